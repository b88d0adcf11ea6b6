"""What is timed: a config, of a file or of the shape options, made ready to run without weights or data."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import jax

from jaxrlhf.algorithm import TEACHER
from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.benchmarks.reward import FUNCTION
from jaxrlhf.benchmarks.rows import Lengths, countdown, response_lengths
from jaxrlhf.config.check import check
from jaxrlhf.config.load import load, load_beside, parse
from jaxrlhf.config.overrides import apply_override, split_override
from jaxrlhf.config.record import Config
from jaxrlhf.config.strict import suggest
from jaxrlhf.data.batch_kinds import DATA_KINDS
from jaxrlhf.errors import ConfigError
from jaxrlhf.plan.shapes import blueprint, configs_by_run
from jaxrlhf.rewards.functions import RewardsConfig
from jaxrlhf.run.batch_shapes import batch_shapes
from jaxrlhf.run.build import Blueprint, draw
from jaxrlhf.sharding import is_pmap, make_mesh
from jaxrlhf.types import Batch

HEAD, VOCAB = 64, 8192  # features of a head; tokens
# algorithm -> its section, its rows (prompts, pairs, demonstrations), responses to a prompt, where its reward is
KNOWN: dict[str, tuple[dict[str, Any], int, int, str]] = {
    "grpo": ({"kl_coef": 0.04, "num_epochs": 1}, 8, 8, "host"),
    "ppo": ({"num_epochs": 4}, 64, 1, "model"),
    "ppo_lagrangian": ({"num_epochs": 4}, 64, 1, "model"),
    **dict.fromkeys(("raft", "online_dpo"), ({}, 8, 8, "host")),
    **dict.fromkeys(("dpo", "simpo", "orpo"), ({}, 32, 1, "")),
    "kto": ({}, 32, 1, ""),
    **dict.fromkeys(("ilql", "fqi", "mc_returns", "bc", "rm_ratings", "rm_ties", "cm"), ({}, 32, 1, "")),
    "distill": ({}, 64, 1, ""),
    "distill_data": ({}, 32, 1, ""),
    "rm": ({}, 32, 1, ""),
    "sft": ({}, 32, 1, ""),
}
ALONE = {"rm": "reward", "rm_ratings": "reward", "rm_ties": "reward", "cm": "cost"}  # algorithm -> its one model
DOUBLED = ("samples", "new tokens", "layers")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the options say of a run that no file describes; None: the default."""

    algorithm: str | None = None
    layers: int | None = None
    hidden: int | None = None
    prompts: int | None = None
    samples: int | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    reward: str | None = None


class Case(NamedTuple):
    """A config ready to compile and run on random rows."""

    drawn: Blueprint
    sources: list[str]  # where the shape of each role was found
    shapes: Batch  # of what an iteration is given
    prompt: int  # tokens of a prompt
    room: int  # tokens of a response at most
    lengths: Lengths


def make_cases(shape: Shape, path: str | None, overrides: Sequence[str], lengths: str, growth: bool) -> list[Case]:
    """The case that is asked for; with ``growth`` behind it those where one of DOUBLED is twice as much.

    Raises ConfigError, in one line, for all that is wrong with any of them; nothing is compiled."""
    if lengths not in get_args(Lengths):
        raise ConfigError(f"--lengths: {lengths}: {suggest(lengths, get_args(Lengths))}")
    if path is None:
        cfg, source, beside = shaped(shape, overrides), "benchmark", []
    else:
        given = [field.name for field in dataclasses.fields(shape) if getattr(shape, field.name) is not None]
        if given:
            option = given[0].replace("_", "-")
            raise ConfigError(
                f"--{option}: {getattr(shape, given[0])}: {path} says it; expected KEY=VALUE of the config"
            )
        cfg, source, beside = load(path, overrides), path, load_beside(path)
    cfg = without_world(cfg)
    if cfg.acts:
        raise ConfigError(f"{source}: environment.id: {cfg.environment.id}: only text is timed; expected null")
    if cfg.converses:
        shown = f"{source}: environment.function: {cfg.environment.function}"
        raise ConfigError(f"{shown}: only single responses are timed; expected null")
    made = blueprint(check(cfg, jax.device_count(), source), make_mesh(cfg.mesh), configs_by_run(beside))
    case = ready(*made, lengths)  # type: ignore[arg-type]
    return [case, *(doubled(case, what) for what in DOUBLED)] if growth else [case]


