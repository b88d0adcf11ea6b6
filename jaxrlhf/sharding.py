"""The mesh, and the one table from logical axis names to mesh axes.

Sharding is explicit (jax.sharding.AxisType.Explicit): the layout of an array is part of its type, and a mistake is an
error while tracing instead of a silent copy. Code names logical axes only; this file alone knows mesh axes.

The step also runs under a literal jax.pmap (``mesh.style: pmap``): every device has all the weights and its own rows,
no mesh is current, and the few sums that are of the whole batch go through ``across``.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("slice", "data", "fsdp", "decode", "expert", "context", "tensor")
SPLIT_ROWS = ("slice", "data", "fsdp", "decode", "expert")  # all that is not context or tensor
DEVICES = "devices"  # the axis of pmap
Rules = dict[str, str | tuple[str, ...] | None]

# logical axis -> mesh axes. Weights are stored split over fsdp (and decode, which is a part of it) and gathered where
# they are used (models/linear.py); activations split their rows over all that is not context or tensor.
RULES: Rules = {
    "batch": SPLIT_ROWS,
    "rows": AXES,  # as batch, and over the devices that share its rows too
    "seq": None,
    "hidden": None,  # features of an activation
    "embed": ("fsdp", "decode", "expert", "context"),  # the same features in a weight
    "embed_of_expert": ("fsdp", "decode", "context"),  # and in a weight of an expert
    "embed_of_group": "fsdp",  # those that a decode group has together
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    # rows of a table that is looked up where it lies (models/per_layer.py)
    "vocab_of_layer": ("fsdp", "decode", "expert", "context", "tensor"),
    "expert": "expert",
    "routes": None,  # a router's outputs, one an expert
    "layers": None,
    "per_layer": None,  # features of a token's embedding in one layer
    "taps": None,  # columns that a convolution sees
    "positions": None,  # rows of a learned position table
    "score": None,  # the one column of a scalar head
    "rank": None,  # of an adapter: columns of A, rows of B
    "observation": None,  # numbers of an environment's observation
}
# Where the mesh has an axis context, it splits the columns of activations (models/context.py).
CONTEXT_RULES: Rules = RULES | {"seq": "context"}
# While responses are sampled no weight is gathered for a token: those of a decode group share one copy among them, as
# tensor does, and their rows. Devices along context have rows of their own: a token is one column.
DECODE_RULES: Rules = RULES | {
    "batch": ("slice", "data", "fsdp", "expert", "context"),
    "embed": ("fsdp", "expert", "context"),
    "embed_of_expert": ("fsdp", "context"),
    **dict.fromkeys(("heads", "kv_heads", "mlp", "vocab", "vocab_of_layer"), ("decode", "tensor")),
}
# What is traced depends on these, so they are part of the key under which JAX keeps what it has traced: no program that
# was traced under one rule set is used under another.
DECODING = jax.make_user_context(False)  # whether DECODE_RULES are in force
IN_STEPS = jax.make_user_context(False)  # see in_steps


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (once) takes what the others leave."""

    data: int = -1  # copies of the weights, each with its own rows
    fsdp: int = 1  # devices that share a copy of the weights, each with its own rows
    tensor: int = 1  # devices that share heads, mlp and vocabulary, and their rows
    slices: int = 1  # of a TPU, joined by the data-center network: copies of all the above
    decode: int = 1  # of the fsdp devices: how many share a copy of the weights, and rows, while responses are sampled
    expert: int = 1  # devices that share the experts, and other weights as fsdp does, each with its own rows
    context: int = 1  # devices that share the columns of a row, and weights as fsdp does; each samples rows of its own
    _: dataclasses.KW_ONLY
    style: Literal["mesh", "pmap"] = "mesh"  # pmap: jax.pmap over the devices of this process, data only


ALWAYS_SHOWN = ("data", "fsdp", "tensor")


