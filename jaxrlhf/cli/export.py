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
    dequantized: Annotated[
        bool, typer.Option("--dequantized", help="Merge an adapter into the quantised weights, as it was trained.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a folder that is not empty; do not ask.")] = False,
    strict: StrictOption = False,
) -> None:
    """Write the weights of one role, or of a GGUF file, as a Hugging Face folder, which transformers loads.

    An adapter is merged into them: one on quantised weights into those that init_from names, or with --dequantized
    into what it was trained on. With --adapter it is written alone, as a folder that PEFT loads."""
    from jaxrlhf.errors import ConfigError

    name = name_step(run, step)
    if run.startswith("gguf:"):
        need_empty_folder(to, force)
        from jaxrlhf.serve.writer import export_model

        if adapter or dequantized:
            option = "--adapter" if adapter else "--dequantized"
            raise ConfigError(f"{option}: {run} has no adapter; expected a run with models.policy.adapter")

        export_model(run, to)
        typer.echo(f"{run} written to {to}")
        return
    need_run(run)
    main = join_processes()
    be_strict(strict)
    from jaxrlhf.hosts import processes
    from jaxrlhf.run.export import export as export_role
    from jaxrlhf.run.export import export_adapter

    if adapter and dequantized:
        raise ConfigError("--dequantized: an adapter alone is written with --adapter; expected one of them")
    processes.on_main(lambda: need_empty_folder(to, force))
    which, notes = export_adapter(name, role, to) if adapter else export_role(name, role, to, dequantized)
    what = "adapter of " if adapter else ""
    if main:
        typer.echo("\n".join([f"{what}{role} of {run}, {which}, written to {to}", *notes]))
