"""The soak: its moments, what it sees of a process, what it calls equal; nightly a short one of real runs."""

import json
import sys
import textwrap
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from jaxrlhf.benchmarks import soak, soak_process
from jaxrlhf.benchmarks.soak import FULL, SIGNALS, Moment, draw_moments
from jaxrlhf.benchmarks.soak_equal import differences
from jaxrlhf.benchmarks.soak_process import ENDED, PHASES, Process

# what training writes and says in each phase, without JAX
TRAINING = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
signal.signal(signal.SIGINT, lambda *_: os._exit(130))
run, wait = pathlib.Path("run"), lambda: time.sleep(0.05)
(run / "checkpoints" / "3").mkdir(parents=True, exist_ok=True)
wait()
(run / ".lock").write_text("")
wait()
(run / "config.yaml").write_text("")
wait()
print("compiled 2 programs", flush=True)
for _ in range(20):
    wait()  # the step 3 has no manifest yet
    (run / "checkpoints" / "3" / "manifest.json").write_text("")
    wait()
    print("\\x1e[]", flush=True)
    wait()
    print("\\x1e", flush=True)
    wait()
    try:
        (run / "rows").write_text("x" * 9)
    except OSError as error:
        print("rows could not be written", flush=True)
    (run / "checkpoints" / "3" / "manifest.json").unlink()
