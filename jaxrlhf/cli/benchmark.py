"""``jaxrlhf benchmark``."""

import json
import re
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from jaxrlhf.cli.setup import set_flags, split_arguments


class Named(TyperGroup):
    """``jaxrlhf benchmark reverse`` is the command NAME, whose argument is reverse."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            return "NAME", self.commands["NAME"], args
        return super().resolve_command(ctx, args)


benchmarks = typer.Typer(
    cls=Named,
    help="Reproduce published results in miniature, and measure speed on this machine and what runs withstand.",
    no_args_is_help=True,
)


@benchmarks.command("list")
def list_benchmarks() -> None:
    """List the published results that can be reproduced."""
    from jaxrlhf.benchmarks import catalog
    from jaxrlhf.cli.discover import tell

    for name in catalog.names():
        found = catalog.find(name)
        after = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", found.after)  # links are for its page
        tell(name, f"{found.title} (after {after})")
    tell("jaxrlhf benchmark NAME reproduces one.")


@benchmarks.command("NAME")
def reproduce(
    name: Annotated[str, typer.Argument(metavar="", help="One of those that list names.", show_default=False)],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each method and control.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    out: Annotated[str, typer.Option(help="The folder of runs and results. Default: runs/benchmarks/NAME.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="The short twin, with a weaker signature.")] = False,
    publish: Annotated[
        bool, typer.Option("--publish", help="Copy README.md, results.json and the SVG to configs/benchmarks/NAME.")
    ] = False,
) -> None:
    """Reproduce a published result: train every method and control, and check the signature of the result.

    Exit code 0 only where every line of the signature holds. Finished runs in OUT are not repeated: the same command
    goes on after Ctrl-C."""
    import signal
    from pathlib import Path

    from jaxrlhf.benchmarks import catalog, figure
    from jaxrlhf.benchmarks.signature import verdicts
    from jaxrlhf.errors import ConfigError
    from jaxrlhf.hosts.exit_codes import EXIT_BROKEN
    from jaxrlhf.hosts.signals import Stop

    benchmark = catalog.find(name, quick, ["list", "bars", "throughput", "soak"])
    if quick and publish:
        raise ConfigError("--publish: --quick is given too; expected one of them")
    figure.need_matplotlib()
    folder = Path(out or f"runs/benchmarks/{name}{'-quick' if quick else ''}")
    with Stop(signal.SIGINT, signal.SIGTERM, leaves=True) as stop:
        set_flags()
        from jaxrlhf.benchmarks import results_page
        from jaxrlhf.benchmarks.reproduce import StoppedBySignal
        from jaxrlhf.benchmarks.reproduce import reproduce as run_cells

        try:
            done = run_cells(benchmark, range(first_seed, first_seed + seeds), folder, stop)
        except StoppedBySignal:
            typer.echo(f"{stop.asked}: stopped; the same command goes on")
            raise typer.Exit(stop.code) from None
        found = verdicts(benchmark.signature, done.results)
        results_page.print_results(benchmark, done.results, found)
        chosen = [("--seeds", seeds, 3), ("--first-seed", first_seed, 0)]
        words = [f" {option} {value}" for option, value, default in chosen if value != default]
        command = f"jaxrlhf benchmark {name}{''.join(words)}{' --quick' if quick else ''}"
        results_page.write_results(benchmark, done, found, folder, command)
        typer.echo(f"{folder}/README.md, results.json, {name}.svg, {name}.png")
        for path in results_page.publish(benchmark, folder) if publish else []:
            typer.echo(path)
    if not all(verdict.held for verdict in found):
        raise typer.Exit(EXIT_BROKEN)


@benchmarks.command()
def bars(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories, finished or not.")],
    config: Annotated[
        str | None, typer.Option(help="A config whose bars count in place of those of the run.", show_default=False)
    ] = None,
) -> None:
    """Hold runs against the published numbers that their configs name (the section bars).

    Exit code 0 only where every bar holds."""
    from etils import epath

    from jaxrlhf.config.load import load
    from jaxrlhf.errors import ConfigError
    from jaxrlhf.hosts.exit_codes import EXIT_BROKEN
    from jaxrlhf.log.bars import results
    from jaxrlhf.log.rows import read_rows

    missed = False
    for run in runs:
        source = epath.Path(config or f"{run}/config.yaml")
        if not (epath.Path(run) / "config.yaml").exists():
            raise ConfigError(f"{run}: no config.yaml; expected a run directory")
        if not (given := load(source, []).bars):
            raise ConfigError(f"{source}: bars: none; expected published numbers to hold the run against")
        for found in results(given, read_rows(run, "metrics")):
            typer.echo(f"{run}: {found}")
            missed |= not found.held
    if missed:
        raise typer.Exit(EXIT_BROKEN)


@benchmarks.command()
def throughput(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="The shapes of a YAML file, and overrides."),
    ] = None,
    algorithm: Annotated[str | None, typer.Option(help="grpo, ppo, dpo, kto, rm or sft. Default: grpo.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of each model. Default: 4.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Hidden size, a multiple of 64. Default: 256.")] = None,
    prompts: Annotated[
        int | None, typer.Option(help="Prompts (offline: pairs or demonstrations) an iteration.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Responses per prompt.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Tokens of a prompt. Default: 32.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Maximum tokens of a response. Default: 32.")] = None,
    reward: Annotated[
        str | None,
        typer.Option(help="host: a function between two programs; model: in the one program."),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Response lengths: dense (all maximal) or ragged (lognormal).")
    ] = "dense",
    steps: Annotated[int, typer.Option(help="Timed iterations.")] = 5,
    cost_growth: Annotated[
        bool, typer.Option("--cost-growth", help="Also time twice the samples, new tokens, layers.")
    ] = False,
    profile: Annotated[str | None, typer.Option(help="A folder for a perfetto trace of one more iteration.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time an iteration on random weights and random tokens, and say what limits it."""
    from jaxrlhf.errors import ConfigError

    paths, overrides = split_arguments(arguments)
    if len(paths) > 1:
        raise ConfigError(f"benchmark: {', '.join(paths)}: expected one config, or none and the shape options")
    if steps < 1:
        raise ConfigError(f"--steps: {steps}: expected 1 or more; nearest: 1")
    set_flags()
    from jaxrlhf.benchmarks.case import Shape, make_cases
    from jaxrlhf.benchmarks.report import print_report
    from jaxrlhf.benchmarks.throughput import measure

    shape = Shape(algorithm, layers, hidden, prompts, samples, prompt_tokens, new_tokens, reward)
    cases = make_cases(shape, paths[0] if paths else None, overrides, lengths, cost_growth)
    report = measure(cases, steps, profile)
    typer.echo(json.dumps(report)) if as_json else print_report(report)


