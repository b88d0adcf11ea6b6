"""Numbers of 8 bits: what decoding reads for every token at a half of bfloat16's bytes (``generate.int8``)."""

from collections.abc import Collection
from typing import Literal, NamedTuple

import jax.numpy as jnp

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.types import Array

Part = Literal["weights", "cache"]  # what may be read so
LARGEST = 127


class Int8(NamedTuple):
    """values * scale."""

    values: Array  # i8, from -127 to 127
    scale: Array  # f32, of size 1 along the axes that share one


def refusal(parts: Collection[Part], cfg: ModelConfig) -> str | None:
    """Why these ``parts`` of such a model are not read so; None where they are."""
    return "experts are not read as 8 bits" if cfg.num_experts and "weights" in parts else None


def quantized(x: Array, axes: tuple[int, ...]) -> Int8:
    """The nearest multiples of a 127th of the largest |x| along ``axes``, whose error is half of that at most."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axes, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) / LARGEST
    return Int8(jnp.round(x / scale).astype(jnp.int8), scale)
