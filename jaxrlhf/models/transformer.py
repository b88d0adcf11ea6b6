"""A decoder-only transformer in plain functions over a pytree of parameters.

One block serves training, prefill and decoding: it is given ``attend``, which either attends within the rows at hand
or through a cache. Training scans over stacked layers; decoding uses its own layout, unstacked and gathered once.
"""

import dataclasses
import functools
import math
import operator
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.models.attention import attention, cached_attention, causal_mask, head_axis, match_heads, near
from jaxrlhf.models.families import FAMILIES
from jaxrlhf.models.linear import gathered, linear
from jaxrlhf.models.rope import RopeScaling, rope_frequencies, rope_magnitude, rotate
from jaxrlhf.sharding import constrain, spec
from jaxrlhf.types import Array, Head, Params

VOCAB_MULTIPLE = 64  # embeddings are padded up to it, whatever the mesh, so that a checkpoint fits every mesh


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture: what a HF config.json says, in the words of the house."""

    family: Literal[
        "llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "gemma2", "gemma3_text", "gpt2", "gpt_neox"
    ] = "llama"
    vocab_size: int = 0  # 0: the tokenizer's
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 0  # 0: num_heads
    head_dim: int = 0  # 0: hidden_size / num_heads
    mlp_size: int = 0  # 0: 8/3 x hidden_size rounded up to 64 (4 x hidden_size where the mlp has no gate)
    max_positions: int = 1024
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_fraction: float = 1.0  # of a head's features that is rotated
    attention_bias: bool | None = None  # null: the family's
    mlp_bias: bool | None = None  # null: the family's
    tie_embeddings: bool = True
    parallel_residual: bool | None = None  # attention and mlp side by side; null: the family's
    sliding_window: int = 0  # tokens that local layers see, the token itself included; 0: there are no such layers
    layer_types: tuple[Literal["local", "global"], ...] = ()  # a layer; []: the family's, where there is a window
    local_rope_theta: float | None = None  # of local layers, which rope_scaling leaves alone; null: rope_theta
    query_pre_attn_scalar: int = 0  # attention's products are divided by its root; 0: head_dim
    attention_softcap: float | None = None  # products x become softcap x tanh(x / softcap)
    logit_softcap: float | None = None  # the same of the next-token logits


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
    """``cfg`` with everything that was left open filled in, and one way of saying each thing.

    Raises ValueError, in one line, where its fields do not fit each other."""
    family = FAMILIES[cfg.family]
    mlp = math.ceil(cfg.hidden_size * 8 / 3 / 64) * 64 if family.gated else 4 * cfg.hidden_size
    head_dim = cfg.head_dim or cfg.hidden_size // cfg.num_heads
    layer_types, window = resolve_layers(cfg)
    cfg = dataclasses.replace(
        cfg,
        vocab_size=cfg.vocab_size or vocab_size,
        num_kv_heads=cfg.num_kv_heads or cfg.num_heads,
        head_dim=head_dim,
        mlp_size=cfg.mlp_size or mlp,
        attention_bias=family.attention_bias if cfg.attention_bias is None else cfg.attention_bias,
        mlp_bias=family.mlp_bias if cfg.mlp_bias is None else cfg.mlp_bias,
        parallel_residual=family.parallel_residual if cfg.parallel_residual is None else cfg.parallel_residual,
        layer_types=layer_types,
        sliding_window=window,
        local_rope_theta=cfg.local_rope_theta if window else None,
        query_pre_attn_scalar=0 if cfg.query_pre_attn_scalar == head_dim else cfg.query_pre_attn_scalar,
    )
    if cfg.num_heads % cfg.num_kv_heads:
        raise ValueError(f"num_heads: {cfg.num_heads} is not a multiple of num_kv_heads: {cfg.num_kv_heads}")
    if family.positions == "rope":
        check_rope(cfg)
    return cfg


def resolve_layers(cfg: ModelConfig) -> tuple[tuple[Literal["local", "global"], ...], int]:
    """(layer_types, sliding_window): both empty where no layer is local."""
    every = FAMILIES[cfg.family].global_every
    types = cfg.layer_types
    if not types and cfg.sliding_window:
        types = tuple("global" if every and (i + 1) % every == 0 else "local" for i in range(cfg.num_layers))
    if types and len(types) != cfg.num_layers:
        raise ValueError(f"layer_types: {len(types)} of them; expected one for each of num_layers: {cfg.num_layers}")
    if "local" not in types:
        return (), 0
    if not cfg.sliding_window:
        raise ValueError("layer_types: local layers need a window; expected sliding_window of 1 or more")
    return types, cfg.sliding_window


def rotary_size(cfg: ModelConfig) -> int:
    """Features of a head that are rotated."""
    return int(cfg.head_dim * cfg.rotary_fraction)


def check_rope(cfg: ModelConfig) -> None:
    """Raises ValueError where the rotated features are no pairs, or a scaling does not fit them."""
    size, scaling = rotary_size(cfg), cfg.rope_scaling
    if size % 2 or not size:
        share = f"{cfg.rotary_fraction:g} of head_dim: {cfg.head_dim} is {size} features"
        raise ValueError(f"rotary_fraction: {share}; expected an even number, at least 2")
    if scaling is None:
        return
    for name in ("short_factor", "long_factor") if scaling.kind == "longrope" else ():
        if len(getattr(scaling, name)) != size // 2:
            count = len(getattr(scaling, name))
            raise ValueError(f"rope_scaling.{name}: {count} numbers; expected one for each of {size // 2} frequencies")
    if cfg.local_rope_theta and rope_magnitude(scaling) != 1:
        kind = scaling.kind
        raise ValueError(f"rope_scaling.kind: {kind}: would scale local layers too; expected linear or llama3")


def row_limit(cfg: ModelConfig) -> int | None:
    """How many columns a row may have; None where any number will do.

    Beyond them learned positions end, and longrope would need its long factors, whose choice depends on the row."""
    if FAMILIES[cfg.family].positions == "learned":
        return cfg.max_positions
    longrope = cfg.rope_scaling is not None and cfg.rope_scaling.kind == "longrope"
    return cfg.rope_scaling.original_max_positions if longrope else None


def padded_vocab(cfg: ModelConfig) -> int:
    """Rows of the embedding: the vocabulary rounded up to VOCAB_MULTIPLE."""
    return -(-cfg.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


# ---- parameters -----------------------------------------------------------------------------------------------------


def parameter_table(cfg: ModelConfig, head: Head) -> dict:
    """The pytree of Leafs of a model with this head. ``cfg`` is resolved."""
    dim, heads, kv, width = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    family, mlp = FAMILIES[cfg.family], cfg.mlp_size
    unit: Literal["ones", "zeros"] = "zeros" if family.norm_offset else "ones"

    def norm(*stack):
        leaf = lambda init: Leaf((*stack, dim), ("layers", "embed") if stack else ("embed",), init)
        return {"scale": leaf(unit)} | ({"bias": leaf("zeros")} if family.norm == "layer" else {})

    def norms():
        places = {"pre": ["norm"], "post": ["post_norm"], "sandwich": ["norm", "post_norm"]}[family.norms]
        return {place: norm(cfg.num_layers) for place in places}

    def head_norms():
        if family.query_key_norm == "none":
            return {}
        shape = lambda n: (cfg.num_layers, n, width) if family.query_key_norm == "all" else (cfg.num_layers, width)
        axes = lambda name: ("layers", name, "head_dim") if family.query_key_norm == "all" else ("layers", "head_dim")
        leaf = lambda n, name: {"scale": Leaf(shape(n), axes(name), unit)}
        return {"query_norm": leaf(heads, "heads"), "key_norm": leaf(kv, "kv_heads")}

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
    out_bias = cfg.attention_bias and family.out_bias
    up = lambda: layer_linear((dim, mlp), ("embed", "mlp"), dim, cfg.mlp_bias, 1)
    table = {
        "embed": {"tokens": {"embedding": Leaf((padded_vocab(cfg), dim), ("vocab", "embed"), 1 / math.sqrt(dim))}},
        "layers": {
            "attention": {
                "query": qkv(heads, "heads"),
                "key": qkv(kv, "kv_heads"),
                "value": qkv(kv, "kv_heads"),
                "out": layer_linear(
                    (heads, width, dim), ("heads", "head_dim", "embed"), heads * width, out_bias, 1, depth
                ),
            }
            | norms()
            | head_norms(),
            "mlp": {
                "up": up(),
                "down": layer_linear((mlp, dim), ("mlp", "embed"), mlp, cfg.mlp_bias, 1, depth),
            }
            | ({"gate": up()} if family.gated else {})
            | norms(),
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
    """The leaf's axes as this mesh can split them: heads that ``tensor`` does not divide stay whole."""
    one = lambda name, size: head_axis(name, size) if name in ("heads", "kv_heads") else name
    return tuple(one(name, size) for name, size in zip(leaf.axes, leaf.shape, strict=True))


