"""Which of the responses to a prompt are the best."""

import jax.numpy as jnp

from jaxrlhf.ops.rows import group_rows, ungroup_rows
from jaxrlhf.types import Array


def best_in_group(scores: Array, rows: Array, size: int, keep: int) -> Array:
    """bool[B]: the ``keep`` rows of each group with the highest scores; of equal ones the first.

    Args:
        scores: [B], the ``size`` responses to a prompt contiguous.
        rows: bool[B], the real ones: no other is kept, whatever its score. A group with fewer keeps all of them.
    """
    assert scores.shape == rows.shape, (scores.shape, rows.shape)
    assert len(scores) % size == 0, (scores.shape, size)
    real = group_rows(rows, size)
    values = jnp.where(real, group_rows(scores.astype(jnp.float32), size), -jnp.inf)
    one, other = values[:, :, None], values[:, None, :]
    earlier = jnp.arange(size)[None, :] < jnp.arange(size)[:, None]
    better = ((other > one) | ((other == one) & earlier)) & real[:, None, :]
    return ungroup_rows(real & (jnp.sum(better, axis=2) < keep))
