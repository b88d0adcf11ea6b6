"""TPU VMs against a gcloud that answers as told: what is run, in which order, and how each trouble ends."""

import itertools
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time

import pytest

from jaxrlhf.launch import bundle, gcloud, tpu_vm
from jaxrlhf.launch.commands import CommandResult, LaunchError, interruptible
from jaxrlhf.launch.config import load_launch
from tests.launch.cases import ROOT
from tests.launch.fake import Fake, repository

STOCKOUT = 'ERROR: (gcloud) There is no more capacity in the zone "us-west4-a"; you can try in another zone [EID: 0x1]'
QUOTA = "ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptible' has been exceeded. Limit: 0"
MISSING = {"code": 1, "err": "ERROR: (gcloud) NOT_FOUND: Resource 'projects/p/queuedResources/x' was not found"}
RETRY = "retry={poll: 1, wait: 10, longest_wait: 40, stockouts: 3, restarts: 2, failures: 1}"


def state(name: str, kind: str = "v5litepod-16", error: str = "", nodes: int = 1) -> dict:
    """The answer of describe."""
    specs = [{"nodeId": f"jaxrlhf-first-{n}", "node": {"acceleratorType": kind}} for n in range(nodes)]
    failed = {"failedData": {"error": {"message": error}}} if error else {}
    return {"out": json.dumps({"name": "x", "state": {"state": name, **failed}, "tpu": {"nodeSpec": specs}})}


ACTIVE = state("ACTIVE")
READY = {"out": "READY\n"}


class Run:
    """A launch that has ended: its exit code, the verbs of its commands, and its waits in seconds."""

    def __init__(self, fake: Fake, code: int, waits: list[float], out: str):
        self.code, self.waits, self.out, self.calls = code, waits, out, fake.calls
        self.verbs = [verb_of(call) for call in fake.calls]
        self.changes = [verb for verb in self.verbs if verb not in ("describe", "node")]

    @property
    def attempts(self) -> list[str]:
        return [call[-1].split()[3] for call in self.calls if verb_of(call) == "run"]


def verb_of(call: list[str]) -> str:
    """create, describe, delete, scp, install, run, or node (a look at one node)."""
    if call[3] == "tpu-vm":
        return "node"
    return call[-1].split()[2] if call[4] == "ssh" else call[4]


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return repository(tmp_path_factory.mktemp("repo"), ROOT)


@pytest.fixture
def launch(repo):
    return load_launch(ROOT / "launch" / "tpu_vm.yaml", "tpu_vm", repo, [RETRY])


@pytest.fixture
def run(launch, tmp_path, monkeypatch, capfd):
    """Launches with these answers of gcloud."""
    fake = Fake(tmp_path / "bin", ["gcloud"], monkeypatch)

    def call(answers: dict, keep: bool = False, launch=launch) -> Run:
        waits: list[float] = []
        fake.answer({"tpu-vm describe": [READY], **answers})
        launcher = tpu_vm.Launcher(launch, keep, waits.append)
        code = interruptible(launcher.run, "ADVICE")
        return Run(fake, code, waits, "".join(capfd.readouterr()))

    return call


ONCE = ["create", "scp", "install", "run", "delete"]
AGAIN = ["scp", "install", "run"]


def test_success_runs_what_the_dry_run_prints(run, launch, monkeypatch):
    monkeypatch.setattr(tpu_vm, "new_attempt", lambda: "ATTEMPT")
    done = run({"describe": [MISSING, state("WAITING_FOR_RESOURCES"), state("PROVISIONING"), ACTIVE]})
    assert (done.code, done.changes) == (0, ONCE)
    assert done.waits == [1, 1]  # polls
    planned = [step.argv for step in tpu_vm.plan(launch)]
    looks = [call for call in done.calls if verb_of(call) == "describe"]
    assert looks[2:] == [planned[2]] * (len(looks) - 2)
    assert [call for call in done.calls if verb_of(call) != "describe"] == [planned[1], *planned[3:]]
    left = {path.name for path in bundle.folder(launch).iterdir()}
    assert left == {bundle.CODE, bundle.WORKER}  # the environment may hold secrets


