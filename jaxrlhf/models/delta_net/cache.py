"""A linear layer one token, or one chunk of a prompt, at a time: what it keeps between them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.models.attention.products import head_axis
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.delta_net.layer import (
    DeltaMemory,
    Mixed,
    Streams,
    after_prompts,
    clone,
    columns_of,
    group_again,
    kept,
    merge_rows,
    of_heads,
    recounted,
    recurred,
    rows_apart,
)
from jaxrlhf.models.delta_net.rule import step
from jaxrlhf.sharding import constrain
from jaxrlhf.types import Array, Params


class DeltaCache(NamedTuple):
    """What one linear layer keeps of each of n responses to G prompts; as many bytes, however long they are."""

    memory: DeltaMemory  # with [G, n, ...] in place of [B, ...]

    def of_samples(self, places: Array) -> "DeltaCache":
        """The cache of the samples at ``places`` i32[G, k] of each prompt."""
        take = jax.vmap(lambda x, at: x.at[at].get())
        return jax.tree.map(lambda x: take(x, places), self)

    def abreast(self, width: int) -> "DeltaCache":
        """Of G prompts with one response each: the same as G / ``width`` rows of ``width`` such."""
        return jax.tree.map(lambda x: recounted(x, x.shape[0] // width, width), self)


def prefill_cache(params: Params, streams: Streams, readable: Array, copies: int) -> tuple[Array, DeltaCache]:
    """(outputs of left-padded prompts, the cache of ``copies`` responses to each, which begin where it ends)."""
    out, memory = after_prompts(params, streams, readable)
    return out, DeltaCache(jax.tree.map(lambda x: clone(x, copies), memory))


def next_token(params: Params, streams: Streams, cache: DeltaCache) -> tuple[Array, DeltaCache]:
    """(outputs f32[G, n, Nv, V], the cache behind it) of one token of each response, whose Streams are [G, n, ...]."""
    taps, (tail, state) = params["delta_convolution"], cache.memory
    columns = jax.tree.map(lambda old, new: jnp.concatenate([old, new[:, :, None]], axis=2), tail, streams.mixed)

    def convolved(name: str) -> Array:
        weights = taps[name]["taps"].astype(jnp.float32)
        weights = constrain(weights, head_axis("heads" if name == "value" else "kv_heads", len(weights)), None, None)
        x = getattr(columns, name)
        y = (x.astype(jnp.float32) * jnp.moveaxis(weights, -1, 0)).sum(2)
        return jax.nn.silu(y).astype(x.dtype)

    out, state = step(state, *of_heads(Mixed(*map(convolved, Mixed._fields))), streams.decay, streams.rate)
    return out, DeltaCache(DeltaMemory(jax.tree.map(lambda x: x[:, :, 1:], columns), state))


# ---- slots ----------------------------------------------------------------------------------------------------------


def blank_cache(cfg: ModelConfig, groups: int, abreast: int, dtype) -> DeltaCache:
    """The cache of ``groups`` x ``abreast`` slots in which nothing stands."""
    rows, size = (groups, abreast), cfg.convolution_size - 1
    key = jnp.zeros((*rows, size, cfg.linear_key_heads, cfg.linear_key_dim), dtype)
    value = jnp.zeros((*rows, size, cfg.linear_value_heads, cfg.linear_value_dim), dtype)
    state = (*rows, cfg.linear_value_heads, cfg.linear_key_dim, cfg.linear_value_dim)
    return DeltaCache(DeltaMemory(Mixed(key, key, value), jnp.zeros(state, jnp.float32)))


def next_columns(
    params: Params, streams: Streams, cache: DeltaCache, start: Array, count: Array
) -> tuple[Array, DeltaCache]:
    """(outputs [G, n * C, Nv, V], the cache behind them) of the next columns of each slot, whose Streams are
    [G, n * C, ...]. Of the C columns of a slot the first ``count`` i32[G * n] are tokens; a slot at column 0 (``start``
    i32[G * n]) begins with nothing, whatever stood in it."""
    groups, abreast = cache.memory.state.shape[:2]
    fresh = lambda x: jnp.where((start == 0).reshape(-1, *(1,) * (x.ndim - 1)), jnp.zeros((), x.dtype), x)
    memory = jax.tree.map(lambda x: fresh(merge_rows(x)), cache.memory)
    if streams.rate.shape[1] == abreast:
        grouped = DeltaCache(jax.tree.map(lambda x: group_again(x, abreast), memory))
        return next_token(params, streams, grouped)
    streams = jax.tree.map(lambda x: rows_apart(x, abreast), streams)
    index = columns_of(streams.rate)
    streams = jax.tree.map(lambda x: kept(x, index < count[:, None]), streams)
    out, state = recurred(params, streams, index, memory)
    every = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), memory.tail, streams.mixed)
    size = memory.tail.key.shape[1]
    ending = jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, size))
    memory = DeltaMemory(jax.tree.map(lambda x: ending(x, count), every), state)
    cache = DeltaCache(jax.tree.map(lambda x: group_again(x, abreast), memory))
    return recounted(out, groups, -1), cache
