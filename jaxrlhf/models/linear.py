"""The one linear map. LoRA and quantised weights come in here and nowhere else."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxrlhf.models.int8 import Int8, quantized
from jaxrlhf.sharding import constrain, spec, split_over
from jaxrlhf.types import Array, Params

Axes = tuple[str | None, ...]  # a logical axis a dimension; None: whole on every device
PRODUCT = "product"  # the name under which remat policies may keep what a linear map's product is
OUT_FIRST = "kernel_out_first"  # in place of "kernel" in a linear map that ``out_first`` made


def gathered(axes: Axes) -> Axes:
    """The axes of a weight where it is used: whole along ``embed``, which storage splits over fsdp."""
    return tuple(None if name == "embed" else name for name in axes)


def inputs(axes: Axes) -> int:
    """How many of a kernel's axes, its first, are summed over."""
    return 1 if axes[0] == "embed" else len(axes) - 1


def linear(params: Params, x: Array, equation: str, axes: Axes, out_axes: Axes, dtype=None) -> Array:
    """einsum(equation, x, kernel) + bias, in x's dtype (or ``dtype``, the type of the sum).

    ``axes`` are the kernel's logical axes and ``out_axes`` the result's. A kernel split over fsdp is gathered here,
    so its gradient is scattered here; a contraction over a split axis (heads, mlp) is summed over the mesh. Whatever
    is recomputed backward, a gathered kernel is never kept for it: what is kept is its part, which is gathered again.
    """
    where = spec(*out_axes)
    if OUT_FIRST in params:
        return plus_bias(params, by_output(params[OUT_FIRST], x, equation, out_axes, dtype), axes)
    if isinstance(params["kernel"], Int8):
        return plus_bias(params, by_int8(params["kernel"], x, equation, inputs(axes), where, dtype), axes)

    def product(kernel: Array, x: Array) -> Array:
        kernel = kernel.astype(x.dtype)
        last_first = axes[-1] == "embed" and is_split(kernel)
        kernel = gather_last(kernel, axes) if last_first else constrain(kernel, *gathered(axes))
        return times(x, kernel, equation, where, last_first, dtype)

    if split_over("embed") > 1:
        # XLA may compute once what is the same: else a layer that is recomputed would gather a third time
        product = jax.checkpoint(product, prevent_cse=False)
    return plus_bias(params, checkpoint_name(product(params["kernel"], x), PRODUCT), axes)


def is_split(kernel: Array) -> bool:
    """Whether fsdp splits its last axis here; the head's, which is used many times, was gathered before."""
    return split_over("embed") > 1 and jax.typeof(kernel).sharding.spec[-1] is not None


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_last(kernel: Array, axes: Axes) -> Array:
    """``kernel``, stored as ``axes`` say, whole along ``embed``, its last axis.

    XLA:TPU scatters a sum along the first axis, but along the last, where pieces are 128 wide, it sums the whole on
    every device and splits that: twice the bytes. So the gradient lies turned round until it is split."""
    return constrain(kernel, *gathered(axes))


def gather_last_forward(kernel: Array, axes: Axes) -> tuple[Array, None]:
    return gather_last(kernel, axes), None


def gather_last_backward(axes: Axes, _: None, dkernel: Array) -> tuple[Array]:
    part = constrain(jnp.moveaxis(dkernel, -1, 0), "embed", *axes[:-1])
    return (jnp.moveaxis(jax.lax.optimization_barrier(part), 0, -1),)


gather_last.defvjp(gather_last_forward, gather_last_backward)


