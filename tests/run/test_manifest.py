"""Checkpoints that aren't what was saved: each is found before it is read, and the newest good one is taken."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from etils import epath

from jaxrlhf.cli.rewind import rewind
from jaxrlhf.log.run_dir import RunDirBusy, lock_run_dir
from jaxrlhf.run import manifest, reader_leases, saved_run, verified_steps
from jaxrlhf.run.checkpoint import Checkpoints, restore
from jaxrlhf.run.manifest import Damaged
from tests.run.test_checkpoint import describe, new_state, same, save, steps_of

# one of each kind of file of a step: what it is -> a pattern of its path
KINDS = {
    "array data": "params.policy/ocdbt.process_0/d/*",
    "merged index": "params.policy/d/*",
    "index of arrays": "params.policy/manifest.ocdbt",
    "index of a process": "state/ocdbt.process_0/manifest.ocdbt",
    "names of arrays": "state/_METADATA",
    "layouts": "state/_sharding",
    "shapes of arrays": "state/array_metadatas/process_0",
    "frozen weights": "slow.reference/ocdbt.process_0/d/*",
    "config and data position": "extra/metadata",
    "step metadata": "_CHECKPOINT_METADATA",
    "mark of the commit": "state/commit_success.txt",
    "what it was measured as": "metrics/metrics",
    "manifest": "manifest.json",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run with steps 1, 2 and 3, and a tokenizer."""
    run = tmp_path_factory.mktemp("saved") / "run"
    (run / "tokenizer").mkdir(parents=True)
    (run / "tokenizer" / "tokenizer.json").write_text('{"vocab": {"good": 0, "bad": 1}}')
    (run / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    save(run, [1, 2, 3], {1: 0.1, 2: 0.2, 3: 0.3}, keep=3, best="eval/score")
    (run / "config.yaml").write_text("checkpoint: {best: eval/score, mode: max}")
    return run


@pytest.fixture
def run(saved, tmp_path) -> Path:
    """A copy of ``saved`` that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def files_of(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def find(step: Path, pattern: str) -> Path:
    return sorted(path for path in step.glob(pattern) if path.stat().st_size)[0]


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Turn one bit of a file, which keeps its size and its times, as a disk does."""
    state, data = path.stat(), bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


# ---- what is found --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_found_in_every_kind_of_file(run, capsys, kind):
    path = find(run / "checkpoints" / "3", KINDS[kind])
    flip(path, path.stat().st_size // 2)
    assert verified_steps.newest(run) == saved_run.find_step(run) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{run}: step 3 is damaged (" in said and "step 2, the newest good one" in said
    assert path.name in said
    same(restore(run, 2, describe(new_state(2))), new_state(2))


def test_every_file_of_a_step_is_covered(run):
    step = run / "checkpoints" / "3"
    named = manifest.read(step)["files"].keys() | {"manifest.json"}
    assert {path.relative_to(step).as_posix() for path in files_of(step)} == named
    kinds = {path for pattern in KINDS.values() for path in step.glob(pattern)}
    alike = lambda path: re.sub(r"^(params|slow)\.\w+", "role", re.sub(r"/d/\w+$", "/d", path))
    shapes = [{alike(path.relative_to(step).as_posix()) for path in paths} for paths in (files_of(step), kinds)]
    assert {name.split("/", 1)[-1] for name in shapes[0]} == {name.split("/", 1)[-1] for name in shapes[1]}


@pytest.mark.nightly
def test_two_hundred_random_flips_are_found(run):
    """The number found is printed: python -m pytest -s -m nightly -k two_hundred."""
    chance, found, step = random.Random(0), 0, run / "checkpoints" / "3"
    paths = [path for path in files_of(step) if path.stat().st_size]
    for _ in range(200):
        path = chance.choice(paths)
        at, bit = chance.randrange(path.stat().st_size), chance.randrange(8)
        flip(path, at, bit)
        verified_steps.verdicts.clear()
        found += verified_steps.newest(run) == 2
        flip(path, at, bit)
    print(f"{found} of 200 flips found in {len(paths)} files")
    assert found == 200
    verified_steps.verdicts.clear()
    assert verified_steps.newest(run) == 3


DAMAGES = {
    "truncated": (lambda step: os.truncate(find(step, KINDS["array data"]), 5), r"params\.policy/ocdbt.* has 5 bytes"),
    "deleted": (lambda step: (step / "extra/metadata").unlink(), "extra/metadata is missing"),
    "deleted array": (lambda step: find(step, KINDS["array data"]).unlink(), r"params\.policy/ocdbt.* is missing"),
    "emptied": (lambda step: [shutil.rmtree(step), step.mkdir()], "its directory is empty"),
    "without manifest": (lambda step: (step / "manifest.json").unlink(), r"interrupted: manifest\.json is missing"),
    "empty manifest": (lambda step: (step / "manifest.json").write_text(""), r"manifest\.json is damaged"),
    "other manifest": (lambda step: shutil.copy(step.parent / "2/manifest.json", step), r"checksum|missing|bytes"),
    "list as manifest": (lambda step: (step / "manifest.json").write_text("[1]"), r"manifest\.json is damaged"),
    "later format": (lambda step: rewrite(step, format=99), r"manifest\.json has format 99; expected 1"),
    "a process lost": (lambda step: rewrite(step, processes=2), r"manifest\.1\.json is missing"),
}


def rewrite(step: Path, **changes) -> None:
    """A manifest that says something else, and is whole."""
    content = json.loads((step / "manifest.json").read_text())
    content = {key: value for key, value in content.items() if key != "digest"} | changes
    (step / "manifest.json").write_text(json.dumps(content | {"digest": manifest.digest(content)}))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_step_that_is_not_whole_is_passed_over(run, capsys, damage):
    act, why = DAMAGES[damage]
    act(run / "checkpoints" / "3")
    assert verified_steps.newest(run) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"{run}: step 3 is damaged \(.*({why}).*\): step 2, the newest good one, is taken\n", said)
    assert verified_steps.newest(run) == 2 and capsys.readouterr().err == ""  # said once


def test_a_step_that_is_asked_for_is_not_replaced(run):
    flip(find(run / "checkpoints" / "3", KINDS["array data"]), 7)
    for name in (f"{run}@3", f"{run}@best"):
        with pytest.raises(
            Damaged, match=r"@\w+: step 3 is damaged \(.* checksum .*\); the newest good one is step 2$"
        ):
            saved_run.find_step(name)
    assert saved_run.find_step(f"{run}@1") == 1


def test_strict_is_an_error(run):
    os.truncate(find(run / "checkpoints" / "3", KINDS["array data"]), 0)
    token = verified_steps.STRICT.set(True)
    try:
        with pytest.raises(Damaged, match=r"step 3 is damaged \(.* has 0 bytes; .*\); the newest good one is step 2$"):
            verified_steps.newest(run)
    finally:
        verified_steps.STRICT.reset(token)


def test_no_good_step_is_an_error_and_not_a_new_start(run):
    for step in (1, 2, 3):
        (run / "checkpoints" / str(step) / "state/_METADATA").unlink()
    with pytest.raises(Damaged, match=r"no checkpoint is good; step 3: state/_METADATA is missing"):
        verified_steps.newest(run)


def test_a_run_without_manifests_is_said_once(run, capsys):
    for step in (1, 2, 3):
        (run / "checkpoints" / str(step) / "manifest.json").unlink()
    assert verified_steps.newest(run) == saved_run.find_step(run) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{run}: step 3 has no manifest (an older version saved it" in said
    (run / "checkpoints/3/extra/metadata").unlink()
    assert verified_steps.newest(run) == 2


def test_a_run_that_got_manifests_later_falls_back_to_before(run):
    (run / "checkpoints/2/manifest.json").unlink()
    (run / "checkpoints/1/manifest.json").unlink()
    flip(run / "checkpoints/3/extra/metadata", 3)
    assert verified_steps.newest(run) == 2


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
@pytest.mark.parametrize("how", ["swapped", "deleted"])
def test_a_changed_tokenizer_is_one_line_that_names_the_file(run, name, how):
    path = run / "tokenizer" / name
    text = path.read_text()
    path.unlink() if how == "deleted" else path.write_text(text[::-1])
    with pytest.raises(Damaged) as error:
        verified_steps.newest(run)
    assert f"{run}/tokenizer/{name}" in str(error.value) and "\n" not in str(error.value)


# ---- what stays -----------------------------------------------------------------------------------------------------


def test_the_last_verified_step_stays_whatever_keep_says(tmp_path, monkeypatch):
    save(tmp_path, [1], keep=1)
    monkeypatch.setattr(manifest, "write", lambda *_: None)  # of a process that is killed before it
    save(tmp_path, [2, 3], keep=1)
    assert steps_of(tmp_path) == [1, 3]
    monkeypatch.undo()
    assert verified_steps.newest(tmp_path) == 1
    save(tmp_path, [4], keep=1)
    assert steps_of(tmp_path) == [4]


def test_a_run_goes_on_from_the_good_step_and_sets_the_others_aside(run):
    flip(find(run / "checkpoints" / "3", KINDS["array data"]), 9)
    with verified_steps.reading():
        assert verified_steps.settle(run) == 2
        assert steps_of(run) == [1, 2] and steps_of_aside(run) == [3]
        save(run, [3, 4], keep=2)  # its own steps are not held
        assert verified_steps.newest(run) == 2  # what it started from
        assert steps_of(run) == [3, 4]
    assert verified_steps.newest(run) == 4


def steps_of_aside(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "set_aside").iterdir())


def test_a_run_is_wound_back_to_a_good_step(run, capsys):
    before = steps_of(run)
    rewind(os.fspath(run), 2)
    line = f"{run}: step 3 set aside in {run}/set_aside; training goes on from step 2"
    assert capsys.readouterr().out == line + "\n"
    assert before == [1, 2, 3] and steps_of(run) == [1, 2] and steps_of_aside(run) == [3]
    with verified_steps.reading():
        assert verified_steps.settle(run) == 2
    rewind(os.fspath(run), 2)
    assert capsys.readouterr().out == f"{run}: step 2 is the last one: nothing to do\n"


def test_a_run_is_wound_back_only_to_a_step_that_is_there_and_good_and_while_nobody_trains(run):
    with pytest.raises(ValueError, match=re.escape(f"{run}: has no step 9; its steps: 1, 2, 3")):
        verified_steps.rewind(run, 9)
    flip(find(run / "checkpoints" / "2", KINDS["array data"]), 9)
    with pytest.raises(Damaged, match=r"step 2 is damaged .*; the newest good one is step 3$"):
        verified_steps.rewind(run, 2)
    lock = lock_run_dir(run)
    with pytest.raises(RunDirBusy, match="already being written"):
        verified_steps.rewind(run, 1)
    lock.close()
    (run / "checkpoints" / "3" / "manifest.json").unlink()  # nobody is writing it: the lock is ours
    with pytest.raises(Damaged, match=r"step 3 is damaged .*; the newest good one is step 1$"):
        verified_steps.rewind(run, 3)
    assert steps_of(run) == [1, 2, 3]


def test_a_step_that_is_read_stays(run):
    with verified_steps.reading():
        assert saved_run.find_step(f"{run}@1") == 1
        save(run, [4, 5], keep=1)
        assert steps_of(run) == [1, 5]
        assert not verified_steps.delete(run, 1)
    save(run, [6], keep=1)
    assert steps_of(run) == [6]


def test_a_step_that_is_read_stays_where_there_are_no_locks(run, monkeypatch, capsys):
    """As in an object store."""
    monkeypatch.setattr(verified_steps, "is_local", lambda _: False)
    monkeypatch.setattr(reader_leases, "RENEW", 0.01)
    with verified_steps.reading():
        assert saved_run.find_step(f"{run}@1") == 1
        (hold,) = (run / "readers").iterdir()
        written = hold.stat().st_mtime_ns
        assert not verified_steps.delete(run, 1)
        while hold.stat().st_mtime_ns == written:
            time.sleep(0.01)
    assert not [*(run / "readers").iterdir()] and verified_steps.delete(run, 1) and steps_of(run) == [2, 3]
    left = run / "readers" / "2-of-a-reader-that-was-killed"
    left.write_text("")
    assert not verified_steps.delete(run, 2)
    os.utime(left, (0, 0))
    assert verified_steps.delete(run, 2) and not left.exists()
    monkeypatch.setattr(reader_leases.Hold, "write", lambda _: (_ for _ in ()).throw(PermissionError("not yours")))
    with verified_steps.reading():
        assert saved_run.find_step(f"{run}@3") == 3
    assert capsys.readouterr().err.endswith(
        "readers: not yours: can't be written to: step 3 may be deleted while it is read\n"
    )


@pytest.mark.parametrize("process", [0, 1])
def test_a_step_whose_manifest_is_under_way_is_no_damage(run, capsys, process):
    """A reader beside the run that trains; of several processes each writes one."""
    step = run / "checkpoints" / "3"
    if process:
        rewrite(step, processes=2)
    else:
        (step / "manifest.json").unlink()
    with contextlib.closing(lock_run_dir(run)):  # type: ignore[arg-type]
        token = verified_steps.STRICT.set(True)
        assert verified_steps.newest(run) == 2
        verified_steps.STRICT.reset(token)
        said = capsys.readouterr().err
        assert said == f"{run}: step 3 is still being written: step 2, the newest good one, is taken\n"
        with pytest.raises(Damaged, match=r"@3: step 3 is still being written; the newest good one is step 2$"):
            saved_run.find_step(f"{run}@3")
    assert verified_steps.newest(run) == 2  # nobody writes
    assert f"step 3 is damaged ({'its save was interrupted: ' * (not process)}manifest" in capsys.readouterr().err


def test_the_first_step_of_a_run_may_be_under_way_too(tmp_path, monkeypatch):
    run = tmp_path / "run"
    save(run, [1])
    (run / "checkpoints" / "1" / "manifest.json").unlink()
    with contextlib.closing(lock_run_dir(run)):  # type: ignore[arg-type]
        with pytest.raises(Damaged, match=r"run: step 1 is still being written, and no other one is good; try again"):
            verified_steps.newest(run)
        assert verified_steps.settle(run) == 1  # of the run itself, after a crash
        monkeypatch.setattr(verified_steps, "YOUNG", 0.0)  # an older version that trains writes none at all
        assert verified_steps.newest(run) == 1
    monkeypatch.undo()
    assert verified_steps.newest(run) == 1


def test_a_step_that_goes_while_it_is_looked_at_is_no_damage(run, capsys, monkeypatch):
    """As in an object store, where nothing holds it."""
    gone = lambda *_: shutil.rmtree(run / "checkpoints" / "3", ignore_errors=True) or True
    monkeypatch.setattr(verified_steps, "hold", gone)
    assert verified_steps.newest(run) == 2 and capsys.readouterr().err == ""


def test_measured_later_is_written_beside_what_was_saved(tmp_path):
    saved = Checkpoints(tmp_path, keep=1, best="eval/score")
    saved.save(1, new_state(1), {"number": 1})
    saved.save(1, new_state(1), {"number": 1}, {"eval/score": 0.5})
    assert saved.best_step() == 1
    saved.save(2, new_state(2), {"number": 2}, {"eval/score": 0.4})
    saved.close()
    assert steps_of(tmp_path) == [1, 2] and verified_steps.newest(tmp_path) == 2
    assert "metrics/metrics" in manifest.read(tmp_path / "checkpoints" / "1")["files"]
    again = Checkpoints(tmp_path, keep=1, best="eval/score")
    assert again.best_step() == again.manager.best_step() == 1


def test_a_save_does_not_wait_for_the_manifest_of_the_one_before(tmp_path, monkeypatch):
    hashed, write = threading.Event(), manifest.write
    monkeypatch.setattr(manifest, "write", lambda *args: hashed.wait(60) and write(*args))
    saved = Checkpoints(tmp_path)
    for step in (1, 2):
        saved.save(step, new_state(step), {"number": step})  # returns though no manifest is there yet
    assert not manifest.exists(tmp_path / "checkpoints" / "1")
    hashed.set()
    saved.close()
    assert verified_steps.with_manifests(tmp_path) == [1, 2]


# ---- killed while it saves ------------------------------------------------------------------------------------------

KILLED = """
    import sys, numpy as np
    from tests.run.test_checkpoint import Checkpoints, new_state
    saved = Checkpoints(sys.argv[1], keep=2)
    for step in range(1, 10**6):
        saved.save(step, new_state(step), {"number": step})
        saved.wait()
        print(step, flush=True)
"""


def kill_while_saving(run: Path, delays: list[float]) -> list[int]:
    """Start to save step after step, and kill it so many seconds after the second was whole; each time the newest good
    step has to be what was saved, and one that was said to be whole at least. Returns those steps."""
    found = []
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    for delay in delays:
        shutil.rmtree(run, ignore_errors=True)
        command = [sys.executable, "-c", textwrap.dedent(KILLED), str(run)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout
            while (line := process.stdout.readline()) and int(line) < 2:
                pass
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            said = [int(line) for line in process.stdout.read().split()]
        step = verified_steps.newest(run)
        assert step is not None and step >= max(said, default=2)
        same(restore(run, step, describe(new_state(step))), new_state(step))
        with verified_steps.reading():
            assert verified_steps.settle(run) == step  # what was half-written is swept
        assert max(steps_of(run)) == step
        found.append(step)
    return found


def test_a_killed_save_leaves_the_step_before(tmp_path):
    kill_while_saving(tmp_path / "run", [0.02])


@pytest.mark.nightly
def test_twenty_killed_saves_leave_the_step_before(tmp_path):
    chance = random.Random(0)
    found = kill_while_saving(tmp_path / "run", [chance.uniform(0, 0.5) for _ in range(20)])
    print(f"20 of 20 killed saves left a good step: {found}")


def test_frozen_weights_are_read_once_for_all_manifests(tmp_path, monkeypatch):
    """Of a folder beside the checkpoints a file is hashed again only where it was written since."""
    folder, read = tmp_path / "base", []
    folder.mkdir()
    (folder / "one").write_text("1")
    (folder / "two").write_text("2")
    real = manifest.checksum
    monkeypatch.setattr(manifest, "checksum", lambda path, kind="sha256": read.append(path.name) or real(path, kind))
    first = manifest.described_once(epath.Path(folder))
    assert sorted(read) == ["one", "two"] and manifest.described_once(epath.Path(folder)) == first
    (folder / "two").write_text("22")
    again = manifest.described_once(epath.Path(folder))
    assert read[2:] == ["two"] and again["two"]["size"] == 2 and again["one"] == first["one"]
    (folder / "one").unlink()
    assert manifest.described_once(epath.Path(folder)).keys() == {"two"}
