"""A decoder-only transformer in plain functions over a pytree of parameters.

One block serves training, prefill and decoding: it is given ``attend``, which either attends within the rows at hand
or through a cache (decoding.py). Training scans over stacked layers.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.models.attention.kernels import SAVED, Asked, Hardware, choose_kernel, within_groups, within_rows
from jaxrlhf.models.attention.products import head_axis, match_heads
from jaxrlhf.models.config import ModelConfig, local_layers, rotary_size, row_limit
from jaxrlhf.models.cpu import scans_layers
from jaxrlhf.models.experts import Routed, expert_block, router_load
from jaxrlhf.models.families import FAMILIES
from jaxrlhf.models.int8 import Part
from jaxrlhf.models.linear import PRODUCT, gather, linear
from jaxrlhf.models.response_packing import Places, side_by_side
from jaxrlhf.models.rope import cos_sin, rope_frequencies, rope_magnitude, rotate
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
    params: Params, cfg: ModelConfig, x: Array, rotary: Callable, attend: Callable, since: int = 0
) -> Array:
    """x [B, S, D] -> [B, S - since, D]: attention of the columns from ``since`` on.

    Args:
        rotary: applied to queries and to keys [B, S, H, K]: their rotation by position, or nothing.
        attend: (query, key, value) -> [B, S, H, K].
        since: no output is computed for the columns before it; their keys and values are.
    """
    heads, kv = head_axis("heads", cfg.num_heads), head_axis("kv_heads", cfg.num_kv_heads)

    def project(name: str, axis: str | None) -> Array:
        out = ("batch", "seq", axis, "head_dim")
        return linear(params[name], x, "bsd,dhk->bshk", ("embed", axis, "head_dim"), out)

    query, key, value = project("query", heads), project("key", kv), project("value", kv)
    if "query_norm" in params:
        whole = FAMILIES[cfg.family].query_key_norm == "all"
        query = normalize(params["query_norm"], query, cfg, (heads, None) if whole else (None,))
        key = normalize(params["key_norm"], key, cfg, (kv, None) if whole else (None,))
    mixed = attend(rotary(query), rotary(key), value)[:, since:]
    return linear(params["out"], mixed, "bshk,hkd->bsd", (heads, "head_dim", "embed"), ("batch", "seq", "hidden"))


def activation_of(cfg: ModelConfig) -> Callable[[Array], Array]:
    """What the family's mlp applies between its maps."""
    family = FAMILIES[cfg.family]
    gelu = functools.partial(jax.nn.gelu, approximate=family.activation == "gelu_tanh")
    return jax.nn.silu if family.activation == "silu" else gelu


def mlp_block(params: Params, cfg: ModelConfig, x: Array) -> Array:
    family, activate = FAMILIES[cfg.family], activation_of(cfg)
    wide = ("batch", "seq", "mlp")
    y = linear(params["up"], x, "bsd,dm->bsm", ("embed", "mlp"), wide)
    if family.gated:
        y = y * activate(linear(params["gate"], x, "bsd,dm->bsm", ("embed", "mlp"), wide))
    else:
        y = activate(y)
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
        y, routed = expert_block(params, cfg, x, activation_of(cfg), runtime.hardware, own)
        if note is not None:
            note(routed)
        return y

    return feed


def block(
    params: Params, cfg: ModelConfig, x: Array, rotary: Callable, attend: Callable, feed: Feed, since: int = 0
) -> Array:
    """Two residual branches, one after the other or side by side, with norms before or after what they compute.

    Returns [B, S - since, D]. Of the columns before ``since`` only keys and values are computed: all that the last
    layer needs where nothing uses their states."""
    attn, mlp = params["attention"], params["mlp"]
    before = lambda part: normalize(part["norm"], x, cfg) if "norm" in part else x
    after = lambda part, y: normalize(part["post_norm"], y, cfg) if "post_norm" in part else y
    mixed = after(attn, attention_block(attn, cfg, before(attn), rotary, attend, since))
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


class LayerKind(NamedTuple):
    """What differs between local and global layers."""

    attend: Callable[..., Array]  # (query, key, value), or (query, Cache) -> weighted values [B, S, H, K]
    freqs: Array | None  # f32[R / 2], radians a position; None where positions were embedded


def check_length(cfg: ModelConfig, columns: int) -> None:
    """Raises ValueError for rows that are longer than the model computes."""
    limit = row_limit(cfg)
    if limit is not None and columns > limit:
        raise ValueError(f"rows of {columns} columns: more than this {cfg.family} model computes; nearest: {limit}")


def layer_kinds(cfg: ModelConfig, attend_to: Callable[[int | None], Callable[..., Array]]) -> dict[bool, LayerKind]:
    """Local or not -> LayerKind, for the kinds of layers that the model has.

    Args:
        attend_to: (window, or None where a layer has none) -> LayerKind.attend.
    """

    def one(local: bool) -> LayerKind:
        attend = attend_to(cfg.sliding_window if local else None)
        if FAMILIES[cfg.family].positions == "learned":
            return LayerKind(attend, None)
        if local and cfg.local_rope_theta:
            return LayerKind(attend, rope_frequencies(rotary_size(cfg), cfg.local_rope_theta, None))
        return LayerKind(attend, rope_frequencies(rotary_size(cfg), cfg.rope_theta, cfg.rope_scaling))

    return {local: one(local) for local in set(local_layers(cfg))}


def row_kinds(cfg: ModelConfig, segment_ids: Array, runtime: Runtime) -> dict[bool, LayerKind]:
    """``layer_kinds`` within whole rows: segment_ids i32[B, S]. Raises ValueError as kernels.choose_kernel."""
    kernel = choose_kernel(runtime.attention, runtime.hardware, cfg, runtime.compute)
    attend_to = lambda window: within_rows(kernel, segment_ids, window, **product(cfg), interpret=runtime.interpret)
    return layer_kinds(cfg, attend_to)


