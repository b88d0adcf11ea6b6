"""Reordering, splitting and packing of rows on random meshes: what NumPy does to the rows of each device."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models import response_packing
from jaxrlhf.ops.rows import join_rows, reorder, size_order, split_rows
from jaxrlhf.sharding import MeshConfig, make_mesh
from tests.support.tiny import program, put

# every way to share 8 devices among data, fsdp, tensor, slices, decode
SHAPES = [
    (data, fsdp, tensor, slices, decode)
    for data, fsdp, tensor, slices in itertools.product((1, 2, 4, 8), repeat=4)
    if data * fsdp * tensor * slices == 8
    for decode in (1, 2)
    if fsdp % decode == 0
]


def draw(seed: int):
    """(rng, mesh, shards of a batch, responses to a prompt, parts, prompts): random, but such that they divide."""
    rng = np.random.default_rng(seed)
    shape = SHAPES[rng.integers(len(SHAPES))]
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[:8])
    shards = shape[0] * shape[1] * shape[3]
    copies, parts = int(rng.choice((1, 2, 3))), int(rng.choice((1, 2, 4)))
    return rng, mesh, shards, copies, parts, shards * parts * int(rng.integers(1, 3))


@pytest.mark.parametrize("seed", range(6))
def test_rows_are_sorted_within_their_devices_and_come_back(seed):
    rng, mesh, shards, copies, parts, prompts = draw(seed)
    rows = np.arange(prompts * copies, dtype=np.int32)
    sizes = rng.integers(0, 50, prompts).astype(np.int32)

    def there_and_back(rows, sizes):
        order = size_order(sizes, parts)
        split = split_rows(reorder(rows, order, copies), parts, copies)
        return split, reorder(join_rows(split, copies), jnp.argsort(order, axis=1), copies)

    with jax.set_mesh(mesh):
        split, back = program(there_and_back)(*put((rows, sizes)))
    np.testing.assert_array_equal(back, rows)
    # by hand: each device sorts its own prompts, and part p has the p-th block of them
    own = sizes.reshape(shards, -1)
    order = np.argsort(own, axis=1, kind="stable") + np.arange(shards)[:, None] * own.shape[1]
    blocks = order.reshape(shards, parts, -1).swapaxes(0, 1).reshape(parts, -1)
    expected = blocks[:, :, None] * copies + np.arange(copies)
    np.testing.assert_array_equal(split, expected.reshape(parts, -1))


@pytest.mark.parametrize("seed", range(4))
def test_responses_are_packed_and_come_apart(seed):
    rng, mesh, _, copies, _, prompts = draw(seed)
    room = int(rng.integers(2, 6))
    lengths = rng.integers(0, room + 1, (prompts, copies))
    valid = np.arange(room) < lengths[..., None]
    tokens = rng.integers(1, 100, valid.shape).astype(np.int32).reshape(-1, room)
    width = max(1, int(lengths.sum(1).max()))

    def pack(valid, tokens):
        where = response_packing.places(valid, width)
        packed = response_packing.side_by_side(tokens, where)
        return packed, response_packing.apart(packed, where)

    with jax.set_mesh(mesh):
        packed, apart = program(pack)(*put((valid, tokens)))
    flat = valid.reshape(-1, room)
    np.testing.assert_array_equal(np.asarray(apart)[flat], tokens[flat])
    for group, row in enumerate(np.asarray(packed)):  # a loop: the tokens of a prompt's responses, one after the other
        mine = slice(group * copies, (group + 1) * copies)
        held = tokens[mine][flat[mine]]
        np.testing.assert_array_equal(row[: len(held)], held)
