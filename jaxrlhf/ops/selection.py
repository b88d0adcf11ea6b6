"""Which of the responses to a prompt are the best, and which groups of responses fill a batch."""

import jax
import jax.numpy as jnp

from jaxrlhf.ops.rows import group_rows, lay_rows, ungroup_rows
from jaxrlhf.sharding import spec
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


def fill_groups(filled: Array, differ: Array) -> tuple[Array, Array]:
    """Which groups fill G places: the first ``filled`` of G earlier ones, then the new ones in ``differ``, in order.

    Args:
        filled: i32[], at most G.
        differ: bool[G], whole on every device.

    Returns:
        (i32[G]: places among the 2 G groups, the earlier ones first; behind those that are kept come others. i32[]: how
        many are kept, which may be more than G.)
    """
    kept = jnp.concatenate([jnp.arange(len(differ)) < filled, differ])
    order = jnp.argsort(~kept, stable=True).astype(jnp.int32)
    return order[: len(differ)], jnp.sum(kept, dtype=jnp.int32)


def take_groups(earlier, new, order: Array, size: int):
    """The groups in ``order`` (i32[G], as of ``fill_groups``) of two trees of rows [G * size, ...]."""
    places = (order[:, None] * size + jnp.arange(size, dtype=jnp.int32)).reshape(-1)

    def one(old, fresh):
        rows = len(fresh)
        layout = spec("batch", *(None,) * (fresh.ndim - 1))
        of_old = old.at[jnp.minimum(places, rows - 1)].get(out_sharding=layout)
        of_new = fresh.at[jnp.maximum(places - rows, 0)].get(out_sharding=layout)
        is_old = lay_rows((places < rows).reshape(-1, *(1,) * (fresh.ndim - 1)))
        return jnp.where(is_old, of_old, of_new)

    return jax.tree.map(one, earlier, new)
