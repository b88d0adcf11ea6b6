"""A decoder-only transformer in plain functions over a pytree of parameters.

One block serves training, prefill and decoding: it is given ``attend``, which either attends within the rows at hand
or through a cache. Training scans over stacked layers; decoding uses its own layout, unstacked and gathered once.
"""

import dataclasses
import math
import operator
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.models.attention import (
    attention,
    causal_mask,
    group_heads,
    match_heads,
    rope_frequencies,
    rotate,
    ungroup_heads,
)
from jaxrlhf.models.families import FAMILIES
from jaxrlhf.models.linear import gathered, linear
from jaxrlhf.sharding import constrain, spec
from jaxrlhf.types import Array, Head, Params

VOCAB_MULTIPLE = 64  # embeddings are padded up to it, whatever the mesh, so that a checkpoint fits every mesh


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts (the fields that its ``kind`` uses)."""

    kind: Literal["linear", "llama3"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture: what a HF config.json says, in the words of the house."""

    family: Literal["llama", "gpt2"] = "llama"
    vocab_size: int = 0  # 0: the tokenizer's
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 0  # 0: num_heads
    head_dim: int = 0  # 0: hidden_size / num_heads
    mlp_size: int = 0  # 0: 4 x hidden_size (gpt2), 8/3 x hidden_size rounded up to 64 (llama)
    max_positions: int = 1024
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool | None = None  # null: the family's
    mlp_bias: bool | None = None  # null: the family's
    tie_embeddings: bool = True


class Runtime(NamedTuple):
    """How a model is run, apart from what it is."""

    compute: Any = jnp.float32  # dtype of activations
    remat: Literal["none", "full", "dots"] = (
        "none"  # what the backward pass recomputes: nothing, layers, all but matmuls
    )