def test_a_resource_that_is_there_is_used(run):
    done = run({"describe": [ACTIVE]})
    assert (done.code, done.changes) == (0, ONCE[1:])


def test_a_request_that_waits_in_the_queue_is_waited_for(run):
    done = run({"describe": [state("PROVISIONING"), ACTIVE]})
    assert (done.code, done.changes) == (0, ONCE[1:])


def test_a_resource_made_meanwhile_is_used(run):
    exists = {"code": 1, "err": "ERROR: (gcloud) ALREADY_EXISTS: Resource already exists"}
    done = run({"describe": [MISSING, ACTIVE], "create": [exists]})
    assert (done.code, done.changes) == (0, ONCE)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (state("ACTIVE", "v5litepod-8"), "exists as v5litepod-8; expected v5litepod-16; delete it or choose another"),
        (state("ACTIVE", nodes=2), "exists with 2 slices; expected 1; delete it or choose another name"),
    ],
)
def test_another_slice_of_this_name_is_left_alone(run, found, said):
    done = run({"describe": [found]})
    assert (done.code, done.changes) == (2, []) and said in done.out


# ---- no machines ----------------------------------------------------------------------------------------------------


def test_stockout_is_asked_again_with_growing_waits(run):
    refused = {"code": 1, "err": f"long explanation\n{STOCKOUT}\n"}
    done = run({"describe": [MISSING, MISSING, MISSING, ACTIVE], "create": [refused, refused, {}]})
    assert (done.code, done.changes) == (0, ["create", "create", *ONCE])
    assert done.waits == [10, 20] and "no more capacity in the zone" in done.out


def test_a_request_that_failed_for_want_of_machines_is_replaced(run):
    done = run({"describe": [MISSING, state("FAILED", error=STOCKOUT), MISSING, ACTIVE]})
    assert (done.code, done.changes) == (0, ["create", "delete", *ONCE])
    assert done.waits == [10]


def test_stockouts_have_a_limit(run):
    done = run({"describe": [MISSING], "create": [{"code": 1, "err": STOCKOUT}]})
    assert (done.code, done.changes) == (1, ["create"] * 4)
    assert done.waits == [10, 20, 40] and "(4 times); another zone may have some" in done.out


@pytest.mark.parametrize(
    "error", [QUOTA, "ERROR: (gcloud) PERMISSION_DENIED: no", "ERROR: (gcloud) INVALID_ARGUMENT: x"]
)
def test_what_waiting_does_not_mend_stops_at_once(run, error):
    done = run({"describe": [MISSING], "create": [{"code": 1, "err": f"{error}\n"}]})
    assert (done.code, done.changes, done.waits) == (2, ["create"], [])
    assert error in done.out and done.out.count("ERROR") == 1


def test_a_request_that_failed_for_good_is_removed(run):
    done = run({"describe": [MISSING, state("FAILED", error="Quota exceeded"), MISSING]})
    assert (done.code, done.changes) == (2, ["create", "delete"])


# ---- preemption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["SUSPENDING", "SUSPENDED", "FAILED"])
def test_a_preemption_in_training_makes_new_machines_and_goes_on(run, lost):
    states = [MISSING, ACTIVE, state(lost), MISSING, ACTIVE]
    done = run({"describe": states, "worker.sh run": [{"code": 255}, {}]})
    assert (done.code, done.changes) == (0, [*ONCE, *ONCE])
    assert done.waits == [1, 10] and "training goes on from its last checkpoint (1 of 2)" in done.out
    assert len(set(done.attempts)) == 2


def test_a_node_that_is_preempted_counts_before_its_resource_says_so(run):
    nodes = [{"out": "PREEMPTED\n"}, READY]
    states = [MISSING, ACTIVE, ACTIVE, MISSING, ACTIVE]
    done = run({"tpu-vm describe": nodes, "queued-resources describe": states, "worker.sh run": [{"code": 137}, {}]})
    assert (done.code, done.changes) == (0, [*ONCE, *ONCE])
    assert "jaxrlhf-first-0 is PREEMPTED" in done.out


