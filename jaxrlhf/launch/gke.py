"""A JobSet on GKE: one Job a slice, one pod a host. https://jobset.sigs.k8s.io, API jobset.x-k8s.io/v1alpha2."""

import json
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import yaml

from jaxrlhf.config.yaml_text import Dumper
from jaxrlhf.errors import one_line
from jaxrlhf.hosts.exit_codes import EXIT_PREEMPTED
from jaxrlhf.launch.bundle import folder
from jaxrlhf.launch.commands import LaunchError, must, say, stream
from jaxrlhf.launch.config import GkeConfig, Launch

CONTAINER = "train"
PORTS = (8471, 8080, 8482)  # of libtpu, of slices among each other, and of jax.distributed


def gke_of(launch: Launch) -> GkeConfig:
    if launch.cfg.gke is None:
        raise LaunchError("gke: missing; expected a section with image")
    return launch.cfg.gke


def manifest(launch: Launch) -> dict[str, Any]:
    """The JobSet as a tree. A pod that ends with 75, or with its node, restarts all without counting; anything else
    does so retry.failures times."""
    cfg, gke = launch.cfg, gke_of(launch)
    metadata: dict[str, Any] = {"name": cfg.name, "namespace": gke.namespace}
    if gke.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": gke.queue}
    # a slice is a node pool: no two Jobs share one
    metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    preempted = {
        "name": "preempted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": cfg.retry.failures, "rules": [preempted]},
            "replicatedJobs": [{"name": "slice", "replicas": cfg.slices, "template": {"spec": job(launch)}}],
        },
    }


def job(launch: Launch) -> dict[str, Any]:
    """The Job of one slice: all of its pods or none."""
    hosts = launch.machines.hosts // launch.cfg.slices
    again = {"containerName": CONTAINER, "operator": "In", "values": [EXIT_PREEMPTED]}
    rules = [
        {"action": "FailJob", "onExitCodes": again},
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    return {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": pod(launch)},
    }


def pod(launch: Launch) -> dict[str, Any]:
    """One host."""
    cfg, gke, slice_ = launch.cfg, gke_of(launch), launch.machines.slice
    assert slice_  # load_launch saw to it
    selector = {
        "cloud.google.com/gke-tpu-accelerator": slice_.generation.gke_accelerator,
        "cloud.google.com/gke-tpu-topology": slice_.layout,
    }
    label = {"spot": "cloud.google.com/gke-spot", "flex-start": "cloud.google.com/gke-flex-start"}.get(cfg.capacity)
    if label:
        selector[label] = "true"
    if gke.reservation:
        selector["cloud.google.com/reservation-name"] = gke.reservation
    account = {"serviceAccountName": gke.service_account} if gke.service_account else {}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": gke.grace_seconds,
        **account,
        "nodeSelector": selector,
        "tolerations": [
            {"key": key, "operator": "Exists", "effect": "NoSchedule"}
            for key in ("cloud.google.com/gke-spot", *([label] if cfg.capacity == "flex-start" else []))
        ],
        "securityContext": {
            "runAsUser": gke.run_as_user,
            "runAsNonRoot": gke.run_as_user != 0,
            "fsGroup": gke.run_as_user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container(launch, slice_.chips_per_host)],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }


def container(launch: Launch, chips: int) -> dict[str, Any]:
    """What runs there: launch/train.sh of the image."""
    gke = gke_of(launch)
    secret = lambda key: {"secretKeyRef": {"name": gke.secret, "key": key}}
    env: list[dict[str, Any]] = [{"name": key, "value": value} for key, value in launch.environment.items()]
    env += [{"name": key, "valueFrom": secret(key)} for key in launch.cfg.secrets]
    return {
        "name": CONTAINER,
        "image": gke.image,
        "args": launch.arguments,
        "env": env,
        "ports": [{"containerPort": port} for port in PORTS],
        "resources": {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }


def render(launch: Launch) -> str:
    """The manifest as YAML."""
    return yaml.dump(manifest(launch), Dumper=Dumper, sort_keys=False, width=120)


# ---- kubectl --------------------------------------------------------------------------------------------------------


def kubectl(launch: Launch, *words: str) -> list[str]:
    gke = gke_of(launch)
    context = [f"--context={gke.context}"] if gke.context else []
    return ["kubectl", *context, f"--namespace={gke.namespace}", *words]


def logs(launch: Launch, pod_name: str, lines: int) -> list[str]:
    """Follows a pod, from its last ``lines`` lines on; -1: from its first."""
    return kubectl(launch, "logs", "--follow", pod_name, f"--container={CONTAINER}", f"--tail={lines}")


def ended(launch: Launch) -> str:
    """Completed, Failed, or "" while it runs. Raises LaunchError where there is no such JobSet."""
    tree = json.loads(must(kubectl(launch, "get", "jobset", launch.cfg.name, "--output=json")))
    kinds = {row["type"] for row in tree.get("status", {}).get("conditions", []) if row["status"] == "True"}
    return next((kind for kind in ("Completed", "Failed") if kind in kinds), "")


class FirstPod(NamedTuple):
    """The pod that logs: the first of the first slice."""

    name: str
    phase: str
    why: str  # it is not running yet


def first_pod(launch: Launch) -> FirstPod | None:
    """The newest one; None before it is made, and between restarts."""
    labels = {
        "jobset.sigs.k8s.io/jobset-name": launch.cfg.name,
        "jobset.sigs.k8s.io/job-index": "0",
        "batch.kubernetes.io/job-completion-index": "0",
    }
    selector = ",".join(f"{key}={value}" for key, value in labels.items())
    tree = json.loads(must(kubectl(launch, "get", "pods", f"--selector={selector}", "--output=json")))
    pods = sorted(tree["items"], key=lambda each: each["metadata"]["creationTimestamp"])
    if not pods:
        return None
    status = pods[-1]["status"]
    why = [row["message"] for row in status.get("conditions", []) if row["status"] == "False" and "message" in row]
    return FirstPod(pods[-1]["metadata"]["name"], status["phase"], one_line(why[0]) if why else "")


def follow(launch: Launch, sleep: Callable[[float], None]) -> int:
    """Shows the log, over restarts, until the JobSet has ended. The exit code."""
    shown_pods: dict[str, bool] = {}  # name -> whether its log was shown to the end
    said = ""
    while True:
        state, found = ended(launch), first_pod(launch)
        if found and found.phase != "Pending" and not shown_pods.get(found.name):
            lines = 20 if found.name in shown_pods else -1
            shown_pods[found.name] = stream(logs(launch, found.name, lines)) == 0
        elif not state and (text := f"{found.name}: {found.phase}: {found.why}" if found else "no pod yet") != said:
            said = text
            say(text)
        if state:
            say(f"{launch.cfg.name}: {state}")
            return 0 if state == "Completed" else 1
        sleep(launch.cfg.retry.poll)


# ---- what cli.py calls ----------------------------------------------------------------------------------------------


def start(launch: Launch, keep: bool) -> int:
    """Applies the manifest, which does nothing where it is applied already, and follows."""
    path = folder(launch) / "jobset.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(launch))
    say(must(kubectl(launch, "apply", f"--filename={os.path.relpath(path)}")).strip())
    return follow(launch, time.sleep)


def delete(launch: Launch) -> list[str]:
    return kubectl(launch, "delete", "jobset", launch.cfg.name, "--ignore-not-found")
