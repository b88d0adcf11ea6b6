"""Going on with a run: what its config may say otherwise than before, and what to say where its state does not fit."""

import contextlib
import functools
import json

import jax
import numpy as np
from jax import Array

from jaxrlhf.config.load import as_tree, parse
from jaxrlhf.config.members import grader_of
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import Resolved
from jaxrlhf.config.yaml_text import flat, read_yaml
from jaxrlhf.errors import ConfigError
from jaxrlhf.errors import show as cut_short
from jaxrlhf.optim import OptimizerConfig
from jaxrlhf.run.saved_run import SavedRuns
from jaxrlhf.types import Role

# keys whose effect is in the checkpoint: another value would be ignored, or would not fit it
FIXED = ("algorithm.name", "models.", "precision.params", "seed", "tokenizer.", "data.chat", "environment.id")
FREE = (".trunk_gradient",)  # endings of keys that are not among them
OF_DATA = ("data.", "batch.", "environment.starts")  # keys that decide, with the data, which rows come when
OF_STATE = ("algorithm.", "optimizer.", "precision.")  # keys that decide which arrays a state has


def changes_since_saved(saved_runs: SavedRuns, resolved: Resolved) -> list[str]:
    """What the config says otherwise than at the run's last checkpoint, as "key: old -> new".

    Raises ConfigError where one of the keys is FIXED, says how many rows of its data an iteration takes, or gives
    a role that learns another optimizer."""
    cfg = resolved.cfg
    if (own := saved_runs.own_extra(cfg.run_dir)) is None:
        return []
    step, extra = own
    changed = changed_keys(cfg, extra["config"])
    rows = tuple(f"batch.{kind.rows_key}" for kind in resolved.kinds)
    for key in changed:
        if key.startswith(FIXED) and not key.endswith(FREE):
            raise ConfigError(misfit(cfg, step, {key: changed[key]}))
    for key in changed:
        if key in rows:
            raise ConfigError(misfit(cfg, step, {key: changed[key]}, "its place in the data is counted by it"))
    for role in resolved.roles.trained:
        old, new = named_optimizer(settings(extra["config"]), role), cfg.optimizer_of(role).name
        if old != new:
            keys = [f"optimizer.{row}.name" for row in (role, grader_of(role), "default")]
            key = next((key for key in keys if key in changed), keys[0])
            raise ConfigError(misfit(cfg, step, {key: (old, new)}, "another optimizer keeps other moments"))
    return [f"{key}: {show(old)} -> {show(new)}" for key, (old, new) in changed.items()]


def named_optimizer(keys: dict[str, object], role: Role) -> object:
    """The name of the role's optimizer in a config's dotted ``keys``, as Config.optimizer_of finds its row."""
    names = [keys.get(f"optimizer.{row}.name") for row in (role, grader_of(role), "default")]
    return next((name for name in names if name), OptimizerConfig.name)


def misfit(cfg: Config, step: int, changed: dict[str, tuple], why: str = "") -> str:
    """One line on keys that a run can't change, given as {key: (old, new)}, and the way out."""
    (key, (old, new)), *more = changed.items()
    also = "".join(f", or {other}: {show(was)} -> {show(now)}" for other, (was, now) in more)
    reason = f", and {why}" if why else ""
    return (
        f"{key}: {show(new)}: the run in {cfg.run_dir} is at step {step} with {show(old)}{also}{reason}; expected the "
        f"same, or another run_dir (with init_from: {cfg.run_dir} it starts from these weights)"
    )


def show(value: object) -> str:
    """A text whole, since paths often differ at their ends alone; anything else cut short."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else cut_short(value)


@contextlib.contextmanager
def explained(cfg: Config, step: int, saved: str, keys: tuple[str, ...], why: str):
    """Where the block raises because what was saved does not fit the config: a ConfigError that names what changed.

    ``saved``: the config of the checkpoint; ``keys``: how keys begin that may be the reason. An error for which there
    is no such key goes through."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        changed = {key: values for key, values in changed_keys(cfg, saved).items() if key.startswith(keys)}
        changed = {key: values for key, values in changed.items() if not key.startswith(("data.eval_", "data.cache"))}
        if not changed:
            raise
        raise ConfigError(misfit(cfg, step, changed, why)) from error


def with_new_controls(resolved: Resolved, saved: str, controls: dict[str, Array]) -> dict[str, Array]:
    """A checkpoint's ``controls`` (PPO's KL coefficient), but those that the config lets begin otherwise than the saved
    config does: they begin anew, where the config says."""
    try:
        before = parse(read_yaml(saved, "config"), "config")
    except ConfigError:  # of an older version
        return controls
    controls_of = resolved.algorithm.controls
    old, new = controls_of(before.algorithm), controls_of(resolved.cfg.algorithm)
    changed = {name: new[name] for name in controls if not np.array_equal(old[name], new[name])}
    return controls | {name: jax.device_put(value, controls[name].sharding) for name, value in changed.items()}


def changed_keys(cfg: Config, saved: str) -> dict[str, tuple[object, object]]:
    """Dotted key -> (old, new) of what ``cfg`` says otherwise than the saved config; the run may be moved."""
    old, new = settings(saved), flat(as_tree(cfg))
    keys = [key for key in {**old, **new} if key != "run_dir" and old.get(key) != new.get(key)]
    return {key: (old.get(key), new.get(key)) for key in keys}


@functools.lru_cache(4)
def settings(text: str) -> dict[str, object]:
    """Dotted key -> value of a config, as it was saved; keys that it is older than are at their defaults."""
    tree = read_yaml(text, "config")
    with contextlib.suppress(ConfigError):  # where a key is gone meanwhile: told as a change
        tree = as_tree(parse(tree, "config"))
    return flat(tree)
