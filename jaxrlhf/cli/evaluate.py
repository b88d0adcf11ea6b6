"""``jaxrlhf evaluate``."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

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
    split_arguments,
)

if TYPE_CHECKING:
    from jaxrlhf.evaluate.report import Options


def evaluate(
    run: RunArgument,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", hidden=True, help="More of --sampling.")
    ] = None,
    judge: Annotated[
        str,
        typer.Option(
            metavar="llm:MODEL@URL",
            help="A language model on an OpenAI-compatible server compares the policy's responses with the "
            "reference's, in both orders; its key: JAXRLHF_JUDGE_KEY. Or llm:FILE.yaml with its settings.",
        ),
    ] = "",
    no_judge: Annotated[bool, typer.Option("--no-judge", help="Without the classifier of eval.judge.")] = False,
    samples: Annotated[int, typer.Option(min=0, help="Prompts to show with their responses.")] = 8,
    beta: Annotated[
        float | None, typer.Option(min=0, help="In place of generate.beta: sample from policy * exp(beta * Q).")
    ] = None,
    best_of: Annotated[
        str, typer.Option(help="Numbers of samples, as in 1,4,16,64: what the best of each is worth by the reward.")
    ] = "",
    gold: Annotated[
        str | None,
        typer.Option(help="A second reward, in place of eval.gold: a function module:name, or a reward model."),
    ] = None,
    sampling: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE...", help="Keys of generate, as in temperature=0.6 top_p=0.95."),
    ] = None,
    rewardbench: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Only this: the accuracy of a reward model (a run, or a Hugging Face folder) on a JSONL or Parquet "
            "file in the format of RewardBench 1 or 2.",
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    step: StepOption = "",
    strict: StrictOption = False,
) -> None:
    """Measure a run on held-out data."""
    if not rewardbench:
        need_run(run)
    overrides = sampling_of(sampling or [], more or [])
    run = name_step(run, step)
    set_flags()
    main = join_processes()
    be_strict(strict)
    from jaxrlhf.evaluate.report import Options

    options = Options(not no_judge, samples, beta, sizes_of(best_of), gold, overrides, judge)
    report, show = measure_file(run, rewardbench, options) if rewardbench else measure_run(run, options)
    if main:
        tell(report, options, as_json, show)


def measure_run(run: str, options: "Options") -> tuple[dict[str, Any], Callable[[Any], None]]:
    """(the report on a run, what prints it)."""
    from jaxrlhf.evaluate.report import evaluate_run, print_report

    return evaluate_run(run, options), print_report


def tell(report: dict[str, Any], options: "Options", as_json: bool, show: Callable[[Any], None]) -> None:
    """Prints the report, and keeps that of a run beside it; where that is not possible it says why."""
    from jaxrlhf.evaluate.kept import FOLDER, keep

    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        show(report)
    if "step" not in report:
        return
    try:
        path = keep(report, options.given())
    except OSError as error:
        typer.echo(f"{report['run']}/{FOLDER}: {error.strerror or error}; the evaluation is not kept", err=True)
        return
    if not as_json:
        typer.echo(f"\nkept as {path}, for jaxrlhf report")


def measure_file(model: str, file: str, options: "Options") -> tuple[dict[str, Any], Callable[[Any], None]]:
    """(the report on a file of RewardBench, what prints it). Raises ConfigError beside options of other measures."""
    from jaxrlhf.errors import ConfigError
    from jaxrlhf.evaluate.rewardbench import print_rewardbench, rewardbench_report

    if given := options.given():
        names = {"llm": "judge", "judge": "no-judge", "best_of": "best-of"}
        word = names.get(name := next(iter(given)), name)
        raise ConfigError(f"--rewardbench {file}: measures the file alone; expected no --{word}")
    return rewardbench_report(model, file), print_rewardbench


def sampling_of(first: list[str], more: list[str]) -> tuple[str, ...]:
    """The KEY=VALUE of --sampling and of the words behind it. Raises ConfigError for a word that is none."""
    from jaxrlhf.errors import ConfigError

    words, overrides = split_arguments([*first, *more])
    if more and not first:
        raise ConfigError(f"{more[0]}: expected one run, or --sampling before KEY=VALUE")
    if words:
        raise ConfigError(f"--sampling {words[0]}: expected KEY=VALUE, as in temperature=0.6")
    return tuple(overrides)


def sizes_of(text: str) -> tuple[int, ...]:
    """The numbers in "1,4,16". Raises ConfigError for anything else."""
    from jaxrlhf.errors import ConfigError

    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--best-of {text}: expected numbers of samples, as in 1,4,16,64")
    return tuple(sorted({int(part) for part in parts}))
