"""A decoder-only transformer in plain functions over a pytree of parameters.

One block serves training, prefill and decoding. What differs between them, and between kinds of layers, is how columns
are mixed: a ``Mixer`` a kind, made by ``mixers`` from two functions. They look at what is before a token, within the
rows at hand or through a cache (decoding.py). Training scans over stacked layers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.models.attention.kernels import SAVED, Asked, Hardware, choose_kernel, within_groups, within_rows
from jaxrlhf.models.attention.products import head_axis, match_heads
from jaxrlhf.models.config import (
    Branch,
    LayerType,
    ModelConfig,
    branch_of,
    layer_types_of,
    rotary_size,
    row_limit,
)
from jaxrlhf.models.cpu import scans_layers
from jaxrlhf.models.delta_net import layer as delta_net
from jaxrlhf.models.experts import Routed, expert_block, router_load
from jaxrlhf.models.families import FAMILIES
from jaxrlhf.models.int8 import Part
from jaxrlhf.models.layer_scan import through_layers
from jaxrlhf.models.linear import PRODUCT, gather, linear
from jaxrlhf.models.response_packing import Places, side_by_side
from jaxrlhf.models.rope import cos_sin, query_scale, rope_frequencies, rope_magnitude, rotate
from jaxrlhf.ops.rows import group_rows, ungroup_rows
from jaxrlhf.sharding import constrain, spec
from jaxrlhf.types import Array, Mean, Params


class Runtime(NamedTuple):
    """How a model is run, apart from what it is."""

    compute: Any = jnp.float32  # dtype of activations
    remat: Literal["none", "full", "dots"] = (
        "none"  # what the backward pass recomputes: nothing, layers, all but matmuls
    )
    attention: Asked = "auto"  # the kernel of whole rows
    hardware: Hardware = Hardware()  # that programs are compiled for
    scan_layers: bool | None = True  # one compiled body for all layers; False: each has its own; None: see ``scans``
    int8: tuple[Part, ...] = ()  # what decoding reads as 8 bits
    merge_adapter: bool = True  # into the kernels that decoding reads; False: beside the quantised ones
    interpret: bool = False  # run Pallas kernels step by step, on any platform (slow: for tests)


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


def attention_block(
    params: Params, cfg: ModelConfig, x: Array, rotary: "Rotary", attend: Callable, since: int = 0
) -> Array:
    """x [B, S, D] -> [B, S - since, D]: attention of the columns from ``since`` on.

    Args:
        rotary: (queries, keys [B, S, H, K]) -> the same: their rotation by position, or nothing.
        attend: (query, key, value, sinks) -> [B, S, H, K]: see kernels.Attend.
        since: no output is computed for the columns before it; their keys and values are.
    """
    heads, kv = head_axis("heads", cfg.num_heads), head_axis("kv_heads", cfg.num_kv_heads)

    def project(name: str, axis: str | None) -> Array:
        out = ("batch", "seq", axis, "head_dim")
        return linear(params[name], x, "bsd,dhk->bshk", ("embed", axis, "head_dim"), out)

    query, key, value = project("query", heads), project("key", kv), project("value", kv)
    gated = FAMILIES[cfg.family].output_gate
    query, gate = jnp.split(query, 2, axis=-1) if gated else (query, None)
    if "query_norm" in params:
        whole = FAMILIES[cfg.family].query_key_norm == "all"
        query = normalize(params["query_norm"], query, cfg, (heads, None) if whole else (None,))
        key = normalize(params["key_norm"], key, cfg, (kv, None) if whole else (None,))
    query, key = rotary(query, key)
    sinks = params["softmax"]["sinks"] if "softmax" in params else None
    mixed = attend(query, key, value, sinks)[:, since:]
    mixed = mixed if gate is None else mixed * jax.nn.sigmoid(gate[:, since:])
    return linear(params["out"], mixed, "bshk,hkd->bsd", (heads, "head_dim", "embed"), ("batch", "seq", "hidden"))


def activation_of(cfg: ModelConfig) -> Callable[[Array], Array]:
    """What the family's mlp applies between its maps."""
    family = FAMILIES[cfg.family]
    gelu = functools.partial(jax.nn.gelu, approximate=family.activation == "gelu_tanh")
    return jax.nn.silu if family.activation == "silu" else gelu


