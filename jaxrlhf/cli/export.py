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
    adapter: Annotated[bool, typer.Option("--adapter", help="Write the adapter alone, as PEFT does.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a folder that is not empty; do not ask.")] = False,
    strict: StrictOption = False,
) -> None:
    """Write the weights of one role, or of a GGUF file, as a Hugging Face folder, which transformers loads.

    An adapter is merged into them; or with --adapter it is written alone, as a folder that PEFT loads."""
    name = name_step(run, step)
    if run.startswith("gguf:"):
        need_empty_folder(to, force)
        from jaxrlhf.errors import ConfigError
        from jaxrlhf.serve.writer import export_model

        if adapter:
            raise ConfigError(f"--adapter: {run} has none; expected a run with models.policy.adapter")

        export_model(run, to)
        typer.echo(f"{run} written to {to}")
        return
    need_run(run)
    main = join_processes()
    be_strict(strict)
    from jaxrlhf.hosts import processes
    from jaxrlhf.run.export import export as export_role
    from jaxrlhf.run.export import export_adapter

    processes.on_main(lambda: need_empty_folder(to, force))
    which, notes = (export_adapter if adapter else export_role)(name, role, to)
    what = "adapter of " if adapter else ""
    if main:
        typer.echo("\n".join([f"{what}{role} of {run}, {which}, written to {to}", *notes]))
