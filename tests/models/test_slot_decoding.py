"""Caches of slots: where columns are written, and how slots move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models.attention.kernels import Hardware
from jaxrlhf.models.slot_decoding import SlotCache, moved, write
from jaxrlhf.models.transformer import Runtime

GROUPS, HEADS, ABREAST, COLUMNS, SIZE = 3, 2, 2, 8, 4
SHAPE = (GROUPS, HEADS, ABREAST, COLUMNS, SIZE)


def cache_of(seed: int, shape: tuple[int, ...]) -> SlotCache:
    return SlotCache(*jax.random.normal(jax.random.key(seed), (2, *shape)))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("count", [1, 3])
def test_columns_are_written_where_each_slot_is(platform, count):
    """A row after the other, or all in one scatter, beside a loop of NumPy."""
    cache, new = cache_of(0, SHAPE), cache_of(1, (GROUPS, HEADS, ABREAST, count, SIZE))
    start = np.array([0, 5, 2, 3, 4, 1], np.int32)
    expected = jax.tree.map(np.array, cache)
    for slot, first in enumerate(start):
        for old, added in zip(expected, new):
            old[slot // ABREAST, :, slot % ABREAST, first : first + count] = added[slot // ABREAST, :, slot % ABREAST]
    found = write(cache, new, jnp.asarray(start), Runtime(hardware=Hardware(platform)))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_slots_move_to_caches_of_other_sizes():
    cache = cache_of(0, SHAPE)
    blank = SlotCache(*jnp.zeros((2, 1, HEADS, 1, COLUMNS, SIZE)))
    (found,) = moved([cache], [blank], jnp.array([3]))
    assert isinstance(found, SlotCache)
    np.testing.assert_array_equal(found.key[0, :, 0], cache.key[1, :, 1])
    (wider,) = moved([found], [SlotCache(*jnp.zeros((2, *SHAPE)))], jnp.zeros(6, jnp.int32))
    assert isinstance(wider, SlotCache)
    np.testing.assert_array_equal(wider.value[0, :, 0], cache.value[1, :, 1])
