"""Frozen weights of 8 or 4 bits under an adapter (QLoRA: Dettmers et al. 2023, arXiv:2305.14314).

int8: a scale for each output of a linear map, as int8.py has it. nf4: blocks of 64 weights along the last axis that is
summed over share a scale, their largest |w| in float32, and each is one of 16 multiples of it (4-bit NormalFloat, the
quantiles of a normal distribution); two of them are a byte. The scales are not quantised again. The kernels of layers
alone are quantised: embeddings, heads, norms and biases stay as they are.
"""

import itertools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.models.int8 import Int8, quantized
from jaxrlhf.models.parameters import Leaf, inputs, weight_axes
from jaxrlhf.sharding import constrain, explicit, laid_as, split_over
from jaxrlhf.types import Array, Params

Quantization = Literal["int8", "nf4"]
BLOCK = 64  # weights that share a scale in nf4
SMALLEST = 4  # weights of a block at least: below it the scales take more than the weights
# the values of nf4, in the order of their codes: appendix E of the paper
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class Nf4(NamedTuple):
    """A kernel in 4 bits. Along one axis, that of the blocks, ``codes`` are half and ``scales`` a block-th as long."""

    codes: Array  # u8: of two neighbours along that axis, the first in the high bits
    scales: Array  # f32


Packed = Int8 | Nf4
PACKED = (Int8, Nf4)


def block_of(size: int) -> int:
    """Weights of a block where the axis has ``size``: BLOCK, or the largest even divisor below it.

    Raises ValueError, in one line, where that is below SMALLEST."""
    block = next((block for block in range(min(BLOCK, size), 1, -1) if block % 2 == 0 and size % block == 0), 1)
    if block < SMALLEST:
        raise ValueError(f"base_quantization: nf4: no even block of {SMALLEST} to {BLOCK} weights divides {size}")
    return block


def inputs_of(leaf: Leaf) -> tuple[int, ...]:
    """The axes of a layer's stacked kernel that are summed over; nf4 has its blocks along the last of them."""
    return tuple(range(1, 1 + inputs(leaf.axes[1:])))


def is_quantized(name: str, leaf: Leaf) -> bool:
    """Whether a parameter of this name is among those that are quantised."""
    return name == "kernel" and leaf.axes[0] == "layers" and not {"expert", "routes"} & {*leaf.axes}


def bytes_each(leaf: Leaf, kind: Quantization) -> float:
    """Bytes of a weight of a quantised kernel, its share of the scales included."""
    if kind == "int8":
        return 1 + 4 / math.prod(leaf.shape[axis] for axis in inputs_of(leaf))
    return 0.5 + 4 / block_of(leaf.shape[inputs_of(leaf)[-1]])


# ---- into 8 or 4 bits -----------------------------------------------------------------------------------------------


def pack(kernel: Array, leaf: Leaf, kind: Quantization) -> Packed:
    """The stacked kernel of ``leaf``, laid out as that is, in 8 or 4 bits. Raises ValueError as ``block_of``."""
    axes, ins = weight_axes(leaf), inputs_of(leaf)
    if kind == "int8":
        return placed(quantized(kernel, ins), axes)
    block_of(leaf.shape[ins[-1]])
    along = ins[-1] - 1  # of one layer

    def one(kernel: Array) -> Packed:
        whole = tuple(None if axis == along else name for axis, name in enumerate(axes[1:]))
        return placed(in_nf4(constrain(kernel, *whole), along), axes[1:])

    return jax.lax.map(one, kernel)


def placed(packed: Packed, axes: tuple[str | None, ...]) -> Packed:
    """``packed`` with each of its arrays laid out as a kernel with these ``axes``, as far as the devices divide it."""
    return type(packed)(*(constrain(part, *part_axes(part, axes)) for part in packed))