def without_world(cfg: Config) -> Config:
    """``cfg`` with a reward function that needs no data, and responses that no token ends: their lengths are given."""
    rewards = RewardsConfig(FUNCTION, overlap=cfg.rewards.overlap) if cfg.rewards.on_host else cfg.rewards
    generate = dataclasses.replace(cfg.generate, min_new_tokens=cfg.generate.max_new_tokens)
    return dataclasses.replace(cfg, rewards=rewards, generate=generate)


def ready(drawn: Blueprint, sources: list[str], lengths: Lengths) -> Case:
    """The case of a drawn config: its longest prompts, and responses of the lengths asked for."""
    cfg = drawn.cfg
    shapes = list(batch_shapes(drawn.resolved, drawn.mesh))[-1]
    sampling = drawn.algorithm.online
    if shapes.prompts is None:
        prompt = min(max(cfg.data.prompt_buckets), cfg.data.max_length // 2)
    else:
        prompt = shapes.prompts.tokens.shape[1]
    room = cfg.generate.max_new_tokens if sampling else cfg.data.max_length - prompt
    if lengths == "ragged" and sampling:
        if is_pmap(drawn.mesh):
            raise ConfigError("--lengths: ragged: mesh.style pmap has no rows of its own to end; expected dense")
        rows = cfg.batch.prompts_per_step * cfg.batch.samples_per_prompt
        ends = countdown(response_lengths(rows, room, lengths, cfg.seed))
        drawn = draw(
            drawn.resolved, drawn.mesh, drawn.weights, drawn.sampler._replace(stops=(*drawn.sampler.stops, ends))
        )
    return Case(drawn, sources, shapes, prompt, room, lengths)


def doubled(case: Case, what: str) -> Case:
    """``case`` with twice as many samples (offline: rows), new tokens (offline: those behind the prompt) or layers."""
    drawn, cfg, weights = case.drawn, case.drawn.cfg, case.drawn.weights
    sampling = drawn.algorithm.online
    batch, generate, data = cfg.batch, cfg.generate, cfg.data
    if what == "samples":
        keys = ["samples_per_prompt"] if sampling else [kind.rows_key for kind in drawn.resolved.kinds]
        batch = dataclasses.replace(batch, **{key: 2 * getattr(batch, key) for key in keys})
    elif what == "new tokens":
        most = 2 * generate.max_new_tokens
        generate = dataclasses.replace(generate, max_new_tokens=most, min_new_tokens=most)
        data = dataclasses.replace(data, max_length=data.max_length if sampling else case.prompt + 2 * case.room)
    else:
        deeper = lambda model: dataclasses.replace(
            model, num_layers=2 * model.num_layers, layer_types=2 * model.layer_types
        )
        weights = {role: found._replace(config=deeper(found.config)) for role, found in weights.items()}
    cfg = dataclasses.replace(cfg, batch=batch, generate=generate, data=data)
    resolved = check(cfg, jax.device_count(), f"--cost-growth: twice the {what}")
    copies, room = batch.samples_per_prompt, generate.max_new_tokens
    sampling_now = drawn.sampler.sampling._replace(min_new_tokens=room)
    sampler = drawn.sampler._replace(sampling=sampling_now, max_new_tokens=room, samples_per_prompt=copies)
    sampler = sampler._replace(stops=sampler.stops[: len(generate.stop)])  # without the countdown of the case itself
    again = ready(draw(resolved, drawn.mesh, weights, sampler), case.sources, case.lengths)
    return again._replace(prompt=case.prompt, room=again.room + again.prompt - case.prompt)


# ---- a config of the options ----------------------------------------------------------------------------------------


def shaped(shape: Shape, overrides: Sequence[str]) -> Config:
    """The config of a Llama of the options' shape, with ``overrides`` applied. Raises ConfigError."""
    name = shape.algorithm or "grpo"
    if name not in KNOWN:
        raise ConfigError(f"--algorithm: {name}: {suggest(name, [*KNOWN])}; others by their config")
    section, rows, copies, reward = KNOWN[name]
    sizes = {"layers": 4, "hidden": 256, "prompts": rows, "samples": copies, "prompt_tokens": 32, "new_tokens": 32}
    sizes |= {key: value for key in sizes if (value := getattr(shape, key)) is not None}
    check_sizes(sizes, name)
    if shape.reward and shape.reward not in (("host", "model") if reward else ()):
        expected = suggest(shape.reward, ["host", "model"]) if reward else f"{name} asks for none; leave it out"
        raise ConfigError(f"--reward: {shape.reward}: {expected}")
    tree = tree_of(name, section, sizes, shape.reward or reward)
    edits = [split_override(text) for text in overrides]
    for edit in edits:
        if edit.target is not None:
            raise ConfigError(f"command line: {edit.target}:{'.'.join(edit.path)}: there is one config; leave the name")
        apply_override(tree, edit)
    return parse(tree, "benchmark", [edit.path for edit in edits])


def check_sizes(sizes: dict[str, int], name: str) -> None:
    """Raises ConfigError for the first size that makes no model and no batch."""
    for key, value in sizes.items():
        if value < 1:
            raise ConfigError(f"--{key.replace('_', '-')}: {value}: expected 1 or more; nearest: 1")
    if sizes["hidden"] % HEAD:
        nearest = max(HEAD, round(sizes["hidden"] / HEAD) * HEAD)
        raise ConfigError(f"--hidden: {sizes['hidden']}: expected a multiple of {HEAD}, a head; nearest: {nearest}")
    if not ALGORITHMS[name].online and sizes["samples"] != 1:
        raise ConfigError(f"--samples: {sizes['samples']}: {name} samples nothing; expected 1, and more --prompts")


def tree_of(name: str, section: dict[str, Any], sizes: dict[str, int], reward: str) -> dict[str, Any]:
    """The config as YAML would have it. Rows of data are a prompt and a response long."""
    heads, longest = sizes["hidden"] // HEAD, sizes["prompt_tokens"] + sizes["new_tokens"]
    architecture = {
        "vocab_size": VOCAB,
        "hidden_size": sizes["hidden"],
        "num_layers": sizes["layers"],
        "num_heads": heads,
        "num_kv_heads": heads // 3 if heads % 3 == 0 else heads,
        "mlp_size": sizes["hidden"] * 8 // 3 // 64 * 64,
        "max_positions": 2 * longest,
    }
    models: dict[str, Any] = {ALONE.get(name, "policy"): {"architecture": architecture}}
    if reward == "model":
        models["reward"] = {"init_from": "policy"}
    if name == "ppo_lagrangian":
        models["cost"] = {"init_from": "policy"}
    if name in ("distill", "distill_data"):
        models[TEACHER] = {"init_from": "policy"}
    somewhere = {"path": "random"}
    return {
        "run_dir": "benchmark",
        "iterations": 1000,
        "algorithm": {"name": name, **section},
        "models": models,
        "tokenizer": {"init_from": "random"},
        "data": {
            **dict.fromkeys((kind.name for kind in DATA_KINDS.values()), somewhere),
            "prompt_buckets": [sizes["prompt_tokens"]],
            "max_length": longest,
            "pack": False,
        },
        "batch": {
            **dict.fromkeys((kind.rows_key for kind in DATA_KINDS.values()), sizes["prompts"]),
            "samples_per_prompt": sizes["samples"],
        },
        "generate": {"max_new_tokens": sizes["new_tokens"]},
        "rewards": {"function": FUNCTION if reward == "host" else None},
    }
