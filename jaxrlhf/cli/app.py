"""The ``jaxrlhf`` command: its sub-commands, each a file of this folder, and what becomes of their errors.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once. Exit codes: 0 done, 1 training
broke down, 2 a mistake in the config or the input (both one line on stderr), 75 stopped by SIGTERM (everything is
saved: launchers run the same command again), 130 stopped by Ctrl-C (``train`` saves too; a second one stops at once).
"""

import io
import logging
import os
import signal
import sys
from typing import Annotated

import typer

from jaxrlhf import __version__
from jaxrlhf.cli import benchmark, discover
from jaxrlhf.cli.evaluate import evaluate
from jaxrlhf.cli.exits import abandon, by_the_system, raised_here
from jaxrlhf.cli.export import export
from jaxrlhf.cli.generate import generate
from jaxrlhf.cli.merge import merge
from jaxrlhf.cli.plan import plan
from jaxrlhf.cli.preflight import preflight
from jaxrlhf.cli.report import report
from jaxrlhf.cli.rewind import rewind
from jaxrlhf.cli.serve import serve
from jaxrlhf.cli.train import train
from jaxrlhf.hosts.exit_codes import EXIT_BROKEN, EXIT_INTERRUPTED, EXIT_MISTAKE, EXIT_PREEMPTED

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(discover.config, name="config")
app.add_typer(discover.configs, name="configs")
app.add_typer(benchmark.benchmarks, name="benchmark")


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jaxrlhf {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train language models from rewards and preferences, in JAX."""


for each in (
    train,
    preflight,
    plan,
    generate,
    evaluate,
    report,
    serve,
    export,
    merge,
    rewind,
    discover.init,
    discover.metrics,
):
    app.command()(each)  # help lists them in this order


def main() -> None:
    """The command, which Ctrl-C ends without a traceback. A process that breaks down doesn't wait for the others of its
    run, which may be waiting for it."""
    from jaxrlhf.hosts.signals import Stop

    with Stop(signal.SIGINT, leaves=True):
        try:
            command()
        except SystemExit as stop:
            if stop.code not in (None, 0, EXIT_PREEMPTED, EXIT_INTERRUPTED):
                abandon(stop.code if isinstance(stop.code, int) else EXIT_BROKEN)
            raise
        except BaseException:
            abandon(EXIT_BROKEN)
            raise


def command() -> None:
    """The command; what this package itself refuses is told in one line (JAXRLHF_TRACEBACK=1 shows where it was)."""
    from jaxrlhf.hosts import heap, platforms

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale without these letters gets "?", not an error
            stream.reconfigure(errors="replace")
    platforms.skip_absent_tpu(os.environ)
    heap.keep_memory(os.environ)
    # orbax and TFDS warn of what is meant, and print the tracebacks of errors that they raise too
    logging.getLogger("absl").setLevel(logging.ERROR if os.environ.get("JAXRLHF_TRACEBACK") else logging.CRITICAL)
    try:
        app()
    # FloatingPointError: a loss is not finite; OSError: of the system, or processes that did not come; RuntimeError: a
    # reward function raised
    except (ValueError, ImportError, FloatingPointError, OSError, RuntimeError) as error:
        if os.environ.get("JAXRLHF_TRACEBACK") or not (raised_here(error) or by_the_system(error)):
            raise
        if isinstance(error, OSError) and by_the_system(error):
            print(f"{error.filename}: {error.strerror}" if error.filename else error.strerror, file=sys.stderr)
        else:
            print(error, file=sys.stderr)
        mistake = isinstance(error, (ValueError, ImportError, FileNotFoundError)) and raised_here(error)
        sys.exit(EXIT_MISTAKE if mistake else EXIT_BROKEN)
