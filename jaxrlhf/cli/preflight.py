"""``jaxrlhf preflight``."""

import typer

from jaxrlhf.cli.setup import ConfigArguments, load_joined
from jaxrlhf.hosts.exit_codes import EXIT_MISTAKE


def preflight(arguments: ConfigArguments) -> None:
    """Check what a run needs before it starts: devices, mesh, run directory, network, memory, tokenizer, weights, data,
    reward functions. Exit code 2 if a check fails."""
    configs = load_joined(arguments)
    from jaxrlhf.launch.preflight import preflight as look

    if not look(configs):
        raise typer.Exit(EXIT_MISTAKE)