Gated = Callable[[Array, Array], Array]  # (gate, up), of one shape -> what a gated mlp multiplies with down


def gated_by(cfg: ModelConfig) -> Gated:
    """How the family's gated mlp, and each of its experts, joins what gate and up make of a token."""
    if FAMILIES[cfg.family].activation == "clamped":
        return clamped_swiglu
    activate = activation_of(cfg)
    return lambda gate, up: activate(gate) * up


def clamped_swiglu(gate: Array, up: Array, alpha: float = 1.702, limit: float = 7.0) -> Array:
    """g sigmoid(alpha g) (u + 1), where g is the gate, at most ``limit``, and u is up, within -/+ ``limit`` (gpt-oss:
    OpenAI 2025, arXiv:2508.10925)."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


def mlp_block(params: Params, cfg: ModelConfig, x: Array) -> Array:
    wide = ("batch", "seq", "mlp")
    y = linear(params["up"], x, "bsd,dm->bsm", ("embed", "mlp"), wide)
    if FAMILIES[cfg.family].gated:
        y = gated_by(cfg)(linear(params["gate"], x, "bsd,dm->bsm", ("embed", "mlp"), wide), y)
    else:
        y = activation_of(cfg)(y)
    return linear(params["down"], y, "bsm,md->bsd", ("mlp", "embed"), ("batch", "seq", "hidden"))


Feed = Callable[[Params, Array], Array]  # (parameters, [B, S, D]) -> [B, S, D]: the second branch of a block


def feed_forward(
    cfg: ModelConfig, runtime: Runtime, note: Callable[[Routed], None] | None = None, kept: Array | None = None
) -> Feed:
    """The mlp of a layer, or its experts.

    Args:
        note: is told what the router said, where there are experts.
        kept: int[B, S, k], the experts to follow: see experts.route. Of fewer columns in x the last ones count."""
    if not cfg.num_experts:
        return lambda params, x: mlp_block(params, cfg, x)

    def feed(params: Params, x: Array) -> Array:
        own = None if kept is None else kept[:, kept.shape[1] - x.shape[1] :]
        y, routed = expert_block(params, cfg, x, gated_by(cfg), runtime.hardware, own)
        if note is not None:
            note(routed)
        return y

    return feed


def block(params: Params, cfg: ModelConfig, x: Array, mixer: "Mixer", feed: Feed, since: int = 0) -> Array:
    """Two residual branches, one after the other or side by side, with norms before or after what they compute.

    Returns [B, S - since, D]. Of the columns before ``since`` only keys and values are computed (or states): all that
    the last layer needs where nothing uses what comes out there."""
    mixing, mlp = params[mixer.branch], params["mlp"]
    before = lambda part: normalize(part["norm"], x, cfg) if "norm" in part else x
    after = lambda part, y: normalize(part["post_norm"], y, cfg) if "post_norm" in part else y
    mixed = after(mixing, mixer.mix(mixing, before(mixing), since))
    x = x[:, since:]
    if cfg.parallel_residual:
        return x + mixed + after(mlp, feed(mlp, before(mlp)))
    x = x + mixed
    return x + after(mlp, feed(mlp, before(mlp)))


def embed(params: Params, cfg: ModelConfig, tokens: Array, positions: Array, dtype) -> Array:
    """tokens, positions i32[B, S] -> [B, S, D]."""
    table = gather(params["embed"]["tokens"]["embedding"].astype(dtype), ("vocab", "embed"))
    x = table.at[tokens].get(out_sharding=spec("batch", "seq", "hidden"))
    if "positions" in params["embed"]:
        table = constrain(params["embed"]["positions"]["embedding"].astype(dtype), None, None)
        x = x + table.at[positions].get(out_sharding=spec("batch", "seq", "hidden"))
    if FAMILIES[cfg.family].scaled_embeddings:
        x = x * jnp.asarray(math.sqrt(cfg.hidden_size), dtype)
    return x


class Mixer(NamedTuple):
    """How a kind of layers mixes columns."""

    branch: Branch  # its parameters, in a layer's
    mix: Callable[[Params, Array, int], Array]  # (they, x [B, S, D] behind the norm, since) -> [B, S - since, D]


# window, None where a layer has none -> attention_block's attend
AttendTo = Callable[[int | None], Callable[..., Array]]
Mixers = dict[LayerType, Mixer]


def check_length(cfg: ModelConfig, columns: int) -> None:
    """Raises ValueError for rows that are longer than the model computes."""
    limit = row_limit(cfg)
    if limit is not None and columns > limit:
        raise ValueError(f"rows of {columns} columns: more than this {cfg.family} model computes; nearest: {limit}")


def mixers(cfg: ModelConfig, positions: Array, limit: int, attend_to: AttendTo, recur: delta_net.Recur) -> Mixers:
    """The Mixer of every kind of layers that the model has, of tokens at ``positions`` i32[B, S], below ``limit``.

    Args:
        attend_to: what attention layers look at.
        recur: what linear layers begin with, as delta_block takes it.
    """

    def one(kind: LayerType) -> Callable[[Params, Array, int], Array]:
        if kind == "linear":
            return lambda params, x, since: delta_net.delta_block(params, cfg, x, recur, since)
        attend = attend_to(cfg.sliding_window if kind == "local" else None)
        rotary = rotation(cfg, kind, positions, limit)
        return lambda params, x, since: attention_block(params, cfg, x, rotary, attend, since)

    return {kind: Mixer(branch_of(kind), one(kind)) for kind in sorted(set(layer_types_of(cfg)))}


Rotary = Callable[[Array, Array], tuple[Array, Array]]  # (query, key), both with the positions in them


def rotation(cfg: ModelConfig, kind: LayerType, positions: Array, limit: int) -> Rotary:
    """How queries and keys of such layers learn of their positions: rotation, or nothing where tokens have theirs in
    their embeddings and in layers without positions."""
    if kind == "nope" or FAMILIES[cfg.family].positions == "learned":
        return lambda query, key: (query, key)
    theta, scaling = cfg.rope_theta, cfg.rope_scaling
    if kind == "local" and cfg.local_rope_theta:
        theta, scaling = cfg.local_rope_theta, None
    freqs = rope_frequencies(rotary_size(cfg), theta, scaling)
    cos, sin = cos_sin(positions, freqs, limit, rope_magnitude(scaling))
    scale = query_scale(positions, scaling, limit)

    def rotary(query: Array, key: Array) -> tuple[Array, Array]:
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        return query if scale is None else query * scale.astype(query.dtype), key

    return rotary


def row_attention(cfg: ModelConfig, segment_ids: Array, runtime: Runtime) -> AttendTo:
    """``mixers``' attend_to within whole rows: segment_ids i32[B, S]. Raises ValueError as kernels.choose_kernel."""
    kernel = choose_kernel(runtime.attention, runtime.hardware, cfg, runtime.compute)
    return lambda window: matching_heads(
        cfg, within_rows(kernel, segment_ids, window, **product(cfg), interpret=runtime.interpret)
    )


