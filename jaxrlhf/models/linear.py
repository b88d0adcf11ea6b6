"""The one linear map. LoRA and quantised weights come in here and nowhere else."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxrlhf.models.cpu import not_before
from jaxrlhf.models.int8 import Int8, quantized
from jaxrlhf.models.parameters import Axes, inputs
from jaxrlhf.models.quantized import PACKED, Packed, part_axes, unpacked
from jaxrlhf.sharding import constrain, explicit, gathers_in_steps, spec, split_over
from jaxrlhf.types import Array, Params

PRODUCT = "product"  # the name under which remat policies may keep what a linear map's product is
OUT_FIRST = "kernel_out_first"  # in place of "kernel" in a linear map that ``out_first`` made
LORA_A, LORA_B = "lora_a", "lora_b"  # beside "kernel" in a linear map with an adapter: see models/lora.py
MAGNITUDE = "magnitude_change"  # beside them: what is learned of each output's magnitude; see models/dora.py
DORA_SCALE = "dora_scale"  # in its place where the map is computed: by how much each output is multiplied


def gathered(axes: Axes) -> Axes:
    """The axes of a weight where it is used: whole along ``embed``, which storage splits over fsdp."""
    return tuple(None if name in ("embed", "embed_of_expert") else name for name in axes)


def linear(params: Params, x: Array, equation: str, axes: Axes, out_axes: Axes, dtype=None) -> Array:
    """einsum(equation, x, kernel) + bias, in x's dtype (or ``dtype``, the type of the sum); and (x A) B beside it, all
    but the bias times a scale for each output where there is one.

    ``axes`` are the kernel's logical axes and ``out_axes`` the result's. A kernel split over fsdp is gathered here,
    so its gradient is scattered here; a contraction over a split axis (heads, mlp) is summed over the mesh. Whatever
    is recomputed backward, a gathered kernel is never kept for it: what is kept is its part, which is gathered again.
    """
    if OUT_FIRST in params:
        return plus_bias(params, by_output(params[OUT_FIRST], x, equation, out_axes, dtype), axes)
    if isinstance(params["kernel"], PACKED):
        like = layout(x) if explicit() else None, x.dtype
        y = times_packed(params["kernel"], x, equation, spec(*out_axes), axes, dtype, like)
    else:
        y = gathered_product(params["kernel"], x, equation, axes, out_axes, dtype)
    y = checkpoint_name(y, PRODUCT)
    if LORA_A in params:
        y = y + low_rank(params[LORA_A], params[LORA_B], x, equation, axes, out_axes, dtype)
    if DORA_SCALE in params:
        y = scale_outputs(y, constrain(params[DORA_SCALE], *gathered(axes[inputs(axes) :])))
    return plus_bias(params, y, axes)


def gathered_product(kernel: Array, x: Array, equation: str, axes: Axes, out_axes: Axes, dtype=None) -> Array:
    """einsum(equation, x, kernel), as ``linear`` has it."""

    def product(kernel: Array, x: Array) -> Array:
        return times(x, halfway(kernel.astype(x.dtype), axes), equation, spec(*out_axes), axes, dtype)

    if split_over("embed") > 1:
        # XLA may compute once what is the same: else a layer that is recomputed would gather a third time
        product = jax.checkpoint(product, prevent_cse=False)
    return product(kernel, x)


def low_rank(a: Array, b: Array, x: Array, equation: str, axes: Axes, out_axes: Axes, dtype=None) -> Array:
    """(x A) B beside einsum(equation, x, kernel): A has the kernel's inputs and the rank, B the rank and its outputs.

    Remat policies may keep x A, which is small, and not the product with B, which is computed again."""
    ins, out = equation.split("->")
    left, right = ins.split(",")
    count = inputs(axes)
    summed, made = right[:count], right[count:]
    rows = "".join(name for name in left if name not in summed)
    within = tuple(out_axes[out.index(name)] for name in rows)
    down, up = f"{left},{summed}r->{rows}r", f"{rows}r,r{made}->{out}"
    narrow = gathered_product(a, x, down, (*axes[:count], "rank"), (*within, "rank"))
    return gathered_product(b, checkpoint_name(narrow, PRODUCT), up, ("rank", *axes[count:]), out_axes, dtype)


@jax.custom_vjp
def scale_outputs(y: Array, scale: Array) -> Array:
    """y [..., outputs] times ``scale`` f32[outputs], in y's dtype, in which it is kept for the backward pass."""
    return (y * scale).astype(y.dtype)


