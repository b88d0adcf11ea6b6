"""The shapes and layouts of the batches that one iteration can be given."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config.batch import fields_read
from jaxrlhf.config.record import Config
from jaxrlhf.sharding import row_layout
from jaxrlhf.types import Batch, Preferences, Prompts, Sequences, Unpaired


def batch_shapes(cfg: Config, mesh: Mesh, margins: bool = False) -> Iterator[Batch]:
    """What one iteration can be given, as shapes with layouts: one a prompt bucket, the smallest first.

    ``margins``: whether the preferences say by how much."""

    def rows(dtype, *shape: int) -> Any:  # stands for an array
        return jax.ShapeDtypeStruct(shape, dtype, sharding=row_layout(mesh, len(shape)))

    def whole(count: int, packed: bool = False) -> Sequences:
        shape = (count, cfg.data.max_length)
        segments = rows(np.int32, *shape) if packed else None
        return Sequences(rows(np.int32, *shape), rows(bool, *shape), rows(bool, *shape), segments)

    fields, batch = fields_read(cfg), Batch()
    if "sequences" in fields:
        batch = batch.replace(sequences=whole(cfg.batch.sequences_per_step, cfg.data.pack))
    if "preferences" in fields:
        count = cfg.batch.preferences_per_step
        margin = rows(np.float32, count) if margins else None
        batch = batch.replace(preferences=Preferences(whole(count), whole(count), margin))
    if "unpaired" in fields:
        count = cfg.batch.unpaired_per_step
        batch = batch.replace(unpaired=Unpaired(whole(count), rows(bool, count), whole(count)))
    if "prompts" not in fields:
        yield batch
        return
    count = cfg.batch.prompts_per_step
    for width in cfg.data.prompt_buckets:
        prompts = Prompts(rows(np.int32, count, width), rows(bool, count, width), rows(np.int32, count))
        yield batch.replace(prompts=prompts)
