"""The ``jaxrlhf`` command.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once. Exit codes: 0 done, 1 training
broke down, 2 a mistake in the config or the input (both one line on stderr), 75 stopped by SIGTERM (everything is
saved: launchers run the same command again), 130 stopped by Ctrl-C (``train`` saves too; a second one stops at once).
"""

import io
import json
import logging
import os
import signal
import sys
from typing import Annotated

import typer

from jaxrlhf import __version__
from jaxrlhf.cli import discover
from jaxrlhf.cli.exits import (
    EXIT_BROKEN,
    EXIT_INTERRUPTED,
    EXIT_MISTAKE,
    EXIT_PREEMPTED,
    abandon,
    by_the_system,
    raised_here,
)
from jaxrlhf.cli.setup import (
    Arguments,
    Run,
    Step,
    Strict,
    be_strict,
    join,
    load_joined,
    name_step,
    need_room,
    need_run,
    set_flags,
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(discover.config, name="config")
app.add_typer(discover.configs, name="configs")


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


@app.command()
def train(
    arguments: Arguments,
    check_only: Annotated[
        bool,
        typer.Option("--check", help="Train nothing and write nothing: show config, rows, steps and memory."),
    ] = False,
    strict: Strict = False,
) -> None:
    """Train. Ctrl-C or SIGTERM saves and stops; the same command resumes."""
    if check_only:
        configs = load_joined(arguments)
        be_strict(strict)
        from jaxrlhf.hosts import processes
        from jaxrlhf.plan.dry_run import dry_run

        for line in dry_run(configs):  # by every process: data have to be the same on all
            if processes.is_main():
                typer.echo(line)
        return
    from jaxrlhf.hosts.signals import Stop

    with Stop(signal.SIGINT, signal.SIGTERM, leaves=True) as stop:
        configs = load_joined(arguments)
        be_strict(strict)
        import jax

        from jaxrlhf.config.check import check
        from jaxrlhf.config.yaml_text import decode, read_file
        from jaxrlhf.hosts import processes

        for path, cfg in configs:
            check(cfg, jax.device_count(), path)
        from jaxrlhf.train import run

        for number, (path, cfg) in enumerate(configs):
            # several processes stop together, in the next run
            if number and stop.asked and not processes.several():
                typer.echo(f"{stop.asked}: stopped before {path}; the same command resumes")
                raise typer.Exit(stop.code)
            ended = run(cfg, decode(read_file(path), path), stop)
            if ended != "done":
                raise typer.Exit(0 if ended == "out of time" else stop.code)


@app.command()
def preflight(arguments: Arguments) -> None:
    """Check what a run needs before it starts: devices, mesh, run directory, network, memory, tokenizer, weights, data,
    reward functions. Exit code 2 if a check fails."""
    configs = load_joined(arguments)
    from jaxrlhf.launch.preflight import preflight as look

    if not look(configs):
        raise typer.Exit(EXIT_MISTAKE)


@app.command()
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
    paths = [argument for argument in arguments or [] if "=" not in argument]
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

    overrides = [argument for argument in arguments or [] if "=" in argument]
    cfg = load(paths[0], overrides if slices is None else [*overrides, f"mesh.slices={slices}"])
    made = make(cfg, topology, cfg.mesh.slices, load_beside(paths[0]), not estimate, paths[0])
    typer.echo(json.dumps(report.as_json(made))) if as_json else report.print_plan(made)


benchmarks = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)
app.add_typer(benchmarks, name="benchmark")


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

    paths = [argument for argument in arguments or [] if "=" not in argument]
    if len(paths) > 1:
        raise ConfigError(f"benchmark: {', '.join(paths)}: expected one config, or none and the shape options")
    if steps < 1:
        raise ConfigError(f"--steps: {steps}: expected 1 or more; nearest: 1")
    set_flags()
    from jaxrlhf.benchmarks.case import Shape, make_cases
    from jaxrlhf.benchmarks.report import print_report
    from jaxrlhf.benchmarks.throughput import measure

    shape = Shape(algorithm, layers, hidden, prompts, samples, prompt_tokens, new_tokens, reward)
    overrides = [argument for argument in arguments or [] if "=" in argument]
    cases = make_cases(shape, paths[0] if paths else None, overrides, lengths, cost_growth)
    report = measure(cases, steps, profile)
    typer.echo(json.dumps(report)) if as_json else print_report(report)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A run, RUN@best, a Hugging Face folder, gguf:FILE or a hub name.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(help="One prompt per line, or JSONL with prompt or messages; - is standard input. Repeatable."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Responses per prompt.")] = 1,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set with this total probability.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Maximum number of new tokens.")] = 64,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a response; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same responses.")] = 0,
    system: Annotated[str | None, typer.Option(help="A system message, in the model's chat template.")] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Put prompts into the model's chat template; without prompts: a conversation."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per prompt, one per line.")] = False,
    step: Step = "",
    strict: Strict = False,
) -> None:
    """Sample responses to prompts, or hold a conversation (--chat)."""
    from jaxrlhf.config.ranges import check_ranges
    from jaxrlhf.errors import ConfigError
    from jaxrlhf.generate.config import GenerateConfig

    chat, prompts, files = chat or system is not None, prompt or [], file or []
    if not prompts and not files and (not chat or as_json):
        raise ConfigError("generate: no prompts: expected --prompt TEXT, --file FILE (- is standard input), or --chat")
    ranges = {"--samples": (samples, 1, 4096), "--seed": (seed, 0, 2**31 - 1)}
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise ConfigError(
                f"{name}: {value}: expected a number in [{low}, {high}]; nearest: {min(max(value, low), high)}"
            )
    if "" in (stop or ()):
        raise ConfigError("--stop: an empty text ends every response; expected one of a letter or more")
    cfg = GenerateConfig(
        max_new_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, stop=tuple(stop or ())
    )
    check_ranges(cfg, "command line")
    model = name_step(model, step)
    set_flags()
    be_strict(strict)
    from jaxrlhf.serve.dialogue import converse, print_responses, read_prompts
    from jaxrlhf.serve.writer import Writer

    if not prompts and not files:
        converse(Writer(model, cfg, seed, width=256), system)
        return
    records = read_prompts(prompts, files, chat, system)
    print_responses(Writer(model, cfg, seed, samples), records, as_json)


