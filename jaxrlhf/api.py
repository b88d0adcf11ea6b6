"""jaxrlhf in a notebook or a script: the runs that the command trains, as functions.

    from jaxrlhf import api

    cfg = api.load_config("grpo.yaml", {"iterations": 20, "rewards.function": my_function})
    for step in api.iterate(cfg):
        print(step.number, step.metrics["score/mean"])
    print(api.sample(cfg.run_dir, ["the film is"], max_new_tokens=20))

Mistakes in a config raise ``ConfigError`` (a ValueError) whose text is one line each.
"""

import os
import queue
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jaxrlhf.config.load import parse
from jaxrlhf.config.overrides import Override, apply_override, split_override
from jaxrlhf.config.ranges import check_ranges
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.config.yaml_text import read_file, read_yaml
from jaxrlhf.errors import ConfigError, cut
from jaxrlhf.generate.config import GenerateConfig
from jaxrlhf.hosts import compiler_flags
from jaxrlhf.hosts.signals import Stop
from jaxrlhf.run.build import Run
from jaxrlhf.run.build import build as find_and_compose
from jaxrlhf.serve.scorer import Scorer
from jaxrlhf.serve.writer import Writer, as_record
from jaxrlhf.train import Step, run
from jaxrlhf.types import Role

__all__ = ["Config", "ConfigError", "Run", "Step", "build", "iterate", "load_config", "sample", "score", "train"]

Prompt = str | Sequence[Mapping[str, Any]]  # a text, or the messages of a conversation


def load_config(
    source: str | os.PathLike | Mapping[str, Any], overrides: Mapping[str, Any] | Sequence[str] = ()
) -> Config:
    """The config of one run, checked key by key.

    Args:
        source: a YAML file, or the same as nested dicts.
        overrides: ``{"optimizer.default.learning_rate": 1e-4}``, or texts as on the command line. In both, a function
            stands for its name, so that ``{"rewards.function": my_function}`` works; it has to be at the top level of
            a module, or of the notebook.

    Raises:
        ConfigError: an unknown key, a wrong type or a number out of range.
    """
    where = "config" if isinstance(source, Mapping) else os.fspath(source)
    tree = named(source) if isinstance(source, Mapping) else read_yaml(read_file(where), where)
    if isinstance(overrides, Mapping):
        edits = [Override(None, tuple(key.split(".")), value) for key, value in overrides.items()]
    else:
        edits = [split_override(text) for text in overrides]
    for edit in edits:
        apply_override(tree, edit._replace(value=named(edit.value, ".".join(edit.path))))
    return parse(tree, where, [edit.path for edit in edits])


