"""What commands do before their work: arguments read, flags set, processes joined, folders checked."""

import os
import sys
from typing import Annotated, Any

import typer

RunArgument = Annotated[str, typer.Argument(help="A run directory (run_dir of its config): RUN, RUN@best or RUN@40.")]
StepOption = Annotated[str, typer.Option(help="Which checkpoint of a run: a step, or best. Default: the latest.")]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="A damaged checkpoint is an error (exit code 1), and no older one is taken.")
]


ConfigArguments = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG... [KEY=VALUE]...",
        help="YAML files, run in order, and overrides. KEY=VALUE (algorithm.kl_coef=0.1) is for every config; "
        "NAME:KEY=VALUE only for the one whose file or algorithm is called NAME.",
    ),
]


def split_arguments(arguments: list[str] | None) -> tuple[list[str], list[str]]:
    """(paths of configs, overrides KEY=VALUE), each in their order."""
    given = arguments or []
    return [text for text in given if "=" not in text], [text for text in given if "=" in text]


def load_joined(arguments: list[str]) -> list[tuple[str, Any]]:
    """(path, Config) of the arguments; the other processes of the run have been joined when it returns."""
    paths, overrides = split_arguments(arguments)
    if not paths:
        raise typer.BadParameter("no config file: expected at least one, as in configs/tiny/ppo.yaml")
    from jaxrlhf.config.load import load_all

    configs = load_all(paths, overrides)
    set_flags(any(cfg.deterministic for cfg in configs))
    join_processes(configs[0].distributed)
    return list(zip(paths, configs))


def set_flags(deterministic: bool = False) -> None:
    """The compiler flags of this machine, before anything touches a device."""
    from jaxrlhf.hosts import compiler_flags

    compiler_flags.prepare(deterministic)


def need_run(run: str) -> None:
    """Raises ConfigError where there is no run directory; the nearest one beside it is named."""
    from etils import epath

    from jaxrlhf.errors import ConfigError, nearest
    from jaxrlhf.log.run_dir import split_step

    path = epath.Path(split_step(run)[0])
    if not (path / "config.yaml").exists():
        near = nearest(run, sorted(os.fspath(file.parent) for file in path.parent.glob("*/config.yaml")), "")
        raise ConfigError(f"{run}: no run directory (config.yaml is not in it){f'; {near}' if near else ''}")


def name_step(run: str, step: str) -> str:
    """RUN@STEP where --step is given. Raises ValueError where that is no run."""
    from jaxrlhf.log.run_dir import at_step

    return at_step(run, step)


def be_strict(wanted: bool) -> None:
    """Makes a damaged checkpoint an error of this command; else the newest good one is taken."""
    from jaxrlhf.run.verified_steps import STRICT

    STRICT.set(wanted)


def need_empty_folder(folder: str, force: bool) -> None:
    """Raises ConfigError where ``folder`` holds something that is not to be written over; on a terminal it asks."""
    from etils import epath

    from jaxrlhf.errors import ConfigError
    from jaxrlhf.paths import unreachable

    if why := unreachable(folder):
        raise ConfigError(f"--to {folder}: {why}")
    path = epath.Path(folder)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--to {folder}: a file; expected a folder")
    held = sorted(file.name for file in path.iterdir()) if path.exists() else []
    if not held or force:
        return
    what = f"--to {folder}: holds {held[0]}" + (f" and {len(held) - 1} more" if len(held) > 1 else "")
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError(f"{what}; expected a new folder, or --force to write over it")
    if not typer.confirm(f"{what}. Write over it?", err=True):
        raise ConfigError(f"--to {folder}: nothing was written")


def join_processes(cfg: Any = None) -> bool:
    """Joins the run's other processes, where there are any, before anything touches a device: whether this process is
    the one that speaks. ``cfg``: a DistributedConfig; without it, as the environment says."""
    from jaxrlhf.hosts import processes

    processes.start(cfg or processes.DistributedConfig())
    return processes.is_main()
