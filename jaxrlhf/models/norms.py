"""Normalisation over features, in float32."""

import jax
import jax.numpy as jnp

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.families import FAMILIES
from jaxrlhf.sharding import constrain
from jaxrlhf.types import Array, Params


def normalize(params: Params, x: Array, cfg: ModelConfig, axes: tuple[str | None, ...] = (None,)) -> Array:
    """RMS or layer normalisation over the last dimensions, whose logical axes are ``axes``; ``params``: scale and bias,
    where there are any."""
    family, dims = FAMILIES[cfg.family], tuple(range(-len(axes), 0))
    y = x.astype(jnp.float32)
    if family.norm == "layer":
        y = y - y.mean(dims, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, dims, keepdims=True) + cfg.norm_eps)
    if "scale" in params:
        scale = constrain(params["scale"].astype(jnp.float32), *axes)
        y = y * (1 + scale) if family.norm_offset else y * scale
    if "bias" in params:
        y = y + constrain(params["bias"].astype(jnp.float32), *axes)
    return y.astype(x.dtype)