def named(value: Any, where: str = "") -> Any:
    """``value`` with "module:name" in the place of each function in it, as YAML would say it."""
    if isinstance(value, Mapping):
        return {key: named(part, f"{where}.{key}".lstrip(".")) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [named(part, where) for part in value]
    if not callable(value):
        return os.fspath(value) if isinstance(value, os.PathLike) else value
    name = getattr(value, "__qualname__", "")
    if not name.isidentifier():
        raise ConfigError(f"{where}: {value!r}: expected a function with a name, at the top level of its module")
    return f"{value.__module__}:{name}"


def checked(cfg: object, function: str) -> Config:
    """``cfg``. Raises ConfigError where it is no config, but what load_config makes one from, or something else."""
    if isinstance(cfg, Config):
        return cfg
    raise ConfigError(f"{function}: {cut(repr(cfg))}: expected a Config, as load_config(...) gives it")


def checked_texts(texts: object, function: str, name: str) -> None:
    """Raises ValueError where one text stands in the place of a list of them, or one message in that of its list."""
    if isinstance(texts, (str, Mapping)) or not isinstance(texts, Collection):
        raise ValueError(f"{function}: {name}: {cut(repr(texts))}: expected a list of them")
    if any(isinstance(text, Mapping) for text in texts):
        raise ValueError(f"{function}: {name}: {cut(repr(texts))}: one conversation; expected a list of them")


def build(cfg: Config) -> Run:
    """The run without its weights: models' shapes, mesh, tokenizer and the recipe of the step.

    Raises ConfigError where models, data and devices do not fit together."""
    compiler_flags.prepare(checked(cfg, "build").deterministic)
    return find_and_compose(resolve_config(cfg))


def train(cfg: Config) -> str:
    """Trains to the end: "done", "interrupted" (Ctrl-C, or a notebook's stop button), "preempted" (SIGTERM) or "out of
    time" (max_run_duration).

    All four leave a checkpoint in ``cfg.run_dir``, and the same call goes on from it. Raises ConfigError before any
    work, FloatingPointError where a loss is not finite."""
    compiler_flags.prepare(checked(cfg, "train").deterministic)
    return run(cfg)


def iterate(cfg: Config) -> Iterator[Step]:
    """Trains as ``train`` does, and gives each iteration once its numbers are on the host.

    Leave the loop, or press stop, and the run is saved; the same call goes on from there. Training runs in a thread of
    its own and is at most two iterations ahead.

    Yields:
        Step(number, metrics, samples): ``metrics`` are floats, with those of an evaluation ("eval/...") where one
        follows the iteration; ``samples`` are rows of prompt, response and score where ``log.samples_every`` has some
        (held-out ones too). An evaluation before the first iteration has number 0.
    """
    compiler_flags.prepare(checked(cfg, "iterate").deterministic)
    if cfg.rewards.timeout is not None:
        asked = f"rewards.timeout: {cfg.rewards.timeout:g}"
        warnings.warn(f"{asked}: not kept by iterate, which trains in a thread; train keeps it", stacklevel=2)
    steps: queue.Queue[Step | BaseException | None] = queue.Queue(maxsize=1)
    stop = Stop()  # hears no signals: it is told

    def work() -> None:
        try:
            run(cfg, stop=stop, watch=lambda step: None if stop.asked else steps.put(step))
            steps.put(None)
        except BaseException as error:
            steps.put(error)

    thread = threading.Thread(target=work, name="training", daemon=True)
    thread.start()
    try:
        while (found := steps.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        stop.asked = "Ctrl-C"
        while thread.is_alive():
            drain(steps)
            thread.join(0.1)


def drain(steps: queue.Queue) -> None:
    """Throws away what waits in the queue, so that who wants to put something there goes on."""
    try:
        while True:
            steps.get_nowait()
    except queue.Empty:
        return


def sample(
    model: str,
    prompts: Sequence[Prompt],
    *,
    n: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    beta: float = 0.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    chat: bool = False,
) -> list[list[str]]:
    """``n`` responses to each prompt: ``found[i][j]`` is the j-th to ``prompts[i]``.

    Args:
        model: a run (RUN, RUN@best or RUN@STEP), a Hugging Face folder, gguf:FILE or a hub name.
        prompts: texts, or lists of messages.
        beta: of a run with Q heads: responses are sampled from policy * exp(beta * Q).
        chat: texts are a user's messages, and put into the model's chat template.

    The same arguments give the same responses. Raises ValueError where ``model`` is not a language model."""
    checked_texts(prompts, "sample", "prompts")
    cfg = GenerateConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        beta=beta,
        stop=tuple(stop),
    )
    check_ranges(cfg, "sample")
    compiler_flags.prepare()
    records = [as_record(prompt, chat) if isinstance(prompt, str) else {"messages": list(prompt)} for prompt in prompts]
    return [[one.text for one in found] for found in Writer(model, cfg, seed, n)(records)]


def score(model: str, prompts: Sequence[Prompt], responses: Sequence[str], role: Role = "reward") -> list[float]:
    """What a reward model says of each response, as it scores in training: behind its prompt, with an ending token.

    Args:
        model: a run (RUN, RUN@best or RUN@STEP), or a Hugging Face folder of a sequence classifier with one label.
        prompts: one for each response: a text, or the messages of a conversation.
        role: of a run: whose score.

    Raises ValueError where ``model`` gives no scores, or prompts and responses are not as many."""
    checked_texts(prompts, "score", "prompts")
    checked_texts(responses, "score", "responses")
    if len(prompts) != len(responses):
        raise ValueError(f"score: {len(prompts)} prompts and {len(responses)} responses: expected as many")
    compiler_flags.prepare()
    records = [
        {"prompt": prompt, "response": response}
        if isinstance(prompt, str)
        else {"messages": [*prompt, {"role": "assistant", "content": response}]}
        for prompt, response in zip(prompts, responses)
    ]
    return Scorer(model, role)(records)