def matching_heads(cfg: ModelConfig, attend: Callable[..., Array]) -> Callable[..., Array]:
    """``attend`` of keys and values whose heads the mesh divides as it does those of queries."""
    match = lambda x: match_heads(x, cfg.num_heads)
    return lambda query, key, value, sinks=None: attend(query, match(key), match(value), sinks)


def product(cfg: ModelConfig) -> dict[str, Any]:
    """How attention treats the products of queries and keys."""
    return {"scale": 1.0 / math.sqrt(cfg.query_pre_attn_scalar or cfg.head_dim), "softcap": cfg.attention_softcap}


# ---- whole rows: training, scoring ----------------------------------------------------------------------------------


def positions_of(segment_ids: Array) -> Array:
    """i32[B, S]: 0, 1, 2, ... within each segment, whichever side the padding is on."""
    columns = jnp.arange(segment_ids.shape[1])[None]
    previous = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    starts = jnp.where(segment_ids != previous, columns, 0)
    return columns - jax.lax.cummax(starts, axis=1)


class Routing(NamedTuple):
    """What passes between the routers of a pass over rows and who asked for it."""

    # is told once what was measured of all layers, as means over layers and tokens: experts.router_load
    note: Callable[[dict[str, Mean]], None] | None = None
    # int[B, S, layers * k]: the choice of experts to follow, of each token; see experts.route
    kept: Array | None = None
    counted: Array | None = None  # bool[B, S]: tokens that are measured; given by ``forward``


