"""``jaxrlhf rewind``."""

from typing import Annotated

import typer

from jaxrlhf.cli.setup import need_run


def rewind(
    run: Annotated[str, typer.Argument(help="A run directory (run_dir of its config).")],
    step: Annotated[int, typer.Argument(min=1, help="The checkpoint from which its training is to go on.")],
) -> None:
    """Set the checkpoints after STEP aside: the command that trains the run goes on from STEP."""
    need_run(run)
    from jaxrlhf.run import verified_steps

    moved = verified_steps.rewind(run, step)
    if not moved:
        typer.echo(f"{run}: step {step} is the last one: nothing to do")
        return
    which = f"step{'s' if moved[1:] else ''} {', '.join(map(str, moved))}"
    typer.echo(f"{run}: {which} set aside in {run}/{verified_steps.ASIDE}; training goes on from step {step}")
