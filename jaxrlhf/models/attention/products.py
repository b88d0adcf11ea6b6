"""Attention: masks, heads over devices, and the product itself."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxrlhf.models.int8 import Int8
from jaxrlhf.sharding import constrain, spec, split_over
from jaxrlhf.types import Array

MASKED = -1e30  # finite: a row with nothing to attend to stays finite, and is masked downstream


def causal_mask(segment_ids: Array) -> Array:
    """i32[B, S], 0 where padding -> bool[B, 1, S, S]: token s may read token t of its own segment, t <= s."""
    size = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = jnp.arange(size)[:, None] >= jnp.arange(size)[None, :]
    return (same & causal & (segment_ids > 0)[:, None, :])[:, None]


def within_window(mask: Array, columns: Array, window: int) -> Array:
    """``mask`` bool[B, 1, S, T] of what lies less than ``window`` columns before the query, which is in ``columns``
    i32[S]. The tokens of a segment are in columns beside each other, so columns count as positions do."""
    return mask & (columns[:, None] - jnp.arange(mask.shape[-1]) < window)


def bias_of(mask: Array) -> Array:
    """f32, 0 where ``mask`` and MASKED elsewhere: added to products. On CPU three times as fast as a selection."""
    return jnp.where(mask, 0.0, MASKED)


def attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """Softmax attention; the softmax is float32 whatever the inputs are.

    query [B, S, H, K]; key, value [B, T, N, K], each for H / N query heads; bias f32[B, 1, S, T] -> [B, S, H, K].
    ``scale``: of the products, by default 1 / sqrt(K); ``softcap``: see soft_cap; ``sinks``: as in branches."""
    grouped, key, value = split_copies(query, key.shape[2], 1), by_head(key), by_head(value)
    return merge_copies(branches(grouped, [(key[:, :, None], value[:, :, None], bias)], scale, softcap, sinks))


def branches(
    query: Array,
    parts: Sequence[tuple[Array | Int8, Array | Int8, Array]],
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """Softmax attention of the n samples of a prompt, query [G, N, n, H / N, S, K], over keys that stand in parts.

    A part is (keys, values, bias): keys and values [G, N, T, K] are read by all samples and [G, N, n, T, K] by one
    each; the bias is f32, broadcastable to [G, n, S, T]. So a prompt that samples share stands in memory once, and
    their queries meet it in one product. ``sinks`` [H]: a logit of each head beside those of its keys, whose share of
    the softmax no value gets (Xiao et al. 2023, arXiv:2309.17453; learned in gpt-oss). Returns the shape of ``query``.
    """
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    query = query * jnp.asarray(scale, query.dtype)
    logits = []
    for key, _, bias in parts:
        key, steps = widened(key, query.dtype)
        letters = "bktd" if key.ndim == 4 else "bkntd"
        products = jnp.einsum(f"bkngsd,{letters}->bkngst", query, key, preferred_element_type=jnp.float32)
        products = products if steps is None else products * steps
        logits.append(soft_cap(products, softcap) + bias[:, None, :, None])
    extra = [] if sinks is None else [sinks_of(sinks, query)]
    peak = functools.reduce(jnp.maximum, [*(x.max(-1, keepdims=True) for x in logits), *extra])
    weigh = lambda x: jnp.exp(x - jax.lax.stop_gradient(peak))
    weights = [weigh(x) for x in logits]
    total = functools.reduce(jnp.add, [*(x.sum(-1, keepdims=True) for x in weights), *map(weigh, extra)])
    mixed = []
    for weight, (_, value, _) in zip(weights, parts, strict=True):
        value, steps = widened(value, query.dtype)
        letters = "bktd" if value.ndim == 4 else "bkntd"
        weight = (weight if steps is None else weight * steps).astype(value.dtype)
        mixed.append(jnp.einsum(f"bkngst,{letters}->bkngsd", weight, value, preferred_element_type=jnp.float32))
    return (functools.reduce(jnp.add, mixed) / total).astype(query.dtype)


def sinks_of(sinks: Array, query: Array) -> Array:
    """[H] -> f32[1, N, 1, H / N, 1, 1], beside the products of ``query`` as split_copies made it."""
    _, kv_heads, _, group, _, _ = query.shape
    layout = spec(None, head_axis("kv_heads", kv_heads), None, None, None, None)
    return jax.lax.reshape(sinks.astype(jnp.float32), (1, kv_heads, 1, group, 1, 1), out_sharding=layout)


def widened(x: Array | Int8, dtype) -> tuple[Array, Array | None]:
    """Keys or values for a product, and what the product with each is to be multiplied by, f32[G, N, 1 or n, 1, 1, T]
    (None: nothing). The scales stay outside of it, so that 8 bits are what it reads."""
    if not isinstance(x, Int8):
        return x, None
    steps = x.scale[..., 0]
    return x.values.astype(dtype), (steps if steps.ndim == 4 else steps[:, :, None])[:, :, :, None, None]


def soft_cap(logits: Array, softcap: float | None) -> Array:
    """softcap * tanh(logits / softcap): within -/+ softcap."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


# ---- heads over devices ---------------------------------------------------------------------------------------------


def head_axis(name: str, size: int) -> str | None:
    """The logical axis of ``size`` heads; None (whole on every device) where the mesh does not divide them."""
    return None if size % split_over(name) else name


def by_head(x: Array) -> Array:
    """[B, S, N, K] -> [B, N, S, K]: the rows of a head beside each other."""
    return jnp.swapaxes(x, 1, 2)


def split_copies(x: Array, kv_heads: int, copies: int) -> Array:
    """Queries [G, n * S, H, K] -> [G, N, n, H / N, S, K], split over devices along N as the keys are: with N = 1 there
    is a choice."""
    rows, columns, heads, dim = x.shape
    layout = spec("batch", None, "seq", head_axis("kv_heads", kv_heads), None, "head_dim")
    shape = (rows, copies, columns // copies, kv_heads, heads // kv_heads, dim)
    return jax.lax.reshape(x, shape, out_sharding=layout).transpose(0, 3, 1, 4, 2, 5)


def merge_copies(x: Array) -> Array:
    """[G, N, n, H / N, S, K] -> [G, n * S, H, K]: undoes split_copies."""
    rows, kv_heads, copies, group, columns, dim = x.shape
    layout = spec("batch", "seq", head_axis("heads", kv_heads * group), "head_dim")
    shape = (rows, copies * columns, kv_heads * group, dim)
    return jax.lax.reshape(x.transpose(0, 2, 4, 1, 3, 5), shape, out_sharding=layout)


def split_keys(x: Array, copies: int) -> Array:
    """Keys or values [G, n * T, N, K] -> [G, N, n, T, K]."""
    rows, columns, heads, dim = x.shape
    layout = spec("batch", None, "seq", head_axis("kv_heads", heads), "head_dim")
    shape = (rows, copies, columns // copies, heads, dim)
    return jax.lax.reshape(x, shape, out_sharding=layout).transpose(0, 3, 1, 2, 4)


def match_heads(x: Array, heads: int) -> Array:
    """Repeat kv heads [B, T, N, K] that the mesh does not divide up to the ``heads`` it does; else x."""
    batch, length, kv_heads, dim = x.shape
    if head_axis("kv_heads", kv_heads) or not head_axis("heads", heads):
        return x
    x = jnp.broadcast_to(x[:, :, :, None], (batch, length, kv_heads, heads // kv_heads, dim))
    return constrain(x.reshape(batch, length, heads, dim), "batch", "seq", "heads", "head_dim")
