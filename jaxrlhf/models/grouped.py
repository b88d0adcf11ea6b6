"""Products of rows with the matrix of the group that each belongs to: sorted by group, then one product a group.

Two ways compute the same. ``jax.lax.ragged_dot`` is one instruction on TPUs and GPUs; XLA:CPU multiplies all rows with
all matrices for it. There rows are padded to blocks of one group each, and a loop multiplies the blocks that are used.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.types import Array

LARGEST_BLOCK = 64  # rows: as fast as more, and wastes half of them for each group


class Groups(NamedTuple):
    """Where the N x k choices of N rows stand, sorted by group."""

    place: Array  # i32[N * k]: of each choice; the number of places, where it is of no group here
    source: Array  # i32[places]: the choice that stands there; N * k: none
    sizes: Array  # i32[groups]: places of each, in their order
    owner: Array | None = None  # i32[blocks]: the group of each block; None: in no blocks
    used: Array | None = None  # i32[]: blocks that hold rows, the first ones


def block_size(choices: int, groups: int) -> int:
    """Rows of a block: as many as a group has on average, a power of two from 8 to LARGEST_BLOCK."""
    size = 8
    while size < LARGEST_BLOCK and size * groups < choices:
        size *= 2
    return size


def make_groups(choice: Array, groups: int, everywhere: int, blocks: bool) -> Groups:
    """Sort the choices i32[N, k]: those of 0 to ``groups`` - 1; others, which are computed elsewhere, have no place.

    ``everywhere``: groups over all devices; ``blocks``: in blocks of one group each, else side by side."""
    count = choice.size
    flat = choice.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < groups), flat, groups)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    ordered = flat[order]
    starts = jnp.searchsorted(ordered, jnp.arange(groups + 1)).astype(jnp.int32)
    sizes = jnp.diff(starts)
    size = block_size(count, everywhere) if blocks else 1
    places = -(-(count + min(groups, count) * (size - 1)) // size) * size
    padded = -(-sizes // size) * size
    ends = jnp.cumsum(padded, dtype=jnp.int32)
    begin = jnp.append(ends - padded, places)
    at = jnp.where(ordered < groups, begin[ordered] + jnp.arange(count, dtype=jnp.int32) - starts[ordered], places)
    place = jnp.zeros(count, jnp.int32).at[order].set(at, unique_indices=True)
    source = jnp.full(places, count, jnp.int32).at[at].set(order, mode="drop")
    if not blocks:
        return Groups(place, source, sizes)
    owner = jnp.searchsorted(ends, jnp.arange(places // size) * size, side="right").astype(jnp.int32)
    return Groups(place, source, padded, jnp.minimum(owner, groups - 1), ends[-1] // size)


def group_of(groups: Groups, choice: Array) -> Array:
    """i32[places]: the group that each place's choice, of ``choice`` i32[N, k], is of; -1 where none stands."""
    return choice.reshape(-1).at[groups.source].get(mode="fill", fill_value=-1)


# ---- rows to their places, and back ---------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def rows_at(x: Array, at: Array, back: Array, copies: int) -> Array:
    """x[at], zeros beyond its end. ``back``: where each of ``copies`` copies of a row of x went, so that the gradient
    is a gather too."""
    return x.at[at].get(mode="fill", fill_value=0)


def rows_at_forward(x: Array, at: Array, back: Array, copies: int):
    return rows_at(x, at, back, copies), back


def rows_at_backward(copies: int, back: Array, dy: Array):
    found = dy.at[back].get(mode="fill", fill_value=0)
    return found.reshape(-1, copies, dy.shape[-1]).sum(1), None, None


rows_at.defvjp(rows_at_forward, rows_at_backward)


def dispatch(x: Array, groups: Groups, copies: int) -> Array:
    """[N, D] -> [places, D]: each row at the places of its ``copies`` choices; 0 where none stands."""
    return rows_at(x, groups.source // copies, groups.place, copies)


def bring_back(y: Array, groups: Groups, shape: tuple[int, ...]) -> Array:
    """[places, D] -> [N, k, D]: what was computed for each choice; 0 for those that have no place."""
    return jnp.reshape(rows_at(y, groups.place, groups.source, 1), (*shape, y.shape[-1]))


# ---- products -------------------------------------------------------------------------------------------------------


def grouped_product(x: Array, kernel: Array, groups: Groups) -> Array:
    """[places, D], [groups, D, M] -> [places, M]: each row times the matrix of its group."""
    if groups.owner is None:
        return jax.lax.ragged_dot(x, kernel, groups.sizes)
    return in_blocks(x, kernel, groups.owner, groups.used)


@jax.custom_vjp
def in_blocks(x: Array, kernel: Array, owner: Array, used: Array) -> Array:
    """``grouped_product`` a block after the other; blocks behind the ``used`` ones are 0 and cost nothing."""
    return by_block(x, kernel, owner, used, 1)


def by_block(x: Array, kernel: Array, owner: Array, used: Array, summed: int) -> Array:
    """Blocks of x times the matrices of their owners, over axis ``summed`` (1 or 2) of ``kernel``."""
    size = x.shape[0] // owner.shape[0]

    def one(index: Array, y: Array) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(x, index * size, size)
        matrix = jax.lax.dynamic_index_in_dim(kernel, owner[index], keepdims=False)
        found = jax.lax.dot_general(rows, matrix, (((1,), (summed - 1,)), ((), ())))
        return jax.lax.dynamic_update_slice_in_dim(y, found, index * size, 0)

    return jax.lax.fori_loop(0, used, one, jnp.zeros((x.shape[0], kernel.shape[3 - summed]), x.dtype))


def in_blocks_forward(x: Array, kernel: Array, owner: Array, used: Array):
    return in_blocks(x, kernel, owner, used), (x, kernel, owner, used)


def in_blocks_backward(kept: tuple[Array, Array, Array, Array], dy: Array):
    x, kernel, owner, used = kept
    size = x.shape[0] // owner.shape[0]

    def one(index: Array, dkernel: Array) -> Array:
        rows, above = (jax.lax.dynamic_slice_in_dim(y, index * size, size) for y in (x, dy))
        found = jax.lax.dot_general(rows, above, (((0,), (0,)), ((), ())))
        at = owner[index]
        found += jax.lax.dynamic_index_in_dim(dkernel, at, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(dkernel, found, at, 0)

    dkernel = jax.lax.fori_loop(0, used, one, jnp.zeros(kernel.shape, kernel.dtype))
    return by_block(dy, kernel, owner, used, 2), dkernel, None, None


in_blocks.defvjp(in_blocks_forward, in_blocks_backward)