def part_axes(part: Array, axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """Those of the kernel's axes that the mesh can split in an array of its record."""
    fits = lambda name, size: name is not None and size % split_over(name) == 0
    return tuple(name if fits(name, size) else None for name, size in zip(axes, part.shape, strict=True))


def in_nf4(x: Array, axis: int) -> Nf4:
    """``x`` in blocks along ``axis``: of each weight over its block's largest |w| the nearest of NF4; the lower one of
    two that are as near."""
    size, block = x.shape[axis], block_of(x.shape[axis])
    split = (*x.shape[:axis], size // block, block, *x.shape[axis + 1 :])
    blocks = jax.lax.reshape(x.astype(jnp.float32), split, out_sharding=spread(x, axis))
    scales = jnp.abs(blocks).max(axis + 1, keepdims=True)
    shares = blocks / jnp.where(scales > 0, scales, 1.0)
    codes = sum((shares > (low + high) / 2).astype(jnp.uint8) for low, high in itertools.pairwise(NF4))
    pairs = jax.lax.reshape(codes, (*x.shape[:axis], size // 2, 2, *x.shape[axis + 1 :]), out_sharding=spread(x, axis))
    first, second = (jax.lax.index_in_dim(pairs, at, axis + 1, keepdims=False) for at in (0, 1))
    return Nf4(first << 4 | second, jnp.squeeze(scales, axis + 1))


def spread(x: Array, axis: int) -> jax.sharding.PartitionSpec | None:
    """The layout of ``x`` with ``axis`` as two, of which the first is split as it is."""
    if not explicit():
        return None
    split = jax.typeof(x).sharding.spec
    return jax.sharding.PartitionSpec(*split[: axis + 1], None, *split[axis + 1 :])


# ---- into wide numbers ----------------------------------------------------------------------------------------------


def unpacked(kernel: Array | Packed, dtype) -> Array:
    """The weights that a kernel stands for, in ``dtype``; those of all layers, or of one. They are computed in
    float32."""
    if isinstance(kernel, Int8):
        return (kernel.values.astype(jnp.float32) * kernel.scale).astype(dtype)
    if not isinstance(kernel, Nf4):
        return kernel.astype(dtype)
    codes, scales = kernel
    axis = next(at for at, (one, other) in enumerate(zip(codes.shape, scales.shape)) if one != other)
    shape = (*codes.shape[:axis], 2 * codes.shape[axis], *codes.shape[axis + 1 :])
    pairs = jnp.stack([value_of(codes >> 4, NF4), value_of(codes & 15, NF4)], axis + 1)
    values = jax.lax.reshape(pairs, shape, out_sharding=spec_of(codes))
    blocks = (*scales.shape[: axis + 1], shape[axis] // scales.shape[axis], *scales.shape[axis + 1 :])
    each = jnp.broadcast_to(jnp.expand_dims(scales, axis + 1), blocks)
    each = laid_as(jax.lax.reshape(each, shape, out_sharding=spec_of(scales)), values)
    return (values * each).astype(dtype)


def value_of(codes: Array, values: tuple[float, ...]) -> Array:
    """f32: ``values`` at the lowest bits of ``codes``, bit by bit: look-ups in a table are slow on TPUs.

    Nothing in it is as large as ``codes`` and does not depend on them: JAX would move that out of a scan over layers,
    and keep it."""
    if len(values) == 2:
        bit = (codes & 1).astype(jnp.float32)
        return values[1] * bit + values[0] * (1 - bit)
    half = len(values) // 2
    return jnp.where((codes & half) > 0, value_of(codes, values[half:]), value_of(codes, values[:half]))


def spec_of(x: Array) -> jax.sharding.PartitionSpec | None:
    return jax.typeof(x).sharding.spec if explicit() else None


# ---- a whole base ---------------------------------------------------------------------------------------------------


def packed_tree(params: Params, table: dict, kind: Quantization | None) -> Params:
    """``params``, which are as ``table`` has them, with the kernels of their layers in 8 or 4 bits; None: as they
    are. Raises ValueError as ``block_of``."""
    if kind is None:
        return params
    one = lambda path, leaf, x: pack(x, leaf, kind) if is_quantized(path[-1].key, leaf) else x
    return jax.tree_util.tree_map_with_path(one, table, params, is_leaf=lambda x: isinstance(x, Leaf))


def check_blocks(table: dict, kind: Quantization) -> None:
    """Raises ValueError, in one line, for a kernel of ``table`` that has no blocks, and for experts, which would stay
    wide and are most of a model."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(table, is_leaf=lambda x: isinstance(x, Leaf))
    if any("expert" in leaf.axes for _, leaf in leaves):
        raise ValueError(f"base_quantization: {kind}: a mixture's experts are not quantised; nearest: null")
    if "delta" in table.get("layers", {}):
        raise ValueError(f"base_quantization: {kind}: gated delta nets are not quantised yet; nearest: null")
    for path, leaf in leaves:
        if kind != "nf4" or not is_quantized(path[-1].key, leaf):
            continue
        axis = inputs_of(leaf)[-1]
        try:
            block_of(leaf.shape[axis])
        except ValueError as error:
            raise ValueError(f"{error}, the model's {leaf.axes[axis]}; nearest: int8") from None
