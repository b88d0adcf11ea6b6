"""Rearranging the rows of a batch without moving them between devices more than the maths asks for."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrlhf.sharding import DEVICES, constrain, explicit, mapped, spec, split_over
from jaxrlhf.types import Array


def shuffled_parts(tree, key: Array, parts: int, together: int = 1):
    """[B, ...] -> [parts, B / parts, ...]: all rows in a new order, the same for every array of as many rows; every
    ``together`` stay side by side, in one part. Which rows are in a part depends on the key alone, not on devices."""

    def one(x):
        runs = x.shape[0] // together
        order = jax.random.permutation(key, runs).reshape(runs // parts, parts).T
        order = (order[..., None] * together + jnp.arange(together)).reshape(parts, -1)
        return x.at[order].get(out_sharding=spec(None, "batch", *(None,) * (x.ndim - 1)))

    return jax.tree.map(one, tree)


def lay_rows(tree):
    """The rows over devices as the rules in use split a batch."""
    return jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), tree)


def gather_rows(tree):
    """The rows of all devices of pmap, in order, on each; just ``tree`` on a mesh, where all rows are one array."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, DEVICES, tiled=True), tree) if mapped() else tree


def own_rows(tree, axis: int = 0):
    """What this device of pmap takes of the rows along ``axis``; just ``tree`` on a mesh."""
    if not mapped():
        return tree

    def one(x):
        size = x.shape[axis] // jax.lax.axis_size(DEVICES)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(DEVICES) * size, size, axis)

    return jax.tree.map(one, tree)


def group_rows(x: Array, size: int) -> Array:
    """[B, ...] -> [B / size, size, ...]: rows that stand together become a group, on the devices that hold them.

    On a mesh the groups must divide over the devices that share the batch, so that none lies on two of them."""
    rows, *rest = x.shape
    return jax.lax.reshape(x, (rows // size, size, *rest), out_sharding=spec("batch", *(None,) * x.ndim))


def ungroup_rows(x: Array) -> Array:
    """[G, n, ...] -> [G * n, ...]: the rows of all groups, split over devices as the groups were.

    The layout is stated because a plain reshape drops that of an axis of size 1: a device's only group."""
    groups, size, *rest = x.shape
    return jax.lax.reshape(x, (groups * size, *rest), out_sharding=spec("batch", *(None,) * len(rest)))


def split_rows(tree, parts: int, together: int = 1):
    """[B, ...] -> [parts, B / parts, ...]. A part takes every parts-th run of ``together`` rows, so that each device
    splits its own."""

    def one(x):
        rows, *rest = x.shape
        groups = rows // (parts * together)
        runs = (groups, parts, together, *rest)
        x = jax.lax.reshape(x, runs, out_sharding=spec("batch", *(None,) * (x.ndim + 1)))
        shape, layout = (parts, groups * together, *rest), spec(None, "batch", *(None,) * len(rest))
        return jax.lax.reshape(jnp.swapaxes(x, 0, 1), shape, out_sharding=layout)

    return jax.tree.map(one, tree)


def by_device(x: Array) -> Array:
    """[B, ...] -> [devices, B / devices, ...]: the rows of each device that shares the batch; other axes lie as they
    did."""
    rows, *rest = x.shape
    devices = split_over("batch")
    layout = PartitionSpec((whose := jax.typeof(x).sharding.spec)[0], None, *whose[1:]) if explicit() else None
    return jax.lax.reshape(x, (devices, rows // devices, *rest), out_sharding=layout)


def of_devices(x: Array) -> Array:
    """The inverse: [devices, b, ...] -> [devices * b, ...]."""
    devices, rows, *rest = x.shape
    layout = PartitionSpec((whose := jax.typeof(x).sharding.spec)[0], *whose[2:]) if explicit() else None
    return jax.lax.reshape(x, (devices * rows, *rest), out_sharding=layout)


def size_order(sizes: Array, parts: int) -> Array:
    """The order of runs of rows in which every part of split_rows has runs of like size: i32[devices, runs of each],
    for ``reorder``; each device keeps its own. sizes: [runs]."""
    order = jnp.argsort(by_device(sizes), axis=1).astype(jnp.int32)
    blocks = (order.shape[0], parts, order.shape[1] // parts)
    blocks = jax.lax.reshape(order, blocks, out_sharding=spec("batch", None, None))
    # a part takes every parts-th run
    return jax.lax.reshape(jnp.swapaxes(blocks, 1, 2), order.shape, out_sharding=spec("batch", None))


def reorder(tree, order: Array, together: int = 1):
    """Runs of ``together`` rows in the order of ``size_order``, on the devices that hold them. The inverse of an order
    is its argsort along axis 1."""
    take = jax.vmap(lambda x, at: x[at])
    return jax.tree.map(lambda x: ungroup_rows(of_devices(take(by_device(group_rows(x, together)), order))), tree)


def join_rows(tree, together: int = 1):
    """The inverse of split_rows: [parts, B / parts, ...] -> [B, ...]."""

    def one(x):
        parts, rows, *rest = x.shape
        groups, end = rows // together, (None,) * len(rest)
        runs = (parts, groups, together, *rest)
        x = jnp.swapaxes(jax.lax.reshape(x, runs, out_sharding=spec(None, "batch", None, *end)), 0, 1)
        return jax.lax.reshape(x, (parts * rows, *rest), out_sharding=spec("batch", *end))

    return jax.tree.map(one, tree)


def repeat_rows(tree, times: int):
    """Each row ``times`` times, its copies contiguous: [B, ...] -> [B * times, ...]."""

    one = lambda x: ungroup_rows(jnp.broadcast_to(x[:, None], (x.shape[0], times, *x.shape[1:])))
    return tree if times == 1 else jax.tree.map(one, tree)


def interleave(first, second):
    """Two trees of B rows as one of 2B: first[0], second[0], first[1], ..."""
    return jax.tree.map(lambda a, b: ungroup_rows(jnp.stack([a, b], axis=1)), first, second)


def deinterleave(x: Array) -> tuple[Array, Array]:
    """The two halves of ``interleave``, for one array."""
    first, second = split_rows(x, 2)
    return first, second
