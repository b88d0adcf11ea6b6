"""A cloud on this machine: a gcloud that makes home directories for VMs and runs there what it is told, so that the
launcher, worker.sh and train.sh meet. Training is a stand-in that counts steps in a folder that outlives the VMs."""

import json
import sys

import pytest

from jaxrlhf.launch import gcloud, tpu_vm
from jaxrlhf.launch.commands import capture, interruptible
from jaxrlhf.launch.config import load_launch
from tests.launch.cases import ROOT
from tests.launch.fake import repository

WORKERS = 2

GCLOUD = """#!{python} -IS
import json, os, pathlib, shutil, signal, subprocess, sys
cloud, argv = pathlib.Path({cloud!r}), sys.argv[1:]
homes = [cloud / f"home-{{worker}}" for worker in range({workers})]
state = cloud / "state"
with open(cloud / "calls", "a") as file:
    file.write(argv[3] + "\\n")

if argv[3] == "describe" and argv[2] == "tpu-vm":
    print("READY")
elif argv[3] == "describe":
    if not state.exists():
        sys.exit("ERROR: (gcloud) NOT_FOUND: no such resource")
    specs = [{{"nodeId": "node", "node": {{"acceleratorType": "v5litepod-16"}}}}]
    print(json.dumps({{"state": {{"state": state.read_text().strip()}}, "tpu": {{"nodeSpec": specs}}}}))
elif argv[3] == "create":
    for home in homes:
        (home / "jaxrlhf-venv" / "bin").mkdir(parents=True)
        shutil.copy(cloud / "jaxrlhf", home / "jaxrlhf-venv" / "bin")
    state.write_text("ACTIVE")
elif argv[3] == "scp":
    for home in homes:
        for name in argv[4:]:
            if not name.startswith("-") and not name.endswith(":"):
                shutil.copy(name, home)
elif argv[3] == "ssh":
    command = argv[argv.index("--command") + 1]
    running = []
    for worker, home in enumerate(homes):
        env = {{**os.environ, "HOME": str(home), "WORKER": str(worker)}}
        running.append(subprocess.Popen(["bash", "-c", command], cwd=home, env=env))
    codes = [process.wait() for process in running]
    sys.exit(next((code for code in codes if code), 0))
elif argv[3] == "delete":
    for home in homes:
        for pid in home.glob("jaxrlhf-run/*.pid"):
            try:
                os.killpg(int(pid.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                pass
        shutil.rmtree(home, ignore_errors=True)
    state.unlink(missing_ok=True)
"""

# workers begin together; worker 0 counts; at some steps something happens to all workers
TRAINING = """#!/usr/bin/env bash
echo "$WORKER $*" >>{bucket}/notes
[ "$1" = train ] || exit 0
trap 'exit 75' TERM
touch "$HOME/began"
until [ -e {cloud}/home-0/began ] && [ -e {cloud}/home-1/began ]; do sleep 0.1; done
[ "$WORKER" != 0 ] || echo "from step $(cat {bucket}/step)"
while [ "$(cat {bucket}/step)" -lt 6 ]; do
    sleep 0.2
    [ "$WORKER" = 0 ] || continue
    step=$(($(cat {bucket}/step) + 1))
    echo "$step" >{bucket}/step.part
    mv {bucket}/step.part {bucket}/step
    case $step in
        2) # the VMs are taken away
            echo SUSPENDED >{cloud}/state
            for file in {cloud}/home-*/jaxrlhf-run/*.pid; do
                [ "$file" = "$HOME/jaxrlhf-run/$(cat "$HOME/jaxrlhf-run/current").pid" ] ||
                    kill -KILL -- -"$(cat "$file")"
            done
            kill -KILL -- -"$(cat "$HOME/jaxrlhf-run/$(cat "$HOME/jaxrlhf-run/current").pid")"
            ;;
        4) # they are asked to stop, this one last
            for home in {cloud}/home-1 {cloud}/home-0; do
                kill -TERM "$(cat "$home/jaxrlhf-run/$(cat "$home/jaxrlhf-run/current").pid")"
            done
            sleep 1
            ;;
    esac
done
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """The folder of the cloud; its gcloud is the first on PATH, with a python3 that installs nothing."""
    folder, bucket, programs = tmp_path / "cloud", tmp_path / "bucket", tmp_path / "bin"
    for path in (folder, bucket, programs):
        path.mkdir()
    (bucket / "step").write_text("0")
    (folder / "jaxrlhf").write_text(TRAINING.format(bucket=bucket, cloud=folder))
    (programs / "gcloud").write_text(GCLOUD.format(python=sys.executable, cloud=str(folder), workers=WORKERS))
    (programs / "python3").write_text("#!/usr/bin/env bash\n")
    for path in (folder / "jaxrlhf", programs / "gcloud", programs / "python3"):
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("FOLLOW_SECONDS", "0.1")
    return folder


def test_training_goes_on_over_a_preemption_and_a_sigterm(cloud, tmp_path, capfd):
    retry = "retry={poll: 0, wait: 0, restarts: 5, failures: 0}"
    repo = repository(tmp_path / "repo", ROOT)
    launch = load_launch(ROOT / "launch" / "tpu_vm.yaml", "tpu_vm", repo, [retry])
    code = interruptible(tpu_vm.Launcher(launch).run, "ADVICE")
    out, err = capfd.readouterr()
    assert code == 0, out + err
    # three trainings: up to the preemption, up to SIGTERM, to the end; each goes on where the one before was
    assert [line for line in out.splitlines() if line.startswith("from step")] == [
        "from step 0",
        "from step 2",
        "from step 4",
    ]
    assert (tmp_path / "bucket" / "step").read_text() == "6\n"
    calls = [call for call in (cloud / "calls").read_text().split() if call != "describe"]
    once = ["scp", "ssh", "ssh"]
    assert calls == ["create", *once, "delete", "create", *once, *once, "delete"]
    assert "SUSPENDED: deleting what is left" in out and "stopped by SIGTERM: training goes on" in out
    # every worker checked its machine first, with the arguments of training, and nothing is left of the machines
    notes = (tmp_path / "bucket" / "notes").read_text().splitlines()
    words = " ".join(launch.arguments)
    expected = [f"{worker} {command} {words}" for worker in range(WORKERS) for command in ("preflight", "train")]
    assert sorted(notes) == sorted(expected * 3)
    assert {path.name for path in cloud.iterdir()} == {"calls", "jaxrlhf"}


def test_stand_in_answers_are_json(cloud):
    """describe of the stand-in is what the launcher reads, not what it forgives."""
    words = ["gcloud", "compute", "tpus", "queued-resources"]
    assert gcloud.read_status(capture([*words, "describe"])).state == "MISSING"
    capture([*words, "create"])
    done = capture([*words, "describe"])
    assert json.loads(done.out) and gcloud.read_status(done) == gcloud.Status("ACTIVE", ("node",), "v5litepod-16")
