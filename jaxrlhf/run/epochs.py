"""How many iterations a number of epochs are: counted from the rows of the training data, before optimizers are made,
whose schedules end with the run."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jaxrlhf.config.batch import rows_taken
from jaxrlhf.config.resolved import Resolved
from jaxrlhf.data import batches
from jaxrlhf.data.actions import starts
from jaxrlhf.data.sources import open_source
from jaxrlhf.errors import counted
from jaxrlhf.types import given


def with_iterations(resolved: Resolved, tokenizer: Any, eos: Sequence[int], tools: Any = None) -> Resolved:
    """``resolved`` with ``iterations`` in place of ``epochs``: as many as see each row of the training data that often.

    Of several sources (ppo with reward_update) the first counts. ``eos``: ids that end a row; ``tools``: those of
    an environment, which are part of prompts."""
    cfg, kind, data = resolved.cfg, resolved.kinds[0], resolved.cfg.data
    if cfg.epochs is None:
        return resolved
    where, section = f"data.{kind.name}", getattr(data, kind.name)
    if section is None and kind.is_prompt and cfg.acts:
        source = starts(cfg.environment.starts)
    else:
        section = given(section, where)
        source = open_source(section, kind.name, cache_dir=data.cache_dir, skip_bad=data.skip_bad, path_in_config=where)
    source = source.with_tools(tools if kind.is_prompt else None)
    rows = batches.count_rows(kind, source, tokenizer, cfg.data, seed=cfg.seed, eos=eos, where=where)
    iterations = math.ceil(cfg.epochs * rows / rows_taken(cfg, kind))
    return dataclasses.replace(resolved, cfg=dataclasses.replace(cfg, iterations=iterations, epochs=None))


def describe_epochs(resolved: Resolved, rows: int) -> str:
    """What the run's iterations are in passes over its ``rows`` rows of training data."""
    cfg, kind = resolved.cfg, resolved.kinds[0]
    each, where = rows_taken(cfg, kind), f"data.{kind.name} ({counted(rows, 'row')})"
    passes = f"{cfg.length * each / rows:.3g}"
    epochs = f"{passes} epoch{'s' * (passes != '1')}{' or more (batch.max_rollouts)' * (cfg.batch.max_rollouts > 1)}"
    return f"{counted(cfg.length, 'iteration')} of {each:,} {kind.field} = {epochs} of {where}"


def describe_short_run(resolved: Resolved, rows: int) -> list[str]:
    """What to say where the data are fewer than one iteration takes, and where the run ends within a warm-up."""
    cfg, kind = resolved.cfg, resolved.kinds[0]
    each, lines = rows_taken(cfg, kind), []
    if each > rows:
        packed = ", once packed" if kind.make_packed and cfg.data.pack else ""
        lines += [
            f"batch.{kind.rows_key}: {each:,}: more than data.{kind.name} has ({counted(rows, 'row')}{packed}): an "
            f"iteration takes each {each / rows:.3g} times; nearest: {rows}"
        ]
    epochs, minibatches, _ = resolved.updates
    trained = resolved.roles.trained
    keys = dict.fromkeys((role if role in cfg.optimizer else "default", role) for role in trained)
    for section, role in keys:
        optimizer = cfg.optimizer_of(role)
        updates = (cfg.length - optimizer.delay) * epochs * minibatches
        if 0 < updates <= optimizer.warmup_steps:
            share = (updates - 1) / optimizer.warmup_steps
            lines += [
                f"optimizer.{section}.warmup_steps: {optimizer.warmup_steps}: the {counted(updates, 'update')} of "
                f"{role} end within it, at {share:.0%} of the learning rate; expected less than {updates}"
            ]
    return lines
