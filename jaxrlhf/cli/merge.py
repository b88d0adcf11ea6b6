"""``jaxrlhf merge``."""

from typing import Annotated

import typer

from jaxrlhf.cli.setup import need_empty_folder, need_run, set_flags


def merge(
    runs: Annotated[list[str], typer.Argument(help="Run directories (RUN, RUN@best, RUN@40).", metavar="RUN...")],
    to: Annotated[str, typer.Option(help="The folder to write.")],
    role: Annotated[
        str, typer.Option(help="Whose weights: reward, policy, ... Of an ensemble, all members'.")
    ] = "reward",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a folder that is not empty; do not ask.")] = False,
) -> None:
    """Write the mean of several runs' weights as a Hugging Face folder, which init_from takes (WARM)."""
    for run in runs:
        need_run(run)
    set_flags()
    need_empty_folder(to, force)
    from jaxrlhf.run.merge import merge as merge_runs

    merged, notes = merge_runs(runs, role, to)
    typer.echo("\n".join([f"the mean of {role} of {len(merged)} models written to {to}:", *merged, *notes]))
