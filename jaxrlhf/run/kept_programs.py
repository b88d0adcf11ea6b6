"""Programs that runs of one process share: those that differ in nothing that a program depends on compile once.

Off by default: a program that was compiled before does not see code that was replaced since.
"""

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
import numpy as np

from jaxrlhf.config.record import CheckpointConfig, Config, EvalConfig, TokenizerConfig
from jaxrlhf.data.sources import DataConfig
from jaxrlhf.hosts.processes import DistributedConfig
from jaxrlhf.log.alarms import AlarmsConfig
from jaxrlhf.log.metrics import LogConfig
from jaxrlhf.run.build import Blueprint

MOST = 32  # programs, or sets of them, that are kept: the last ones used
T = TypeVar("T")
KEPT: ContextVar[OrderedDict[Any, Any] | None] = ContextVar("KEPT", default=None)


@contextlib.contextmanager
def share_programs() -> Iterator[None]:
    """Within it, a run takes the programs that an equal one compiled. Within another one, it shares those."""
    kept = KEPT.get()
    token = KEPT.set(OrderedDict() if kept is None else kept)
    try:
        yield
    finally:
        KEPT.reset(token)


def shared(name: str, drawn: Blueprint, make: Callable[[], T], *arguments: Any) -> T:
    """What ``make`` gives; within ``share_programs``, what it gave for ``name`` of an equal run and for arguments of
    the same shapes and layouts."""
    kept = KEPT.get()
    if kept is None:
        return make()
    leaves, tree = jax.tree.flatten(arguments)
    key = name, *key_of(drawn), tree, tuple((x.shape, np.dtype(x.dtype), x.sharding) for x in leaves)
    if key not in kept:
        kept[key] = make()
        if len(kept) > MOST:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


def key_of(drawn: Blueprint) -> tuple[Any, ...]:
    """All that the programs of a run depend on besides their arguments, hashable."""
    models = repr([(role, found.config, drawn.heads[role]) for role, found in drawn.weights.items()])
    bases = repr(
        [
            (role, base, lora and (lora.scale, lora.targets, lora.dora), kind)
            for role, (base, lora, kind) in drawn.resolved.bases.items()
        ]
    )
    stops = tuple((stop.table.tobytes(), np.asarray(stop.start).tobytes()) for stop in drawn.sampler.stops)
    sampler = repr(drawn.sampler._replace(stops=()))
    flags = repr(sorted(jax.config.values.items()))
    return repr(neutral(drawn)), drawn.algorithm, models, bases, sampler, stops, drawn.mesh, flags


def neutral(drawn: Blueprint) -> Config:
    """The config without what no program depends on: where things are, what is measured, saved and said. The length
    stays where learning rates depend on it."""
    cfg, rewards = drawn.cfg, drawn.cfg.rewards
    constant = all(cfg.optimizer_of(role).schedule == "constant" for role in drawn.recipe.optimizers)
    return dataclasses.replace(
        cfg,
        preset=None,
        run_dir="",
        seed=0,
        iterations=None if constant else cfg.iterations,
        epochs=None,
        max_run_duration=None,
        models={role: dataclasses.replace(one, init_from=None) for role, one in cfg.models.items()},
        rewards=dataclasses.replace(
            rewards,
            function="" if rewards.function is not None else None,
            arguments={},
            functions=dict.fromkeys(rewards.functions),
            timeout=None,
        ),
        tokenizer=TokenizerConfig(),
        data=DataConfig(),
        distributed=DistributedConfig(),
        checkpoint=CheckpointConfig(),
        eval=EvalConfig(),
        log=LogConfig(),
        alarms=AlarmsConfig(),
        bars={},
        on_nonfinite="stop",
        max_nonfinite=0,
        profile=None,
    )
