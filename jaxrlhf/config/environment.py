"""What a run in an environment is made of: its spaces, and which keys go with one."""

import dataclasses
from collections.abc import Iterator

from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import Resolved
from jaxrlhf.errors import ConfigError, show
from jaxrlhf.models.config import MLP, ModelConfig
from jaxrlhf.rewards import environments
from jaxrlhf.rewards.environments import EnvironmentConfig, Spaces
from jaxrlhf.rewards.turns import function_problems

LEARNED = ("prompts", "preferences")  # sections of data that episodes and their segments fill


def spaces_of(cfg: Config) -> Spaces | None:
    """Those of the run's environment; None without one. Raises ConfigError where it can't be had."""
    if not cfg.acts:
        return None
    try:
        return environments.spaces_of(cfg.environment)
    except ValueError as error:
        raise ConfigError(f"environment.{error}") from None


def observing(cfg: Config, shape: ModelConfig) -> ModelConfig:
    """A resolved ``shape`` with the size of the observations that the run's environment shows, where it leaves that
    open."""
    spaces = spaces_of(cfg)
    if spaces is None or shape.observation_size:
        return shape
    return dataclasses.replace(shape, observation_size=spaces.observation)


def environment_problems(resolved: Resolved) -> Iterator[str]:
    """The environment can be had, the models are computed from its observations, and nothing asks for text."""
    cfg, name = resolved.cfg, resolved.cfg.algorithm_name
    shapes = {role: model.architecture for role, model in cfg.models.items() if model.architecture}
    yield from conversation_problems(resolved)
    if not cfg.acts:
        for role, shape in shapes.items():
            if shape.family == MLP:
                yield f"models.{role}.architecture.family: {MLP}: computed from observations; expected environment.id"
        return
    try:
        spaces = environments.spaces_of(cfg.environment)
    except ValueError as error:
        yield f"environment.{error}"
        return
    for role, shape in shapes.items():
        key = f"models.{role}.architecture"
        if shape.family != MLP:
            yield f"{key}.family: {shape.family}: reads tokens, and an environment shows numbers; nearest: {MLP}"
        elif shape.observation_size not in (0, spaces.observation):
            yield f"{key}.observation_size: {shape.observation_size}: nearest: {spaces.observation}, the environment's"
    for kind in resolved.kinds:
        if kind.name not in LEARNED:
            yield f"environment.id: {cfg.environment.id}: {name} reads {kind.name}, which are text; expected null"
    yield from text_problems(resolved)


def conversation_problems(resolved: Resolved) -> Iterator[str]:
    """An environment of text can be found, answers what an algorithm samples, and gives the scores alone."""
    cfg, defaults = resolved.cfg, EnvironmentConfig()
    if not cfg.converses:
        for name in ("max_turns", "turn_tokens", "context_widths"):
            if (value := getattr(cfg.environment, name)) != (default := getattr(defaults, name)):
                wrong = f"environment.{name}: {value}: there is no environment.function whose turns it is of"
                yield f"{wrong}; expected {show(default)}"
        return
    yield from function_problems(cfg.environment)
    shown = f"environment.function: {cfg.environment.function}"
    if not resolved.algorithm.online:
        yield f"{shown}: {cfg.algorithm_name} samples no responses to answer; expected null"
    if cfg.rewards.on_host:
        key = "function" if cfg.rewards.function is not None else "functions"
        yield f"rewards.{key}: given, and {shown} gives the rewards; expected {'null' if key == 'function' else '{}'}"
    if cfg.generate.min_new_tokens:
        least = cfg.generate.min_new_tokens
        yield f"generate.min_new_tokens: {least}: of a response, and {shown} makes several of one row; expected 0"
    room = cfg.generate.max_new_tokens
    if (cfg.environment.turn_tokens or 0) > room:
        wrong = f"environment.turn_tokens: {cfg.environment.turn_tokens}: more than generate.max_new_tokens"
        yield f"{wrong}; nearest: {room}"


def text_problems(resolved: Resolved) -> Iterator[str]:
    """Keys of text that are given although the run acts in an environment."""
    cfg = resolved.cfg
    given = {
        "tokenizer.init_from": (cfg.tokenizer.init_from, None),
        "tokenizer.train_vocab_size": (cfg.tokenizer.train_vocab_size, None),
        "rewards.function": (cfg.rewards.function, None),
        "rewards.functions": ([*cfg.rewards.functions], []),
        "data.chat": (cfg.data.chat, None),
        "data.eval_prompts": (cfg.data.eval_prompts, None),
        "generate.stop": ([*cfg.generate.stop], []),
        "eval.gold": (cfg.eval.gold, None),
    }
    for key, (value, neutral) in given.items():
        if value != neutral:
            shown = show(value if isinstance(value, (str, int, list)) else "given")
            yield f"{key}: {shown}: of text, and the run acts in environment.id; expected {show(neutral)}"
    if resolved.algorithm.finish(cfg.algorithm) is not None:
        yield "algorithm.normalize_samples: of text, and the run acts in environment.id; expected 0"
