"""The mesh, its one-line errors, and the table from logical axes to mesh axes."""

import functools
import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxrlhf import sharding
from jaxrlhf.ops import masked
from jaxrlhf.sharding import AXES, MeshConfig, make_mesh, mesh_shape


@pytest.mark.parametrize(
    ("cfg", "devices", "shape"),
    [
        (MeshConfig(), 1, (1, 1, 1, 1, 1, 1, 1)),
        (MeshConfig(), 8, (1, 8, 1, 1, 1, 1, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), 8, (1, 2, 2, 1, 1, 1, 2)),
        (MeshConfig(data=1, fsdp=4, tensor=2), 8, (1, 1, 4, 1, 1, 1, 2)),
        (MeshConfig(data=2, fsdp=3, tensor=-1), 6, (1, 2, 3, 1, 1, 1, 1)),
        (MeshConfig(slices=2, fsdp=2), 8, (2, 2, 2, 1, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=4, tensor=2, decode=2), 8, (1, 1, 2, 2, 1, 1, 2)),
        (MeshConfig(data=1, fsdp=2, expert=-1), 8, (1, 1, 2, 1, 4, 1, 1)),
        (MeshConfig(data=1, fsdp=2, context=-1, tensor=2), 8, (1, 1, 2, 1, 1, 2, 2)),
        (MeshConfig(style="pmap"), 8, (1, 8, 1, 1, 1, 1, 1)),
    ],
)
def test_mesh_shape(cfg, devices, shape):
    assert mesh_shape(cfg, devices) == shape


@pytest.mark.parametrize(
    ("cfg", "devices", "words"),
    [
        (MeshConfig(data=2, fsdp=2, tensor=2), 6, ["data=2, fsdp=2, tensor=2", "needs 8 devices", "there are 6 here"]),
        (MeshConfig(data=2, fsdp=2, tensor=1), 8, ["data=2, fsdp=2, tensor=1", "needs 4 devices", "there are 8 here"]),
        (
            MeshConfig(data=-1, fsdp=3),
            8,
            ["data=-1, fsdp=3, tensor=1", "needs a multiple of 3 devices", "there are 8 here"],
        ),
        (MeshConfig(data=-1, fsdp=-1), 8, ["data=-1, fsdp=-1", "at most one is -1"]),
        (MeshConfig(data=0), 8, ["data=0", "positive"]),
        (MeshConfig(fsdp=-2), 8, ["fsdp=-2", "positive"]),
        (MeshConfig(slices=-1, data=8), 8, ["slices=-1", "positive"]),
        (MeshConfig(slices=3), 8, ["slices=3, data=-1", "needs a multiple of 3 devices", "there are 8 here"]),
        (MeshConfig(fsdp=4, decode=3, data=2), 8, ["mesh.decode: 3: expected a divisor of fsdp=4", "nearest: 1"]),
        (MeshConfig(expert=3), 8, ["data=-1, fsdp=1, expert=3", "needs a multiple of 3 devices"]),
        (MeshConfig(data=1, expert=8, style="pmap"), 8, ["expert=8", "style pmap splits rows only"]),
        (MeshConfig(context=3), 8, ["data=-1, fsdp=1, context=3", "needs a multiple of 3 devices"]),
        (MeshConfig(context=2, style="pmap"), 8, ["context=2", "style pmap splits rows only"]),
        (MeshConfig(fsdp=2, style="pmap"), 8, ["data=-1, fsdp=2", "style pmap splits rows only", "style: mesh"]),
        (MeshConfig(slices=2, style="pmap"), 8, ["slices=2", "style pmap splits rows only"]),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line(cfg, devices, words):
    with pytest.raises(ValueError) as caught:
        mesh_shape(cfg, devices)
    message = str(caught.value)
    assert message.startswith(("mesh: ", "mesh.decode: ")) and "\n" not in message
    for word in words:
        assert word in message


def test_a_mesh_is_explicit_and_in_the_order_of_the_devices():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert mesh.axis_names == AXES and set(mesh.axis_types) == {AxisType.Explicit}
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    assert make_mesh(MeshConfig(), jax.devices()[:3]).devices.shape == (1, 3, 1, 1, 1, 1, 1)
    assert sharding.batch_shards(mesh) == 4  # rows go over data and fsdp
    assert sharding.batch_shards(make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))) == 4
    assert sharding.batch_shards(make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))) == 4
    assert sharding.batch_shards(make_mesh(MeshConfig(tensor=8))) == 1


def test_slices_are_the_outermost_axis_and_count_as_rows():
    mesh = make_mesh(MeshConfig(slices=2, data=1, fsdp=2, tensor=2))
    assert [device.id for device in mesh.devices[1].flat] == [4, 5, 6, 7]
    assert sharding.batch_shards(mesh) == 4


