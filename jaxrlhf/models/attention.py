"""Attention: masks, heads over devices, and the product itself."""

import math

import jax
import jax.numpy as jnp

from jaxrlhf.sharding import constrain, spec, split_over
from jaxrlhf.types import Array

MASKED = -1e30  # finite: a row with nothing to attend to stays finite, and is masked downstream


def causal_mask(segment_ids: Array) -> Array:
    """i32[B, S], 0 where padding -> bool[B, 1, S, S]: token s may read token t of its own segment, t <= s."""
    size = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = jnp.arange(size)[:, None] >= jnp.arange(size)[None, :]
    return (same & causal & (segment_ids > 0)[:, None, :])[:, None]


def near(mask: Array, columns: Array, window: int) -> Array:
    """``mask`` bool[B, 1, S, T] of what lies less than ``window`` columns before the query, which is in ``columns``
    i32[S]. The tokens of a segment are in columns beside each other, so columns count as positions do."""
    return mask & (columns[:, None] - jnp.arange(mask.shape[-1]) < window)


def attention(
    query: Array, key: Array, value: Array, mask: Array, scale: float | None = None, softcap: float | None = None
) -> Array:
    """Softmax attention; the softmax is float32 whatever the inputs are.

    query [B, S, H, K]; key, value [B, T, N, K], each for H / N query heads; mask bool[B, 1, S, T] -> [B, S, H, K].
    ``scale``: of the products, by default 1 / sqrt(K); ``softcap``: see share."""
    kv_heads = key.shape[2]
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    if kv_heads == query.shape[2]:
        logits = jnp.einsum("bshk,bthk->bhst", query, key, preferred_element_type=jnp.float32) * scale
        return jnp.einsum("bhst,bthk->bshk", share(logits, mask, softcap).astype(value.dtype), value)
    grouped = group_heads(query, kv_heads)
    logits = jnp.einsum("bsngk,btnk->bngst", grouped, key, preferred_element_type=jnp.float32) * scale
    weights = share(logits, mask[:, :, None], softcap).astype(value.dtype)
    return ungroup_heads(jnp.einsum("bngst,btnk->bsngk", weights, value))


def cached_attention(
    query: Array, key: Array, value: Array, mask: Array, scale: float | None = None, softcap: float | None = None
) -> Array:
    """``attention`` of one query a row, [B, 1, H, K], over cached keys and values [B, N, T, K]; mask [B, 1, 1, T]."""
    grouped = group_heads(query, key.shape[1])[:, 0]
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = jnp.einsum("bngk,bntk->bngt", grouped, key, preferred_element_type=jnp.float32) * scale
    weights = share(logits, mask, softcap).astype(value.dtype)
    return ungroup_heads(jnp.einsum("bngt,bntk->bngk", weights, value)[:, None])


def share(logits: Array, mask: Array, softcap: float | None) -> Array:
    """The softmax over what the mask lets through, of logits that ``softcap`` bends to lie within -/+ itself."""
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return jax.nn.softmax(jnp.where(mask, logits, MASKED), axis=-1)


# ---- heads over devices ---------------------------------------------------------------------------------------------


def head_axis(name: str, size: int) -> str | None:
    """The logical axis of ``size`` heads; None (whole on every device) where the mesh does not divide them."""
    return None if size % split_over(name) else name


def group_heads(x: Array, kv_heads: int) -> Array:
    """[B, S, H, K] -> [B, S, N, H / N, K], split over devices along N as the keys are: with N = 1 there is a choice."""
    *front, heads, dim = x.shape
    layout = spec("batch", "seq", head_axis("kv_heads", kv_heads), None, "head_dim")
    return jax.lax.reshape(x, (*front, kv_heads, heads // kv_heads, dim), out_sharding=layout)


def ungroup_heads(x: Array) -> Array:
    """The inverse."""
    *front, kv_heads, group, dim = x.shape
    layout = spec("batch", "seq", head_axis("heads", kv_heads * group), "head_dim")
    return jax.lax.reshape(x, (*front, kv_heads * group, dim), out_sharding=layout)


def match_heads(x: Array, heads: int) -> Array:
    """Repeat kv heads [B, T, N, K] that the mesh does not divide up to the ``heads`` it does; else x."""
    batch, length, kv_heads, dim = x.shape
    if head_axis("kv_heads", kv_heads) or not head_axis("heads", heads):
        return x
    x = jnp.broadcast_to(x[:, :, :, None], (batch, length, kv_heads, heads // kv_heads, dim))
    return constrain(x.reshape(batch, length, heads, dim), "batch", "seq", "heads", "head_dim")