NO_ROUTING = Routing()


def forward(
    params: Params,
    cfg: ModelConfig,
    tokens: Array,
    segment_ids: Array,
    runtime: Runtime,
    routing: Routing = NO_ROUTING,
) -> Array:
    """Final hidden states [B, S, D] of whole rows: tokens and segment_ids (0 = padding) i32[B, S].

    Raises ValueError, in one line, for rows that are longer than the model computes (see config.row_limit), and for a
    kernel that can't be had (see kernels.choose_kernel)."""
    check_length(cfg, segment_ids.shape[1])
    positions, attend_to = positions_of(segment_ids), row_attention(cfg, segment_ids, runtime)
    recur, routing = delta_net.within_rows(positions), routing._replace(counted=segment_ids > 0)
    return hidden_states(params, cfg, tokens, positions, attend_to, recur, runtime, routing=routing)


def forward_responses(
    params: Params,
    cfg: ModelConfig,
    tokens: Array,
    valid: Array,
    start: int,
    copies: int,
    runtime: Runtime,
    where: Places | None = None,
    routing: Routing = NO_ROUTING,
) -> Array:
    """[B, S - start + 1, D]: the final hidden states of the prompts' last column and of the responses, from ``start``.

    tokens i32[B, S], valid bool[B, S]: prompts left-padded to ``start`` columns, and responses. Every ``copies`` rows
    have one prompt, which is read once: it and its responses are computed as one row. With ``where`` the responses are
    packed into W columns, and stay so: [B / copies, 1 + W, D]. Raises ValueError as forward, and for a kernel that
    can't compute packed responses."""
    kernel = choose_kernel(runtime.attention, runtime.hardware, cfg, runtime.compute)
    if where is not None and kernel != "xla":
        raise ValueError(f"batch.pack_widths: {kernel} attention can't compute packed responses; nearest: 1")
    if kernel != "xla" and copies == 1:  # rows are what they know
        return forward(params, cfg, tokens, valid.astype(jnp.int32), runtime, routing)[:, start - 1 :]
    check_length(cfg, tokens.shape[1])
    readable = group_rows(valid[:, :start], copies)[:, 0]
    positions = positions_of(valid.astype(jnp.int32))
    if where is None:
        fold = lambda x: fold_group(x, start, copies)
        counted = fold(valid) if cfg.num_experts else None
    else:
        fold = lambda x: pack_group(x, start, where)
        counted = jnp.concatenate([readable, where.owner < copies], axis=1)
    tokens, positions = fold(tokens), fold(positions)
    routing = routing._replace(counted=counted, kept=None if routing.kept is None else fold(routing.kept))
    room = valid.shape[1] - start
    how = product(cfg) | {"interpret": runtime.interpret}
    attend_to = lambda window: matching_heads(cfg, within_groups(kernel, readable, copies, room, window, where, **how))
    recur = delta_net.within_groups(readable, copies, where)
    states = hidden_states(params, cfg, tokens, positions, attend_to, recur, runtime, start - 1, routing)
    return unfold_group(states, copies) if where is None else states


def pack_group(x: Array, start: int, where: Places) -> Array:
    """[G * n, S, ...] -> [G, start + W, ...]: the first row's prompt, then what the responses have, side by side."""
    prompt = group_rows(x[:, :start], where.column.shape[1])[:, 0]
    return jnp.concatenate([prompt, side_by_side(x[:, start:], where)], axis=1)


