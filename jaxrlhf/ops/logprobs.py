"""Log-probabilities of tokens without storing [B, S, V]."""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxrlhf.sharding import laid_as, reshaped, split_over, whole_rows
from jaxrlhf.types import Array, QStats, TokenStats

T = TypeVar("T")
H = TypeVar("H")  # hidden states [B, S, D], or several of them in a tuple
L = TypeVar("L")  # logits f32[B, C, V] of those

# floats of a device: below it all logits are kept for the backward pass, above it recomputed, so many at a time
STORED_LOGITS = 2**24
STORED_LOGITS_GPU = 2**27  # each time reads and writes the head's whole gradient: with 2**24 it took half of an update


def stored_logits(platform: str) -> int:
    """Floats of logits that a device of ``platform`` stores at most."""
    return STORED_LOGITS_GPU if platform == "gpu" else STORED_LOGITS


def token_logprobs(logits: Array, tokens: Array) -> TokenStats:
    """log softmax(logits)[token] and the entropy, in float32: logits [..., V], tokens i32[...]."""
    logits = logits.astype(jnp.float32)
    peak = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    shifted = logits - peak
    weights = jnp.exp(shifted)
    total = weights.sum(-1)
    log_total = jnp.log(total)
    picked = pick(logits, tokens) - peak[..., 0]
    return TokenStats(picked - log_total, log_total - (weights * shifted).sum(-1) / total)


@jax.custom_vjp
def pick(x: Array, tokens: Array) -> Array:
    """x[..., token]: x f32[..., V], tokens i32[...] -> f32[...].

    By comparison, which fuses with what else reads ``x`` and bears a vocabulary that is split over devices; on CPUs,
    where XLA would write the whole comparison to sum it up, by a gather. The gradient is a comparison everywhere,
    which fuses with the softmax's."""
    by_comparison = lambda x, tokens: jnp.where(is_token(x, tokens), x, 0.0).sum(-1)
    if split_over("vocab") > 1:
        return by_comparison(x, tokens)
    return jax.lax.platform_dependent(x, tokens, cpu=by_gather, default=by_comparison)


def by_gather(x: Array, tokens: Array) -> Array:
    one = lambda row, token: jax.lax.dynamic_index_in_dim(row, token, keepdims=False)
    for _ in tokens.shape:
        one = jax.vmap(one)
    return one(whole_rows(x), tokens)


def is_token(x: Array, tokens: Array) -> Array:
    """bool[..., V]."""
    return jnp.arange(x.shape[-1]) == tokens[..., None]


def pick_forward(x: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    return pick(x, tokens), (x, tokens)


def pick_backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, None]:
    x, tokens = kept
    return laid_as(jnp.where(is_token(x, tokens), dy[..., None], 0.0), x), None


pick.defvjp(pick_forward, pick_backward)


def action_values(values: Array, tokens: Array) -> QStats:
    """Q(s, token), max and logsumexp of Q(s, .), in float32: values [..., V], tokens i32[...]."""
    values = values.astype(jnp.float32)
    largest = values.max(-1)
    total = jnp.exp(values - jax.lax.stop_gradient(largest)[..., None]).sum(-1)
    return QStats(pick(values, tokens), largest, jax.lax.stop_gradient(largest) + jnp.log(total))


def in_chunks(
    reduce: Callable[[L, Array], T],
    hidden: H,
    tokens: Array,
    logits_of: Callable[[H, Array], L],
    vocab: int,
    stored: int,
) -> T:
    """``reduce(logits_of(hidden, columns), tokens)`` over chunks of columns: token_logprobs, action_values, or another
    function of f32[B, C, V] and i32[B, C] to arrays [B, C]. ``vocab``: floats of logits a token.

    hidden [B, S, D] is aligned: column t is the state before token t; there may be those of several models, with widths
    of their own. Up to ``stored`` logits of a device are computed
    at once; else each chunk of so many is recomputed in the backward pass, so that [B, S, V] is never stored. Every
    chunk adds to the gradient of the head, which is read and written for it, so there should be few.
    """
    batch, size = tokens.shape
    columns = jnp.arange(size)
    num_chunks = min(size, math.ceil(batch * size * vocab / split_over("batch", "seq", "vocab") / stored))
    if num_chunks <= 1:
        return reduce(logits_of(hidden, columns), tokens)
    devices = split_over("seq")  # a chunk has as many columns of each
    own = size // devices
    width = math.ceil(own / num_chunks)

    def split(x):  # [B, S, ...] -> [chunks, B, devices * width, ...]
        rest, tail = x.shape[2:], range(x.ndim)[2:]
        x = reshaped(x, (len(x), devices, own, *rest), (0, 1, None, *tail))
        x = jnp.pad(x, ((0, 0), (0, 0), (0, num_chunks * width - own)) + ((0, 0),) * len(rest))
        x = reshaped(x, (len(x), devices, num_chunks, width, *rest), (0, 1, None, None, *(axis + 1 for axis in tail)))
        parts = (num_chunks, len(x), devices * width, *rest)
        return reshaped(jnp.moveaxis(x, 2, 0), parts, (0, 1, 2, *(axis + 2 for axis in tail)))

    def join(x):  # what ``split`` did to [B, S], undone
        x = reshaped(x, (num_chunks, batch, devices, width), (0, 1, 2, None))
        x = reshaped(jnp.moveaxis(x, 0, 2), (batch, devices, num_chunks * width), (0, 1, None))
        return reshaped(x[:, :, :own], (batch, size), (0, 1))

    @jax.checkpoint
    def chunk(_, part):
        states, ids, where = part
        return None, reduce(logits_of(states, where), ids)

    where = split(columns[None])[:, 0]
    _, stats = jax.lax.scan(chunk, None, (jax.tree.map(split, hidden), split(tokens), where))
    return jax.tree.map(join, stats)
