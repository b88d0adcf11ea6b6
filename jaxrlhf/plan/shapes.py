"""The shapes of a run's models without their weights: from what is here, or from what is known of what is not."""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from etils import epath

from jaxrlhf.config.environment import observing, spaces_of
from jaxrlhf.config.load import parse
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import Resolved
from jaxrlhf.config.yaml_text import read_yaml
from jaxrlhf.errors import ConfigError
from jaxrlhf.generate import sampler as samplers
from jaxrlhf.log.run_dir import made_by, split_step
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.files import gguf, hf_config, hf_folder
from jaxrlhf.models.files.published import SHAPES, published, published_file
from jaxrlhf.models.parameters import padded_vocab
from jaxrlhf.plan.weights import active, held
from jaxrlhf.run import saved_run
from jaxrlhf.run.build import Blueprint, draw
from jaxrlhf.run.origins import Weights, base_role, origin
from jaxrlhf.run.verified_steps import committed
from jaxrlhf.types import Role

HUB_SECONDS = 5  # for the hub to answer
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Found(NamedTuple):
    """A model's shape, and where it was found."""

    config: ModelConfig
    source: str


def blueprint(resolved: Resolved, mesh, beside: Mapping[str, Config]) -> tuple[Blueprint, list[str]]:
    """The config ready to compile, and what to tell of where shapes come from.

    ``beside``: run directory -> the config that makes it, of runs that may not be there yet. Token ids are made up:
    a program depends on their number only. Raises ConfigError where a shape is known nowhere, or does not fit."""
    cfg = resolved.cfg
    if cfg.iterations is None:  # programs have the same shapes whenever their schedules end
        cfg = dataclasses.replace(cfg, iterations=1, epochs=None)
        resolved = dataclasses.replace(resolved, cfg=cfg)
    found = {role: find_shape(cfg, base_role(cfg, role), beside) for role in resolved.roles.heads}
    weights = {role: Weights("new", None, shape.config, "lm") for role, shape in found.items()}
    first = found.get("policy") or next(iter(found.values()))
    rows, copies = padded_vocab(first.config), cfg.batch.samples_per_prompt
    sampler = samplers.make_sampler(cfg.generate, (1,), 0, [], rows, copies)
    return draw(resolved, mesh, weights, sampler), [
        f"{role}: {shape.source}{counted_experts(shape.config)}" for role, shape in found.items()
    ]


def counted_experts(shape: ModelConfig) -> str:
    """What to say of a mixture's parameters: how many there are, and how many compute one token."""
    if not shape.num_experts:
        return ""
    every, some = held(shape, "lm", 1) / 1e9, active(shape, "lm") / 1e9
    chosen = f"{shape.experts_per_token} of {shape.num_experts} experts"
    return f"; {every:.3g}B parameters, of which {some:.3g}B compute a token: {chosen}"


def find_shape(cfg: Config, role: Role, beside: Mapping[str, Config], seen: tuple[str, ...] = ()) -> Found:
    """The shape at the end of the role's chain of origins, through runs that start from other runs."""
    model, path = origin(cfg, role), origin(cfg, role).init_from or ""
    if model.architecture is not None:
        shape = resolve(model.architecture, model.architecture.vocab_size or vocabulary(cfg, beside))
        return Found(observing(cfg, shape), "random")
    if saved_run.is_run(path) and committed(split_step(path)[0]):
        step, extra = saved_run.read_extra(path)
        there = saved_run.find_role(extra["models"], role)
        return Found(saved_run.model_of(extra["models"][there])[0], f"{path}, step {step}")
    if (maker := maker_of(path, beside)) is not None and path not in seen:
        there = saved_run.find_role(dict.fromkeys(maker.models), role)
        made = find_shape(maker, base_role(maker, there), beside, (*seen, path))
        return Found(made.config, f"{path}, not there yet, which starts from {made.source}")
    if (shape := shape_of(path)) is not None:
        return shape
    if role != "policy" and "policy" in cfg.models and base_role(cfg, "policy") == "policy":
        other = find_shape(cfg, "policy", beside, (*seen, path))
        return Found(other.config, f"{path} is not there: ASSUMED to be shaped like the policy ({other.source})")
    raise ConfigError(
        f"models.{role}.init_from: {path}: no folder, no run, no config that makes it, and not among the published "
        f"shapes ({', '.join(sorted(SHAPES))}); expected one, or models.{role}.architecture"
    )


def maker_of(run_dir: str, beside: Mapping[str, Config]) -> Config | None:
    """The config of a run that has saved nothing yet: the one in its directory, else the one that will make it."""
    run_dir, _ = split_step(run_dir)
    written = epath.Path(run_dir) / "config.yaml" if run_dir else None
    if written is not None and written.exists():
        return parse(read_yaml(written.read_text(), str(written)), str(written))
    return beside.get(made_by(run_dir, beside) or "")


def shape_of(name: str) -> Found | None:
    """The shape of a folder, a GGUF file or a model of the hub: what lies here, else the hub, else the table."""
    if name.startswith(gguf.PREFIX):
        file = name.removeprefix(gguf.PREFIX)
        if not os.path.isfile(os.path.expanduser(file)):
            model = published_file(file)
            return Found(resolve(SHAPES[model]), f"{name} is not there: published shape of {model}") if model else None
        return Found(hf_config.read_config(gguf.unpack(file))[0], name)
    if epath.Path(name).expanduser().is_dir():
        return Found(hf_config.read_config(epath.Path(name).expanduser())[0], name)
    if (raw := on_the_hub(name)) is not None:
        return Found(hf_config.parse_config(raw, f"{name}/config.json")[0], f"{name}, config.json of the hub")
    known = published(name)
    return known and Found(known, f"{name}, published shape (no cache, no hub)")


def on_the_hub(name: str) -> dict[str, Any] | None:
    """config.json of a model of the hub, from the cache or fetched (once, without retries); None where it can't be had.

    What comes next is the table, so every failure is one: offline, gated, no such model, no name of a model."""
    if not HUB_NAME.fullmatch(name):
        return None
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return hf_folder.read_json(epath.Path(cached).parent, "config.json")
    try:
        session, url = huggingface_hub.get_session(), huggingface_hub.hf_hub_url(name, "config.json")
        headers = huggingface_hub.utils.build_hf_headers()
        answer = session.get(url, headers=headers, timeout=HUB_SECONDS, follow_redirects=True)
        found = answer.json() if answer.status_code == 200 else None
    except Exception:
        return None
    return found if isinstance(found, dict) else None


def vocabulary(cfg: Config, beside: Mapping[str, Config]) -> int:
    """Tokens of the run's tokenizer: those that are asked for, else as many as its model has rows for."""
    if (spaces := spaces_of(cfg)) is not None:
        return spaces.actions + 1  # and EOS
    if cfg.tokenizer.train_vocab_size:
        return cfg.tokenizer.train_vocab_size
    named = cfg.tokenizer.init_from or ""
    if (maker := maker_of(named, beside)) is not None:
        return vocabulary(maker, beside)
    if (shape := shape_of(named)) is not None:
        return shape.config.vocab_size
    raise ConfigError(f"tokenizer.init_from: {named}: can't be read here; expected architecture.vocab_size")


def configs_by_run(configs: Iterable[Config]) -> dict[str, Config]:
    """Run directory -> the config that makes it."""
    return {cfg.run_dir: cfg for cfg in configs}