class Device:
    """As much of a TPU as the mesh asks for."""

    platform, device_kind, process_index = "tpu", "TPU v5 lite", 0

    def __init__(self, ident: int):
        self.id, self.slice_index = ident, ident // 4 % 2
        self.coords, self.core_on_chip = (ident % 2, ident // 2 % 2, 0), 0


def test_slices_must_be_those_of_the_devices():
    with pytest.raises(ValueError, match=r"^mesh.slices: 1: these devices are in 2 slices; nearest: 2$"):
        make_mesh(MeshConfig(), [Device(i) for i in range(8)])


def test_pmap_has_no_current_mesh():
    mesh = make_mesh(MeshConfig(style="pmap"))
    with sharding.current(mesh):
        assert not sharding.explicit() and sharding.spec("batch") is None
    x = sharding.for_programs(jnp.arange(3), mesh)
    assert len(x.addressable_shards) == 8 and x.sharding.is_fully_replicated
    with sharding.current(make_mesh(MeshConfig())):
        assert sharding.explicit()


def test_across_sums_over_devices_under_pmap_only():
    """Masked statistics with it: the numbers of the whole batch on every device."""
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(16, 5)).astype(np.float32), rng.random((16, 5)) < 0.5
    white = functools.partial(masked.whiten, variance="unbiased")
    x, mask = jnp.asarray(x), jnp.asarray(mask)
    function = lambda x, mask: (white(x, mask), masked.mean(x, mask), masked.count(mask), sharding.mapped())
    split = jax.pmap(function, sharding.DEVICES)(x.reshape(8, 2, 5), mask.reshape(8, 2, 5))
    assert not sharding.mapped() and sharding.across(x) is x and all(split[3])
    np.testing.assert_allclose(split[0].reshape(16, 5), white(x, mask), atol=1e-6)
    np.testing.assert_allclose(split[1], np.full(8, x[mask].mean()), atol=1e-6)
    np.testing.assert_array_equal(split[2], np.full(8, mask.sum()))


def test_partition_is_the_table():
    assert sharding.partition(("batch", "seq", None)) == PartitionSpec(
        ("slice", "data", "fsdp", "decode", "expert"), None, None
    )
    assert sharding.partition(("layers", "embed", "kv_heads", "head_dim")) == PartitionSpec(
        None, ("fsdp", "decode", "expert", "context"), "tensor", None
    )
    with pytest.raises(KeyError, match="colour"):
        sharding.partition(("colour",))
    used = {axis for rule in sharding.RULES.values() for axis in ((rule,) if isinstance(rule, str) else rule or ())}
    assert used <= set(AXES)


def test_context_splits_columns_where_a_row_has_several():
    """In training; while responses are sampled it splits rows."""
    whole, split = make_mesh(MeshConfig(data=4, tensor=2)), make_mesh(MeshConfig(data=2, tensor=2, context=2))
    rows = ("slice", "data", "fsdp", "decode", "expert")
    with jax.set_mesh(whole):
        assert sharding.partition(("batch", "seq")) == PartitionSpec(rows, None) and sharding.split_over("seq") == 1
    with jax.set_mesh(split):
        assert sharding.partition(("batch", "seq")) == PartitionSpec(rows, "context")
        assert (sharding.split_over("batch"), sharding.split_over("seq")) == (2, 2)
        with sharding.decoding():
            assert sharding.partition(("seq",)) == PartitionSpec(None) and sharding.split_over("batch") == 4
    assert (sharding.batch_shards(split), sharding.prompt_shards(split)) == (2, 4)


def test_without_a_mesh_nothing_is_laid_out():
    x = jnp.ones((4, 2))
    assert not sharding.explicit() and sharding.spec("batch", None) is None
    assert sharding.constrain(x, "batch", None) is x


def test_under_a_mesh_rows_are_split():
    x = np.arange(16.0).reshape(8, 2)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        split = sharding.constrain(jnp.asarray(x), "batch", None)
        assert sharding.explicit() and jax.typeof(split).sharding.spec == PartitionSpec(
            ("slice", "data", "fsdp", "decode", "expert"), None
        )
        assert {shard.data.shape for shard in split.addressable_shards} == {(2, 2)}
        np.testing.assert_array_equal(split, x)
        with pytest.raises(Exception, match="5"):  # 5 rows on 4 shards: refused, not padded
            sharding.constrain(jnp.ones((5, 2)), "batch", None)