def plus_bias(params: Params, y: Array, axes: Axes) -> Array:
    """``y`` and the bias, if there is one; ``axes`` of the kernel as in ``linear``."""
    if "bias" not in params:
        return y
    bias = params["bias"].astype(y.dtype)
    return y + constrain(bias, *(name for name in gathered(axes[-bias.ndim :])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def times(x: Array, kernel: Array, equation: str, where: Any, last_first: bool, dtype: Any) -> Array:
    """einsum(equation, x, kernel), both of one dtype, in ``dtype`` (None: theirs), laid out as ``where``; the kernel's
    gradient is made from x^T dy.

    What JAX derives is dy^T x, or its transpose. On CPUs XLA then turns dy round element by element, inside whatever
    computed it (without that, updates of layers 256 wide took 0.85 of the time, and 0.88 of that for the logits).
    Elsewhere the two are the same product. ``last_first``: the gradient is made with the kernel's last axis before the
    others, as ``gather_last`` will have it.

    Backward both products are of the inputs' dtype, dy rounded to it, as TPUs do it anyway: GPUs would widen the kernel
    for a product of float32, in memory and for every chunk of logits."""
    return jnp.einsum(equation, x, kernel, out_sharding=where, preferred_element_type=dtype)


def times_forward(
    x: Array, kernel: Array, equation: str, where: Any, last_first: bool, dtype: Any
) -> tuple[Array, tuple[Array, Array]]:
    return times(x, kernel, equation, where, last_first, dtype), (x, kernel)


def times_backward(
    equation: str, where: Any, last_first: bool, dtype: Any, kept: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = kept
    dy = dy.astype(x.dtype)
    ins, out = equation.split("->")
    left, right = ins.split(",")
    rows = [name for name in left if name in out]
    if [name for name in left + out if name in right] != list(right):
        # logits of tied embeddings: what the softmax sends back is computed once for both products, not in each of
        # them, and of the three arrays it is the product that is turned round
        dy = jax.lax.optimization_barrier(dy)
    factors = [(left, x), (out, dy)]
    if last_first and right[-1] in out:
        factors.reverse()
    made = [name for letters, _ in factors for name in letters if name in right]
    layout = lambda like, names, order: (
        None if where is None else PartitionSpec(*(jax.typeof(like).sharding.spec[names.index(name)] for name in order))
    )
    dx = jnp.einsum(f"{out},{right}->{left}", dy, kernel, out_sharding=layout(x, left, left))
    (names, first), (others, second) = factors
    summed = tuple(map(names.index, rows)), tuple(map(others.index, rows))
    dkernel = jax.lax.dot_general(first, second, (summed, ((), ())), out_sharding=layout(kernel, right, made))
    if made == list(right):
        return dx, dkernel
    dkernel = dkernel if last_first else jax.lax.optimization_barrier(dkernel)
    return dx, jnp.transpose(dkernel, [made.index(name) for name in right])


times.defvjp(times_forward, times_backward)


# ---- few rows on a CPU ----------------------------------------------------------------------------------------------


def out_first(params: Params, axes: Axes) -> Params:
    """A linear map whose kernel begins with the axes of its result: on CPUs a product of few rows is up to twice as
    fast with the weights on its left, each row of them read once and in order."""
    kernel, ins = params["kernel"], inputs(axes)
    turned = jnp.transpose(kernel, (*range(ins, kernel.ndim), *range(ins)))
    return {OUT_FIRST: turned, **{name: x for name, x in params.items() if name != "kernel"}}


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
    # without the barrier XLA would turn the product round, and save itself this small transposition
    return jnp.transpose(jax.lax.optimization_barrier(y), [made.index(name) for name in out])


# ---- 8 bits ---------------------------------------------------------------------------------------------------------


def in_int8(kernel: Array, axes: Axes) -> Int8:
    """``kernel``, laid out as ``axes`` say, with a scale for each of its outputs, gathered as 8 bits."""
    ins, whole = inputs(axes), gathered(axes)
    found = quantized(kernel, tuple(range(ins)))
    return Int8(constrain(found.values, *whole), constrain(found.scale, *(None,) * ins, *whole[ins:]))


def by_int8(kernel: Int8, x: Array, equation: str, ins: int, where: Any, dtype=None) -> Array:
    """What ``linear`` computes before the bias, of such a kernel: it is widened where the product reads it, and the
    scales are applied to what comes out."""
    values = kernel.values.astype(x.dtype)
    y = jnp.einsum(equation, x, values, out_sharding=where, preferred_element_type=dtype)
    return (y * jnp.squeeze(kernel.scale, tuple(range(ins)))).astype(y.dtype)
