"""The shapes and layouts of the batches that one iteration can be given."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config.batch import rows_taken
from jaxrlhf.config.resolved import Resolved
from jaxrlhf.sharding import row_layout
from jaxrlhf.types import Batch, Prompts


def batch_shapes(resolved: Resolved, mesh: Mesh, margins: bool = False) -> Iterator[Batch]:
    """What one iteration can be given, as shapes with layouts: one a prompt bucket, the smallest first.

    ``margins``: whether the preferences say by how much."""

    def rows(dtype, *shape: int) -> Any:  # stands for an array
        return jax.ShapeDtypeStruct(shape, dtype, sharding=row_layout(mesh, len(shape)))

    cfg, kinds = resolved.cfg, resolved.kinds
    learned = {kind.field: kind.shapes(rows, rows_taken(cfg, kind), cfg.data, margins) for kind in kinds if kind.shapes}
    batch = Batch(**learned)
    if not any(kind.is_prompt for kind in kinds):
        yield batch
        return
    count = cfg.batch.prompts_per_step
    for width in cfg.data.prompt_buckets:
        prompts = Prompts(rows(np.int32, count, width), rows(bool, count, width), rows(np.int32, count))
        yield batch.replace(prompts=prompts)