"""


def process(folder: Path, source: str = TRAINING) -> Process:
    folder.mkdir(exist_ok=True)
    return Process([sys.executable, "-S", "-c", textwrap.dedent(source)], folder, folder / "run", {})


def test_moments_cover_all_phases_and_are_those_of_the_seed():
    drawn = draw_moments(20, 6, 2, seed=3)
    assert drawn == draw_moments(20, 6, 2, seed=3) != draw_moments(20, 6, 2, seed=4)
    assert Counter(moment.what for moment in drawn) == dict.fromkeys(SIGNALS, 20) | {FULL: 6}
    counts = Counter((moment.what, moment.phase) for moment in drawn)
    assert all(counts[what, phase] >= 3 for what in SIGNALS for phase in PHASES)
    assert {moment.process for moment in drawn} == {0, 1}


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_comes_in_its_phase(tmp_path, phase):
    running = process(tmp_path)
    what = SIGNALS[PHASES.index(phase) % 3] if phase != "import" else "SIGKILL"
    moment = Moment(what, phase, 0.5, 0, 0)
    assert soak.disturb([running], moment, {phase: 0.02}) == phase
    codes = soak_process.finish([running], 10.0)
    assert soak.complaint(moment, phase, codes, [running]) == ""
    assert running.phase() == ENDED


def test_of_several_processes_any_is_hit_and_the_first_says_when(tmp_path):
    both = [process(tmp_path), process(tmp_path, "import time\ntime.sleep(60)")]
    assert soak.disturb(both, Moment("SIGKILL", "reward", 0.0, 1, 1), {}) == "reward"
    assert both[1].wait(10.0) == -9 and both[0].phase() != ENDED
    assert soak_process.finish(both, 10.0) == [75, -9]


def test_a_phase_that_was_shorter_than_usual_is_waited_for_again_where_it_comes_again(tmp_path):
    again = process(tmp_path / "a")
    assert soak.disturb([again], Moment("SIGKILL", "reward", 1.0, 0, 0), {"reward": 0.2}) == "reward"
    once = process(tmp_path / "b")
    assert soak.disturb([once], Moment("SIGKILL", "compile", 1.0, 0, 0), {"compile": 5.0}) not in ("compile", None)
    assert soak_process.finish([again, once], 10.0) == [-9, -9]


def test_a_phase_that_is_over_before_it_is_seen_is_not_waited_for(tmp_path):
    at_once = TRAINING.replace('(run / ".lock").write_text("")\nwait()', '(run / ".lock").write_text("")')
    running = process(tmp_path / "quick", at_once)
    assert soak.disturb([running], Moment("SIGKILL", "load", 0.0, 0, 0), {}) in ("load", "compile")
    assert soak_process.finish([running], 10) == [-9]
    for wanted, phases in {"load": "load compile loop save reward ended", "loop": "loop ended"}.items():
        assert {phase for phase in (*PHASES, ENDED) if soak.reached(phase, wanted)} == {*phases.split()}


def test_a_phase_that_never_comes_is_not_waited_for_to_the_end(tmp_path):
    """On a busy machine a run may be saving all the time."""
    always = TRAINING.replace('(run / "checkpoints" / "3" / "manifest.json").write_text("")\n    wait()', "")
    always = always.replace('(run / "checkpoints" / "3" / "manifest.json").unlink()', "")
    running = process(tmp_path / "busy", always)
    assert soak.disturb([running], Moment("SIGKILL", "loop", 0.5, 3, 0), {}) in ("save", "reward")
    assert soak_process.finish([running], 10) == [-9] and soak.LATEST <= len(running.seen) < 20


def test_what_ends_otherwise_than_it_should_is_told(tmp_path):
    moment = Moment("SIGTERM", "loop", 0.0, 0, 0)
    running = process(tmp_path, "print('gone'); raise SystemExit(3)")
    assert soak.disturb([running], moment, {}) is None
    codes = soak_process.finish([running], 10.0)
    assert soak.complaint(None, None, codes, [running]).startswith(
        "undisturbed: exit code 3, expected one of [0]: gone"
    )
    hangs = process(tmp_path, "import time\nprint('here', flush=True)\ntime.sleep(60)")
    codes = soak_process.finish([hangs], 0.3)
    assert codes == [None] and "still there" in soak.complaint(moment, "loop", codes, [hangs])


def test_a_disk_is_full_until_somebody_notices(tmp_path):
    """The limit is the process's own; the test's goes on writing."""
    running = process(tmp_path)
    moment = Moment(FULL, "reward", 0.0, 0, 0)
    assert soak.disturb([running], moment, {}) == "reward"
    assert running.refused

    assert soak_process.finish([running], 10.0) == [75]
    assert (tmp_path / "run" / "checkpoints" / "3").exists()


def run_directory(folder: Path, value: float = 1.0) -> Path:
    """As far as two runs are compared: a checkpoint of step 4, and rows."""
    step = folder / "checkpoints" / "4"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(step / "params.policy", {"kernel": jnp.array([value, jnp.nan])})
    (step / "extra").mkdir()
    (step / "extra" / "metadata").write_text(json.dumps({"data": 7}))
    rows = [{"step": step, "time": value + step, "loss": 0.5} for step in range(1, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_what_is_called_equal_and_what_is_not(tmp_path):
    one, same = run_directory(tmp_path / "a"), run_directory(tmp_path / "b")
    assert differences(one, same, 4) == []
    metrics = same / "metrics.jsonl"
    rows = metrics.read_text().splitlines(keepends=True)
    for changed, wrong in (
        ([*rows[:2], rows[3]], "row 3: step is 4; expected 3"),
        ([*rows, rows[3]], "5 rows; expected 4"),
        ([rows[0].replace("0.5", "0.25"), *rows[1:]], "row 1: loss is 0.25; expected 0.5"),
    ):
        metrics.write_text("".join(changed))
        assert differences(one, same, 4) == [f"metrics.jsonl: {wrong}"]
    metrics.write_text("".join(rows))
    (same / "checkpoints" / "4" / "extra" / "metadata").write_text(json.dumps({"data": 8}))
    assert differences(one, same, 4) == ["extra: data differs, of 1 that do"]
    other = run_directory(tmp_path / "c", 1.0 + 2**-23)
    assert differences(one, other, 4) == ["arrays: params.policy['kernel'] differs, of 1 that do"]


def test_mistakes_are_one_line(command, tmp_path):
    for arguments, wrong in (
        (["--algorithm", "pop"], "--algorithm: pop: nearest: ppo"),
        (["--moments", "0"], "--moments: 0: expected 1 or more; nearest: 1"),
        (["--folder", tmp_path], f"--folder: {tmp_path}: is there; expected a new folder"),
    ):
        _, errors = command("benchmark", "soak", *arguments, code=2)
        assert errors.startswith(wrong) and errors.count("\n") == 1


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("more", [[], ["--full-disks", "2"]])
def test_a_run_that_is_disturbed_ends_as_one_that_is_not(command, more):
    out, _ = command("benchmark", "soak", "--algorithm", "grpo", "--moments", "1", *more)
    assert "equal to the undisturbed run: yes" in out
