"""Rows in a new order, in parts, repeated, in pairs: the same with and without a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxrlhf.ops.rows import (
    deinterleave,
    group_rows,
    interleave,
    reorder,
    repeat_rows,
    shuffled_parts,
    size_order,
    split_rows,
    ungroup_rows,
)
from jaxrlhf.sharding import MeshConfig, make_mesh
from tests.support.tiny import program, put

ROWS = PartitionSpec(("slice", "data", "fsdp", "decode", "expert"), None)


def tree(rows: int = 16):
    return {"id": np.arange(rows, dtype=np.int32), "x": np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)}


def on_mesh(function, *args, devices: int = 8):
    """The result of ``function`` on NumPy trees whose rows are split over (2, 2, 2), or on a mesh of one device."""
    shape = MeshConfig(2, 2, 2) if devices == 8 else MeshConfig(1, 1, 1)
    with jax.set_mesh(make_mesh(shape, jax.devices()[:devices])):
        return program(function)(*put(args))


def test_shuffled_parts_move_every_array_alike():
    out = shuffled_parts(tree_of_jax(), jax.random.key(0), 2)
    ids = np.asarray(out["id"])
    assert ids.shape == (2, 8) and sorted(ids.ravel()) == list(range(16)) and list(ids.ravel()) != list(range(16))
    np.testing.assert_array_equal(out["x"], tree()["x"][ids])
    again, other = (shuffled_parts(tree_of_jax(), jax.random.key(seed), 2) for seed in (0, 1))
    np.testing.assert_array_equal(again["id"], ids)
    assert (np.asarray(other["id"]) != ids).any()


def tree_of_jax():
    return jax.tree.map(jnp.asarray, tree())


@pytest.mark.parametrize("together", [1, 4])
def test_shuffled_parts_hold_the_same_rows_on_a_mesh(together):
    """Also where a device has fewer rows of a part than stay together: 2 of 4 runs of 4 rows, over 4 shards."""
    mix = lambda rows: shuffled_parts(rows, jax.random.key(0), 2, together)
    out, alone = on_mesh(mix, tree()), mix(tree_of_jax())
    np.testing.assert_array_equal(out["id"], alone["id"])
    np.testing.assert_array_equal(out["x"], alone["x"])
    assert out["x"].sharding.spec == PartitionSpec(None, *ROWS)
    runs = np.asarray(alone["id"]).reshape(2, -1, together)
    np.testing.assert_array_equal(runs - runs[:, :, :1], np.broadcast_to(np.arange(together), runs.shape))
    assert (runs[:, :, 0] % together == 0).all()


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_split_rows_takes_every_parts_th_row(parts):
    out = split_rows(tree_of_jax(), parts)
    assert out["x"].shape == (parts, 16 // parts, 3)
    for part in range(parts):
        np.testing.assert_array_equal(out["id"][part], np.arange(16)[part::parts])
        np.testing.assert_array_equal(out["x"][part], tree()["x"][part::parts])


def test_rows_that_stay_together():
    """Runs of two rows: whole in a part."""
    rows = tree_of_jax()
    parts = split_rows(rows, 2, together=2)
    order = np.arange(len(rows["x"])).reshape(-1, 2, 2).swapaxes(0, 1).reshape(2, -1)
    np.testing.assert_array_equal(parts["x"], np.asarray(rows["x"])[order])


def test_split_rows_stays_on_its_devices():
    out = on_mesh(lambda rows: split_rows(rows, 2), tree())
    np.testing.assert_array_equal(out["x"], split_rows(tree_of_jax(), 2)["x"])
    assert out["x"].sharding.spec == PartitionSpec(None, ("slice", "data", "fsdp", "decode", "expert"), None)
    for shard in out["id"].addressable_shards:  # a device holds 4 neighbouring rows before, and the same ones after
        assert len({int(row) // 4 for row in np.asarray(shard.data).ravel()}) == 1
    collectives = ("all_gather", "all-gather", "all-to-all", "collective-permute")
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        text = jax.jit(lambda rows: split_rows(rows, 2)).lower(put(tree())).compile().as_text()
    assert text is not None and not any(word in text for word in collectives)


def test_rows_that_do_not_split_are_refused():
    with pytest.raises(Exception, match="reshape"):
        split_rows(tree_of_jax(), 3)


def test_repeat_rows_is_contiguous():
    out = repeat_rows(tree_of_jax(), 3)
    np.testing.assert_array_equal(out["id"], np.repeat(np.arange(16), 3))
    np.testing.assert_array_equal(out["x"], np.repeat(tree()["x"], 3, axis=0))
    meshed = on_mesh(lambda rows: repeat_rows(rows, 3), tree())
    np.testing.assert_array_equal(meshed["x"], out["x"])
    assert meshed["x"].sharding.spec == ROWS
    same = tree_of_jax()
    assert repeat_rows(same, 1) is same


def test_groups_are_neighbours_and_come_apart_again():
    out = group_rows(tree_of_jax()["x"], 4)
    np.testing.assert_array_equal(out, tree()["x"].reshape(4, 4, 3))
    np.testing.assert_array_equal(ungroup_rows(out), tree()["x"])
    meshed = on_mesh(lambda rows: (group_rows(rows["x"], 4), ungroup_rows(group_rows(rows["x"], 4))), tree())
    np.testing.assert_array_equal(meshed[0], out)
    np.testing.assert_array_equal(meshed[1], tree()["x"])
    assert (
        meshed[0].sharding.spec == PartitionSpec(("slice", "data", "fsdp", "decode", "expert"), None, None)
        and meshed[1].sharding.spec == ROWS
    )


def test_interleave_and_back():
    first, second = tree_of_jax(), jax.tree.map(lambda x: -x - 1, tree_of_jax())
    both = interleave(first, second)
    np.testing.assert_array_equal(both["id"][0::2], first["id"])
    np.testing.assert_array_equal(both["id"][1::2], second["id"])
    for found, given in zip(deinterleave(both["x"]), (first["x"], second["x"])):
        np.testing.assert_array_equal(found, given)
    meshed = on_mesh(lambda a, b: deinterleave(interleave(a, b)["x"]), first, second)
    np.testing.assert_array_equal(meshed[0], first["x"])
    np.testing.assert_array_equal(meshed[1], second["x"])
    assert meshed[0].sharding.spec == ROWS


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_hold_what_is_alike_in_size(parts):
    """16 rows in runs of two, on 1 device and on 4: each sorts its own runs, and every part is a block of them."""
    sizes = np.array([5, 1, 7, 3, 2, 8, 4, 6], np.int32)

    def split(rows, sizes):
        rows = reorder(rows, size_order(sizes, parts), together=2)
        return split_rows(rows, parts, together=2)

    alone = np.asarray(split(tree_of_jax(), jnp.asarray(sizes))["id"])
    expected = np.sort(sizes).reshape(parts, -1)
    np.testing.assert_array_equal(np.sort(sizes[alone[:, ::2] // 2], axis=1), expected)
    np.testing.assert_array_equal(alone[:, 1::2], alone[:, ::2] + 1)  # a run stays together
    if parts == 4:
        return  # devices have two runs each
    spread = np.asarray(on_mesh(split, tree(), sizes)["id"])
    own = np.sort(sizes.reshape(4, 2), axis=1).reshape(4, parts, -1).swapaxes(0, 1).reshape(parts, -1)
    np.testing.assert_array_equal(np.sort(sizes[spread[:, ::2] // 2], axis=1), np.sort(own, axis=1))


def test_an_order_is_undone_by_its_argsort():
    def there_and_back(rows, sizes):
        order = size_order(sizes, 2)
        return reorder(reorder(rows, order, 2), jnp.argsort(order, axis=1), 2)

    sizes = np.array([5, 1, 7, 3, 2, 8, 4, 6], np.int32)
    without = there_and_back(tree_of_jax(), jnp.asarray(sizes))
    one, eight = (on_mesh(there_and_back, tree(), sizes, devices=devices) for devices in (1, 8))
    for out in (without, one, eight):
        np.testing.assert_array_equal(out["x"], tree()["x"])
    assert eight["x"].sharding.spec == ROWS
