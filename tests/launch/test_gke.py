"""The JobSet: every field is one that the API has, and says what it should; and kubectl's part, against a stand-in."""

import json
from typing import Any

import pytest
import yaml

from jaxrlhf.launch import gke
from jaxrlhf.launch.commands import interruptible
from jaxrlhf.launch.config import load_launch
from tests.launch.cases import GOLDEN, ROOT
from tests.launch.fake import Fake

# ---- the schema -----------------------------------------------------------------------------------------------------

# The fields of jobset.x-k8s.io/v1alpha2 (jobset_types.go, and the CRD made of it) and, below the template, of batch/v1
# and core/v1 (https://kubernetes.io/docs/reference/kubernetes-api/), as far as they are used here: a type; a list of
# one form; {field: form}, where "field!" must be there; {"*": form}: any names; a set: one of these.
INTEGER, TEXT, FLAG = int, str, bool
QUANTITIES = {"*": int}
ENV = {"name!": TEXT, "value": TEXT, "valueFrom": {"secretKeyRef!": {"name!": TEXT, "key!": TEXT}}}
CONTAINER = {
    "name!": TEXT,
    "image!": TEXT,
    "args": [TEXT],
    "env": [ENV],
    "ports": [{"containerPort!": INTEGER}],
    "resources": {"limits": QUANTITIES, "requests": QUANTITIES},
    "securityContext": {"allowPrivilegeEscalation": FLAG, "capabilities": {"drop": [TEXT]}},
    "volumeMounts": [{"name!": TEXT, "mountPath!": TEXT}],
}
POD = {
    "restartPolicy": {"Never", "OnFailure", "Always"},
    "terminationGracePeriodSeconds": INTEGER,
    "serviceAccountName": TEXT,
    "nodeSelector": {"*": TEXT},
    "tolerations": [{"key": TEXT, "operator": {"Exists", "Equal"}, "effect": {"NoSchedule", "NoExecute"}}],
    "securityContext": {
        "runAsUser": INTEGER,
        "runAsNonRoot": FLAG,
        "fsGroup": INTEGER,
        "seccompProfile": {"type!": {"RuntimeDefault", "Unconfined", "Localhost"}},
    },
    "containers!": [CONTAINER],
    "volumes": [{"name!": TEXT, "emptyDir": {"medium": {"", "Memory"}}}],
}
POD_RULE = {
    "action!": {"FailJob", "FailIndex", "Ignore", "Count"},
    "onExitCodes": {"containerName": TEXT, "operator!": {"In", "NotIn"}, "values!": [INTEGER]},
    "onPodConditions": [{"type!": TEXT, "status!": {"True", "False", "Unknown"}}],
}
JOB = {
    "parallelism": INTEGER,
    "completions": INTEGER,
    "completionMode": {"Indexed", "NonIndexed"},
    "backoffLimit": INTEGER,
    "podFailurePolicy": {"rules!": [POD_RULE]},
    "template!": {"spec!": POD},
}
ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob"}
JOB_SET = {
    "apiVersion!": {"jobset.x-k8s.io/v1alpha2"},
    "kind!": {"JobSet"},
    "metadata!": {"name!": TEXT, "namespace": TEXT, "labels": {"*": TEXT}, "annotations": {"*": TEXT}},
    "spec!": {
        "failurePolicy": {
            "maxRestarts": INTEGER,
            "rules": [{"name!": TEXT, "action!": ACTIONS, "onJobFailureReasons": [TEXT]}],
        },
        "replicatedJobs": [{"name!": TEXT, "replicas": INTEGER, "template!": {"spec!": JOB}}],
    },
}


def faults(form: Any, value: Any, where: str = "") -> list[str]:
    """Where ``value`` has not this form."""
    if isinstance(form, set):
        return [] if value in form else [f"{where}: {value}"]
    if isinstance(form, type):
        return [] if type(value) is form else [f"{where}: {value!r}"]
    if isinstance(form, list):
        rows = enumerate(value) if isinstance(value, list) else []
        found = [fault for index, row in rows for fault in faults(form[0], row, f"{where}[{index}]")]
        return found if isinstance(value, list) else [f"{where}: {value!r}"]
    if not isinstance(value, dict):
        return [f"{where}: {value!r}"]
    fields = {key.rstrip("!"): part for key, part in form.items()}
    found = [f"{where}.{key}: missing" for key in (k[:-1] for k in form if k.endswith("!")) if key not in value]
    for key, part in value.items():
        known = fields.get(key, fields.get("*"))
        found += faults(known, part, f"{where}.{key}") if known else [f"{where}.{key}: no such field"]
    return found


@pytest.mark.parametrize("name", ["gke", "gke_two_slices"])
def test_a_manifest_has_only_what_the_api_knows(name):
    assert faults(JOB_SET, yaml.safe_load((GOLDEN / f"{name}.txt").read_text())) == []


