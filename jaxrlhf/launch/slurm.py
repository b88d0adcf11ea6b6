"""A batch job of SLURM: one process a node, which finds the others by SLURM's variables."""

import shlex

from jaxrlhf.hosts.exit_codes import EXIT_PREEMPTED
from jaxrlhf.launch.bundle import folder, write_private
from jaxrlhf.launch.commands import must, say, shown
from jaxrlhf.launch.config import Launch, SlurmConfig

GRACE = 120  # seconds between SIGTERM and the end: a checkpoint must fit

SCRIPT = """\
#!/usr/bin/env bash
{directives}
set -euo pipefail
cd {root}
{exports}
export JAXRLHF={jaxrlhf}
{lines}
# SLURM warns this shell alone (B:); srun passes the signal on to all processes
trap 'asked=1; kill -TERM "${{step:-}}" 2>/dev/null || true' TERM
srun bash launch/train.sh {arguments} &
step=$!
while :; do # a wait that a signal interrupts says nothing of the step
    asked='' code=0
    wait "$step" || code=$?
    [ -n "$asked" ] || break
done
# {preempted}: everything is saved, and the same job goes on from there
if [ "$code" = {preempted} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def slurm_of(launch: Launch) -> SlurmConfig:
    return launch.cfg.slurm or SlurmConfig()


def directives(launch: Launch) -> list[str]:
    """The options of sbatch."""
    cfg, slurm = launch.cfg, slurm_of(launch)
    given = {
        "job-name": cfg.name,
        "partition": slurm.partition,
        "account": slurm.account,
        "time": slurm.time,
        "nodes": cfg.slices,
        "ntasks-per-node": 1,
        "gpus-per-node": launch.machines.devices_per_slice,
        "exclusive": "",
        "signal": f"B:TERM@{GRACE}",
        "requeue": "",
        "open-mode": "append",
        "output": f"{folder(launch)}/%j.log",
    }
    rows = [(key, value) for key, value in given.items() if value is not None]
    return [f"#SBATCH --{key}={value}" if value != "" else f"#SBATCH --{key}" for key, value in rows]


def render(launch: Launch) -> str:
    """The batch script."""
    slurm = slurm_of(launch)
    return SCRIPT.format(
        directives="\n".join(directives(launch)),
        root=shlex.quote(str(launch.root)),
        exports="\n".join(f"export {key}={shlex.quote(value)}" for key, value in launch.environment.items()),
        jaxrlhf=shlex.quote(f"{slurm.python}/jaxrlhf"),
        lines="\n".join(slurm.lines),
        arguments=shlex.join(launch.arguments),
        preempted=EXIT_PREEMPTED,
    ).replace("\n\n", "\n")


# ---- what cli.py calls ----------------------------------------------------------------------------------------------


def start(launch: Launch, keep: bool) -> int:
    """Submits the job and leaves it."""
    path = folder(launch) / "train.sbatch"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_private(path, render(launch))
    say(must(["sbatch", str(path)]).strip())
    say(f"log: {path.parent}/JOB.log; cancel: {shown(delete(launch))}")
    return 0


def delete(launch: Launch) -> list[str]:
    return ["scancel", "--me", f"--name={launch.cfg.name}"]