def weight_spec(leaf: Leaf):
    return spec(*weight_axes(leaf))


# ---- the block ------------------------------------------------------------------------------------------------------


def normalize(params: Params, x: Array, cfg: ModelConfig, axes: tuple[str | None, ...] = (None,)) -> Array:
    """RMS or layer normalisation in float32, over the last dimensions, whose logical axes are ``axes``."""
    family, dims = FAMILIES[cfg.family], tuple(range(-len(axes), 0))
    y = x.astype(jnp.float32)
    if family.norm == "layer":
        y = y - y.mean(dims, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, dims, keepdims=True) + cfg.norm_eps)
    scale = constrain(params["scale"].astype(jnp.float32), *axes)
    y = y * (1 + scale) if family.norm_offset else y * scale
    if "bias" in params:
        y = y + constrain(params["bias"].astype(jnp.float32), *axes)
    return y.astype(x.dtype)


def attention_block(params: Params, cfg: ModelConfig, x: Array, turn: Callable, attend: Callable) -> Array:
    """x [B, S, D]; ``turn`` gives positions to queries and keys; ``attend``: (query, key, value) to [B, S, H, K]."""
    heads, kv = head_axis("heads", cfg.num_heads), head_axis("kv_heads", cfg.num_kv_heads)

    def project(name: str, axis: str | None) -> Array:
        out = ("batch", "seq", axis, "head_dim")
        return linear(params[name], x, "bsd,dhk->bshk", ("embed", axis, "head_dim"), out)

    query, key, value = project("query", heads), project("key", kv), project("value", kv)
    if "query_norm" in params:
        whole = FAMILIES[cfg.family].query_key_norm == "all"
        query = normalize(params["query_norm"], query, cfg, (heads, None) if whole else (None,))
        key = normalize(params["key_norm"], key, cfg, (kv, None) if whole else (None,))
    mixed = attend(turn(query), turn(key), value)
    return linear(params["out"], mixed, "bshk,hkd->bsd", (heads, "head_dim", "embed"), ("batch", "seq", "hidden"))


