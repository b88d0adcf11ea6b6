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

from jaxrlhf.models import per_layer
from jaxrlhf.models.attention.kernels import SAVED, Asked, Hardware, choose_kernel, within_groups, within_rows
from jaxrlhf.models.attention.products import head_axis, match_heads
from jaxrlhf.models.config import LayerType, ModelConfig, head_sizes, rotary_size, row_limit
from jaxrlhf.models.cpu import scans_layers
from jaxrlhf.models.delta_net import layer as delta_net
from jaxrlhf.models.experts import Routed, router_load
from jaxrlhf.models.families import FAMILIES
from jaxrlhf.models.feed_forward import Feed, activation_of, feed_forward
from jaxrlhf.models.int8 import Part
from jaxrlhf.models.layer_kinds import LayerKind, kinds_of
from jaxrlhf.models.layer_scan import Memory, through_layers
from jaxrlhf.models.linear import PRODUCT, gather, linear
from jaxrlhf.models.norms import normalize
from jaxrlhf.models.response_packing import Places, fold_group, pack_group, unfold_group
from jaxrlhf.models.rope import cos_sin, query_scale, rope_frequencies, rope_magnitude, rotate
from jaxrlhf.ops.rows import group_rows
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


KeyValue = tuple[Array, Array]  # keys and values [B, S, N, K] of one layer


def attention_block(
    params: Params,
    cfg: ModelConfig,
    x: Array,
    kind: LayerKind,
    rotary: "Rotary",
    attend: Callable,
    since: int = 0,
    read: KeyValue | None = None,
) -> tuple[Array, KeyValue]:
    """x [B, S, D] -> [B, S - since, D]: attention of the columns from ``since`` on; and its keys and values.

    Args:
        rotary: queries or keys [B, S, H, K] -> the same: their rotation by position, or nothing.
        attend: (query, key, value, sinks) -> [B, S, H, K]: see kernels.Attend.
        since: no output is computed for the columns before it; their keys and values are.
        read: the keys and values of an earlier layer, where the layer has none of its own.
    """
    family, kv_heads = FAMILIES[cfg.family], head_sizes(cfg, kind.type)[0]
    heads, kv = head_axis("heads", cfg.num_heads), head_axis("kv_heads", kv_heads)
    whole = family.query_key_norm == "all"

    def project(name: str, axis: str | None) -> Array:
        out = ("batch", "seq", axis, "head_dim")
        return linear(params[name], x, "bsd,dhk->bshk", ("embed", axis, "head_dim"), out)

    def normed(name: str, y: Array, axis: str | None) -> Array:
        return normalize(params[name], y, cfg, (axis, None) if whole else (None,)) if name in params else y

    query, gate = project("query", heads), None
    if family.output_gate:
        query, gate = jnp.split(query, 2, axis=-1)
    query = rotary(normed("query_norm", query, heads), True)
    if read is None:
        key = project("key", kv)
        value = project("value", kv) if "value" in params else key
        key = rotary(normed("key_norm", key, kv), False)
        read = key, normalize({}, value, cfg) if family.value_norm else value
    sinks = params["softmax"]["sinks"] if "softmax" in params else None
    mixed = attend(query, *read, sinks)[:, since:]
    mixed = mixed if gate is None else mixed * jax.nn.sigmoid(gate[:, since:])
    out = linear(params["out"], mixed, "bshk,hkd->bsd", (heads, "head_dim", "embed"), ("batch", "seq", "hidden"))
    return out, read


class Layers(NamedTuple):
    """What all layers of a pass have in common."""

    cfg: ModelConfig
    mixers: "dict[LayerKind, Mix]"
    add: per_layer.Add | None = None  # where layers have embeddings of their own


def block(
    layers: Layers, kind: LayerKind, params: Params, x: Array, feed: Feed, memory: Memory, since: int = 0
) -> tuple[Array, Memory]:
    """Two residual branches, one after the other or side by side, with norms before or after what they compute; then
    what the layer adds of its own embeddings.

    Returns [B, S - since, D], and ``memory`` with the layer's keys and values, where it holds some of this type. Of the
    columns before ``since`` only keys and values are computed (or states): all that the last layer needs where nothing
    uses what comes out there."""
    cfg, mixing, mlp = layers.cfg, params[kind.stack(kind.mixing)], params[kind.stack("mlp")]
    before = lambda part: normalize(part["norm"], x, cfg) if "norm" in part else x
    after = lambda part, y: normalize(part["post_norm"], y, cfg) if "post_norm" in part else y
    mixed, made = layers.mixers[kind](mixing, before(mixing), since, memory.get(kind.type) if kind.reads else None)
    if made is not None:
        memory = {name: made if name == kind.type else old for name, old in memory.items()}
    mixed, x = after(mixing, mixed), x[:, since:]
    if cfg.parallel_residual:
        return x + mixed + after(mlp, feed(mlp, before(mlp), x)), memory
    x = x + mixed
    x = x + after(mlp, feed(mlp, before(mlp), x))
    if layers.add is not None:
        x = x + layers.add(params[kind.stack("per_layer")], x)
    if "output" in kind.parts:
        x = x * jax.lax.stop_gradient(params[kind.stack("output")]["layer_scalar"]).astype(x.dtype)
    return x, memory


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


# how a kind of layers mixes columns: (the parameters of that part, x [B, S, D] behind the norm, since, keys and values
# to read in place of its own) -> ([B, S - since, D], its keys and values, where it has any)
Mix = Callable[[Params, Array, int, KeyValue | None], tuple[Array, KeyValue | None]]
# (kind, its window or None) -> attention_block's attend
AttendTo = Callable[[LayerKind, int | None], Callable[..., Array]]


