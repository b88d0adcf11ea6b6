"""The one linear map. LoRA and quantised weights come in here and nowhere else."""

import jax
import jax.numpy as jnp

from jaxrlhf.sharding import constrain, spec, split_over
from jaxrlhf.types import Array, Params

Axes = tuple[str | None, ...]  # a logical axis a dimension; None: whole on every device


def gathered(axes: Axes) -> Axes:
    """The axes of a weight where it is used: whole along ``embed``, which storage splits over fsdp."""
    return tuple(None if name == "embed" else name for name in axes)


def linear(params: Params, x: Array, equation: str, axes: Axes, out_axes: Axes, dtype=None) -> Array:
    """einsum(equation, x, kernel) + bias, in x's dtype (or ``dtype``, the type of the sum).

    ``axes`` are the kernel's logical axes and ``out_axes`` the result's. A kernel split over fsdp is gathered here,
    so its gradient is scattered here; a contraction over a split axis (heads, mlp) is summed over the mesh. Whatever
    is recomputed backward, a gathered kernel is never kept for it: what is kept is its part, which is gathered again.
    """
    where = spec(*out_axes)

    def product(kernel: Array, x: Array) -> Array:
        kernel = constrain(kernel.astype(x.dtype), *gathered(axes))
        return jnp.einsum(equation, x, kernel, out_sharding=where, preferred_element_type=dtype)

    if split_over("embed") > 1:
        # XLA may compute once what is the same: else a layer that is recomputed would gather a third time
        product = jax.checkpoint(product, prevent_cse=False)
    y = product(params["kernel"], x)
    if "bias" in params:
        bias = params["bias"].astype(y.dtype)
        y = y + constrain(bias, *(name for name in gathered(axes[-bias.ndim :])))
    return y
