"""Decoding in slots: rows that are each at their own column, so that one may begin while others go on.

A slot's prompt and response share one cache, left-aligned. One function serves prompts, a chunk of columns at a time,
and decoding, one column at a time. It runs on one device, outside of any mesh.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.models.attention.products import bias_of, branches, merge_copies, split_copies, split_keys
from jaxrlhf.models.config import ModelConfig, local_layers
from jaxrlhf.models.cpu import writes_row_by_row
from jaxrlhf.models.transformer import (
    LayerKind,
    Runtime,
    block,
    check_length,
    embed,
    feed_forward,
    layer_kinds,
    normalize,
    product,
    rotations,
)
from jaxrlhf.types import Array, Params


class SlotCache(NamedTuple):
    """Keys and values of one layer, [G, N, n, W, K]: W columns of each of G * n slots."""

    key: Array
    value: Array


def blank_caches(cfg: ModelConfig, groups: int, abreast: int, columns: int, dtype) -> list[SlotCache]:
    """The caches of ``groups`` x ``abreast`` slots. Raises ValueError as transformer.forward."""
    check_length(cfg, columns)
    shape = (groups, cfg.num_kv_heads, abreast, columns, cfg.head_dim)
    return [SlotCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(cfg.num_layers)]


def place_of(slot: Array, x: Array) -> tuple[Array | int, ...]:
    """Where a slot's columns begin in keys or values [G, N, n, W, K]."""
    return slot // x.shape[2], 0, slot % x.shape[2], 0, 0


def slot_of(caches: list[SlotCache], slot: Array) -> list[SlotCache]:
    """The caches of one slot, [1, N, 1, W, K]."""

    def one(x: Array) -> Array:
        _, heads, _, columns, size = x.shape
        return jax.lax.dynamic_slice(x, place_of(slot, x), (1, heads, 1, columns, size))

    return jax.tree.map(one, caches)


def with_slot(caches: list[SlotCache], own: list[SlotCache], slot: Array) -> list[SlotCache]:
    """``caches`` with those of one slot replaced."""
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice(x, new, place_of(slot, x)), caches, own)


def moved(caches: list[SlotCache], blank: list[SlotCache], source: Array) -> list[SlotCache]:
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
            own = slot_of([new], slot)[0]
            return jax.tree.map(lambda old, own: jax.lax.dynamic_update_slice(old, own, at), cache, own)

        return jax.lax.fori_loop(0, len(start), row, cache)
    # [N, W, K] of a slot, its new columns [N, C, K], their place
    put = lambda old, new, at: jax.lax.dynamic_update_slice(old, new, (0, at, 0))
    put_all = jax.vmap(jax.vmap(put, (1, 1, 0), 1))  # over G; over n, which is the second axis behind it
    return jax.tree.map(lambda old, new: put_all(old, new, start.reshape(-1, abreast)), cache, new)


def read_columns(
    params: Params, cfg: ModelConfig, tokens: Array, start: Array, caches: list[SlotCache], runtime: Runtime
) -> tuple[Array, list[SlotCache]]:
    """The forward pass over the next C columns of each slot, with what stands before them cached.

    Args:
        params: in decoding.decode_layout.
        tokens: i32[G * n, C].
        start: i32[G * n], the column of each slot's first token. No column may be beyond those of the caches.
        caches: one a layer.

    Returns:
        (final hidden states [G * n, C, D], the caches with the tokens' keys and values).
    """
    rows, count = tokens.shape
    groups, _, abreast, columns, _ = caches[0].key.shape
    positions = start[:, None] + jnp.arange(count)
    grouped = positions.reshape(groups, abreast, count)

    def attend_to(window: int | None) -> Callable[[Array, SlotCache], Array]:
        back = grouped[..., None] - jnp.arange(columns)
        bias = bias_of((back >= 0) if window is None else (back >= 0) & (back < window))

        def attend(query: Array, cache: SlotCache) -> Array:
            heads = cache.key.shape[1]
            parts = [(cache.key, cache.value, bias)]
            return merge_copies(branches(split_copies(query, heads, abreast), parts, **product(cfg)))

        return attend

    kinds, layers, updated = layer_kinds(cfg, attend_to), iter(caches), []

    def attend(kind: LayerKind, query: Array, key: Array, value: Array) -> Array:
        cache = next(layers)
        cache = write(cache, SlotCache(split_keys(key, abreast), split_keys(value, abreast)), start, runtime)
        updated.append(cache)
        return kind.attend(query, cache)

    side_by_side = (groups, abreast * count)
    places = positions.reshape(side_by_side)
    x = embed(params, cfg, tokens.reshape(side_by_side), places, runtime.compute)
    rotary, feed = rotations(cfg, places, kinds, columns), feed_forward(cfg, runtime)
    for layer_params, local in zip(params["layers"], local_layers(cfg), strict=True):
        x = block(layer_params, cfg, x, rotary[local], functools.partial(attend, kinds[local]), feed)
    return normalize(params["final_norm"], x, cfg).reshape(rows, count, -1), updated
