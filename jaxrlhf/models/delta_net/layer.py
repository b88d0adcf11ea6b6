"""The branch of a linear layer, in place of attention's: queries, keys and values are convolved over a few tokens, go
through the gated delta rule (rule.py), and what comes out is normalised and gated.

``delta_block`` serves training, prefill and decoding: it is given ``recur``, which says where a token's document begins
and with what: within the rows at hand (``within_rows``, ``within_groups``), or with what a cache holds (cache.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrlhf.models.attention.products import head_axis
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.delta_net.rule import of_length_one, scan_chunks
from jaxrlhf.models.linear import linear
from jaxrlhf.models.response_packing import Places
from jaxrlhf.sharding import constrain, explicit, spec
from jaxrlhf.types import Array, Params


class Mixed(NamedTuple):
    """What is convolved: of S columns, or the last few before some column."""

    query: Array  # [B, S, Nk, K]
    key: Array  # [B, S, Nk, K]
    value: Array  # [B, S, Nv, V]


class Streams(NamedTuple):
    """All that the rule is computed from, before the convolution."""

    mixed: Mixed
    decay: Array  # f32[B, S, Nv], at most 0
    rate: Array  # f32[B, S, Nv]


Recur = Callable[[Params, Streams], Array]  # (the branch's parameters, Streams) -> [B, S, Nv, V]


# ---- the branch -----------------------------------------------------------------------------------------------------


def delta_block(params: Params, cfg: ModelConfig, x: Array, recur: Recur, since: int = 0) -> Array:
    """x [B, S, D] -> [B, S - since, D]; of the columns before ``since`` only states are computed."""
    heads = head_axis("heads", cfg.linear_value_heads)
    mixed = recur(params, project(params, cfg, x))[:, since:]
    wide = ("batch", "seq", heads, "head_dim")
    gate = linear(params["delta_gate"], x[:, since:], "bsd,dhk->bshk", ("embed", heads, "head_dim"), wide)
    mixed = gated_norm(params["delta_norm"]["scale"], mixed.astype(x.dtype), gate, cfg.norm_eps)
    return linear(params["delta_out"], mixed, "bshk,hkd->bsd", (heads, "head_dim", "embed"), ("batch", "seq", "hidden"))


def project(params: Params, cfg: ModelConfig, x: Array) -> Streams:
    """The linear maps of x [B, S, D]. The decay is -exp(A_log) softplus(x W + dt_bias), in float32."""
    heads, keys = head_axis("heads", cfg.linear_value_heads), head_axis("kv_heads", cfg.linear_key_heads)

    def wide(name: str, axis: str | None) -> Array:
        out = ("batch", "seq", axis, "head_dim")
        return linear(params[f"delta_{name}"], x, "bsd,dhk->bshk", ("embed", axis, "head_dim"), out)

    def one(name: str) -> Array:
        y = linear(params[f"delta_{name}"], x, "bsd,dh->bsh", ("embed", heads), ("batch", "seq", heads))
        return y.astype(jnp.float32)

    own = {name: constrain(params["delta_rate"][name].astype(jnp.float32), heads) for name in ("A_log", "dt_bias")}
    decay = -jnp.exp(own["A_log"]) * jax.nn.softplus(one("decay") + own["dt_bias"])
    mixed = Mixed(wide("query", keys), wide("key", keys), wide("value", heads))
    return Streams(mixed, decay, jax.nn.sigmoid(one("beta")))


def gated_norm(scale: Array, x: Array, gate: Array, eps: float) -> Array:
    """RMS normalisation of x [..., V] in float32, times scale [V], times silu(gate)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    y = constrain(scale.astype(jnp.float32), None) * y
    return (y * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)


# ---- the convolution ------------------------------------------------------------------------------------------------


def convolve(params: Params, mixed: Mixed, index: Array, tail: Mixed | None = None) -> Mixed:
    """Each feature of a token and of the W - 1 tokens before it in its document, weighted and summed; then silu.

    index i32[B, S] as in rule.scan_chunks. ``tail``: what stands before every document; None: nothing."""

    def one(name: str) -> Array:
        taps = params["delta_convolution"][name]["taps"].astype(jnp.float32)
        x, before = getattr(mixed, name), None if tail is None else getattr(tail, name).astype(jnp.float32)
        taps = constrain(taps, head_axis("heads" if name == "value" else "kv_heads", len(taps)), None, None)
        return jax.nn.silu(weighted(x.astype(jnp.float32), taps, index[..., None, None], before)).astype(x.dtype)

    return Mixed(*map(one, Mixed._fields))


def weighted(x: Array, taps: Array, index: Array, tail: Array | None) -> Array:
    """f32[B, S, N, K]: sum over j of taps[..., W - 1 - j] * (x of j columns before, in the document or in ``tail``)."""
    y = x * taps[..., -1]
    for by in range(1, taps.shape[-1]):
        moved = jnp.pad(x, ((0, 0), (by, 0), (0, 0), (0, 0)))[:, : x.shape[1]]
        found = jnp.where(index >= by, moved, 0.0)
        for at in range(by) if tail is not None else ():  # the token at index ``at`` reaches by - at columns beyond
            found = jnp.where(index == at, tail[:, at - by][:, None], found)  # type: ignore[index]
        y = y + found * taps[..., -1 - by]
    return y


# ---- the rule -------------------------------------------------------------------------------------------------------


class DeltaMemory(NamedTuple):
    """What a linear layer keeps of the tokens before the next one, of each row. It does not grow with them."""

    tail: Mixed  # of the W - 1 columns before, zeros in front: each [B, W - 1, N, K]
    state: Array  # f32[B, Nv, K, V]