class Leaf(NamedTuple):
    """One parameter: its shape, logical axes, and the deviation it starts with ("ones" and "zeros" are constants)."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: float | Literal["ones", "zeros"]


def resolve(cfg: ModelConfig, vocab_size: int = 0) -> ModelConfig:
    """``cfg`` with everything that was left open filled in. Raises ValueError where heads do not divide."""
    family = FAMILIES[cfg.family]
    mlp = math.ceil(cfg.hidden_size * 8 / 3 / 64) * 64 if family.gated else 4 * cfg.hidden_size
    cfg = dataclasses.replace(
        cfg,
        vocab_size=cfg.vocab_size or vocab_size,
        num_kv_heads=cfg.num_kv_heads or cfg.num_heads,
        head_dim=cfg.head_dim or cfg.hidden_size // cfg.num_heads,
        mlp_size=cfg.mlp_size or mlp,
        attention_bias=family.bias if cfg.attention_bias is None else cfg.attention_bias,
        mlp_bias=family.bias if cfg.mlp_bias is None else cfg.mlp_bias,
    )
    if cfg.num_heads % cfg.num_kv_heads:
        raise ValueError(f"num_heads: {cfg.num_heads} is not a multiple of num_kv_heads: {cfg.num_kv_heads}")
    return cfg


def padded_vocab(cfg: ModelConfig) -> int:
    """Rows of the embedding: the vocabulary rounded up to VOCAB_MULTIPLE."""
    return -(-cfg.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


# ---- parameters -----------------------------------------------------------------------------------------------------


def parameter_table(cfg: ModelConfig, head: Head) -> dict:
    """The pytree of Leafs of a model with this head. ``cfg`` is resolved."""
    dim, heads, kv, width = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    family, mlp = FAMILIES[cfg.family], cfg.mlp_size

    def norm(*stack):
        leaf = lambda init: Leaf((*stack, dim), ("layers", "embed") if stack else ("embed",), init)
        return {"scale": leaf("ones")} | ({"bias": leaf("zeros")} if family.norm == "layer" else {})

    def layer_linear(shape, axes, fan_in, bias, bias_rank, gain=1.0):
        kernel = Leaf((cfg.num_layers, *shape), ("layers", *axes), gain / math.sqrt(fan_in))
        if not bias:
            return {"kernel": kernel}
        return {
            "kernel": kernel,
            "bias": Leaf(kernel.shape[:1] + shape[-bias_rank:], ("layers", *axes[-bias_rank:]), "zeros"),
        }

    depth = 1.0 / math.sqrt(2 * cfg.num_layers)  # residual branches start small (GPT-2)
    qkv = lambda n, axis: layer_linear((dim, n, width), ("embed", axis, "head_dim"), dim, cfg.attention_bias, 2)
    up = lambda: layer_linear((dim, mlp), ("embed", "mlp"), dim, cfg.mlp_bias, 1)
    table = {
        "embed": {"tokens": {"embedding": Leaf((padded_vocab(cfg), dim), ("vocab", "embed"), 1 / math.sqrt(dim))}},
        "layers": {
            "attention": {
                "norm": norm(cfg.num_layers),
                "query": qkv(heads, "heads"),
                "key": qkv(kv, "kv_heads"),
                "value": qkv(kv, "kv_heads"),
                "out": layer_linear(
                    (heads, width, dim), ("heads", "head_dim", "embed"), heads * width, cfg.attention_bias, 1, depth
                ),
            },
            "mlp": {
                "norm": norm(cfg.num_layers),
                "up": up(),
                "down": layer_linear((mlp, dim), ("mlp", "embed"), mlp, cfg.mlp_bias, 1, depth),
            }
            | ({"gate": up()} if family.gated else {}),
        },
        "final_norm": norm(),
    }
    if family.positions == "learned":
        table["embed"]["positions"] = {"embedding": Leaf((cfg.max_positions, dim), ("positions", "embed"), 0.01)}
    if head == "scalar":
        table["head"] = {
            "kernel": Leaf((dim, 1), ("embed", "score"), 1 / math.sqrt(dim + 1)),
            "bias": Leaf((1,), ("score",), "zeros"),
        }
    elif not cfg.tie_embeddings:
        table["head"] = {"kernel": Leaf((dim, padded_vocab(cfg)), ("embed", "vocab"), 0.02)}
    return table


def init(cfg: ModelConfig, head: Head, key: Array, dtype=jnp.float32) -> Params:
    """Random parameters, each laid out by its logical axes. A leaf's noise hangs on its path alone, not on the mesh."""
    table = parameter_table(cfg, head)

    def one(path, leaf: Leaf):
        if leaf.init in ("ones", "zeros"):
            value = 1.0 if leaf.init == "ones" else 0.0
            return jnp.full(leaf.shape, value, dtype, out_sharding=weight_spec(leaf))
        noise_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        noise = jax.random.normal(noise_key, leaf.shape, jnp.float32, out_sharding=weight_spec(leaf))
        return (noise * leaf.init).astype(dtype)

    return jax.tree_util.tree_map_with_path(one, table, is_leaf=lambda x: isinstance(x, Leaf))


def weight_axes(leaf: Leaf) -> tuple[str | None, ...]:
    """The leaf's axes as this mesh can split them: kv heads that ``tensor`` does not divide stay whole."""
    tensor = dict(jax.sharding.get_abstract_mesh().shape).get("tensor", 1)
    return tuple(
        None if name == "kv_heads" and size % tensor else name for name, size in zip(leaf.axes, leaf.shape, strict=True)
    )


def weight_spec(leaf: Leaf):
    return spec(*weight_axes(leaf))


# ---- the block ------------------------------------------------------------------------------------------------------


def normalize(params: Params, x: Array, cfg: ModelConfig) -> Array:
    """RMS or layer normalisation in float32."""
    y = x.astype(jnp.float32)
    if FAMILIES[cfg.family].norm == "layer":
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + cfg.norm_eps)
    y = y * constrain(params["scale"].astype(jnp.float32), None)
    if "bias" in params:
        y = y + constrain(params["bias"].astype(jnp.float32), None)
    return y.astype(x.dtype)