def test_a_resource_found_suspended_is_replaced(run):
    done = run({"describe": [state("SUSPENDED"), ACTIVE]})
    assert (done.code, done.changes) == (0, ["delete", *ONCE])


def test_exit_code_75_runs_again_on_the_same_machines(run):
    done = run({"describe": [ACTIVE], "worker.sh run": [{"code": 75}, {"code": 75}, {}]})
    assert (done.code, done.changes) == (0, [*AGAIN * 3, "delete"])
    assert len(set(done.attempts)) == 3


def test_restarts_have_a_limit(run):
    done = run({"describe": [ACTIVE], "worker.sh run": [{"code": 75}]})
    assert (done.code, done.changes) == (75, [*AGAIN * 3, "delete"])


# ---- failures -------------------------------------------------------------------------------------------------------


def test_a_mistake_is_not_repeated(run):
    done = run({"describe": [ACTIVE], "worker.sh run": [{"code": 2}]})
    assert (done.code, done.changes) == (2, [*AGAIN, "delete"])
    assert "training failed with exit code 2; deleting the machines" in done.out


@pytest.mark.parametrize("code", [1, 134, 137])
def test_a_failure_is_repeated_as_often_as_asked(run, code):
    done = run({"describe": [ACTIVE], "worker.sh run": [{"code": code}]})
    assert (done.code, done.changes) == (code, [*AGAIN * 2, "delete"])
    assert len(set(done.attempts)) == 2


def test_failures_far_from_each_other_are_not_counted_together(run, monkeypatch):
    clock = itertools.count(0, 100)
    monkeypatch.setattr(tpu_vm.time, "monotonic", lambda: next(clock))  # longest_wait is 40
    done = run({"describe": [ACTIVE], "worker.sh run": [*[{"code": 1}] * 4, {}]})
    assert (done.code, done.changes) == (0, [*AGAIN * 5, "delete"])


def test_a_state_that_is_not_known_is_waited_for(run):
    done = run({"describe": [state("STATE_OF_TOMORROW"), ACTIVE]})
    assert (done.code, done.changes) == (0, ONCE[1:])


def test_a_broken_connection_comes_back_to_the_same_attempt(run):
    done = run({"describe": [ACTIVE], "worker.sh run": [{"code": 255}, {}]})
    assert (done.code, done.changes) == (0, [*AGAIN * 2, "delete"])
    assert len(set(done.attempts)) == 1


def test_an_installation_that_fails_is_tried_again_then_given_up(run):
    done = run({"describe": [ACTIVE], "worker.sh install": [{"code": 1, "err": "pip: no such package"}]})
    assert (done.code, done.changes) == (255, ["scp", "install", "scp", "install", "delete"])
    assert "installation failed with exit code 1" in done.out and "pip: no such package" in done.out
    mended = run({"describe": [ACTIVE], "scp": [{"code": 1}, {}]})
    assert mended.code == 0


def test_machines_may_be_kept(run):
    done = run({"describe": [ACTIVE]}, keep=True)
    assert (done.code, done.changes) == (0, AGAIN)
    assert "kept, and costs money until: gcloud compute tpus queued-resources delete jaxrlhf-first" in done.out


def test_machines_that_are_not_deleted_are_named(run):
    done = run({"describe": [ACTIVE], "delete": [{"code": 1, "err": "ERROR: (gcloud) INTERNAL"}]})
    assert done.code == 1
    assert "not deleted, and costs money: ERROR: (gcloud) INTERNAL; delete it: gcloud compute tpus" in done.out
    assert done.out.rstrip().endswith("ADVICE")


def test_a_look_that_fails_is_repeated(run):
    done = run({"describe": [{"code": 1, "err": "ERROR: no network"}, ACTIVE]})
    assert done.code == 0 and done.waits[0] == 10
    lost = run({"describe": [{"code": 1, "err": "ERROR: no network"}]})
    assert (lost.code, len(lost.waits)) == (1, 4) and "gcloud: ERROR: no network" in lost.out