@benchmarks.command()
def soak(
    algorithm: Annotated[list[str] | None, typer.Option(help="ppo or grpo, more than once. Default: both.")] = None,
    moments: Annotated[int, typer.Option(help="How often each of SIGKILL, SIGTERM and SIGINT comes.")] = 20,
    full_disks: Annotated[int, typer.Option(help="How often the disk is full for a while (Linux).")] = 0,
    processes: Annotated[int, typer.Option(help="Processes of a run.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the moments, the data and the runs.")] = 0,
    folder: Annotated[
        str | None, typer.Option(help="A new folder that stays. Default: one that goes if all is equal.")
    ] = None,
) -> None:
    """Kill and stop tiny runs at random moments, start them again, and compare each with an undisturbed one, bit by
    bit. Exit code 1: something differs."""
    from jaxrlhf.benchmarks.soak import soaked_in

    numbers = {"moments": (moments, 1), "full-disks": (full_disks, 0), "processes": (processes, 1)}
    for name, (value, least) in numbers.items():
        if value < least:
            from jaxrlhf.errors import ConfigError

            raise ConfigError(f"--{name}: {value}: expected {least} or more; nearest: {least}")
    found = soaked_in(folder, algorithm or ["ppo", "grpo"], moments, full_disks, processes, seed, typer.echo)
    from jaxrlhf.benchmarks.report import print_soaks

    print_soaks(found)
    if any(each.wrong for each in found):
        raise typer.Exit(1)
