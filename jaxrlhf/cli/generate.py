"""``jaxrlhf generate``."""

from typing import Annotated, Any

import typer

from jaxrlhf.cli.setup import StepOption, StrictOption, be_strict, name_step, set_flags


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
    beta: Annotated[float, typer.Option(help="Of a run with Q heads: sample from policy * exp(beta * Q).")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Maximum number of new tokens.")] = 64,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a response; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same responses.")] = 0,
    system: Annotated[str | None, typer.Option(help="A system message, in the model's chat template.")] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Put prompts into the model's chat template; without prompts: a conversation."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per prompt, one per line.")] = False,
    step: StepOption = "",
    strict: StrictOption = False,
) -> None:
    """Sample responses to prompts, or hold a conversation (--chat)."""
    chat, prompts, files = chat or system is not None, prompt or [], file or []
    check_request(prompts, files, chat and not as_json, samples, seed)
    cfg = sampling(max_tokens, temperature, top_k, top_p, stop or [], beta)
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


def check_request(prompts: list[str], files: list[str], converses: bool, samples: int, seed: int) -> None:
    """Raises ConfigError where there is nothing to answer, or a number makes no sense."""
    from jaxrlhf.errors import ConfigError

    if not prompts and not files and not converses:
        raise ConfigError("generate: no prompts: expected --prompt TEXT, --file FILE (- is standard input), or --chat")
    ranges = {"--samples": (samples, 1, 4096), "--seed": (seed, 0, 2**31 - 1)}
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise ConfigError(
                f"{name}: {value}: expected a number in [{low}, {high}]; nearest: {min(max(value, low), high)}"
            )


def sampling(max_tokens: int, temperature: float, top_k: int, top_p: float, stop: list[str], beta: float) -> Any:
    """The GenerateConfig of the options. Raises ConfigError for a value out of its range."""
    from jaxrlhf.config.ranges import check_ranges
    from jaxrlhf.errors import ConfigError
    from jaxrlhf.generate.config import GenerateConfig

    if "" in stop:
        raise ConfigError("--stop: an empty text ends every response; expected one of a letter or more")
    cfg = GenerateConfig(
        max_new_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, beta=beta, stop=tuple(stop)
    )
    check_ranges(cfg, "command line")
    return cfg