@app.command()
def evaluate(
    run: Run,
    judge: Annotated[bool, typer.Option(help="Also score with the outside judge, which training never uses.")] = True,
    samples: Annotated[int, typer.Option(min=0, help="Prompts to show with their responses.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    step: Step = "",
    strict: Strict = False,
) -> None:
    """Measure a run on held-out data."""
    need_run(run)
    run = name_step(run, step)
    set_flags()
    main = join()
    be_strict(strict)
    from jaxrlhf.evaluate.report import evaluate_run, print_report

    report = evaluate_run(run, judge, samples)
    if not main:
        return
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        print_report(report)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run directory (RUN, RUN@best, RUN@40), or gguf:FILE.")],
    to: Annotated[str, typer.Option(help="The folder to write.")],
    role: Annotated[str, typer.Option(help="Whose weights: policy, reward, value, ...")] = "policy",
    step: Step = "",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a folder that is not empty; do not ask.")] = False,
    strict: Strict = False,
) -> None:
    """Write the weights of one role, or of a GGUF file, as a Hugging Face folder, which transformers loads."""
    name = name_step(run, step)
    if run.startswith("gguf:"):
        need_room(to, force)
        from jaxrlhf.serve.writer import export_model

        export_model(run, to)
        typer.echo(f"{run} written to {to}")
        return
    need_run(run)
    main = join()
    be_strict(strict)
    from jaxrlhf.hosts import processes
    from jaxrlhf.run.export import export as export_role

    processes.on_main(lambda: need_room(to, force))
    which, notes = export_role(name, role, to)
    if main:
        typer.echo("\n".join([f"{role} of {run}, {which}, written to {to}", *notes]))


app.command()(discover.init)
app.command()(discover.metrics)  # after the commands that run something: help lists them in this order


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
