"""Decoding in slots: rows that are each at their own column, so that one may begin while others go on.

A slot's prompt and response share one cache, left-aligned. One function serves prompts, a chunk of columns at a time,
and decoding, one column at a time. It runs on one device, outside of any mesh.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.models.attention.products import bias_of, branches, merge_copies, split_copies, split_keys
from jaxrlhf.models.config import ModelConfig, head_sizes
from jaxrlhf.models.cpu import writes_row_by_row
from jaxrlhf.models.delta_net import cache as delta_net
from jaxrlhf.models.delta_net.layer import Streams
from jaxrlhf.models.layer_kinds import LayerKind, kinds_of
from jaxrlhf.models.norms import normalize
from jaxrlhf.models.transformer import Runtime, blank_memory, block, check_length, common, feed_forward, product
from jaxrlhf.types import Array, Params


class SlotCache(NamedTuple):
    """Keys and values of one attention layer, [G, N, n, W, K]: W columns of each of G * n slots."""

    key: Array
    value: Array


LayerSlots = SlotCache | delta_net.DeltaCache


def blank_caches(cfg: ModelConfig, groups: int, abreast: int, columns: int, dtype) -> list[LayerSlots]:
    """The caches of ``groups`` x ``abreast`` slots, of each layer but those that read another's. Raises ValueError as
    transformer.forward."""
    check_length(cfg, columns)

    def one(kind: LayerKind) -> LayerSlots:
        if kind.type == "linear":
            return delta_net.blank_cache(cfg, groups, abreast, dtype)
        heads, dim = head_sizes(cfg, kind.type)
        blank = lambda: jnp.zeros((groups, heads, abreast, columns, dim), dtype)
        return SlotCache(blank(), blank())

    return [one(kind) for kind in kinds_of(cfg) if not kind.reads]


def keys_of(caches: list[LayerSlots]) -> Array:
    """The keys of one layer [G, N, n, W, K], for their sizes."""
    return next(cache.key for cache in caches if isinstance(cache, SlotCache))


def place_of(slot: Array, x: Array, cache: LayerSlots) -> tuple[Array | int, ...]:
    """Where a slot begins in an array of its layer's cache."""
    if isinstance(cache, SlotCache):
        return slot // x.shape[2], 0, slot % x.shape[2], 0, 0
    return slot // x.shape[1], slot % x.shape[1], *(0,) * (x.ndim - 2)


def slot_of(caches: list[LayerSlots], slot: Array) -> list[LayerSlots]:
    """The caches of one slot: [1, N, 1, W, K], or [1, 1, ...] of a linear layer."""

    def one(x: Array, cache: LayerSlots) -> Array:
        slots = (0, 2) if isinstance(cache, SlotCache) else (0, 1)
        sizes = [1 if axis in slots else size for axis, size in enumerate(x.shape)]
        return jax.lax.dynamic_slice(x, place_of(slot, x, cache), sizes)

    return [jax.tree.map(lambda x, cache=cache: one(x, cache), cache) for cache in caches]


def with_slot(caches: list[LayerSlots], own: list[LayerSlots], slot: Array) -> list[LayerSlots]:
    """``caches`` with those of one slot replaced."""

    def one(cache: LayerSlots, new: LayerSlots) -> LayerSlots:
        put = lambda x, new: jax.lax.dynamic_update_slice(x, new, place_of(slot, x, cache))
        return jax.tree.map(put, cache, new)

    return [one(cache, new) for cache, new in zip(caches, own, strict=True)]


def widened(caches: list[LayerSlots], columns: int) -> list[LayerSlots]:
    """``caches`` of so many columns; the new ones are empty. Linear layers have none."""
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, columns - x.shape[3]), (0, 0)))
    return [jax.tree.map(pad, cache) if isinstance(cache, SlotCache) else cache for cache in caches]


def moved(caches: list[LayerSlots], blank: list[LayerSlots], source: Array) -> list[LayerSlots]:
    """``blank`` with the slots ``source`` i32[slots of blank] of ``caches``, which are as wide."""
    move = lambda slot, new: with_slot(new, slot_of(caches, source[slot]), slot)
    return jax.lax.fori_loop(0, len(source), move, blank)


