"""The one command line of all launchers: CONFIG [KEY=VALUE]... [--dry-run] [--delete] [--keep]."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from jaxrlhf.launch import gke, skypilot, slurm, tpu_vm
from jaxrlhf.launch.commands import LaunchError, interruptible, shown, stream
from jaxrlhf.launch.config import Launch, load_launch


class Provider(NamedTuple):
    """A way to launch."""

    dry_run: Callable[[Launch], str]  # what would be run or submitted
    start: Callable[[Launch, bool], int]  # (launch, keep the machines) -> exit code
    delete: Callable[[Launch], list[str]]  # the command that ends it, and what it costs
    stays: str  # what is true after Ctrl-C


PROVIDERS = {
    "tpu_vm": Provider(tpu_vm.dry_run, tpu_vm.start, tpu_vm.delete, "The machines stay, and cost money."),
    "gke": Provider(gke.render, gke.start, gke.delete, "The JobSet goes on."),
    "slurm": Provider(slurm.render, slurm.start, slurm.delete, "A submitted job goes on."),
    "skypilot": Provider(skypilot.render, skypilot.start, skypilot.delete, "A submitted job goes on."),
}


def main(script: str) -> None:
    """Runs the launcher that the script (a file of launch/) is called after, with the arguments of this process."""
    path = Path(script).resolve()
    provider, root = PROVIDERS[path.stem], path.parent.parent

    def command(
        config: Annotated[str, typer.Argument(help=f"A launch config, as launch/{path.stem}.yaml.")],
        overrides: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE of the launch config.")] = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be run; run nothing.")] = False,
        delete: Annotated[bool, typer.Option("--delete", help="End it, and delete what was made.")] = False,
        keep: Annotated[bool, typer.Option("--keep", help="Leave TPU VMs when training ends.")] = False,
    ) -> None:
        given = overrides or []
        again = shown(["python", f"launch/{path.name}", config, *given])
        advice = f"{provider.stays}\n  go on:   {again}\n  delete:  {again} --delete"

        def work() -> int:
            launch = load_launch(config, path.stem, root, given)
            if dry_run:
                print((shown(provider.delete(launch)) if delete else provider.dry_run(launch)).rstrip("\n"))
                return 0
            if delete:
                if code := stream(provider.delete(launch)):
                    raise LaunchError(f"{launch.cfg.name}: not deleted", code)
                return 0
            return provider.start(launch, keep)

        raise typer.Exit(interruptible(work, advice))

    command.__doc__ = f"Train by {path.stem}, as launch/README.md says."
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app()
