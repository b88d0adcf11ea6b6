"""How many iterations a number of epochs are: counted from the rows of the training data, before optimizers are made,
whose schedules end with the run."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jaxrlhf.config import Config
from jaxrlhf.config_batch import KIND_OF, ROWS_KEY, fields_read
from jaxrlhf.data import batches
from jaxrlhf.data.sources import open_source


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
    each, count = getattr(cfg.batch, ROWS_KEY[field]), cfg.length
    passes = count * each / rows
    return f"{count:,} iterations of {each:,} {field} = {passes:.3g} epochs of data.{KIND_OF[field]} ({rows:,} rows)"