def write(cache: SlotCache, new: SlotCache, start: Array, runtime: Runtime) -> SlotCache:
    """``cache`` with the columns ``new`` [G, N, n, C, K] of each slot from ``start`` i32[G * n] on."""
    new = jax.tree.map(lambda x, old: x.astype(old.dtype), new, cache)
    abreast = cache.key.shape[2]
    if writes_row_by_row(runtime.hardware):

        def row(slot: Array, cache: SlotCache) -> SlotCache:
            at = (slot // abreast, 0, slot % abreast, start[slot], 0)
            own: Any = slot_of([new], slot)[0]
            return jax.tree.map(lambda old, own: jax.lax.dynamic_update_slice(old, own, at), cache, own)

        return jax.lax.fori_loop(0, len(start), row, cache)
    # [N, W, K] of a slot, its new columns [N, C, K], their place
    put = lambda old, new, at: jax.lax.dynamic_update_slice(old, new, (0, at, 0))
    put_all = jax.vmap(jax.vmap(put, (1, 1, 0), 1))  # over G; over n, which is the second axis behind it
    return jax.tree.map(lambda old, new: put_all(old, new, start.reshape(-1, abreast)), cache, new)


def read_columns(
    params: Params,
    cfg: ModelConfig,
    tokens: Array,
    start: Array,
    count: Array,
    caches: list[LayerSlots],
    runtime: Runtime,
) -> tuple[Array, list[LayerSlots]]:
    """The forward pass over the next C columns of each slot, with what stands before them cached.

    Args:
        params: in decoding.decode_layout.
        tokens: i32[G * n, C].
        start: i32[G * n], the column of each slot's first token. No column may be beyond those of the caches.
        count: i32[G * n]: how many of the C are tokens, the first ones. Only linear layers ask: keys and values of the
            others are overwritten before anything attends to them, and a state would keep them.
        caches: as ``blank_caches`` has them.

    Returns:
        (final hidden states [G * n, C, D], the caches with the tokens in them).
    """
    rows, size = tokens.shape
    groups, _, abreast, columns, _ = keys_of(caches).shape
    positions = start[:, None] + jnp.arange(size)
    grouped = positions.reshape(groups, abreast, size)
    own, updated, last = iter(caches), [], {}  # last: of each type of layers, the last cache

    def attend_to(kind: LayerKind, window: int | None) -> Callable:
        back = grouped[..., None] - jnp.arange(columns)
        bias = bias_of((back >= 0) if window is None else (back >= 0) & (back < window))

        def attend(query: Array, key: Array, value: Array, sinks: Array | None) -> Array:
            cache: Any = last[kind.type] if kind.reads else next(own)
            if not kind.reads:
                new = SlotCache(split_keys(key, abreast), split_keys(value, abreast))
                last[kind.type] = cache = write(cache, new, start, runtime)
                updated.append(cache)
            parts = [(cache.key, cache.value, bias)]
            query = split_copies(query, cache.key.shape[1], abreast)
            return merge_copies(branches(query, parts, **product(cfg), sinks=sinks))

        return attend

    def recur(params: Params, streams: Streams) -> Array:
        cache: Any = next(own)
        out, cache = delta_net.next_columns(params, streams, cache, start, count)
        updated.append(cache)
        return out

    side_by_side = (groups, abreast * size)
    places = positions.reshape(side_by_side)
    tokens = tokens.reshape(side_by_side)
    x, layers = common(params, cfg, tokens, places, columns, attend_to, recur, runtime.compute)
    feed, memory = feed_forward(cfg, runtime.hardware), blank_memory(cfg, x)
    for layer_params, kind in zip(params["layers"], kinds_of(cfg), strict=True):
        x, memory = block(layers, kind, layer_params, x, feed, memory)
    return normalize(params["final_norm"], x, cfg).reshape(rows, size, -1), updated
