"""Attention: rotary positions, masks, and the product itself."""

import math

import jax
import jax.numpy as jnp

from jaxrlhf.sharding import constrain, spec
from jaxrlhf.types import Array

MASKED = -1e30  # finite: a row with nothing to attend to stays finite, and is masked downstream


def causal_mask(segment_ids: Array) -> Array:
    """i32[B, S], 0 where padding -> bool[B, 1, S, S]: token s may read token t of its own segment, t <= s."""
    size = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = jnp.arange(size)[:, None] >= jnp.arange(size)[None, :]
    return (same & causal & (segment_ids > 0)[:, None, :])[:, None]


def attention(query: Array, key: Array, value: Array, mask: Array) -> Array:
    """Softmax attention; the softmax is float32 whatever the inputs are.

    query [B, S, H, K]; key, value [B, T, N, K], each for H / N query heads; mask bool[B, 1, S, T] -> [B, S, H, K].
    """
    kv_heads = key.shape[2]
    scale = 1.0 / math.sqrt(query.shape[-1])
    if kv_heads == query.shape[2]:
        logits = jnp.einsum("bshk,bthk->bhst", query, key, preferred_element_type=jnp.float32) * scale
        weights = jax.nn.softmax(jnp.where(mask, logits, MASKED), axis=-1).astype(value.dtype)
        return jnp.einsum("bhst,bthk->bshk", weights, value)
    grouped = group_heads(query, kv_heads)
    logits = jnp.einsum("bsngk,btnk->bngst", grouped, key, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(mask[:, :, None], logits, MASKED), axis=-1).astype(value.dtype)
    return ungroup_heads(jnp.einsum("bngst,btnk->bsngk", weights, value))


def group_heads(x: Array, kv_heads: int) -> Array:
    """[B, S, H, K] -> [B, S, N, H / N, K], split over devices along N as the keys are: with N = 1 there is a choice."""
    *front, heads, dim = x.shape
    layout = spec("batch", "seq", "kv_heads", None, "head_dim")
    return jax.lax.reshape(x, (*front, kv_heads, heads // kv_heads, dim), out_sharding=layout)


def ungroup_heads(x: Array) -> Array:
    """The inverse."""
    *front, kv_heads, group, dim = x.shape
    layout = spec("batch", "seq", "heads", "head_dim")
    return jax.lax.reshape(x, (*front, kv_heads * group, dim), out_sharding=layout)


def match_heads(x: Array, heads: int) -> Array:
    """Repeat kv heads [B, T, N, K] that the mesh does not divide up to the ``heads`` it does; else x."""
    tensor = dict(jax.sharding.get_abstract_mesh().shape).get("tensor", 1)
    if x.shape[2] % tensor == 0:
        return x
    batch, length, kv_heads, dim = x.shape
    x = jnp.broadcast_to(x[:, :, :, None], (batch, length, kv_heads, heads // kv_heads, dim))
    return constrain(x.reshape(batch, length, heads, dim), "batch", "seq", "heads", "head_dim")


def rope_frequencies(head_dim: int, theta: float, scaling) -> Array:
    """f32[head_dim / 2], radians a position. ``scaling``: a RopeScaling or None (linear: all slower by the factor;
    llama3: only wavelengths longer than the original context, with a smooth band between)."""
    freqs = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return freqs
    if scaling.kind == "linear":
        return freqs / scaling.factor
    wavelength = 2 * math.pi / freqs
    low = scaling.original_max_positions / scaling.low_freq_factor
    high = scaling.original_max_positions / scaling.high_freq_factor
    smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * freqs / scaling.factor + smooth * freqs
    return jnp.where(wavelength > low, freqs / scaling.factor, jnp.where(wavelength < high, freqs, between))


def rotate(x: Array, positions: Array, freqs: Array) -> Array:
    """Rotary embedding (Su et al. 2021) in the half-split layout: x [B, S, H, K], positions i32[B, S]."""
    angles = positions[:, :, None, None].astype(jnp.float32) * freqs
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
