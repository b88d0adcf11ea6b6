"""What `jaxrlhf preflight` finds right and wrong, on one process and on two."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxrlhf.cli import app
from jaxrlhf.config.load import load
from jaxrlhf.launch import preflight
from tests.support import fake_gcs

ROOT = Path(__file__).parents[2]
SFT = str(ROOT / "configs" / "tiny" / "sft.yaml")


@pytest.fixture
def look(tmp_path, capsys):
    """preflight of configs/tiny/sft.yaml with overrides: (all is well, {name: (ok or FAILED, text)})."""

    def call(*overrides: str) -> tuple[bool, dict[str, tuple[str, str]]]:
        given = [f"run_dir={tmp_path}/run", *overrides]
        well = preflight.preflight([(SFT, load(SFT, given))])
        rows = [(line[:7].strip(), line[8:22].strip(), line[23:]) for line in capsys.readouterr().out.splitlines()]
        return well, {name: (state, text) for state, name, text in rows}

    return call


def test_all_is_well_on_eight_devices(look, tmp_path):
    well, rows = look("mesh.fsdp=4")
    assert well and {state for state, _ in rows.values()} == {"ok"}
    assert rows["devices"][1] == "8 x cpu, 8 of them here; processes: 1"
    assert rows["mesh"][1] == "data 2 x fsdp 4 x expert 1 x context 1 x tensor 1"
    assert rows["all-reduce"][1].startswith("36 over 8 devices in ")  # 1 + 2 + ... + 8
    assert rows["run_dir"][1].startswith(f"{tmp_path}/run: wrote, read and deleted a file in ")
    assert not (tmp_path / "run").exists()
    assert f"jax {jax.__version__}" in rows["versions"][1]
    free, total = (float(word) for word in rows["host memory"][1].replace("GB free of", "").split())
    assert 0 < free < total


def test_what_is_in_the_run_directory_stays(look, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine")
    assert look()[0]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_directory_that_another_process_looks_at_too(look, tmp_path, monkeypatch):
    """It is there until all have looked; and where something has come into it since, it stays and nothing is wrong."""

    def gather(text: str) -> list[str]:
        assert (tmp_path / "run").exists()
        (tmp_path / "run" / "config.yaml").write_text("a run that began")
        return [text]

    monkeypatch.setattr(preflight, "gather", gather)
    assert look()[0]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_run_directory_that_cannot_be_written_fails_alone(look, tmp_path):
    (tmp_path / "file").write_text("")
    well, rows = look(f"run_dir={tmp_path}/file/run")
    assert not well
    assert [name for name, (state, _) in rows.items() if state == "FAILED"] == ["run_dir"]
    assert "Not a directory" in rows["run_dir"][1]


def test_storage_that_gives_back_something_else_fails(look, monkeypatch):
    monkeypatch.setattr(type(preflight.epath.Path(".")), "read_text", lambda self, *_: "old")
    well, rows = look()
    assert not well and "wrote 'process 0' and read 'old'" in rows["run_dir"][1]


@pytest.mark.nightly  # by day: a folder, above
def test_a_bucket_is_written_to_as_a_folder_is(tmp_path):
    """In a process of its own, as the stand-in for gs:// stays where it is installed."""
    code = "from tests.support import fake_gcs; fake_gcs.install(); from jaxrlhf.cli.app import main; main()"
    environment = {**os.environ, fake_gcs.ROOT: str(tmp_path), "JAX_PLATFORMS": "cpu"}
    (tmp_path / "bucket").mkdir()
    command = [sys.executable, "-c", code, "preflight", SFT, "run_dir=gs://bucket/runs/new"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "gs://bucket/runs/new: wrote, read and deleted a file" in done.stdout
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["mesh.fsdp=3"], "mesh: (data=-1, fsdp=3, tensor=1) needs a multiple of 3 devices; there are 8 here"),
        (["batch.sequences_per_step=12"], "batch.sequences_per_step: 12: 12 rows do not divide over 1 minibatch x 8"),
    ],
)
def test_a_mesh_or_batch_that_does_not_fit_fails_alone(look, overrides, text):
    well, rows = look(*overrides)
    assert not well
    assert [name for name, (state, _) in rows.items() if state == "FAILED"] == ["mesh"]
    assert rows["mesh"][1].startswith(f"{SFT}: {text}")


def test_a_wrong_sum_fails(look, monkeypatch):
    monkeypatch.setattr(preflight.jax.lax, "psum", lambda x, axis: x)
    well, rows = look()
    assert not well and rows["all-reduce"][0] == "FAILED"


def test_memory_of_devices_is_that_of_the_fullest(look, monkeypatch):
    class Device:
        def __init__(self, used):
            self.used = used

        def memory_stats(self):
            return {"bytes_limit": 16e9, "bytes_in_use": self.used}

    monkeypatch.setattr(preflight.jax, "local_devices", lambda: [Device(0), Device(4e9)])
    assert preflight.device_memory() == "12.0 GB free of 16.0 on each device"


@pytest.mark.parametrize(("override", "code"), [("seed=1", 0), ("mesh.fsdp=3", 2)])
def test_the_command_ends_with_0_or_2(monkeypatch, capsys, tmp_path, override, code):
    monkeypatch.setattr(sys, "argv", ["jaxrlhf", "preflight", SFT, f"run_dir={tmp_path}/run", override])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert (stop.value.code or 0) == code
    assert ("FAILED" in capsys.readouterr().out) == bool(code)


def pair(*overrides: str) -> list[tuple[int, str]]:
    """Two processes of two devices each: the exit code and output of each, twice in a row at the same port, as
    launch/train.sh joins them again for training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-m", "jaxrlhf", "preflight", SFT, f"distributed.coordinator=127.0.0.1:{port}"]
    command += ["distributed.num_processes=2", "distributed.init_timeout=60"]
    found = []
    for _ in range(2):
        processes = [
            subprocess.Popen(
                [*command, f"distributed.process_id={id}", *overrides],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **settings},
            )
            for id in range(2)
        ]
        outputs = [process.communicate(timeout=120) for process in processes]
        found += [(process.returncode, out) for process, (out, _) in zip(processes, outputs)]
    return found


@pytest.mark.nightly  # by day: pairs that train, in hosts/test_processes
def test_two_processes_sum_over_all_devices(tmp_path):
    first, second, again, quiet = pair(f"run_dir={tmp_path}/run")
    for code, out in (first, again):
        assert code == 0, out
        assert "4 x cpu, 2 of them here; processes: 2" in out and "10 over 4 devices" in out  # 1 + 2 + 3 + 4
    for code, out in (second, quiet):
        assert code == 0 and "devices" not in out
