"""Rows between the host and the devices: which lie on which process, put there, fetched back."""

from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.data import batches
from jaxrlhf.models.files import hf_weights
from jaxrlhf.sharding import batch_shards, row_layout

Rows = TypeVar("Rows")


def holders(mesh: Mesh) -> list[list[int]]:
    """The processes, ascending, whose devices hold each block of a batch's rows: one a block, but several where other
    axes of the mesh go over processes too."""
    total = batch_shards(mesh)
    found: list[set[int]] = [set() for _ in range(total)]
    for device, index in row_layout(mesh, 1).devices_indices_map((total,)).items():
        found[index[0].start or 0].add(device.process_index)
    return [sorted(processes) for processes in found]


def share_of(mesh: Mesh) -> batches.Share:
    """The rows of a batch that lie on this process's devices."""
    held, me = holders(mesh), jax.process_index()
    return batches.Share(tuple(block for block, processes in enumerate(held) if me in processes), len(held))


def put(mesh: Mesh, batch: Rows) -> Rows:
    """Host rows (a record of arrays) onto the mesh; every process brings its share."""
    share = share_of(mesh)

    def one(x):
        x = np.asarray(x)
        size = len(x) // len(share.blocks)
        block = lambda index: share.blocks.index((index[0].start or 0) // size)
        part = lambda index: x[block(index) * size : (block(index) + 1) * size]
        return jax.make_array_from_callback((size * share.total, *x.shape[1:]), row_layout(mesh, x.ndim), part)

    return jax.tree.map(one, batch)


def fetch(rows: Rows) -> Rows:
    """The inverse of ``put``: this process's rows as NumPy arrays."""

    def one(x) -> np.ndarray:
        parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}  # once where it is replicated
        return np.concatenate([np.asarray(parts[first]) for first in sorted(parts)])

    return jax.tree.map(one, rows)


def fetch_all(rows: Rows) -> Rows:
    """All processes' rows as NumPy arrays, on each of them; all have to call it."""
    return jax.tree.map(hf_weights.to_numpy, rows)
