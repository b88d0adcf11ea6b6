"""``jaxrlhf plan``."""

import json
import os
from typing import Annotated

import typer

from jaxrlhf.cli.setup import split_arguments


def plan(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="CONFIG [KEY=VALUE]...", help="A YAML file, and overrides.")
    ] = None,
    topology: Annotated[
        str,
        typer.Option(
            help="A slice by its chip and layout, in chips (v5e:8x8, v5p:4x4x4), or by its name (v5litepod-64)."
        ),
    ] = "",
    slices: Annotated[int | None, typer.Option(help="Number of slices. Default: mesh.slices.")] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only count FLOPs, bytes and memory.")] = False,
    calibration: Annotated[
        bool, typer.Option("--calibration", help="Show predictions beside published speeds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict memory and speed of a config on a TPU slice, without the TPU: it is compiled ahead of time."""
    paths, overrides = split_arguments(arguments)
    if not calibration and (len(paths) != 1 or not topology):
        raise typer.BadParameter("expected one config and a TPU slice: configs/tiny/ppo.yaml --topology v5e:2x2")
    os.environ["JAX_PLATFORMS"] = "cpu"  # a TPU or GPU that is here is left alone
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's stacks: a plan says what it raised
    from jaxrlhf.plan import report

    if calibration:
        typer.echo(json.dumps(report.calibration_json())) if as_json else report.print_calibration()
        return
    from jaxrlhf.config.load import load, load_beside
    from jaxrlhf.plan import plan as make

    cfg = load(paths[0], overrides if slices is None else [*overrides, f"mesh.slices={slices}"])
    made = make(cfg, topology, cfg.mesh.slices, load_beside(paths[0]), not estimate, paths[0])
    typer.echo(json.dumps(report.as_json(made))) if as_json else report.print_plan(made)
