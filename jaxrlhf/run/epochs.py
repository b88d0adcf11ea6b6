"""How many iterations a number of epochs are: counted from the rows of the training data, before optimizers are made,
whose schedules end with the run."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jaxrlhf.config.batch import KIND_OF, ROWS_KEY, fields_read, updates_of
from jaxrlhf.config.record import Config
from jaxrlhf.config.roles import roles_of
from jaxrlhf.data import batches
from jaxrlhf.data.sources import open_source
from jaxrlhf.errors import counted


def with_iterations(cfg: Config, tokenizer: Any, eos: Sequence[int]) -> Config:
    """``cfg`` with ``iterations`` in place of ``epochs``: as many as see each row of the training data that often.

    Of several sources (ppo with reward_update) the first counts. ``eos``: ids that end a row."""
    if cfg.epochs is None:
        return cfg
    field = fields_read(cfg)[0]
    kind = KIND_OF[field]
    where = f"data.{kind}"
    source = open_source(
        getattr(cfg.data, kind), kind, cache_dir=cfg.data.cache_dir, skip_bad=cfg.data.skip_bad, path_in_config=where
    )
    rows = batches.count_rows(kind, source, tokenizer, cfg.data, seed=cfg.seed, eos=eos, where=where)
    iterations = math.ceil(cfg.epochs * rows / getattr(cfg.batch, ROWS_KEY[field]))
    return dataclasses.replace(cfg, iterations=iterations, epochs=None)


def describe_epochs(cfg: Config, rows: int) -> str:
    """What the run's iterations are in passes over its ``rows`` rows of training data."""
    field = fields_read(cfg)[0]
    each, where = getattr(cfg.batch, ROWS_KEY[field]), f"data.{KIND_OF[field]} ({counted(rows, 'row')})"
    passes = f"{cfg.length * each / rows:.3g}"
    return f"{counted(cfg.length, 'iteration')} of {each:,} {field} = {passes} epoch{'s' * (passes != '1')} of {where}"


def describe_short_run(cfg: Config, rows: int) -> list[str]:
    """What to say where the data are fewer than one iteration takes, and where the run ends within a warm-up."""
    field = fields_read(cfg)[0]
    key, kind = ROWS_KEY[field], KIND_OF[field]
    each, lines = getattr(cfg.batch, key), []
    if each > rows:
        packed = ", once packed" if field == "sequences" and cfg.data.pack else ""
        lines += [
            f"batch.{key}: {each:,}: more than data.{kind} has ({counted(rows, 'row')}{packed}): an iteration takes "
            f"each {each / rows:.3g} times; nearest: {rows}"
        ]
    epochs, minibatches = updates_of(cfg)
    keys = dict.fromkeys((role if role in cfg.optimizer else "default", role) for role in roles_of(cfg)[0])
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