def check_length(cfg: ModelConfig, columns: int) -> None:
    """Raises ValueError for rows that are longer than the model computes."""
    limit = row_limit(cfg)
    if limit is not None and columns > limit:
        raise ValueError(f"rows of {columns} columns: more than this {cfg.family} model computes; nearest: {limit}")


def common(
    params: Params,
    cfg: ModelConfig,
    tokens: Array,
    positions: Array,
    limit: int,
    attend_to: AttendTo,
    recur: delta_net.Recur,
    dtype: Any,
) -> tuple[Array, Layers]:
    """(embeddings [B, S, D], what all layers have in common) of ``tokens`` at ``positions``, both i32[B, S], the latter
    below ``limit``.

    Args:
        attend_to: what attention layers look at.
        recur: what linear layers begin with, as delta_block takes it."""
    x = embed(params, cfg, tokens, positions, dtype)
    add = per_layer.adding(params, cfg, tokens, x, activation_of(cfg)) if cfg.per_layer_size else None

    def one(kind: LayerKind) -> Mix:
        if kind.type == "linear":
            return lambda params, x, since, read: (delta_net.delta_block(params, cfg, x, recur, since), None)
        attend = attend_to(kind, cfg.sliding_window if kind.type == "local" else None)
        rotary = rotation(cfg, kind.type, positions, limit)
        return lambda params, x, since, read: attention_block(params, cfg, x, kind, rotary, attend, since, read)

    return x, Layers(cfg, {kind: one(kind) for kind in sorted(set(kinds_of(cfg)))}, add)


Rotary = Callable[[Array, bool], Array]  # (queries or keys, whether they are queries), with the positions in them


def rotation(cfg: ModelConfig, kind: LayerType, positions: Array, limit: int) -> Rotary:
    """How queries and keys of such layers learn of their positions: rotation, or nothing where tokens have theirs in
    their embeddings and in layers without positions."""
    if kind == "nope" or FAMILIES[cfg.family].positions == "learned":
        return lambda x, asks: x
    theta, scaling = cfg.rope_theta, cfg.rope_scaling
    if kind == "local" and cfg.local_rope_theta:
        theta, scaling = cfg.local_rope_theta, None
    freqs = rope_frequencies(rotary_size(cfg, kind), theta, scaling, head_sizes(cfg, kind)[1])
    cos, sin = cos_sin(positions, freqs, limit, rope_magnitude(scaling))
    scale = query_scale(positions, scaling, limit)

    def rotary(x: Array, asks: bool) -> Array:
        x = rotate(x, cos, sin)
        return x * scale.astype(x.dtype) if asks and scale is not None else x

    return rotary


def row_attention(cfg: ModelConfig, segment_ids: Array, runtime: Runtime) -> AttendTo:
    """``common``'s attend_to within whole rows: segment_ids i32[B, S]. Raises ValueError as kernels.choose_kernel."""
    kernel = choose_kernel(runtime.attention, runtime.hardware, cfg, runtime.compute)
    return lambda kind, window: matching_heads(
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
    attend_to = lambda kind, window: matching_heads(
        cfg, within_groups(kernel, readable, copies, room, window, where, **how)
    )
    recur = delta_net.within_groups(readable, copies, where)
    states = hidden_states(params, cfg, tokens, positions, attend_to, recur, runtime, start - 1, routing)
    return unfold_group(states, copies) if where is None else states


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
    that see what ``attend_to`` and ``recur`` say (see ``common``)."""
    x, layers = common(params, cfg, tokens, positions, tokens.shape[1], attend_to, recur, runtime.compute)
    counted = routing.counted

    def layer(
        kind: LayerKind, since: int, given: tuple[Params, Array | None], x: Array, memory: Memory
    ) -> tuple[Array, Memory, dict[str, Mean]]:
        (layer_params, kept), told = given, {}

        def note(routed: Routed) -> None:
            if routing.note is not None and counted is not None:
                last = lambda x: x[:, x.shape[1] - routed.choice.shape[1] :]
                told.update(router_load(routed, last(counted), None if kept is None else last(kept)))

        feed = feed_forward(cfg, runtime.hardware, note, kept)
        return *block(layers, kind, layer_params, x, feed, memory, since), told

    def layer_of(kind: LayerKind, scanned: bool, since: int) -> Callable:
        return rematerialized(functools.partial(layer, kind, since), runtime, scanned)

    kept = None if routing.kept is None else by_layer(routing.kept, cfg)
    blank, scanned = blank_memory(cfg, x), scans(cfg, runtime)
    x, told = through_layers(layer_of, params["layers"], kept, kinds_of(cfg), x, blank, since, scanned)
    if routing.note is not None and told:
        routing.note(told)
    return normalize(params["final_norm"], x, cfg)


def blank_memory(cfg: ModelConfig, x: Array) -> Memory:
    """A Memory of zeros beside x [B, S, D]; empty where no layer reads one."""

    def one(kind: LayerType) -> KeyValue:
        heads, dim = head_sizes(cfg, kind)
        layout = spec("batch", "seq", head_axis("kv_heads", heads), "head_dim")
        zeros = lambda: jnp.zeros((*x.shape[:2], heads, dim), x.dtype, out_sharding=layout)
        return zeros(), zeros()

    return {kind.type: one(kind.type) for kind in kinds_of(cfg) if kind.reads}


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
