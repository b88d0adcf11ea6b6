"""Log-probabilities of tokens without storing [B, S, V]."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrlhf.sharding import split_over
from jaxrlhf.types import Array, TokenStats

STORED_LOGITS = 2**24  # floats of a device: below it all logits are kept for the backward pass, above it recomputed


def token_logprobs(logits: Array, tokens: Array) -> TokenStats:
    """log softmax(logits)[token] and the entropy, in float32: logits [..., V], tokens i32[...].

    The token's logit is picked by comparison, not by a gather, so that the vocabulary may be split over devices."""
    logits = logits.astype(jnp.float32)
    peak = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    shifted = logits - peak
    weights = jnp.exp(shifted)
    total = weights.sum(-1)
    log_total = jnp.log(total)
    picked = jnp.where(jnp.arange(logits.shape[-1]) == tokens[..., None], shifted, 0.0).sum(-1)
    return TokenStats(picked - log_total, log_total - (weights * shifted).sum(-1) / total)


def chunked_token_stats(
    hidden: Array, tokens: Array, logits_of: Callable[[Array, Array], Array], vocab: int
) -> TokenStats:
    """token_logprobs of ``logits_of(hidden, columns)`` over chunks of columns.

    hidden [B, S, D] is aligned: column t is the state before token t. Small problems are done at once; else each
    chunk is recomputed in the backward pass, so that [B, S, V] is never stored. What counts is what one device would
    store: every chunk sums the gradient of the head over the mesh, so there should be few.
    """
    batch, size, _ = hidden.shape
    columns = jnp.arange(size)
    num_chunks = min(size, math.ceil(batch * size * vocab / split_over("batch", "vocab") / STORED_LOGITS))
    if num_chunks <= 1:
        return token_logprobs(logits_of(hidden, columns), tokens)
    width = math.ceil(size / num_chunks)
    extra = num_chunks * width - size

    def split(x):  # [B, S, ...] -> [chunks, B, width, ...]
        x = jnp.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2))
        return jnp.swapaxes(x.reshape(x.shape[0], num_chunks, width, *x.shape[2:]), 0, 1)

    @jax.checkpoint
    def chunk(_, part):
        states, ids, where = part
        return None, token_logprobs(logits_of(states, where), ids)

    where = jnp.pad(columns, (0, extra)).reshape(num_chunks, width)
    _, stats = jax.lax.scan(chunk, None, (split(hidden), split(tokens), where))
    join = lambda x: jnp.swapaxes(x, 0, 1).reshape(batch, num_chunks * width)[:, :size]
    return jax.tree.map(join, stats)