def rotations(
    cfg: ModelConfig, positions: Array, kinds: dict[bool, LayerKind], limit: int
) -> dict[bool, Callable[[Array], Array]]:
    """Local or not -> how queries and keys learn of their positions, i32[B, S] below ``limit``: rotation, or nothing
    where positions were embedded."""

    def one(kind: LayerKind) -> Callable[[Array], Array]:
        if kind.freqs is None:
            return lambda x: x
        cos, sin = cos_sin(positions, kind.freqs, limit, rope_magnitude(cfg.rope_scaling))
        return lambda x: rotate(x, cos, sin)

    return {local: one(kind) for local, kind in kinds.items()}


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
    kept: Array | None = (
        None  # int[B, S, layers * k]: the choice of experts to follow, of each token; see experts.route
    )
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
    positions, kinds = positions_of(segment_ids), row_kinds(cfg, segment_ids, runtime)
    routing = routing._replace(counted=segment_ids > 0)
    return hidden_states(params, cfg, tokens, positions, kinds, runtime, routing=routing)


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
    attend_to = lambda window: within_groups(kernel, readable, copies, room, window, where, **how)
    states = hidden_states(params, cfg, tokens, positions, layer_kinds(cfg, attend_to), runtime, start - 1, routing)
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
    kinds: dict[bool, LayerKind],
    runtime: Runtime,
    since: int = 0,
    routing: Routing = NO_ROUTING,
) -> Array:
    """Final hidden states [B, S - since, D] of the columns from ``since``, of tokens at ``positions``, both i32[B, S],
    that see what ``kinds`` says."""

    rotary, counted = rotations(cfg, positions, kinds, tokens.shape[1]), routing.counted

    def layer(local: bool, since: int, given: tuple[Params, Array | None], x: Array) -> tuple[Array, dict[str, Mean]]:
        (layer_params, kept), told = given, {}

        def note(routed: Routed) -> None:
            if routing.note is not None and counted is not None:
                last = lambda x: x[:, x.shape[1] - routed.choice.shape[1] :]
                told.update(router_load(routed, last(counted), None if kept is None else last(kept)))

        def attend(query, key, value):
            return kinds[local].attend(query, match_heads(key, cfg.num_heads), match_heads(value, cfg.num_heads))

        x = block(layer_params, cfg, x, rotary[local], attend, feed_forward(cfg, runtime, note, kept), since)
        return x, told

    def layer_of(local: bool, scanned: bool, since: int = 0) -> Callable:
        return rematerialized(functools.partial(layer, local, since), runtime, scanned)

    x = embed(params, cfg, tokens, positions, runtime.compute)
    stacked = params["layers"], None if routing.kept is None else by_layer(routing.kept, cfg)
    x, told = through_layers(layer_of, stacked, local_layers(cfg), x, since, scans(cfg, runtime))
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


def through_layers(
    layer_of: Callable, stacked: Any, local: list[bool], x: Array, since: int, scanned: bool
) -> tuple[Array, dict[str, Mean]]:
    """(the columns of ``x`` from ``since`` after all layers, the sum of what was measured of each); ``layer_of``:
    (local, inside a scan, since) to a function of what a layer has of ``stacked`` and x, to both.

    Where local and global layers alternate, one step of the scan is one round of their pattern: each layer's kernel
    is known while tracing, and the program grows with the pattern, not with the model. Layers behind the last whole
    round follow the scan, all of them where it is not wanted: what is kept of those for the backward pass is not
    copied into and out of stacks, and the last of them computes no more than is asked for."""
    period = next(size for size in range(1, len(local) + 1) if local == (local[:size] * len(local))[: len(local)])
    rounds = len(local) // period if scanned else 0
    behind = range(rounds * period, len(local))

    def one_round(x, params):
        measured = []
        for i, is_local in enumerate(local[:period]):
            x, told = layer_of(is_local, True)(jax.tree.map(operator.itemgetter(i), params), x)
            measured.append(told)
        return x, measured

    measured = []
    if rounds and period == 1:  # as they are stacked: what the backward pass reads of them is then no copy
        x, told = jax.lax.scan(lambda x, params: layer_of(local[0], True)(params, x), x, stacked)
        measured = [jax.tree.map(lambda y: y.sum(0), told)]
    elif rounds:
        fold = lambda w: w[: rounds * period].reshape(rounds, period, *w.shape[1:])
        x, found = jax.lax.scan(one_round, x, jax.tree.map(fold, stacked))
        measured = [jax.tree.map(lambda y: y.sum(0), told) for told in found]
    for i in behind:
        asked = since if i == behind[-1] else 0
        x, told = layer_of(local[i], False, asked)(jax.tree.map(operator.itemgetter(i), stacked), x)
        measured.append(told)
    total = jax.tree.map(lambda *layers: sum(layers), *measured)
    return x if behind else x[:, since:], total


def rematerialized(layer: Callable, runtime: Runtime, scanned: bool) -> Callable:
    """``layer`` under the remat policy of the run. Outside a scan XLA must be kept from computing it only once."""
    if runtime.remat == "none":
        return layer
    policies = jax.checkpoint_policies
    # by name: policies that look for products see neither those with a gradient of their own nor a kernel
    keep = policies.save_only_these_names(PRODUCT, SAVED) if runtime.remat == "dots" else policies.nothing_saveable
    return jax.checkpoint(layer, policy=keep, prevent_cse=not scanned)