def of_heads(mixed: Mixed) -> tuple[Array, Array, Array]:
    """(queries, keys, values) as the rule takes them: float32, of length 1 (queries 1 / sqrt(K)), repeated for the
    value heads that share them."""
    heads = mixed.value.shape[2]

    def matched(x: Array) -> Array:
        rows, columns, keys, dim = x.shape
        axis = head_axis("kv_heads", keys)
        x = jnp.broadcast_to(x[:, :, :, None], (rows, columns, keys, heads // keys, dim))
        x = jax.lax.reshape(x, (rows, columns, heads, dim), out_sharding=spec("batch", "seq", axis, "head_dim"))
        return constrain(x, "batch", "seq", head_axis("heads", heads), "head_dim")

    query, key = of_length_one(mixed.query) / mixed.query.shape[-1] ** 0.5, of_length_one(mixed.key)
    return matched(query), matched(key), mixed.value.astype(jnp.float32)


def recurred(params: Params, streams: Streams, index: Array, before: DeltaMemory | None = None) -> tuple[Array, Array]:
    """(outputs f32[B, S, Nv, V], states behind the last column): documents begin where index i32[B, S] is 0, with what
    ``before`` has for their row; None: with nothing."""
    tail, state = before or (None, None)
    mixed = convolve(params, streams.mixed, index, tail)
    return scan_chunks(*of_heads(mixed), streams.decay, streams.rate, index, state)


def within_rows(index: Array) -> Recur:
    """Whole rows: index i32[B, S] says how many tokens of its document precede each token."""
    return lambda params, streams: recurred(params, streams, index)[0]


def within_groups(readable: Array, copies: int, where: Places | None) -> Recur:
    """Rows that are groups: a prompt, then ``copies`` responses that branch from it; as attention.kernels has them.

    The state behind the prompt is computed once, and each response begins with it."""

    def recur(params: Params, streams: Streams) -> Array:
        start = readable.shape[1]
        first, rest = jax.tree.map(lambda x: x[:, :start], streams), jax.tree.map(lambda x: x[:, start:], streams)
        prompts, memory = after_prompts(params, first, readable)
        if where is not None:
            responses, _ = recurred(params, rest, where.index, memory)
            return jnp.concatenate([prompts, responses], axis=1)
        apart = jax.tree.map(lambda x: rows_apart(x, copies), rest)
        cloned = jax.tree.map(lambda x: merge_rows(clone(x, copies)), memory)
        responses, _ = recurred(params, apart, columns_of(apart.rate), cloned)
        return jnp.concatenate([prompts, recounted(responses, prompts.shape[0], -1)], axis=1)

    return recur


def after_prompts(params: Params, streams: Streams, readable: Array) -> tuple[Array, DeltaMemory]:
    """(outputs, what the layer keeps) of left-padded prompts; readable bool[G, P]: their tokens. Padding enters
    neither the convolution nor the state."""
    streams = jax.tree.map(lambda x: kept(x, readable), streams)
    out, state = recurred(params, streams, columns_of(streams.rate))
    return out, DeltaMemory(jax.tree.map(lambda x: last_columns(x, taps_of(params) - 1), streams.mixed), state)


def kept(x: Array, mask: Array) -> Array:
    """x [B, S, ...] where ``mask`` bool[B, S], and 0 elsewhere."""
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


def columns_of(x: Array) -> Array:
    """i32[B, S]: the column of each token of x [B, S, ...]."""
    return constrain(jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]), "batch", "seq")


def taps_of(params: Params) -> int:
    """W, the columns that the convolution sees."""
    return params["delta_convolution"]["query"]["taps"].shape[-1]


def last_columns(x: Array, count: int) -> Array:
    """[B, S, ...] -> [B, count, ...], with zeros in front where S is less."""
    widen = ((0, 0), (max(count - x.shape[1], 0), 0), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(x, widen)[:, x.shape[1] + widen[1][0] - count :]


# ---- rows, whose heads lie as they do -------------------------------------------------------------------------------


def recounted(x: Array, rows: int, columns: int) -> Array:
    """[B, S, ...] -> [rows, columns, ...], -1: what is left; rows stay on the devices that hold them."""
    columns = x.shape[0] * x.shape[1] // rows if columns == -1 else columns
    layout = PartitionSpec((whose := jax.typeof(x).sharding.spec)[0], None, *whose[2:]) if explicit() else None
    return jax.lax.reshape(x, (rows, columns, *x.shape[2:]), out_sharding=layout)


def rows_apart(x: Array, copies: int) -> Array:
    """[G, n * T, ...] -> [G * n, T, ...]."""
    return recounted(x, x.shape[0] * copies, x.shape[1] // copies)


def clone(x: Array, copies: int) -> Array:
    """[G, ...] -> [G, n, ...]."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], copies, *x.shape[1:]))


def merge_rows(x: Array) -> Array:
    """[G, n, ...] -> [G * n, ...]."""
    layout = PartitionSpec((whose := jax.typeof(x).sharding.spec)[0], *whose[2:]) if explicit() else None
    return jax.lax.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]), out_sharding=layout)


def group_again(x: Array, copies: int) -> Array:
    """[G * n, ...] -> [G, n, ...]."""
    layout = PartitionSpec((whose := jax.typeof(x).sharding.spec)[0], None, *whose[1:]) if explicit() else None
    return jax.lax.reshape(x, (x.shape[0] // copies, copies, *x.shape[1:]), out_sharding=layout)