def test_concrete_puts_abstract_layouts_on_the_mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(
            lambda: {"w": sharding.constrain(jnp.ones((4, 8)), "embed", "mlp"), "n": jnp.int32(0)}
        )
    found = sharding.concrete(abstract, mesh)
    assert found["w"].sharding.mesh == mesh and found["w"].sharding.spec == PartitionSpec(
        ("fsdp", "decode", "expert", "context"), "tensor"
    )
    assert found["n"].sharding.spec == PartitionSpec() and found["n"].dtype == jnp.int32


class Chip(NamedTuple):
    """A device of a torus."""

    coords: tuple[int, int, int]


def torus(shape: tuple[int, int, int], fsdp: int, decode: int, context: int = 1) -> Any:
    """A mesh of them, in order, with no more than what is asked of it."""
    chips = np.empty(math.prod(shape), object)
    chips[:] = [Chip(place) for place in np.ndindex(*shape)]
    devices = chips.reshape(1, -1, fsdp // decode, decode, 1, context, 1)
    return SimpleNamespace(devices=devices, axis_names=sharding.AXES)


@pytest.mark.parametrize(
    ("shape", "fsdp", "decode", "steps", "whole"),
    [
        ((4, 4, 4), 64, 4, True, False),
        ((4, 4, 4), 64, 16, True, False),
        ((4, 4, 4), 64, 1, False, True),
        ((4, 4, 4), 64, 2, False, True),  # half of an axis: the other half goes on with the two
        ((4, 4, 4), 16, 4, False, False),  # two axes
        ((16, 8, 1), 128, 16, False, False),
        ((16, 16, 1), 256, 16, True, False),  # all of a square
        ((4, 4, 1), 16, 2, True, False),
        ((4, 4, 1), 16, 1, False, False),  # no steps: gradients alone are summed whole
        ((4, 4, 1), 8, 2, False, False),
        ((2, 2, 1), 4, 2, False, False),
    ],
)
def test_weights_move_in_steps_along_three_axes_and_in_squares(shape, fsdp, decode, steps, whole):
    mesh = torus(shape, fsdp, decode)
    assert (sharding.in_steps(mesh), sharding.sums_whole(mesh)) == (steps, whole)


def test_a_square_is_all_of_a_slice():
    """And more than 2 x 2; devices that lie nowhere are none."""
    assert sharding.whole_square(torus((4, 4, 1), 16, 1)) and sharding.whole_square(torus((8, 8, 1), 16, 2, 4))
    for mesh in (torus((4, 4, 1), 8, 1), torus((4, 8, 1), 32, 1), torus((2, 2, 1), 4, 1), torus((4, 4, 4), 64, 1)):
        assert not sharding.whole_square(mesh)
    assert not sharding.is_square(np.array(jax.devices()[:4]))


def test_context_shares_weights_as_fsdp_does():
    """16 x 4 devices of a v5p:4x4x4: those along context are gathered from first."""
    assert sharding.in_steps(torus((4, 4, 4), 16, 1, 4)) and not sharding.sums_whole(torus((4, 4, 4), 16, 1, 4))
    assert sharding.sums_whole(torus((4, 4, 4), 32, 1, 2))


def test_cpus_lie_on_no_torus():
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 8, decode=2), jax.devices()[:8])
    assert not sharding.in_steps(mesh) and not sharding.sums_whole(mesh)


# ---- rules in force, and programs that were traced under others -----------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["called", "inside another trace"])
def test_a_cached_program_is_not_reused_under_other_rules(nested):
    """An inner jit is traced once for the rules of training and once for those of decoding, in whichever order."""
    laid = jax.jit(lambda x: sharding.constrain(x, "batch", "heads"))

    def both(x):
        before = laid(x)
        with sharding.decoding():
            during = laid(x)
        return before, during, laid(x)

    with sharding.current(make_mesh(MeshConfig(data=1, fsdp=4, tensor=2, decode=2))):
        found = jax.eval_shape(both, jnp.zeros((8, 8))) if nested else both(jnp.zeros((8, 8)))
        training = sharding.partition(("batch", "heads"))
        with sharding.decoding():
            decoding = sharding.partition(("batch", "heads"))
    assert training != decoding and [x.sharding.spec for x in found] == [training, decoding, training]


def test_a_cached_program_is_not_reused_where_weights_are_gathered_in_steps(monkeypatch):
    """in_steps depends on the devices' torus, which an abstract mesh, the key of jax.jit, does not tell."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    answer = jax.jit(lambda: jnp.int32(sharding.gathers_in_steps()))
    for steps in (False, True, False):
        monkeypatch.setattr(sharding, "in_steps", lambda mesh, steps=steps: steps)
        with sharding.current(mesh):
            assert int(answer()) == steps
