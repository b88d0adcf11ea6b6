"""One token at a time: the transformer of transformer.py with a cache a layer, in a layout of its own.

Decoding reads all weights for every token, so that they are laid out for it once a rollout: unstacked and gathered.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.models.attention.products import (
    bias_of,
    branches,
    by_head,
    head_axis,
    match_heads,
    merge_copies,
    split_copies,
)
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.cpu import decodes_by_output
from jaxrlhf.models.delta_net.cache import DeltaCache, next_token, prefill_cache
from jaxrlhf.models.delta_net.layer import Streams
from jaxrlhf.models.experts import Routed
from jaxrlhf.models.int8 import Int8, quantized
from jaxrlhf.models.layer_kinds import LayerKind, kinds_of
from jaxrlhf.models.linear import DORA_SCALE, LORA_A, LORA_B, OUT_FIRST, gathered, in_int8, out_first, used_whole
from jaxrlhf.models.lora import merged
from jaxrlhf.models.norms import normalize
from jaxrlhf.models.parameters import Leaf, inputs, layer_at, parameter_table, weight_axes
from jaxrlhf.models.quantized import PACKED, placed
from jaxrlhf.models.transformer import (
    Runtime,
    blank_memory,
    block,
    check_length,
    common,
    feed_forward,
    positions_of,
    product,
    row_attention,
)
from jaxrlhf.sharding import constrain, spec
from jaxrlhf.types import Array, Head, Params

# leaves that are computed with in float32, few numbers
WIDE = ("scale", "A_log", "dt_bias", "taps", "sinks", "layer_scalar")


class Cache(NamedTuple):
    """Keys and values of one attention layer; heads before time, so that a decoded token reads contiguous rows. In int8
    each token has a scale for each head."""

    # [G, N, P, K]: read by all samples of a prompt; [G, N, n, P, K]: of prompts that stand abreast
    prompt_key: Array | Int8
    prompt_value: Array | Int8
    key: Array | Int8  # [G, N, n, T, K]: of each sample's response
    value: Array | Int8

    @property
    def shape(self) -> tuple[int, ...]:
        """(G, N, n, T, K)."""
        return (self.key.values if isinstance(self.key, Int8) else self.key).shape

    def of_samples(self, places: Array) -> "Cache":
        """The cache of the samples at ``places`` i32[G, k] of each prompt."""
        take = jax.vmap(lambda x, at: x.at[:, at].get())  # samples are the third axis
        own = lambda tree: jax.tree.map(lambda x: take(x, places), tree)
        return self._replace(key=own(self.key), value=own(self.value))

    def abreast(self, width: int) -> "Cache":
        """Of G prompts with one response each: the same as G / ``width`` rows of ``width`` such."""

        def one(x: Array) -> Array:
            prompts, heads, *_, columns, dim = x.shape
            layout = spec("batch", None, head_axis("kv_heads", heads), "seq", "head_dim")
            x = jax.lax.reshape(x, (prompts // width, width, heads, columns, dim), out_sharding=layout)
            return jnp.swapaxes(x, 1, 2)

        return jax.tree.map(one, self)


LayerCache = Cache | DeltaCache


def stored(x: Array, runtime: Runtime) -> Array | Int8:
    """Keys or values [..., K] as a cache holds them."""
    return quantized(x, (-1,)) if "cache" in runtime.int8 else x


def decode_layout(params: Params, cfg: ModelConfig, head: Head, runtime: Runtime, rows: int) -> Params:
    """The parameters as decoding ``rows`` rows reads them, once a rollout: cast, unstacked, laid out as
    sharding.DECODE_RULES say.

    In two steps, each of one collective: a decode group trades parts of the features for parts of heads, mlp and
    vocabulary; then they are gathered over fsdp. A layer at a time, so that one alone is held twice. Adapters are added
    to their kernels, but for quantised ones where the run has decoding read these as they are. Where the run asks for
    int8, kernels are quantised before they are gathered, and a head of tied embeddings after. Routers stay as they are:
    they choose in float32 here as in training."""
    table = parameter_table(cfg, head)
    int8 = "weights" in runtime.int8

    def one(path, leaf: Leaf, x, wide: bool):
        axes = weight_axes(leaf)[len(leaf.axes) - x.ndim :]  # without "layers" where it is one layer's
        if int8 and path[-1].key == "kernel" and not wide:
            return in_int8(constrain(x, *axes), axes)
        x = x if wide or path[-1].key in WIDE else x.astype(runtime.compute)
        return constrain(constrain(x, *axes), *gathered(axes))

    def lay_out(table, params, wide=False):
        if isinstance(params.get("kernel"), PACKED) and not runtime.merge_adapter:
            return beside(table, params, runtime.compute)
        if any(isinstance(part, dict) for part in params.values()):
            return {name: lay_out(table[name], part, wide or name == "router") for name, part in params.items()}
        table = {name: table[name] for name in params if name in table}
        laid = functools.partial(one, wide=wide)
        return jax.tree_util.tree_map_with_path(laid, table, merged(params), is_leaf=lambda x: isinstance(x, Leaf))

    laid: Params = {name: lay_out(table[name], part) for name, part in params.items() if name != "layers"}
    if "layers" in params:  # else it is a head alone
        layers = [layer_at(params["layers"], kinds_of(cfg), i) for i in range(cfg.num_layers)]
        laid |= {"layers": [lay_out({name: table["layers"][name] for name in layer}, layer) for layer in layers]}
    if int8:
        return laid if "head" in laid else laid | {"head": {"kernel": tied_in_int8(laid["embed"]["tokens"])}}
    return by_outputs(laid, table) if decodes_by_output(rows, runtime.hardware) else laid


def beside(table: dict, params: Params, compute) -> Params:
    """A linear map whose kernel is quantised, as decoding reads it: gathered as it is, A and B beside it, and the scale
    of its outputs in float32."""
    leaf = table["kernel"]
    axes = weight_axes(leaf)[len(leaf.axes) - params["kernel"][0].ndim :]
    ins, found = inputs(axes), {}
    others = {LORA_A: (*axes[:ins], "rank"), LORA_B: ("rank", *axes[ins:])}
    if "bias" in params:
        others["bias"] = axes[len(axes) - params["bias"].ndim :]
    for name, own in others.items():
        if name in params:
            found[name] = constrain(constrain(params[name].astype(compute), *own), *gathered(own))
    if DORA_SCALE in params:
        found[DORA_SCALE] = constrain(params[DORA_SCALE], *gathered(axes[ins:]))
    return found | {"kernel": used_whole(placed(params["kernel"], axes), axes)}


def tied_in_int8(tokens: Params) -> Int8:
    """Embeddings [V, D] as the kernel of a head, [D, V]."""
    return Int8(*map(jnp.transpose, quantized(tokens["embedding"], (1,))))


def by_outputs(params: Params, table: dict) -> Params:
    """``params`` in decode_layout with all kernels as linear.out_first makes them; tied embeddings are a head too."""

    def change(table, params):
        if isinstance(params.get("kernel"), PACKED):
            return params
        if "kernel" in table:
            leaf = table["kernel"]
            if "expert" in leaf.axes:
                return params
            return out_first(params, leaf.axes[len(leaf.axes) - params["kernel"].ndim :])
        return {name: change(table[name], part) if isinstance(part, dict) else part for name, part in params.items()}

    rest = {name: change(table[name], part) for name, part in params.items() if name != "layers"}
    if "head" not in rest:
        rest["head"] = {OUT_FIRST: rest["embed"]["tokens"]["embedding"]}
    layers = {"layers": [change(table["layers"], layer) for layer in params["layers"]]} if "layers" in params else {}
    return rest | layers


def prefill(
    params: Params,
    cfg: ModelConfig,
    tokens: Array,
    valid: Array,
    copies: int,
    room: int,
    runtime: Runtime,
    note: Callable[[Routed], None] | None = None,
) -> tuple[Array, list[LayerCache]]:
    """Read left-padded prompts [G, P]: (final hidden state of the last column [G, 1, D], a cache of each layer but of
    those that read another's).

    The caches have room for ``copies`` responses of ``room`` columns to each prompt; ``params`` are in decode_layout.
    ``note`` is told what each layer's router said, of the last column alone in the last layer. Raises ValueError as
    forward."""
    check_length(cfg, tokens.shape[1] + room)
    segment_ids = valid.astype(jnp.int32)
    positions, within = positions_of(segment_ids), row_attention(cfg, segment_ids, runtime)
    caches: list[LayerCache] = []

    def attend_to(kind: LayerKind, window: int | None) -> Callable:
        mix = within(kind, window)

        def attend(query, key, value, sinks):
            key, value = match_heads(key, cfg.num_heads), match_heads(value, cfg.num_heads)
            batch, _, heads, _ = key.shape
            layout = spec("batch", head_axis("kv_heads", heads), None, "seq", "head_dim")
            zeros = lambda x: jnp.zeros((batch, heads, copies, room, x.shape[-1]), x.dtype, out_sharding=layout)
            prompt = [stored(by_head(x), runtime) for x in (key, value)]
            caches.append(Cache(*prompt, *jax.tree.map(zeros, prompt)))
            return mix(query, key, value, sinks)

        return mix if kind.reads else attend

    def recur(params: Params, streams: Streams) -> Array:
        out, cache = prefill_cache(params, streams, valid, copies)
        caches.append(cache)
        return out

    x, layers = common(params, cfg, tokens, positions, tokens.shape[1], attend_to, recur, runtime.compute)
    feed, memory = feed_forward(cfg, runtime.hardware, note), blank_memory(cfg, x)
    for i, kind in enumerate(kinds_of(cfg)):
        since = tokens.shape[1] - 1 if i == cfg.num_layers - 1 else 0
        x, memory = block(layers, kind, params["layers"][i], x, feed, memory, since)
    return normalize(params["final_norm"], x, cfg), caches


def abreast(caches: list[LayerCache], width: int) -> list[LayerCache]:
    """The caches of G prompts with one response each, as those of G / ``width`` rows of ``width`` such."""
    return [cache.abreast(width) for cache in caches]


def decode_step(
    params: Params,
    cfg: ModelConfig,
    token: Array,
    index: Array,
    prompt: Array,
    caches: list[LayerCache],
    runtime: Runtime,
    note: Callable[[Routed], None] | None = None,
) -> tuple[Array, list[LayerCache]]:
    """The forward pass over one token of each response, with what layers keep of the tokens before it.

    The n responses to a prompt are the columns of one row, so that the prompt's cache is read once for all of them. Or
    the n columns of a row are n prompts with one response each.

    Args:
        token: i32[G, n], the newest token of each response.
        index: i32[], response tokens before it; keys and values are written there.
        prompt: bool[G, 1, P], or bool[G, n, P] where the columns are prompts: which prompt columns hold tokens.
        caches: as ``prefill`` returns them.
        note: is told what each layer's router said.

    Returns:
        (final hidden states [G, n, D], the caches with the token in them).
    """
    size, room = prompt.shape[-1], next(cache.shape[3] for cache in caches if isinstance(cache, Cache))
    position = jnp.broadcast_to(prompt.sum(axis=-1, dtype=jnp.int32) + index, token.shape)
    own, updated, last = iter(caches), [], {}  # last: of each type of layers, the last cache

    def attend_to(kind: LayerKind, window: int | None) -> Callable:
        columns = jnp.arange(size + room)
        seen = columns <= size + index
        seen = seen if window is None else seen & (size + index - columns < window)
        biases = bias_of(prompt & seen[:size])[:, :, None], bias_of(seen[None, None, size:])[:, :, None]
        grow = lambda new: stored(by_head(match_heads(new, cfg.num_heads))[:, :, :, None], runtime)
        put = lambda old, new: jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, 0, 0, index, 0))
        write = lambda old, new: jax.tree.map(put, old, grow(new))

        def attend(query, key, value, sinks):
            cache: Any = last[kind.type] if kind.reads else next(own)
            if not kind.reads:
                last[kind.type] = cache = cache._replace(key=write(cache.key, key), value=write(cache.value, value))
                updated.append(cache)
            parts = [(cache.prompt_key, cache.prompt_value, biases[0]), (cache.key, cache.value, biases[1])]
            query = split_copies(query, cache.shape[1], query.shape[1])
            return merge_copies(branches(query, parts, **product(cfg), sinks=sinks))

        return attend

    def recur(params: Params, streams: Streams) -> Array:
        before: Any = next(own)
        out, cache = next_token(params, streams, before)
        updated.append(cache)
        return out

    x, layers = common(params, cfg, token, position, size + room, attend_to, recur, runtime.compute)
    feed, memory = feed_forward(cfg, runtime.hardware, note), blank_memory(cfg, x)
    for layer_params, kind in zip(params["layers"], kinds_of(cfg), strict=True):
        x, memory = block(layers, kind, layer_params, x, feed, memory)
    return normalize(params["final_norm"], x, cfg), updated
