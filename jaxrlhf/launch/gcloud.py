"""The gcloud commands of TPU VMs as argument lists, and what gcloud answers.

The flags are those of ``gcloud compute tpus queued-resources`` (https://cloud.google.com/sdk/gcloud/reference).
"""

import json
import re
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from jaxrlhf.launch.commands import CommandResult, LaunchError, last_line
from jaxrlhf.launch.config import Launch

QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
ACTIVE, FAILED, MISSING, DELETING = "ACTIVE", "FAILED", "MISSING", "DELETING"
LOST = {"SUSPENDING", "SUSPENDED", FAILED, DELETING, MISSING}  # the others are on their way to ACTIVE
# a node in one of these serves no more, whatever its queued resource still says
LOST_NODES = {"PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "DELETING", "HIDDEN", "HIDING"}
# Both are RESOURCE_EXHAUSTED: a quota stays where it is however long one waits, machines become free
STOCKOUT = re.compile(
    r"no more capacity|stock.?out|insufficient (reserved )?capacity|RESOURCE_POOL_EXHAUSTED|RESOURCE_EXHAUSTED"
    r"|UNAVAILABLE|currently unavailable|try again|internal error|\b(429|500|503)\b",
    re.IGNORECASE,
)
FINAL = re.compile(r"quota|PERMISSION_DENIED|INVALID_ARGUMENT|UNAUTHENTICATED", re.IGNORECASE)


class Status(NamedTuple):
    """What describe says of a queued resource."""

    state: str  # MISSING where there is none
    nodes: tuple[str, ...] = ()
    accelerator: str = ""  # type of its nodes
    error: str = ""  # why it failed


def create(launch: Launch) -> list[str]:
    """Asks for the slices, as one resource that comes whole or not at all."""
    cfg, tpu = launch.cfg, launch.cfg.tpu_vm
    slice_ = launch.machines.slice
    assert tpu and slice_  # load_launch saw to it
    command = [QUEUED[0], "alpha", *QUEUED[1:]] if cfg.capacity == "flex-start" else QUEUED  # which alone has its flags
    argv = [*command, "create", cfg.name, *place(launch), f"--accelerator-type={slice_.accelerator_type}"]
    argv += [f"--runtime-version={tpu.runtime or slice_.generation.runtime}"]
    several = [f"--node-count={cfg.slices}", f"--node-prefix={cfg.name}"]
    argv += several if cfg.slices > 1 else [f"--node-id={cfg.name}"]
    flex_start = ["--provisioning-model=flex-start", f"--max-run-duration={tpu.max_run_duration}"]
    kinds = {"spot": ["--spot"], "reserved": ["--reserved"], "on-demand": [], "flex-start": flex_start}
    argv += kinds[cfg.capacity]
    given = {"network": tpu.network, "subnetwork": tpu.subnetwork, "service-account": tpu.service_account}
    given["valid-until-duration"] = tpu.valid_until
    argv += [f"--{flag}={value}" for flag, value in given.items() if value]
    argv += ["--internal-ips"] if tpu.internal_ips else []
    return [*argv, "--labels=jaxrlhf=launch", "--quiet"]


def describe(launch: Launch) -> list[str]:
    return [*QUEUED, "describe", launch.cfg.name, *place(launch), "--format=json"]


def describe_node(launch: Launch, node: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "tpu-vm", "describe", node, *place(launch), "--format=value(state)"]


def delete(launch: Launch) -> list[str]:
    """Deletes the request and its machines, whatever they do."""
    return [*QUEUED, "delete", launch.cfg.name, *place(launch), "--force", "--quiet"]


def copy(launch: Launch, files: Sequence[str]) -> list[str]:
    """Copies files to the home directory of every worker."""
    return [*QUEUED, "scp", *files, f"{launch.cfg.name}:", *everywhere(launch)]


def ssh(launch: Launch, command: Sequence[str]) -> list[str]:
    """Runs a command on every worker at once."""
    return [*QUEUED, "ssh", launch.cfg.name, *everywhere(launch), "--command", shlex.join(command)]


def place(launch: Launch) -> list[str]:
    return [f"--project={launch.cfg.project}", f"--zone={launch.cfg.zone}"]


def everywhere(launch: Launch) -> list[str]:
    """All workers at the same time: by default gcloud serves 64 at a time, of which none ends before the 65th began."""
    tunnel = ["--tunnel-through-iap"] if launch.cfg.tpu_vm and launch.cfg.tpu_vm.internal_ips else []
    return ["--node=all", "--worker=all", "--batch-size=all", *place(launch), *tunnel, "--quiet"]


def read_status(done: CommandResult) -> Status:
    """What ``describe`` answered. Raises LaunchError where that is neither a resource nor its absence."""
    if done.code:
        if "NOT_FOUND" in done.err or "not found" in done.err.lower():
            return Status(MISSING)
        raise LaunchError(f"gcloud: {last_line(done.err)}", 1)
    try:
        tree = json.loads(done.out)
        state = tree.get("state", {})
        specs = tree.get("tpu", {}).get("nodeSpec", [])
        nodes = tuple(spec["nodeId"] for spec in specs if "nodeId" in spec)
        kinds = {spec.get("node", {}).get("acceleratorType", "") for spec in specs}
        error = state.get("failedData", {}).get("error", {}).get("message", "")
        return Status(state["state"], nodes, max(kinds, default=""), error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LaunchError(f"gcloud: an answer that is no queued resource ({error}): {done.out[:80]!r}", 1) from None


def is_stockout(message: str) -> bool:
    """Whether it is worth asking again for what was refused with this message."""
    return STOCKOUT.search(message) is not None and FINAL.search(message) is None
