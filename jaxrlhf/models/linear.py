"""The one linear map. LoRA and quantised weights come in here and nowhere else."""

import jax.numpy as jnp

from jaxrlhf.sharding import constrain, spec
from jaxrlhf.types import Array, Params

Axes = tuple[str | None, ...]  # a logical axis a dimension; None: whole on every device


def gathered(axes: Axes) -> Axes:
    """The axes of a weight where it is used: whole along ``embed``, which storage splits over fsdp."""
    return tuple(None if name == "embed" else name for name in axes)


def linear(params: Params, x: Array, equation: str, axes: Axes, out_axes: Axes, dtype=None) -> Array:
    """einsum(equation, x, kernel) + bias, in x's dtype (or ``dtype``, the type of the sum).

    ``axes`` are the kernel's logical axes and ``out_axes`` the result's. A kernel split over fsdp is gathered here,
    so its gradient is scattered here; a contraction over a split axis (heads, mlp) is summed over the mesh.
    """
    kernel = constrain(params["kernel"].astype(x.dtype), *gathered(axes))
    y = jnp.einsum(equation, x, kernel, out_sharding=spec(*out_axes), preferred_element_type=dtype)
    if "bias" in params:
        bias = params["bias"].astype(y.dtype)
        y = y + constrain(bias, *(name for name in gathered(axes[-bias.ndim :])))
    return y