def test_the_schema_finds_mistakes():
    tree = yaml.safe_load((GOLDEN / "gke.txt").read_text())
    tree["spec"]["failurePolicy"]["maxRestarts"] = "3"
    tree["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["hostNetwork"] = True
    del tree["spec"]["replicatedJobs"][0]["name"]
    tree["spec"]["failurePolicy"]["rules"][0]["action"] = "Restart"
    assert len(faults(JOB_SET, tree)) == 4


# ---- what it says ---------------------------------------------------------------------------------------------------


@pytest.fixture
def launch(tmp_path):
    (tmp_path / "configs" / "tiny").mkdir(parents=True)
    (tmp_path / "configs" / "tiny" / "sft.yaml").write_bytes((ROOT / "configs" / "tiny" / "sft.yaml").read_bytes())
    return load_launch(ROOT / "launch" / "gke.yaml", "gke", tmp_path, ["retry={poll: 1}", "gke.context=there"])


def test_it_is_safe(launch):
    """No privileges, no network of the host; time to save; a whole slice or nothing."""
    text = gke.render(launch)
    for word in ("privileged", "hostNetwork", "hostPath", "hostPID"):
        assert word not in text
    pod = gke.pod(launch)
    assert pod["terminationGracePeriodSeconds"] >= 120 and pod["restartPolicy"] == "Never"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False


@pytest.mark.parametrize("accelerator, hosts, chips", [("v5e-8", 1, 8), ("v6e-16", 4, 4), ("tpu7x:4x4x4", 16, 4)])
def test_pods_are_hosts_and_ask_for_their_chips(launch, accelerator, hosts, chips):
    rows = "overrides=[batch.sequences_per_step=128]"
    other = load_launch(ROOT / "launch" / "gke.yaml", "gke", launch.root, [f"accelerator={accelerator}", rows])
    job = gke.job(other)
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    limits = job["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"google.com/tpu": chips}


def test_75_and_lost_nodes_restart_without_counting(launch):
    tree = gke.manifest(launch)
    (rule,) = tree["spec"]["failurePolicy"]["rules"]
    codes, conditions = tree["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    # a pod rule of action FailJob fails its Job for the reason PodFailurePolicy, which the JobSet's rule catches
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert codes == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "train", "operator": "In", "values": [75]},
    }
    assert conditions["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


# ---- kubectl --------------------------------------------------------------------------------------------------------


def answer(tree: Any) -> dict:
    return {"out": json.dumps(tree)}


def job_set(*conditions: str) -> dict:
    return answer({"status": {"conditions": [{"type": kind, "status": "True"} for kind in conditions]}})


def pods(*rows: tuple[str, str]) -> dict:
    """(name, phase), old to new."""
    reason = [{"type": "PodScheduled", "status": "False", "message": "0/9 nodes are available"}]
    items = [
        {
            "metadata": {"name": name, "creationTimestamp": f"2026-01-0{day}T00:00:00Z"},
            "status": {"phase": phase, "conditions": reason if phase == "Pending" else []},
        }
        for day, (name, phase) in enumerate(rows, 1)
    ]
    return answer({"items": items})


def run(launch, tmp_path, monkeypatch, answers) -> tuple[int, list[list[str]], list[float]]:
    fake = Fake(tmp_path / "bin", ["kubectl"], monkeypatch)
    fake.answer({"apply": [{"out": "jobset created\n"}], **answers})
    waits: list[float] = []
    monkeypatch.setattr(gke.time, "sleep", waits.append)
    return interruptible(lambda: gke.start(launch, False), "ADVICE"), fake.calls, waits


def followed(calls: list[list[str]]) -> list[str]:
    return [call[call.index("--follow") + 1] for call in calls if "logs" in call]


def test_it_is_applied_and_followed_over_a_restart(launch, tmp_path, monkeypatch, capfd):
    states = [job_set(), job_set(), job_set(), job_set("Completed")]
    there = [pods(), pods(("a", "Pending")), pods(("a", "Failed")), pods(("a", "Failed"), ("b", "Succeeded"))]
    code, calls, waits = run(launch, tmp_path, monkeypatch, {"get jobset": states, "get pods": there})
    assert (code, followed(calls), waits) == (0, ["a", "b"], [1, 1, 1])
    path = tmp_path / "runs" / "launch" / "jaxrlhf-first" / "jobset.yaml"
    assert path.read_text() == gke.render(launch)
    assert calls[0][:4] == ["kubectl", "--context=there", "--namespace=default", "apply"]
    out = capfd.readouterr().out
    assert "no pod yet" in out and "a: Pending: 0/9 nodes are available" in out and "Completed" in out


def test_a_log_that_breaks_off_is_taken_up_again(launch, tmp_path, monkeypatch):
    states = [job_set(), job_set(), job_set("Failed")]
    there = {"get jobset": states, "get pods": [pods(("a", "Running"))], "logs": [{"code": 1}, {}]}
    code, calls, _ = run(launch, tmp_path, monkeypatch, there)
    assert (code, followed(calls)) == (1, ["a", "a"])
    assert [call[-1] for call in calls if "logs" in call] == ["--tail=-1", "--tail=20"]


def test_what_kubectl_refuses_is_one_line(launch, tmp_path, monkeypatch, capfd):
    refused = {"code": 1, "err": 'error: no matches for kind "JobSet" in version "jobset.x-k8s.io/v1alpha2"\n'}
    code, calls, _ = run(launch, tmp_path, monkeypatch, {"apply": [refused]})
    assert (code, len(calls)) == (1, 1)
    err = capfd.readouterr().err
    assert 'exit code 1: error: no matches for kind "JobSet"' in err and err.endswith("\nADVICE\n")


def test_it_can_be_deleted(launch):
    words = ["delete", "jobset", "jaxrlhf-first", "--ignore-not-found"]
    assert gke.delete(launch) == ["kubectl", "--context=there", "--namespace=default", *words]
