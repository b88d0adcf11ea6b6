"""``jaxrlhf evaluate``."""

import json
from typing import Annotated

import typer

from jaxrlhf.cli.setup import (
    RunArgument,
    StepOption,
    StrictOption,
    be_strict,
    join_processes,
    name_step,
    need_run,
    set_flags,
)


def evaluate(
    run: RunArgument,
    judge: Annotated[bool, typer.Option(help="Also score with the outside judge, which training never uses.")] = True,
    samples: Annotated[int, typer.Option(min=0, help="Prompts to show with their responses.")] = 8,
    beta: Annotated[
        float | None, typer.Option(min=0, help="In place of generate.beta: sample from policy * exp(beta * Q).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    step: StepOption = "",
    strict: StrictOption = False,
) -> None:
    """Measure a run on held-out data."""
    need_run(run)
    run = name_step(run, step)
    set_flags()
    main = join_processes()
    be_strict(strict)
    from jaxrlhf.evaluate.report import evaluate_run, print_report

    report = evaluate_run(run, judge, samples, beta)
    if not main:
        return
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        print_report(report)