def mlp_block(params: Params, cfg: ModelConfig, x: Array) -> Array:
    family = FAMILIES[cfg.family]
    gelu = functools.partial(jax.nn.gelu, approximate=family.activation == "gelu_tanh")
    activate = jax.nn.silu if family.activation == "silu" else gelu
    wide = ("batch", "seq", "mlp")
    y = linear(params["up"], x, "bsd,dm->bsm", ("embed", "mlp"), wide)
    if family.gated:
        y = y * activate(linear(params["gate"], x, "bsd,dm->bsm", ("embed", "mlp"), wide))
    else:
        y = activate(y)
    return linear(params["down"], y, "bsm,md->bsd", ("mlp", "embed"), ("batch", "seq", "hidden"))


def block(params: Params, cfg: ModelConfig, x: Array, turn: Callable, attend: Callable) -> Array:
    """Two residual branches, one after the other or side by side, with norms before or after what they compute."""
    attn, mlp = params["attention"], params["mlp"]
    before = lambda part: normalize(part["norm"], x, cfg) if "norm" in part else x
    after = lambda part, y: normalize(part["post_norm"], y, cfg) if "post_norm" in part else y
    mixed = after(attn, attention_block(attn, cfg, before(attn), turn, attend))
    if cfg.parallel_residual:
        return x + mixed + after(mlp, mlp_block(mlp, cfg, before(mlp)))
    x = x + mixed
    return x + after(mlp, mlp_block(mlp, cfg, before(mlp)))