def mesh_shape(cfg: MeshConfig, num_devices: int, place: str = "here") -> tuple[int, ...]:
    """Sizes along AXES. Raises ValueError, in one line, when they do not multiply to ``num_devices``, which are
    ``place``."""
    named = ("slices", "data", "fsdp", "expert", "context", "tensor")
    sizes: dict[str, int] = {name: getattr(cfg, name) for name in named}
    shown = ", ".join(f"{name}={size}" for name, size in sizes.items() if name in ALWAYS_SHOWN or size != 1)
    given = [*sizes.values()]
    if cfg.style == "pmap" and (given != [1, cfg.data, 1, 1, 1, 1] or cfg.decode != 1):
        raise ValueError(f"mesh: ({shown}): style pmap splits rows only; expected data alone, or style: mesh")
    if given.count(-1) > 1 or any(size < 1 and size != -1 for size in given) or cfg.slices < 1:
        raise ValueError(f"mesh: ({shown}): sizes are positive, and at most one is -1 (the rest of the devices)")
    known = math.prod(size for size in given if size != -1)
    if num_devices % known or (-1 not in given and known != num_devices):
        count = f"a multiple of {known}" if -1 in given else known
        raise ValueError(f"mesh: ({shown}) needs {count} devices; there are {num_devices} {place}")
    slices, data, fsdp, expert, context, tensor = (num_devices // known if size == -1 else size for size in given)
    if cfg.decode < 1 or fsdp % cfg.decode:
        nearest = math.gcd(fsdp, max(cfg.decode, 1))
        raise ValueError(f"mesh.decode: {cfg.decode}: expected a divisor of fsdp={fsdp}; nearest: {nearest}")
    return slices, data, fsdp // cfg.decode, cfg.decode, expert, context, tensor


def make_mesh(cfg: MeshConfig, devices: list | None = None) -> Mesh:
    """An explicit mesh over ``devices`` (all of them by default); for pmap its own, of one axis that is never current.

    Raises ValueError, in one line, where the sizes do not fit the devices or their slices."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(cfg, len(devices))
    kinds = (AxisType.Explicit,) * len(AXES)
    if cfg.style == "pmap":
        if (count := jax.process_count()) > 1:
            raise ValueError(f"mesh.style: pmap: for one process, and there are {count}; expected mesh")
        return Mesh(np.array(devices), (DEVICES,))
    found = sorted({getattr(device, "slice_index", 0) for device in devices})
    if len(found) > 1 and cfg.slices != len(found):
        raise ValueError(f"mesh.slices: {cfg.slices}: these devices are in {len(found)} slices; nearest: {len(found)}")
    from jax.experimental import mesh_utils

    if len(found) > 1:
        inside, between = (1, *shape[1:]), (cfg.slices, *(1,) * (len(shape) - 1))
        return Mesh(mesh_utils.create_hybrid_device_mesh(inside, between, devices), AXES, kinds)
    # sizes that are no product of the torus' own (8 on a v5p:4x4x4) lie along a part of one of them
    return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES, kinds)


def is_pmap(mesh: Mesh) -> bool:
    """Whether make_mesh made it for pmap."""
    return mesh.axis_names == (DEVICES,)


@contextlib.contextmanager
def current(mesh: Mesh) -> Iterator[None]:
    """``with current(mesh)``: the mesh of what is traced there; none for that of pmap, which brings its own."""
    with IN_STEPS(in_steps(mesh)), contextlib.nullcontext() if is_pmap(mesh) else jax.set_mesh(mesh):
        yield


def in_steps(mesh: Mesh) -> bool:
    """Whether weights are better gathered within decode groups first, then over fsdp, and their gradients scattered the
    other way round: where all of fsdp (and context) lies along three axes of a torus, and that of one decode rank
    along fewer; or where it is a ``whole_square``, and that of one decode rank is not.

    XLA:TPU (libtpu 0.0.52, v5p) gathers and scatters along one axis or two; along three it sums whole weights, of zeros
    but for each device's part, which sends twice the bytes."""
    if is_pmap(mesh):
        return False
    devices = sharing(mesh)
    part = devices[:, :1, :1]
    return torus_axes(devices) > 2 >= torus_axes(part) or (whole_square(mesh) and part.size < devices.size)


def whole_square(mesh: Mesh) -> bool:
    """Whether a copy of the weights is shared by all chips of a slice of n x n, n > 2.

    XLA:TPU (libtpu 0.0.52; v5e, v6e and v5p of 4x4, 8x8, 16x16) then sums whole gradients and keeps a part, also where
    it is asked for psum_scatter: twice the bytes. It gathers as elsewhere, and scatters over 2x4, 4x8 or a part of the
    slice, into pieces of any size."""
    return not is_pmap(mesh) and sharing(mesh).size == mesh.devices.size and is_square(mesh.devices)


def is_square(devices: np.ndarray) -> bool:
    """Whether these lie on n x n places of a torus, n > 2."""
    places = [device.coords for device in devices.flat if hasattr(device, "coords")]
    sides = sorted(len(set(axis)) for axis in zip(*places))
    return len(sides) > 1 and sides[-1] == sides[-2] > 2 and sides[-1] ** 2 == devices.size


def sharing(mesh: Mesh) -> np.ndarray:
    """[fsdp, decode, context]: devices that share a copy of the weights, of the first experts and the first heads."""
    return mesh.devices[0, 0, :, :, 0, :, 0]


def gathers_in_steps() -> bool:
    """Whether the current mesh is one whose weights are gathered ``in_steps``."""
    return IN_STEPS.value


def sums_whole(mesh: Mesh) -> bool:
    """Whether XLA sums whole weights, as ``in_steps`` says, and steps are of no use."""
    return not is_pmap(mesh) and not in_steps(mesh) and torus_axes(sharing(mesh)) > 2


def torus_axes(devices: np.ndarray) -> int:
    """Along how many axes of their torus these lie; 0 where they say nothing of any."""
    found = [device.coords for device in devices.flat if hasattr(device, "coords")]
    return sum(len(set(places)) > 1 for places in zip(*found))


def explicit() -> bool:
    """Whether the current mesh has explicit axes; without one (pmap, plain jit), specs are None."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and any(kind == AxisType.Explicit for kind in mesh.axis_types)


def mapped() -> bool:
    """Whether this is traced under pmap, for one of its devices."""
    return DEVICES in jax.sharding.get_abstract_mesh().axis_names


def across(tree):
    """``tree`` summed over the devices of pmap; just ``tree`` on a mesh, where a sum is that of the whole batch.

    Never inside what is differentiated: gradients are summed afterwards, as the losses are."""
    return jax.lax.psum(tree, DEVICES) if mapped() else tree


def all_finite(leaves: Sequence[jax.Array]) -> jax.Array:
    """bool[]: whether no number of any leaf is NaN or infinite.

    Each device looks at its own part of every leaf, and one number is reduced over the mesh."""
    fine = lambda *leaves: jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
    if not explicit():
        return fine(*leaves)
    axes = jax.sharding.get_abstract_mesh().axis_names
    everywhere = lambda *leaves: jax.lax.pmin(fine(*leaves).astype(jnp.int32), axes)
    specs = tuple(jax.typeof(leaf).sharding.spec for leaf in leaves)
    return jax.shard_map(everywhere, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)(*leaves) > 0


def spec(*names: str | None) -> PartitionSpec | None:
    """The PartitionSpec of an array whose dimensions are the logical axes ``names``; None without an explicit mesh."""
    return partition(names) if explicit() else None


def partition(names: tuple[str | None, ...]) -> PartitionSpec:
    """The rules table applied to ``names``, mesh or not. Raises KeyError for a name that is not in the table."""
    rules = rules_in_force()
    return PartitionSpec(*(None if name is None else rules[name] for name in names))


def rules_in_force() -> Rules:
    """The table that logical axes are looked up in."""
    if DECODING.value:
        return DECODE_RULES
    return CONTEXT_RULES if jax.sharding.get_abstract_mesh().shape.get("context", 1) > 1 else RULES


def decoding() -> contextlib.AbstractContextManager[None]:
    """``with decoding()``: what is traced there lies as DECODE_RULES say; arrays enter and leave by ``constrain``."""
    return DECODING(True)


def split_over(*names: str) -> int:
    """Over how many devices the current mesh splits the logical axes ``names`` together; 1 without an explicit mesh."""
    if not explicit():
        return 1
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in mesh_axes(*names))


def mesh_axes(*names: str) -> list[str]:
    """The mesh axes that split the logical axes ``names``."""
    rules = map(rules_in_force().get, names)
    return [axis for rule in rules for axis in ((rule,) if isinstance(rule, str) else rule or ())]


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """``x`` laid out as ``names`` say (a collective where the layout changes); just ``x`` without an explicit mesh."""
    return jax.sharding.reshard(x, partition(names)) if explicit() else x


def used_often(x: jax.Array, *names: str | None) -> jax.Array:
    """``constrain``, where tokens that devices split meet ``x`` in several products, in a loop say: each device adds up
    the gradient of its own tokens, and what they all have is summed once, where this is differentiated."""
    if not explicit():
        return x
    return jax.sharding.reshard(x, PartitionSpec(*partition(names), reduced=frozenset(mesh_axes("batch", "seq"))))


def gather_over(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """Inside a shard_map: ``x`` whole along ``dimension``, which ``axes`` of the mesh split."""
    return jax.lax.all_gather(x, axes, axis=dimension, tiled=True) if axes else x


def scatter_over(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """Inside a shard_map: the sum of ``x`` over ``axes`` of the mesh, of which each device keeps its part along
    ``dimension``."""
    return jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True) if axes else x


def whole_rows(x: jax.Array) -> jax.Array:
    """``x`` with its last dimension whole on every device, and the others as they lie."""
    if not explicit():
        return x
    return jax.sharding.reshard(x, PartitionSpec(*jax.typeof(x).sharding.spec[:-1], None))


def split_columns(x: jax.Array, *sizes: int) -> jax.Array:
    """[B, C, ...] -> [B, *sizes, ...], rows laid out as they are; ``sizes`` multiply to C, which no device splits.

    A plain reshape drops the layout of an only row where one of the new sizes is 1."""
    rows, _, *rest = x.shape
    return reshaped(x, (rows, *sizes, *rest), (0, *(None,) * len(sizes), *range(2, x.ndim)))


def reshaped(x: jax.Array, shape: Sequence[int], takes: Sequence[int | None]) -> jax.Array:
    """``x`` in another ``shape``, whose dimension i is split as dimension takes[i] of ``x`` is; None: not at all."""
    layout = None
    if explicit():
        whose = jax.typeof(x).sharding.spec
        layout = PartitionSpec(*(None if axis is None else whose[axis] for axis in takes))
    return jax.lax.reshape(x, tuple(shape), out_sharding=layout)


def laid_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """``x`` laid out as ``like``, which has its shape."""
    return jax.sharding.reshard(x, jax.typeof(like).sharding.spec) if explicit() else x


def concrete(tree, mesh: Mesh):
    """Shapes from jax.eval_shape with their AbstractMesh shardings put on ``mesh``, which orbax needs."""

    def one(x):
        pspec = x.sharding.spec if x.sharding is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, pspec))

    return jax.tree.map(one, tree)


def for_programs(tree, mesh: Mesh):
    """``tree`` as the programs of ``mesh`` take it: for pmap a copy on every device, else as it is laid out."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec())) if is_pmap(mesh) else tree


def row_layout(mesh: Mesh, ndim: int) -> NamedSharding:
    """How an array of the batch lies on the mesh: its rows split."""
    rows = PartitionSpec(DEVICES) if is_pmap(mesh) else partition(("batch",))
    return NamedSharding(mesh, PartitionSpec(*rows, *(None,) * (ndim - 1)))


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return mesh.size // row_layout(mesh, 1).shard_shape((mesh.size,))[0]


def prompt_shards(mesh: Mesh) -> int:
    """Over how many devices prompts have to divide: as the rows of a batch, and while responses are sampled."""
    return batch_shards(mesh) * context_of(mesh)


def context_of(mesh: Mesh) -> int:
    """Devices that share the columns of a row."""
    return mesh.shape.get("context", 1)
