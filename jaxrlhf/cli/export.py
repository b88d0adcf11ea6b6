"""``jaxrlhf export``."""

from typing import Annotated

import typer

from jaxrlhf.cli.setup import (
    StepOption,
    StrictOption,
    be_strict,
    join_processes,
    name_step,
    need_empty_folder,
    need_run,
)


def export(
    run: Annotated[str, typer.Argument(help="A run directory (RUN, RUN@best, RUN@40), or gguf:FILE.")],
    to: Annotated[str, typer.Option(help="The folder to write.")],
    role: Annotated[str, typer.Option(help="Whose weights: policy, reward, value, ...")] = "policy",
    step: StepOption = "",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a folder that is not empty; do not ask.")] = False,
    strict: StrictOption = False,
) -> None:
    """Write the weights of one role, or of a GGUF file, as a Hugging Face folder, which transformers loads."""
    name = name_step(run, step)
    if run.startswith("gguf:"):
        need_empty_folder(to, force)
        from jaxrlhf.serve.writer import export_model

        export_model(run, to)
        typer.echo(f"{run} written to {to}")
        return
    need_run(run)
    main = join_processes()
    be_strict(strict)
    from jaxrlhf.hosts import processes
    from jaxrlhf.run.export import export as export_role

    processes.on_main(lambda: need_empty_folder(to, force))
    which, notes = export_role(name, role, to)
    if main:
        typer.echo("\n".join([f"{role} of {run}, {which}, written to {to}", *notes]))
