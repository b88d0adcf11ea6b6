"""Responses to a prompt side by side, as close as they come: what has ended takes no columns of a pass."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.ops.rows import group_rows, ungroup_rows
from jaxrlhf.sharding import spec
from jaxrlhf.types import Array


class Places(NamedTuple):
    """Which token of which response stands in each of W columns, and where each token of a response stands."""

    owner: Array  # i32[G, W]: which of the n responses to its prompt; n: no token stands here
    index: Array  # i32[G, W]: how many tokens of that response precede it
    column: Array  # i32[G, n, T]; of columns that hold no token, one that is


def places(valid: Array, width: int) -> Places:
    """The places of responses, valid bool[G, n, T] (tokens first), in ``width`` columns, which must suffice for the n
    of every prompt."""
    _, copies, room = valid.shape
    lengths = valid.sum(2, dtype=jnp.int32)
    ends = jnp.cumsum(lengths, axis=1)
    starts = ends - lengths
    columns = jnp.arange(width)
    owner = (columns[None, :, None] >= ends[:, None, :]).sum(2, dtype=jnp.int32)
    first = jnp.where(owner[:, :, None] == jnp.arange(copies), starts[:, None, :], 0).sum(2)
    column = jnp.minimum(starts[:, :, None] + jnp.arange(room), width - 1)
    return Places(owner, jnp.where(owner < copies, columns - first, 0), column)


def side_by_side(x: Array, where: Places) -> Array:
    """[B, T, ...] -> [G, W, ...]: every response's tokens; the last one's where no token stands."""
    copies, room = where.column.shape[1:]
    rows = group_rows(x, copies)
    rest = rows.shape[3:]
    layout = spec("batch", None, *(None,) * len(rest))
    flat = jax.lax.reshape(rows, (rows.shape[0], copies * room, *rest), out_sharding=layout)
    return pick(flat, jnp.minimum(where.owner, copies - 1) * room + where.index)


def apart(x: Array, where: Places) -> Array:
    """[G, W] -> [B, T]: the inverse; what stands behind the end of a response is arbitrary but finite."""
    groups, copies, room = where.column.shape
    flat = jax.lax.reshape(where.column, (groups, copies * room), out_sharding=spec("batch", None))
    found = pick(x, flat)
    return ungroup_rows(jax.lax.reshape(found, (groups, copies, room), out_sharding=spec("batch", None, None)))


def pick(rows: Array, columns: Array) -> Array:
    """rows[g, columns[g]] of each g: [G, C, ...], i32[G, D] -> [G, D, ...]. A row at a time: take_along_axis would
    take a batch of one row for an axis to broadcast."""
    return jax.vmap(lambda row, at: row.at[at].get(mode="clip"))(rows, columns)


# ---- responses with their prompt in front of them -----------------------------------------------------------------


def pack_group(x: Array, start: int, where: Places) -> Array:
    """[G * n, S, ...] -> [G, start + W, ...]: the first row's prompt, then what the responses have, side by side."""
    prompt = group_rows(x[:, :start], where.column.shape[1])[:, 0]
    return jnp.concatenate([prompt, side_by_side(x[:, start:], where)], axis=1)


def fold_group(x: Array, start: int, copies: int) -> Array:
    """[G * n, S, ...] -> [G, start + n * (S - start), ...]: the first row's prompt, then every row's response."""
    rows = group_rows(x, copies)
    return jnp.concatenate([rows[:, 0, :start], join_columns(rows[:, :, start:])], axis=1)


def unfold_group(x: Array, copies: int) -> Array:
    """[G, 1 + n * T, D] -> [G * n, 1 + T, D]: the prompt's last column, for each of its responses, and theirs."""
    groups, columns, dim = x.shape
    own = (groups, copies, (columns - 1) // copies, dim)
    responses = jax.lax.reshape(x[:, 1:], own, out_sharding=spec("batch", None, "seq", "hidden"))
    last = jnp.broadcast_to(x[:, None, :1], (groups, copies, 1, dim))
    return ungroup_rows(jnp.concatenate([last, responses], axis=2))


def join_columns(x: Array) -> Array:
    """[G, n, T, ...] -> [G, n * T, ...]."""
    groups, copies, columns, *rest = x.shape
    layout = spec("batch", "seq", *(None,) * len(rest))
    return jax.lax.reshape(x, (groups, copies * columns, *rest), out_sharding=layout)