def embed(params: Params, cfg: ModelConfig, tokens: Array, positions: Array, dtype) -> Array:
    """tokens, positions i32[B, S] -> [B, S, D]."""
    table = constrain(params["embed"]["tokens"]["embedding"].astype(dtype), "vocab", None)
    x = table.at[tokens].get(out_sharding=spec("batch", "seq", "hidden"))
    if "positions" in params["embed"]:
        table = constrain(params["embed"]["positions"]["embedding"].astype(dtype), None, None)
        x = x + table.at[positions].get(out_sharding=spec("batch", "seq", "hidden"))
    if FAMILIES[cfg.family].scaled_embeddings:
        x = x * jnp.asarray(math.sqrt(cfg.hidden_size), dtype)
    return x


class Sight(NamedTuple):
    """What local and global layers differ in."""

    mask: Array  # bool[B, 1, S, T]: what each token may read
    freqs: Array | None  # f32[R / 2], radians a position; None where positions were embedded


def local_layers(cfg: ModelConfig) -> list[bool]:
    """Which layers are local."""
    return [kind == "local" for kind in cfg.layer_types] or [False] * cfg.num_layers


def sights(cfg: ModelConfig, mask: Array, columns: Array) -> dict[bool, Sight]:
    """Local or not -> Sight, for the kinds of layers that the model has.

    ``mask``: what global layers read; columns i32[S]: where the rows of the mask stand. Raises ValueError for rows
    that are longer than the model's."""
    limit, length = row_limit(cfg), mask.shape[-1]
    if limit is not None and length > limit:
        raise ValueError(f"rows of {length} columns: longer than this {cfg.family} model computes; expected <= {limit}")

    def one(local: bool) -> Sight:
        seen = near(mask, columns, cfg.sliding_window) if local else mask
        if FAMILIES[cfg.family].positions == "learned":
            return Sight(seen, None)
        if local and cfg.local_rope_theta:
            return Sight(seen, rope_frequencies(rotary_size(cfg), cfg.local_rope_theta, None))
        return Sight(seen, rope_frequencies(rotary_size(cfg), cfg.rope_theta, cfg.rope_scaling))

    return {local: one(local) for local in set(local_layers(cfg))}


def turner(cfg: ModelConfig, positions: Array, sight: Sight) -> Callable:
    """How queries and keys learn of their positions: rotation, or nothing where positions were embedded."""
    if sight.freqs is None:
        return lambda x: x
    freqs, magnitude = sight.freqs, rope_magnitude(cfg.rope_scaling)
    return lambda x: rotate(x, positions, freqs, magnitude)


def product(cfg: ModelConfig) -> dict[str, float | None]:
    """How attention treats the products of queries and keys."""
    return {"scale": 1.0 / math.sqrt(cfg.query_pre_attn_scalar or cfg.head_dim), "softcap": cfg.attention_softcap}


# ---- whole rows: training, scoring ----------------------------------------------------------------------------------


def positions_of(segment_ids: Array) -> Array:
    """i32[B, S]: 0, 1, 2, ... within each segment, whichever side the padding is on."""
    columns = jnp.arange(segment_ids.shape[1])[None]
    previous = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    starts = jnp.where(segment_ids != previous, columns, 0)
    return columns - jax.lax.cummax(starts, axis=1)


