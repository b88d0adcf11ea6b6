"""``jaxrlhf train``."""

import signal
from typing import Annotated

import typer

from jaxrlhf.cli.setup import ConfigArguments, StrictOption, be_strict, load_joined
from jaxrlhf.hosts.exit_codes import EXIT_BROKEN


def train(
    arguments: ConfigArguments,
    check_only: Annotated[
        bool,
        typer.Option("--check", help="Train nothing and write nothing: show config, rows, steps and memory."),
    ] = False,
    strict: StrictOption = False,
) -> None:
    """Train. Ctrl-C or SIGTERM saves and stops; the same command resumes."""
    if check_only:
        configs = load_joined(arguments)
        be_strict(strict)
        from jaxrlhf.hosts import processes
        from jaxrlhf.plan.dry_run import dry_run

        for line in dry_run(configs):  # by every process: data have to be the same on all
            if processes.is_main():
                typer.echo(line)
        return
    from jaxrlhf.hosts.signals import Stop

    with Stop(signal.SIGINT, signal.SIGTERM, leaves=True) as stop:
        configs = load_joined(arguments)
        be_strict(strict)
        import jax

        from jaxrlhf.config.check import check
        from jaxrlhf.config.yaml_text import decode, read_file
        from jaxrlhf.hosts import processes

        for path, cfg in configs:
            check(cfg, jax.device_count(), path)
        from jaxrlhf.train import run

        for number, (path, cfg) in enumerate(configs):
            # several processes stop together, in the next run
            if number and stop.asked and not processes.several():
                typer.echo(f"{stop.asked}: stopped before {path}; the same command resumes")
                raise typer.Exit(stop.code)
            ended = run(cfg, decode(read_file(path), path), stop)
            if ended != "done":
                raise typer.Exit({"out of time": 0, "alarmed": EXIT_BROKEN}.get(ended, stop.code))
