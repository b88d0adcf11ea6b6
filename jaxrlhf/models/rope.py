"""Rotary positions (Su et al. 2021), and how they are stretched for long contexts."""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp

from jaxrlhf.sharding import spec
from jaxrlhf.types import Array


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts (the fields that its ``kind`` uses)."""

    kind: Literal["linear", "llama3", "yarn", "longrope", "proportional"]  # which frequencies are stretched
    factor: float = 1.0  # what frequencies are divided by
    low_freq_factor: float = 1.0  # llama3: one that turns less often over the original context is divided by factor
    high_freq_factor: float = 4.0  # llama3: one that turns more often than this stays
    original_max_positions: int = 8192  # columns of the original context
    beta_fast: float = 32.0  # yarn: a frequency that turns more often than this over the original context stays
    beta_slow: float = 1.0  # yarn: one that turns less often is divided by factor
    truncate: bool = True  # yarn: the band between the two is widened to whole frequencies
    attention_factor: float | None = None  # yarn, longrope: of cosines and sines; null: by factor, as in their papers
    short_factor: tuple[float, ...] = ()  # longrope: what each frequency is divided by, up to the original context
    long_factor: tuple[float, ...] = ()  # longrope: the same in longer rows, which are refused; it is kept for export
    query_beta: float = 0.0  # queries are multiplied by 1 + query_beta x ln(1 + floor(position / original context))


def rope_frequencies(dim: int, theta: float, scaling: RopeScaling | None, width: int = 0) -> Array:
    """f32[dim / 2], radians a position, of heads that are rotated in ``dim`` features; proportional: f32[width / 2], of
    heads of ``width`` features.

    linear: all slower by the factor; llama3 (Llama 3.1): only wavelengths longer than the original context, with a
    smooth band between; yarn (Peng et al. 2023): the same with a band of frequency numbers; longrope (Ding et al.
    2024): each by its own factor, here the one for rows up to the original context; proportional (Gemma 4): the first
    dim / 2 of the frequencies that a whole head would have, slower by the factor, and 0 for the others."""
    if scaling is not None and scaling.kind == "proportional":
        turning = theta ** (-jnp.arange(0, 2 * (dim // 2), 2, dtype=jnp.float32) / width) / scaling.factor
        return jnp.concatenate([turning, jnp.zeros(width // 2 - len(turning), jnp.float32)])
    freqs = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    if scaling is None:
        return freqs
    if scaling.kind == "linear":
        return freqs / scaling.factor
    if scaling.kind == "longrope":
        return freqs / jnp.array(scaling.short_factor, jnp.float32)
    if scaling.kind == "yarn":
        slow = yarn_ramp(dim, theta, scaling)
        return freqs * (1 - slow) + freqs / scaling.factor * slow
    wavelength = 2 * math.pi / freqs
    low = scaling.original_max_positions / scaling.low_freq_factor
    high = scaling.original_max_positions / scaling.high_freq_factor
    smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * freqs / scaling.factor + smooth * freqs
    return jnp.where(wavelength > low, freqs / scaling.factor, jnp.where(wavelength < high, freqs, between))


def yarn_ramp(dim: int, theta: float, scaling: RopeScaling) -> Array:
    """f32[dim / 2]: 0 for frequencies that turn beta_fast times over the original context, 1 for beta_slow times."""

    def number_of(turns: float) -> float:
        """Which frequency (0 is the fastest; not a whole number) turns so often."""
        return dim * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = number_of(scaling.beta_fast), number_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first or 0.001  # a step, where the band is empty
    return jnp.clip((jnp.arange(dim // 2, dtype=jnp.float32) - first) / width, 0, 1)


def rope_magnitude(scaling: RopeScaling | None) -> float:
    """What cosines and sines are multiplied by: other than 1 with yarn and longrope only."""
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    if scaling.kind == "yarn":
        return 0.1 * math.log(scaling.factor) + 1.0
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_positions))


def cos_sin(positions: Array, freqs: Array, limit: int, magnitude: float = 1.0) -> tuple[Array, Array]:
    """Cosines and sines, f32[B, S, 1, R / 2], of positions i32[B, S] below ``limit`` times freqs f32[R / 2].

    They are looked up, once for all layers: XLA:CPU would compute them anew in every product, for every head."""
    angles = jnp.arange(limit, dtype=jnp.float32)[:, None] * freqs

    def look_up(table: Array) -> Array:
        rows = (table * magnitude).at[positions]
        return rows.get(mode="clip", out_sharding=spec("batch", "seq", None))[:, :, None]

    return look_up(jnp.cos(angles)), look_up(jnp.sin(angles))


def query_scale(positions: Array, scaling: RopeScaling | None, limit: int) -> Array | None:
    """What queries at positions i32[B, S] below ``limit`` are multiplied by, f32[B, S, 1, 1]: 1 within the original
    context, and more behind it, as the softmax over more keys would else be flatter (Llama 4). None: by 1."""
    if scaling is None or not scaling.query_beta:
        return None
    contexts = jnp.arange(limit) // scaling.original_max_positions
    table = 1 + scaling.query_beta * jnp.log(1 + contexts.astype(jnp.float32))
    return table.at[positions].get(mode="clip", out_sharding=spec("batch", "seq"))[:, :, None, None]


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding in the half-split layout, by ``cos_sin``: x [B, S, H, K].

    The first R features of a head are rotated; the others stay."""
    size = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :size].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return rotated if size == x.shape[-1] else jnp.concatenate([rotated, x[..., size:]], axis=-1)