def forward(params: Params, cfg: ModelConfig, tokens: Array, segment_ids: Array, runtime: Runtime) -> Array:
    """Final hidden states [B, S, D] of whole rows: tokens and segment_ids (0 = padding) i32[B, S]."""
    positions, local = positions_of(segment_ids), local_layers(cfg)
    seen = sights(cfg, causal_mask(segment_ids), jnp.arange(segment_ids.shape[1]))
    mixed = len(seen) == 2  # then a layer's flag chooses while it runs, as all layers are one program

    def layer(x, xs):
        layer_params, is_local = xs
        choose = lambda near, far: jnp.where(is_local, near, far)
        sight = jax.tree.map(choose, seen[True], seen[False]) if mixed else seen[local[0]]

        def attend(query, key, value):
            key, value = match_heads(key, cfg.num_heads), match_heads(value, cfg.num_heads)
            return attention(query, key, value, sight.mask, **product(cfg))

        return block(layer_params, cfg, x, turner(cfg, positions, sight), attend), None

    x = embed(params, cfg, tokens, positions, runtime.compute)
    flags = jnp.array(local) if mixed else None
    x, _ = jax.lax.scan(rematerialized(layer, runtime), x, (params["layers"], flags))
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

    def one(path, leaf: Leaf, x):
        x = x if path[-1].key == "scale" else x.astype(runtime.compute)  # norms compute in float32
        return constrain(x, *gathered(weight_axes(leaf)))

    whole = jax.tree_util.tree_map_with_path(one, table, params, is_leaf=lambda x: isinstance(x, Leaf))
    layers = [jax.tree.map(operator.itemgetter(i), whole["layers"]) for i in range(cfg.num_layers)]
    return whole | {"layers": layers}


def prefill(params: Params, cfg: ModelConfig, tokens: Array, valid: Array, cache_size: int, runtime: Runtime):
    """Read left-padded prompts [B, P]: (final hidden state of the last column [B, 1, D], a Cache a layer).

    The caches have room for ``cache_size`` columns; ``params`` are in decode_layout."""
    segment_ids = valid.astype(jnp.int32)
    positions = positions_of(segment_ids)
    seen = sights(cfg, causal_mask(segment_ids), jnp.arange(valid.shape[1]))
    caches = []

    def attend(sight: Sight, query, key, value):
        grow = lambda x: jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, cache_size - x.shape[1]), (0, 0)))
        key, value = match_heads(key, cfg.num_heads), match_heads(value, cfg.num_heads)
        caches.append(Cache(grow(key), grow(value)))
        return attention(query, key, value, sight.mask, **product(cfg))

    x = embed(params, cfg, tokens, positions, runtime.compute)
    for layer_params, local in zip(params["layers"], local_layers(cfg), strict=True):
        sight = seen[local]
        x = block(layer_params, cfg, x, turner(cfg, positions, sight), functools.partial(attend, sight))
    return normalize(params["final_norm"], x[:, -1:], cfg), caches


def decode_step(
    params: Params, cfg: ModelConfig, token: Array, column: Array, valid: Array, caches: list[Cache], runtime: Runtime
):
    """Read one token a row, i32[B, 1], which goes to ``column`` (i32[]) of the caches.

    valid bool[B, T]: the columns that hold tokens, the new one included. Returns as prefill does."""
    position = valid.sum(axis=1, dtype=jnp.int32)[:, None] - 1
    seen = sights(cfg, valid[:, None, None, :], column[None])
    layers, updated = iter(caches), []

    def attend(sight: Sight, query, key, value):
        cache = next(layers)
        write = lambda old, new: jax.lax.dynamic_update_slice(
            old, jnp.swapaxes(match_heads(new, cfg.num_heads), 1, 2).astype(old.dtype), (0, 0, column, 0)
        )
        cache = Cache(write(cache.key, key), write(cache.value, value))
        updated.append(cache)
        return cached_attention(query, cache.key, cache.value, sight.mask, **product(cfg))

    x = embed(params, cfg, token, position, runtime.compute)
    for layer_params, local in zip(params["layers"], local_layers(cfg), strict=True):
        sight = seen[local]
        x = block(layer_params, cfg, x, turner(cfg, position, sight), functools.partial(attend, sight))
    return normalize(params["final_norm"], x, cfg), updated