def test_without_gcloud_it_says_so(launch, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert interruptible(tpu_vm.Launcher(launch).run, "ADVICE") == 2
    assert capsys.readouterr().err == "gcloud: no such program on PATH; expected it to be installed\n"


def test_an_answer_that_is_no_resource_is_told():
    for out in ("", "[]", "{}", '{"state": "ACTIVE"}'):
        with pytest.raises(LaunchError, match="no queued resource"):
            gcloud.read_status(CommandResult(0, out, ""))


def test_ctrl_c_leaves_training_and_says_how_to_go_on(repo, tmp_path, monkeypatch):
    """The real script, whose gcloud hangs where it follows the log."""
    fake = Fake(tmp_path / "bin", ["gcloud"], monkeypatch)
    fake.answer({"queued-resources describe": [ACTIVE]})
    script = fake.folder / "gcloud"
    script.write_text(script.read_text() + "\n")
    slow = (
        'if "run" in " ".join(argv).split():\n    import time\n    print("following", flush=True)\n    time.sleep(60)\n'
    )
    script.write_text(script.read_text().replace("sys.stdout.write(answer", slow + "sys.stdout.write(answer", 1))
    shutil.copy(ROOT / "launch" / "tpu_vm.py", repo / "launch" / "tpu_vm.py")
    command = [sys.executable, str(repo / "launch" / "tpu_vm.py"), str(ROOT / "launch" / "tpu_vm.yaml"), RETRY]
    process = subprocess.Popen(
        command,
        cwd=repo,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout
    for line in process.stdout:
        if "following" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The machines stay, and cost money.\n  go on:   python launch/tpu_vm.py " in err
    assert err.rstrip().endswith("--delete") and "Traceback" not in err
    assert "delete" not in [verb_of(call) for call in fake.calls]


# ---- what is sent ---------------------------------------------------------------------------------------------------


def test_the_bundle_is_what_git_does_not_ignore(launch, repo):
    count = bundle.write_bundle(launch)
    with tarfile.open(bundle.folder(launch) / bundle.CODE) as archive:
        names = archive.getnames()
        assert {member.uid for member in archive} == {0}
    assert "new.txt" in names and "launch/worker.sh" in names and len(names) == count
    assert not [name for name in names if name.startswith(("runs", ".git/"))]
    first = (bundle.folder(launch) / bundle.CODE).read_bytes()
    time.sleep(1.1)  # gzip notes seconds
    os.utime(repo / "new.txt")
    bundle.write_bundle(launch)
    assert (bundle.folder(launch) / bundle.CODE).read_bytes() == first
    assert bundle.describe_code(repo).endswith("changed files")


def test_secrets_go_in_a_file_that_the_owner_alone_reads(repo, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "it's secret")
    more = ["secrets=[HF_TOKEN]", "env={A: b c}", "preflight=false"]
    launch = load_launch(ROOT / "launch" / "tpu_vm.yaml", "tpu_vm", repo, more)
    bundle.write_bundle(launch)
    path = bundle.folder(launch) / bundle.ENVIRONMENT
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    script = f'. {path}; echo "$PREFLIGHT|$A|$HF_TOKEN"'
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout == "0|b c|it's secret\n"
    assert "secret" not in tpu_vm.dry_run(launch)


@pytest.mark.nightly
@pytest.mark.parametrize("case", [[], ["slices=2", "overrides=[batch.sequences_per_step=32]", "capacity=reserved"]])
def test_gcloud_itself_knows_every_flag(case, tmp_path):
    """By its own linter, which asks nobody."""
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed")
    launch = load_launch(ROOT / "launch" / "tpu_vm.yaml", "tpu_vm", ROOT, case)
    steps = [step.argv for step in tpu_vm.plan(launch)] + [gcloud.describe_node(launch, "node")]
    for argv in steps:
        text = "gcloud " + tpu_vm.shown(argv[1:])
        lint = ["gcloud", "meta", "lint-gcloud-commands", f"--command-string={text}"]
        done = subprocess.run(
            lint, capture_output=True, text=True, env={**os.environ, "CLOUDSDK_CONFIG": str(tmp_path)}
        )
        (report,) = json.loads(done.stdout)
        assert report["success"], (text, report.get("error_message"))