def fold_group(x: Array, start: int, copies: int) -> Array:
    """[G * n, S, ...] -> [G, start + n * (S - start), ...]: the first row's prompt, then every row's response."""
    rows = group_rows(x, copies)
    return jnp.concatenate([rows[:, 0, :start], join_columns(rows[:, :, start:])], axis=1)


def unfold_group(x: Array, copies: int) -> Array:
    """[G, 1 + n * T, D] -> [G * n, 1 + T, D]: the prompt's last column, for each of its responses, and theirs."""
    groups, columns, dim = x.shape
    own = (groups, copies, (columns - 1) // copies, dim)
    responses = jax.lax.reshape(x[:, 1:], own, out_sharding=spec("batch", None, "seq", "hidden"))
    last = jnp.broadcast_to(x[:, None, :1], (groups, copies, 1, dim))
    return ungroup_rows(jnp.concatenate([last, responses], axis=2))


def join_columns(x: Array) -> Array:
    """[G, n, T, ...] -> [G, n * T, ...]."""
    groups, copies, columns, *rest = x.shape
    layout = spec("batch", "seq", *(None,) * len(rest))
    return jax.lax.reshape(x, (groups, copies * columns, *rest), out_sharding=layout)


def hidden_states(
    params: Params,
    cfg: ModelConfig,
    tokens: Array,
    positions: Array,
    attend_to: AttendTo,
    recur: delta_net.Recur,
    runtime: Runtime,
    since: int = 0,
    routing: Routing = NO_ROUTING,
) -> Array:
    """Final hidden states [B, S - since, D] of the columns from ``since``, of tokens at ``positions``, both i32[B, S],
    that see what ``attend_to`` and ``recur`` say (see ``mixers``)."""
    kinds, counted = mixers(cfg, positions, tokens.shape[1], attend_to, recur), routing.counted

    def layer(
        kind: LayerType, since: int, given: tuple[Params, Array | None], x: Array
    ) -> tuple[Array, dict[str, Mean]]:
        (layer_params, kept), told = given, {}

        def note(routed: Routed) -> None:
            if routing.note is not None and counted is not None:
                last = lambda x: x[:, x.shape[1] - routed.choice.shape[1] :]
                told.update(router_load(routed, last(counted), None if kept is None else last(kept)))

        return block(layer_params, cfg, x, kinds[kind], feed_forward(cfg, runtime, note, kept), since), told

    def layer_of(kind: LayerType, scanned: bool, since: int = 0) -> Callable:
        return rematerialized(functools.partial(layer, kind, since), runtime, scanned)

    x = embed(params, cfg, tokens, positions, runtime.compute)
    kept = None if routing.kept is None else by_layer(routing.kept, cfg)
    x, told = through_layers(layer_of, params["layers"], kept, layer_types_of(cfg), x, since, scans(cfg, runtime))
    if routing.note is not None and told:
        routing.note(told)
    return normalize(params["final_norm"], x, cfg)


def by_layer(kept: Array, cfg: ModelConfig) -> Array:
    """[B, S, layers * k] -> [layers, B, S, k]."""
    shape = (*kept.shape[:2], cfg.num_layers, cfg.experts_per_token)
    return jnp.moveaxis(jax.lax.reshape(kept, shape, out_sharding=spec("batch", "seq", None, None)), 2, 0)


def scans(cfg: ModelConfig, runtime: Runtime) -> bool:
    """Whether one compiled body serves all layers: as the run says, else as is fastest on its hardware."""
    if runtime.scan_layers is not None:
        return runtime.scan_layers
    return scans_layers(cfg.num_layers, runtime.hardware)


def rematerialized(layer: Callable, runtime: Runtime, scanned: bool) -> Callable:
    """``layer`` under the remat policy of the run. Outside a scan XLA must be kept from computing it only once."""
    if runtime.remat == "none":
        return layer
    policies = jax.checkpoint_policies
    # by name: policies that look for products see neither those with a gradient of their own nor a kernel
    keep = policies.save_only_these_names(PRODUCT, SAVED) if runtime.remat == "dots" else policies.nothing_saveable
    return jax.checkpoint(layer, policy=keep, prevent_cse=not scanned)