def attention_block(params: Params, cfg: ModelConfig, x: Array, turn: Callable, attend: Callable) -> Array:
    """x [B, S, D]; ``turn`` gives positions to queries and keys; ``attend``: (query, key, value) to [B, S, H, K]."""
    heads, kv = ("batch", "seq", "heads", "head_dim"), ("batch", "seq", kv_axis(cfg), "head_dim")
    query = linear(params["query"], x, "bsd,dhk->bshk", ("embed", "heads", "head_dim"), heads)
    key = linear(params["key"], x, "bsd,dhk->bshk", ("embed", kv_axis(cfg), "head_dim"), kv)
    value = linear(params["value"], x, "bsd,dhk->bshk", ("embed", kv_axis(cfg), "head_dim"), kv)
    mixed = attend(turn(query), turn(key), value)
    return linear(params["out"], mixed, "bshk,hkd->bsd", ("heads", "head_dim", "embed"), ("batch", "seq", "hidden"))


def kv_axis(cfg: ModelConfig) -> str | None:
    """The logical axis of kv heads: None (whole everywhere) where ``tensor`` does not divide them."""
    tensor = dict(jax.sharding.get_abstract_mesh().shape).get("tensor", 1)
    return None if cfg.num_kv_heads % tensor else "kv_heads"


def mlp_block(params: Params, cfg: ModelConfig, x: Array) -> Array:
    family = FAMILIES[cfg.family]
    activate = jax.nn.silu if family.activation == "silu" else lambda y: jax.nn.gelu(y, approximate=True)
    wide = ("batch", "seq", "mlp")
    y = linear(params["up"], x, "bsd,dm->bsm", ("embed", "mlp"), wide)
    if family.gated:
        y = y * activate(linear(params["gate"], x, "bsd,dm->bsm", ("embed", "mlp"), wide))
    else:
        y = activate(y)
    return linear(params["down"], y, "bsm,md->bsd", ("mlp", "embed"), ("batch", "seq", "hidden"))


def block(params: Params, cfg: ModelConfig, x: Array, turn: Callable, attend: Callable) -> Array:
    """Pre-norm residual block."""
    attn, mlp = params["attention"], params["mlp"]
    x = x + attention_block(attn, cfg, normalize(attn["norm"], x, cfg), turn, attend)
    return x + mlp_block(mlp, cfg, normalize(mlp["norm"], x, cfg))


def embed(params: Params, cfg: ModelConfig, tokens: Array, positions: Array, dtype) -> Array:
    """tokens, positions i32[B, S] -> [B, S, D]."""
    table = constrain(params["embed"]["tokens"]["embedding"].astype(dtype), "vocab", None)
    x = table.at[tokens].get(out_sharding=spec("batch", "seq", "hidden"))
    if "positions" in params["embed"]:
        table = constrain(params["embed"]["positions"]["embedding"].astype(dtype), None, None)
        x = x + table.at[positions].get(out_sharding=spec("batch", "seq", "hidden"))
    return x


def turner(cfg: ModelConfig, positions: Array) -> Callable:
    """How queries and keys learn of their positions: rotation, or nothing where positions were embedded."""
    if FAMILIES[cfg.family].positions == "learned":
        return lambda x: x
    freqs = rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    return lambda x: rotate(x, positions, freqs)


# ---- whole rows: training, scoring ----------------------------------------------------------------------------------


def positions_of(segment_ids: Array) -> Array:
    """i32[B, S]: 0, 1, 2, ... within each segment, whichever side the padding is on."""
    columns = jnp.arange(segment_ids.shape[1])[None]
    previous = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    starts = jnp.where(segment_ids != previous, columns, 0)
    return columns - jax.lax.cummax(starts, axis=1)


def forward(params: Params, cfg: ModelConfig, tokens: Array, segment_ids: Array, runtime: Runtime) -> Array:
    """Final hidden states [B, S, D] of whole rows: tokens and segment_ids (0 = padding) i32[B, S]."""
    positions = positions_of(segment_ids)
    mask, turn = causal_mask(segment_ids), turner(cfg, positions)

    def attend(query, key, value):
        return attention(query, match_heads(key, cfg.num_heads), match_heads(value, cfg.num_heads), mask)

    def layer(x, layer_params):
        return block(layer_params, cfg, x, turn, attend), None

    x = embed(params, cfg, tokens, positions, runtime.compute)
    x, _ = jax.lax.scan(rematerialized(layer, runtime), x, params["layers"])
    return normalize(params["final_norm"], x, cfg)