def scale_outputs_forward(y: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    return scale_outputs(y, scale), (y, scale)


def scale_outputs_backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    y, scale = kept
    rows = tuple(range(y.ndim - scale.ndim))
    return (dy * scale).astype(y.dtype), (dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(rows)


scale_outputs.defvjp(scale_outputs_forward, scale_outputs_backward)


def gather(kernel: Array, axes: Axes) -> Array:
    """``kernel``, stored as ``axes`` say, whole along ``embed``."""
    return whole(halfway(kernel, axes), axes)


def whole(kernel: Array, axes: Axes) -> Array:
    """``kernel`` after the last step of its gathering."""
    return constrain(kernel, *gathered(axes)) if is_split(kernel) else kernel


def halfway(kernel: Array, axes: Axes) -> Array:
    """``kernel`` before the last step of its gathering, which is the only one but where ``sharding.in_steps``."""
    if not gathers_in_steps() or not is_split(kernel):
        return kernel
    return constrain(kernel, *("embed_of_group" if name == "embed" else name for name in axes))


def is_split(kernel: Array) -> bool:
    """Whether fsdp splits it here; the head's, which is used many times, was gathered before."""
    if not explicit():
        return False
    return any("fsdp" in ((names,) if isinstance(names, str) else names or ()) for names in layout(kernel).partitions)


def layout(x: Array) -> PartitionSpec:
    return jax.typeof(x).sharding.spec


def plus_bias(params: Params, y: Array, axes: Axes) -> Array:
    """``y`` and the bias, if there is one; ``axes`` of the kernel as in ``linear``."""
    if "bias" not in params:
        return y
    bias = params["bias"].astype(y.dtype)
    return y + constrain(bias, *(name for name in gathered(axes[-bias.ndim :])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def times(x: Array, kernel: Array, equation: str, where: Any, axes: Axes, dtype: Any) -> Array:
    """einsum(equation, x, kernel), with a gradient that XLA compiles well.

    Args:
        x, kernel: of one dtype.
        where: layout of the result.
        axes: logical axes of the kernel, which is gathered over fsdp here; its gradient is scattered again.
        dtype: of the result; None: that of the inputs.

    The backward pass differs from what JAX derives in three ways:
        - The kernel's gradient is x^T dy. JAX derives dy^T x and transposes it; XLA:CPU then transposes dy one element
          at a time, inside the operation that computes it.
        - Where fsdp splits the kernel's last axis, the gradient is computed with that axis first. XLA:TPU
          reduce-scatters along the first axis; along the last it all-reduces and slices, which sends twice the bytes.
        - dy is rounded to the inputs' dtype, as TPUs do. GPUs would otherwise copy the kernel in float32, for every
          chunk of logits.
    """
    return jnp.einsum(equation, x, whole(kernel, axes), out_sharding=where, preferred_element_type=dtype)


def times_forward(
    x: Array, kernel: Array, equation: str, where: Any, axes: Axes, dtype: Any
) -> tuple[Array, tuple[Array, Array]]:
    return times(x, kernel, equation, where, axes, dtype), (x, kernel)


def times_backward(
    equation: str, where: Any, axes: Axes, dtype: Any, kept: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = kept
    dy = dy.astype(x.dtype)
    ins, out = equation.split("->")
    left, right = ins.split(",")
    rows = [name for name in left if name in out]
    if [name for name in left + out if name in right] != list(right):
        # logits of tied embeddings: what the softmax sends back is computed once for both products, not in each of
        # them, and of the three arrays the product is the one to transpose
        dy = jax.lax.optimization_barrier(dy)
    factors = [(left, x), (out, dy)]
    if axes[-1] == "embed" and right[-1] in out and is_split(kernel):
        factors.reverse()
    made = [name for letters, _ in factors for name in letters if name in right]

    def lay(like: Array, names: str, order: Sequence[str]) -> PartitionSpec | None:
        if where is None:
            return None
        split = (layout(like).partitions[names.index(name)] for name in order)
        return PartitionSpec(*split, unreduced=layout(like).reduced)  # see sharding.used_often

    used = whole(kernel, axes)
    dx = jnp.einsum(f"{out},{right}->{left}", dy, used, out_sharding=lay(x, left, left))
    (names, first), (others, second) = factors
    summed = tuple(map(names.index, rows)), tuple(map(others.index, rows))
    # summed whole and split, which XLA makes one; what it makes of a product that is asked for in parts are many small
    # products and sends in turn, except in steps, where it scatters
    summed_as = lay(kernel if gathers_in_steps() else used, right, made)
    dkernel = jax.lax.dot_general(first, second, (summed, ((), ())), out_sharding=summed_as)
    dkernel = dkernel if where is None else jax.sharding.reshard(dkernel, lay(kernel, right, made))
    if made == list(right):
        return dx, dkernel
    return dx, jnp.transpose(jax.lax.optimization_barrier(dkernel), [made.index(name) for name in right])


times.defvjp(times_forward, times_backward)


# ---- few rows on a CPU ----------------------------------------------------------------------------------------------


def out_first(params: Params, axes: Axes) -> Params:
    """A linear map whose kernel begins with the axes of its result: on CPUs a product of few rows is up to twice as
    fast with the weights on its left, each row of them read once and in order."""
    kernel, ins = params["kernel"], inputs(axes)
    transposed = jnp.transpose(kernel, (*range(ins, kernel.ndim), *range(ins)))
    return {OUT_FIRST: transposed, **{name: x for name, x in params.items() if name != "kernel"}}


def by_output(kernel: Array, x: Array, equation: str, out_axes: Axes, dtype=None) -> Array:
    """What ``linear`` computes before the bias, of such a kernel, which is laid out as it is read."""
    ins, out = equation.split("->")
    left, right = ins.split(",")
    summed = [name for name in right if name not in out]
    made = [name for name in right if name in out] + [name for name in left if name in out]
    theirs = tuple(range(kernel.ndim - len(summed), kernel.ndim)), tuple(left.index(name) for name in summed)
    where = spec(*(out_axes[out.index(name)] for name in made))
    y = jax.lax.dot_general(
        kernel.astype(x.dtype), x, (theirs, ((), ())), preferred_element_type=dtype, out_sharding=where
    )
    # without the barrier XLA would transpose the product instead, and save this small transposition
    return jnp.transpose(jax.lax.optimization_barrier(y), [made.index(name) for name in out])


# ---- 8 and 4 bits ---------------------------------------------------------------------------------------------------


def in_int8(kernel: Array, axes: Axes) -> Int8:
    """``kernel``, laid out as ``axes`` say, with a scale for each of its outputs, gathered as 8 bits."""
    ins, whole = inputs(axes), gathered(axes)
    found = quantized(kernel, tuple(range(ins)))
    return Int8(constrain(found.values, *whole), constrain(found.scale, *(None,) * ins, *whole[ins:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def times_packed(kernel: Packed, x: Array, equation: str, where: Any, axes: Axes, dtype: Any, like: tuple) -> Array:
    """einsum(equation, x, the weights that ``kernel`` stands for), where these are frozen: no gradient is theirs.

    The weights are there in x's dtype for this product alone, and again for its backward pass, which keeps ``kernel``
    and no more: else a copy of all layers would be kept. ``like``: layout and dtype of x."""
    kernel = used_packed(kernel, x, axes)
    if isinstance(kernel, Int8):  # its scales are applied to what comes out
        y = jnp.einsum(equation, x, kernel.values.astype(x.dtype), out_sharding=where, preferred_element_type=dtype)
        return (y * jnp.squeeze(kernel.scale, tuple(range(inputs(axes))))).astype(y.dtype)
    return jnp.einsum(equation, x, unpacked(kernel, x.dtype), out_sharding=where, preferred_element_type=dtype)


def times_packed_forward(
    kernel: Packed, x: Array, equation: str, where: Any, axes: Axes, dtype: Any, like: tuple
) -> tuple[Array, Packed]:
    return times_packed(kernel, x, equation, where, axes, dtype, like), kernel


def times_packed_backward(
    equation: str, where: Any, axes: Axes, dtype: Any, like: tuple, kernel: Packed, dy: Array
) -> tuple[None, Array]:
    (split, compute), (ins, out) = like, equation.split("->")
    left, right = ins.split(",")
    kernel = used_packed(kernel, dy, axes)
    if isinstance(kernel, Int8):
        dy = dy * jnp.squeeze(kernel.scale, tuple(range(inputs(axes))))
        weights = kernel.values.astype(compute)
    else:
        weights = unpacked(kernel, compute)
    return None, jnp.einsum(f"{out},{right}->{left}", dy.astype(compute), weights, out_sharding=split)


times_packed.defvjp(times_packed_forward, times_packed_backward)


def used_packed(kernel: Packed, after: Array, axes: Axes) -> Packed:
    """``used_whole``, not before ``after`` is there: else XLA could compute the weights of all layers, or for all
    tokens, at once and keep them."""
    bits, scale = used_whole(kernel, axes)
    return type(kernel)(not_before(bits, after), scale)


def used_whole(kernel: Packed, axes: Axes) -> Packed:
    """``kernel`` whole along ``embed``, gathered as 8 or 4 bits."""

    def one(part: Array) -> Array:
        names = part_axes(part, axes)
        return whole(halfway(part, names), names)

    return type(kernel)(*map(one, kernel))
