"""A managed job of SkyPilot, which finds machines, starts again after preemptions, and cleans up. Version 0.11 or later
(https://docs.skypilot.co/en/latest/reference/yaml-spec.html)."""

import shlex
from typing import Any

import yaml

from jaxrlhf.config.yaml_text import Dumper
from jaxrlhf.hosts.exit_codes import EXIT_PREEMPTED
from jaxrlhf.launch.bundle import folder
from jaxrlhf.launch.commands import stream
from jaxrlhf.launch.config import Launch, SkyPilotConfig

PORT = 8476

SETUP = """\
set -e
pip install --quiet --upgrade uv
[ -x ~/jaxrlhf-venv/bin/python ] || uv venv --quiet --python 3.12 ~/jaxrlhf-venv
uv pip install --quiet --python ~/jaxrlhf-venv/bin/python --constraint launch/requirements.lock --editable ".[{extra}]"
"""
# TPU hosts find each other by themselves; nodes of GPUs are told
GPU_NODES = (
    f'distributed.coordinator="$(head -n 1 <<<"$SKYPILOT_NODE_IPS"):{PORT}"'
    ' distributed.num_processes="$SKYPILOT_NUM_NODES" distributed.process_id="$SKYPILOT_NODE_RANK"'
)


def task(launch: Launch) -> dict[str, Any]:
    """The task as a tree."""
    cfg, tpu = launch.cfg, launch.machines.slice
    sky = cfg.skypilot or SkyPilotConfig()
    region = [cfg.zone.rpartition("-")[0], cfg.zone] if cfg.zone else []
    resources: dict[str, Any] = {
        "infra": "/".join([sky.cloud, *region]),
        "accelerators": f"tpu-{tpu.accelerator_type}" if tpu else cfg.accelerator.upper(),
    }
    if tpu:
        resources["accelerator_args"] = {"runtime_version": sky.runtime or tpu.generation.runtime}
    resources["use_spot"] = cfg.capacity == "spot"
    resources["job_recovery"] = {
        "strategy": sky.strategy,
        "max_restarts_on_errors": cfg.retry.failures,
        "recover_on_exit_codes": [EXIT_PREEMPTED],
    }
    words = shlex.join(launch.arguments) + (f" {GPU_NODES}" if tpu is None and cfg.slices > 1 else "")
    return {
        "name": cfg.name,
        "num_nodes": 1 if tpu else cfg.slices,
        "workdir": str(launch.root),
        "resources": resources,
        "envs": launch.environment,
        **({"secrets": dict.fromkeys(cfg.secrets)} if cfg.secrets else {}),  # their values: --secret NAME
        "setup": SETUP.format(extra="tpu" if tpu else "cuda,gcs"),
        "run": f"export JAXRLHF=~/jaxrlhf-venv/bin/jaxrlhf\nexec bash launch/train.sh {words}\n",
    }


class Blocks(Dumper):
    """Texts of several lines as blocks, which one can read."""

    def represent_str(self, data: str):
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


Blocks.add_representer(str, Blocks.represent_str)


def render(launch: Launch) -> str:
    """The task as YAML."""
    return yaml.dump(task(launch), Dumper=Blocks, sort_keys=False, width=1000)


# ---- what cli.py calls ----------------------------------------------------------------------------------------------


def start(launch: Launch, keep: bool) -> int:
    """Submits the job and shows its log."""
    path = folder(launch) / "sky.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(launch))
    secrets = [word for key in launch.cfg.secrets for word in ("--secret", key)]
    return stream(["sky", "jobs", "launch", "--yes", "--name", launch.cfg.name, *secrets, str(path)])


def delete(launch: Launch) -> list[str]:
    return ["sky", "jobs", "cancel", "--yes", "--name", launch.cfg.name]
