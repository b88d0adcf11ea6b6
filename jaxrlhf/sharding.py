"""The mesh, and the one table from logical axis names to mesh axes.

Sharding is explicit (jax.sharding.AxisType.Explicit): the layout of an array is part of its type, and a mistake is an
error while tracing instead of a silent copy. Code names logical axes only; this file alone knows mesh axes.
"""

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# logical axis -> mesh axes. Weights are stored split over fsdp and gathered where they are used (models/heads.linear);
# activations split their rows over data and fsdp.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "seq": None,
    "hidden": None,  # features of an activation
    "embed": "fsdp",  # the same features in a weight
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    "positions": None,  # rows of a learned position table
    "score": None,  # the one column of a scalar head
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (once) takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def mesh_shape(cfg: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Sizes along AXES. Raises ValueError, in one line, when they do not multiply to ``num_devices``."""
    sizes = [getattr(cfg, axis) for axis in AXES]
    shown = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh: ({shown}): sizes are positive, and at most one is -1 (the rest of the devices)")
    known = 1
    for size in sizes:
        known *= size if size != -1 else 1
    if num_devices % known or (-1 not in sizes and known != num_devices):
        word = "divides into" if -1 in sizes else "equals"
        raise ValueError(f"mesh: ({shown}) needs {known} devices, which never {word} the {num_devices} present here")
    return tuple(num_devices // known if size == -1 else size for size in sizes)


def make_mesh(cfg: MeshConfig, devices: list | None = None) -> Mesh:
    """An explicit mesh over ``devices`` (all of them by default)."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(cfg, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)


def explicit() -> bool:
    """Whether the current mesh has explicit axes; without one (pmap, plain jit), specs are None."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and any(kind == AxisType.Explicit for kind in mesh.axis_types)


def spec(*names: str | None) -> PartitionSpec | None:
    """The PartitionSpec of an array whose dimensions are the logical axes ``names``; None without an explicit mesh."""
    return partition(names) if explicit() else None


def partition(names: tuple[str | None, ...]) -> PartitionSpec:
    """The rules table applied to ``names``, mesh or not. Raises KeyError for a name that is not in the table."""
    return PartitionSpec(*(None if name is None else RULES[name] for name in names))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """``x`` laid out as ``names`` say (a collective where the layout changes); just ``x`` without an explicit mesh."""
    return jax.sharding.reshard(x, partition(names)) if explicit() else x


def split_over(*names: str) -> int:
    """Over how many devices the current mesh splits the logical axes ``names`` together; 1 without an explicit mesh."""
    if not explicit():
        return 1
    rules = [RULES[name] for name in names]
    axes = [axis for rule in rules for axis in ((rule,) if isinstance(rule, str) else rule or ())]
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


def concrete(tree, mesh: Mesh):
    """Shapes from jax.eval_shape with their AbstractMesh shardings put on ``mesh``, which orbax needs."""

    def one(x):
        pspec = x.sharding.spec if x.sharding is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, pspec))

    return jax.tree.map(one, tree)


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are split."""
    rows = RULES["batch"]
    size = 1
    for axis in (rows,) if isinstance(rows, str) else rows or ():
        size *= mesh.shape[axis]
    return size
