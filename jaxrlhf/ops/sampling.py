"""Choosing a token: the distribution that is sampled from, and the noise law.

The law: **one uniform a (seed, step, sample id, position)**, turned into a token by the inverse of the cumulative
distribution. So a sample does not depend on the number of devices, the micro-batch, or where a run was resumed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.sharding import split_columns
from jaxrlhf.types import Array

IMPOSSIBLE = -1e30
BLOCK = 64  # tokens a block of the two-level search; vocabularies are padded to a multiple of it


class Sampling(NamedTuple):
    """What shapes the distribution; the trainer applies the same to its own logits."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_new_tokens: int = 0
    eos_ids: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()  # ids that are never sampled: some model of the run could not read them


def uniform_noise(seed: Array, step: Array, sample_id: Array, positions: Array) -> Array:
    """f32[B, T] in [0, 1): one number for sample_id i32[B] and positions i32[B, T] (places in the sequence)."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    one = lambda ident, position: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, ident), position))
    return jax.vmap(jax.vmap(one, (None, 0)))(sample_id, positions)


def shape_logits(logits: Array, sampling: Sampling, index: Array, keep: Array | None = None) -> Array:
    """The logits of the distribution that is sampled from: without banned tokens and an early EOS, divided by the
    temperature, then top-k and top-p.

    logits f32[..., V]; index i32, broadcastable to [...]: how many response tokens precede. ``keep`` i32[...] are
    tokens that stay possible whatever the filters say: the sampled ones, when the policy has moved since.
    """
    ids = jnp.arange(logits.shape[-1])
    if sampling.banned:
        logits = jnp.where(np.isin(np.arange(len(ids)), sampling.banned), IMPOSSIBLE, logits)
    if sampling.min_new_tokens and sampling.eos_ids:
        is_eos = (ids[:, None] == jnp.array(sampling.eos_ids)).any(-1)
        banned = is_eos & (index < sampling.min_new_tokens)[..., None]
        logits = jnp.where(banned, IMPOSSIBLE, logits)
    if sampling.temperature not in (0.0, 1.0):
        logits = logits / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p >= 1.0:
        return logits
    kept = support(jax.lax.stop_gradient(logits), sampling.top_k, sampling.top_p)
    if keep is not None:
        kept = kept | (ids == keep[..., None])
    return jnp.where(kept, logits, IMPOSSIBLE)


def support(logits: Array, top_k: int | Array, top_p: float | Array) -> Array:
    """bool[..., V]: the tokens that top-k, then top-p keep; ties with the last kept one are kept. Either may be an
    array [...], which is applied whatever it holds.

    Both are a threshold on the logit, found by bisection on the ordered bits of a float32: exact, and no sort."""
    order = ordered_bits(logits.astype(jnp.float32))
    kept = jnp.ones(logits.shape, bool)
    if not isinstance(top_k, int) or top_k:
        kept = order >= largest_threshold(order, jnp.ones_like(logits), jnp.asarray(top_k, jnp.float32))[..., None]
    if not isinstance(top_p, float) or top_p < 1.0:
        weights = jax.nn.softmax(jnp.where(kept, logits, IMPOSSIBLE), axis=-1)
        kept = kept & (order >= largest_threshold(order, weights, jnp.asarray(top_p, jnp.float32))[..., None])
    return kept


def ordered_bits(x: Array) -> Array:
    """An int32 that orders as the float32 does."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits >= 0, bits, bits ^ jnp.int32(0x7FFFFFFF))


def largest_threshold(order: Array, weights: Array, goal: Array) -> Array:
    """i32[...]: the largest t with sum(weights where order >= t) >= goal; the smallest int32 where none reaches it."""
    low = jnp.min(order, -1)  # everything is at or above it
    high = jnp.max(order, -1)

    def halve(_, bounds):
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # ceil of the mean, without overflow
        enough = jnp.where(order >= middle[..., None], weights, 0.0).sum(-1) >= goal
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    return low


class RowSampling(NamedTuple):
    """What shapes the distribution of each row by itself, as arrays: see Sampling."""

    temperature: Array  # f32[B]; 0: greedy
    top_k: Array  # i32[B]; 0: off
    top_p: Array  # f32[B]; 1: off


def shape_rows(logits: Array, sampling: RowSampling) -> Array:
    """``shape_logits`` of f32[B, V], each row by settings of its own: no other program is compiled for others."""
    temperature = jnp.where(sampling.temperature == 0, 1.0, sampling.temperature)
    logits = logits / temperature[:, None]
    vocab = logits.shape[-1]

    def filtered(logits: Array) -> Array:
        off = (sampling.top_k == 0) | (sampling.top_k > vocab)
        kept = support(logits, jnp.where(off, vocab, sampling.top_k), 1.0)
        narrow = support(jnp.where(kept, logits, IMPOSSIBLE), 0, sampling.top_p)
        kept = kept & (narrow | (sampling.top_p >= 1.0)[:, None])
        return jnp.where(kept, logits, IMPOSSIBLE)

    wanted = ((sampling.top_k > 0) | (sampling.top_p < 1.0)).any()
    return jax.lax.cond(wanted, filtered, lambda logits: logits, logits)


def choose(logits: Array, uniform: Array, greedy: bool | Array = False) -> tuple[Array, Array]:
    """Tokens i32[B] and their log-probs f32[B] from shaped logits f32[B, V] and one uniform a row; ``greedy``: of all
    rows, or bool[B].

    Two levels: which block of BLOCK tokens holds the point ``uniform`` of the cumulative distribution, then which
    token of it."""
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    vocab = weights.shape[1]
    weights = jnp.pad(weights, ((0, 0), (0, -vocab % BLOCK)))
    blocks = split_columns(weights, weights.shape[1] // BLOCK, BLOCK)
    mass = blocks.sum(-1)
    cumulative = jnp.cumsum(mass, axis=-1)
    total = cumulative[:, -1]
    if greedy is True:
        token = jnp.argmax(logits, -1).astype(jnp.int32)
    else:
        goal = (uniform * total)[:, None]
        block = first_above(cumulative, goal, mass)
        # a row at a time: take_along_axis would take a batch of one row for an axis to broadcast
        pick = jax.vmap(lambda row, at: jax.lax.dynamic_index_in_dim(row, at, keepdims=False))
        before, inside = pick(cumulative - mass, block)[:, None], pick(blocks, block)
        rest = jnp.maximum(goal - before, 0.0)  # rounding may leave it below 0, where a banned first token would pass
        token = block * BLOCK + first_above(jnp.cumsum(inside, axis=-1), rest, inside)
        token = token if greedy is False else jnp.where(greedy, jnp.argmax(logits, -1).astype(jnp.int32), token)
    chosen = jnp.where(jnp.arange(vocab) == token[:, None], logits, 0.0).sum(-1)
    return token, chosen - logits.max(-1) - jnp.log(total)


def first_above(cumulative: Array, goal: Array, mass: Array) -> Array:
    """i32[B]: the first column whose cumulative sum passes the goal; rounding never leads past the last with mass."""
    columns = jnp.arange(mass.shape[-1])
    last = jnp.max(jnp.where(mass > 0, columns, 0), -1)
    return jnp.minimum((cumulative <= goal).sum(-1, dtype=jnp.int32), last)