def rematerialized(layer: Callable, runtime: Runtime) -> Callable:
    """``layer`` under the remat policy of the run."""
    if runtime.remat == "none":
        return layer
    keep = jax.checkpoint_policies.nothing_saveable
    if runtime.remat == "dots":
        keep = jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims
    return jax.checkpoint(layer, policy=keep, prevent_cse=False)


# ---- one token at a time: generation --------------------------------------------------------------------------------


class Cache(NamedTuple):
    """Keys and values of one layer, [B, N, T, K]: heads before time, so that a decoded token reads contiguous rows."""

    key: Array
    value: Array


def decode_layout(params: Params, cfg: ModelConfig, head: Head, runtime: Runtime) -> Params:
    """The parameters as decoding reads them: cast, gathered over fsdp and unstacked, once a rollout."""
    table = parameter_table(cfg, head)

    def one(leaf: Leaf, x):
        x = x if leaf.init == "ones" else x.astype(runtime.compute)
        return constrain(x, *gathered(weight_axes(leaf)))

    whole = jax.tree.map(one, table, params, is_leaf=lambda x: isinstance(x, Leaf))
    layers = [jax.tree.map(operator.itemgetter(i), whole["layers"]) for i in range(cfg.num_layers)]
    return whole | {"layers": layers}


def prefill(params: Params, cfg: ModelConfig, tokens: Array, valid: Array, cache_size: int, runtime: Runtime):
    """Read left-padded prompts [B, P]: (final hidden state of the last column [B, 1, D], a Cache a layer).

    The caches have room for ``cache_size`` columns; ``params`` are in decode_layout."""
    segment_ids = valid.astype(jnp.int32)
    positions = positions_of(segment_ids)
    mask, turn = causal_mask(segment_ids), turner(cfg, positions)
    caches = []

    def attend(query, key, value):
        grow = lambda x: jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, cache_size - x.shape[1]), (0, 0)))
        key, value = match_heads(key, cfg.num_heads), match_heads(value, cfg.num_heads)
        caches.append(Cache(grow(key), grow(value)))
        return attention(query, key, value, mask)

    x = embed(params, cfg, tokens, positions, runtime.compute)
    for layer_params in params["layers"]:
        x = block(layer_params, cfg, x, turn, attend)
    return normalize(params["final_norm"], x[:, -1:], cfg), caches


def decode_step(
    params: Params, cfg: ModelConfig, token: Array, column: Array, valid: Array, caches: list[Cache], runtime: Runtime
):
    """Read one token a row, i32[B, 1], which goes to ``column`` (i32[]) of the caches.

    valid bool[B, T]: the columns that hold tokens, the new one included. Returns as prefill does."""
    position = valid.sum(axis=1, dtype=jnp.int32)[:, None] - 1
    turn, mask = turner(cfg, position), valid[:, None, None, :]
    layers, updated = iter(caches), []

    def attend(query, key, value):
        cache = next(layers)
        write = lambda old, new: jax.lax.dynamic_update_slice(
            old, jnp.swapaxes(match_heads(new, cfg.num_heads), 1, 2).astype(old.dtype), (0, 0, column, 0)
        )
        cache = Cache(write(cache.key, key), write(cache.value, value))
        updated.append(cache)
        return cached_attention(query, cache, mask)

    x = embed(params, cfg, token, position, runtime.compute)
    for layer_params in params["layers"]:
        x = block(layer_params, cfg, x, turn, attend)
    return normalize(params["final_norm"], x, cfg), updated


def cached_attention(query: Array, cache: Cache, mask: Array) -> Array:
    """One query a row, [B, 1, H, K], over the cache [B, N, T, K]; mask bool[B, 1, 1, T] -> [B, 1, H, K]."""
    grouped = group_heads(query, cache.key.shape[1])[:, 0]
    scale = 1.0 / math.sqrt(query.shape[-1])
    logits = jnp.einsum("bngk,bntk->bngt", grouped, cache.key, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1).astype(cache.value.dtype)
    return ungroup_heads(jnp.einsum("bngt,bntk->bngk", weights, cache.value)[:, None])
