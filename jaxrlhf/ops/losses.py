"""Loss terms, one number per token or pair, and the ways to sum them.

The terms take no mask: ``aggregate`` drops what is outside it, and what may be NaN there goes through ``masked.keep``
first, since 0 * NaN would reach the gradient.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxrlhf.ops import masked
from jaxrlhf.ops.kl import LARGEST_LOG_RATIO
from jaxrlhf.sharding import across
from jaxrlhf.types import Array, Mean, QStats

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
Objective = Literal["clip", "cispo"]


def clipped_policy_terms(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    clip_low: float | Array,
    clip_high: float | Array,
    dual_clip: float | None = None,
) -> tuple[Array, Array, Array]:
    """PPO's pessimistic policy loss of every token.

        ratio = exp(logprobs - old_logprobs)
        loss  = max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high))

    With ``dual_clip`` c > 1 the loss of a token with A < 0 is at most -A * c, which bounds the one side that the clip
    leaves open: a ratio that has run away.

    Args:
        logprobs, old_logprobs, advantages: [...], same shape; only ``logprobs`` is meant to be differentiated.
        clip_low, clip_high: how far the ratio may fall under 1, and rise over it, before it earns nothing more.

    Returns:
        (loss f32[...], ratio f32[...], clipped bool[...]): ``clipped`` where the clip (not ``dual_clip``) decides the
        loss, so that the token has no gradient. The log-ratio is held within 20 nats.

    Source: Schulman et al. 2017 (arXiv:1707.06347), equation 7; separate bounds: Yu et al. 2025 (arXiv:2503.14476);
    dual clip: Ye et al. 2020 (arXiv:1912.09729).
    """
    assert logprobs.shape == old_logprobs.shape == advantages.shape, (
        logprobs.shape,
        old_logprobs.shape,
        advantages.shape,
    )
    log_ratio = logprobs.astype(jnp.float32) - old_logprobs
    ratio = jnp.exp(jnp.clip(log_ratio, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))
    free = -advantages * ratio
    bounded = -advantages * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = jnp.maximum(free, bounded)
    if dual_clip is not None:
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -advantages * dual_clip), loss)
    return loss, ratio, bounded > free


def weighted_likelihood_terms(
    logprobs: Array,
    log_ratio: Array,
    advantages: Array,
    clip_low: float | Array,
    clip_high: float | Array,
) -> tuple[Array, Array, Array]:
    """CISPO's policy loss of every token: its log-likelihood, weighted by a clipped ratio that has no gradient.

        loss = -stop_gradient(clip(exp(log_ratio), 1 - clip_low, 1 + clip_high)) * A * logprobs

    So a token keeps its gradient where the ratio is clipped; ``clipped_policy_terms`` would drop it.

    Args:
        logprobs, log_ratio, advantages: [...], same shape; only ``logprobs`` is differentiated.
        clip_low, clip_high: how far the weight may fall under 1, and rise over it. ``clip_low`` 1: no lower bound, as
            in the source.

    Returns:
        (loss f32[...], ratio f32[...], clipped bool[...]): ``clipped`` where the weight is not the ratio itself. The
        log-ratio is held within 20 nats.

    Source: MiniMax 2025 (arXiv:2506.13585), equations 4 and 5.
    """
    assert logprobs.shape == log_ratio.shape == advantages.shape, (logprobs.shape, log_ratio.shape, advantages.shape)
    held = jnp.clip(log_ratio.astype(jnp.float32), -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    ratio = jax.lax.stop_gradient(jnp.exp(held))
    weight = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return -weight * advantages * logprobs.astype(jnp.float32), ratio, weight != ratio


def clipped_value_terms(
    values: Array, old_values: Array, returns: Array, clip_range: float | Array | None
) -> tuple[Array, Array]:
    """Squared error of every value, with the values held near what they were when the responses were sampled.

        clipped = clip(values, old_values - clip_range, old_values + clip_range)
        loss = 1/2 * max((values - returns)^2, (clipped - returns)^2)

    ``clip_range`` (in units of return) None: the plain 1/2 * (values - returns)^2.

    Args:
        values, old_values, returns: [...], same shape; only ``values`` is meant to be differentiated.

    Returns:
        (loss f32[...], clipped bool[...]): ``clipped`` where the clip decides the loss, so that there is no gradient.

    Source: the PPO code released with Schulman et al. 2017; described in Engstrom et al. 2020 (arXiv:2005.12729).
    """
    assert values.shape == old_values.shape == returns.shape, (values.shape, old_values.shape, returns.shape)
    values = values.astype(jnp.float32)
    free = jnp.square(values - returns)
    if clip_range is None:
        return 0.5 * free, jnp.zeros_like(free, dtype=bool)
    # not old + clip(values - old): rounding would make that differ from values, and unclipped tokens look clipped
    clipped = jnp.clip(values, old_values - clip_range, old_values + clip_range)
    bounded = jnp.square(clipped - returns)
    return 0.5 * jnp.maximum(free, bounded), bounded > free


def expectile_terms(error: Array, expectile: float | Array) -> Array:
    """Asymmetric squared error, whose minimum over a constant is the expectile of what it is subtracted from.

        loss = |expectile - [error < 0]| * error^2

    ``expectile`` 1/2: half the squared error, so the mean; near 1: the maximum.

    Args:
        error: [...], a target less the value that is learned.

    Returns:
        f32[...].

    Source: Kostrikov et al. 2022 (arXiv:2110.06169), equation 5.
    """
    error = error.astype(jnp.float32)
    return jnp.where(error < 0, 1.0 - expectile, expectile) * jnp.square(error)


def conservative_q_terms(q: QStats, goal: Array, mask: Array, cql_coef: float | Array) -> Array:
    """Squared error of the chosen token's action value, and a term that lowers the values of the other tokens.

        loss = (Q(s, a) - goal)^2 + cql_coef * (log sum exp Q(s, .) - Q(s, a))

    Args:
        q: [...]; only it is meant to be differentiated.
        goal, mask: [...]; outside the mask the loss is that of zeros.

    Returns:
        f32[...].

    Source: Kumar et al. 2020 (arXiv:2006.04779), equation 4 with a uniform prior.
    """
    assert q.chosen.shape == goal.shape == mask.shape, (q.chosen.shape, goal.shape, mask.shape)
    chosen = masked.keep(q.chosen, mask)
    error = jnp.square(chosen - masked.keep(goal, mask))
    if isinstance(cql_coef, float) and cql_coef == 0:
        return error
    return error + cql_coef * (masked.keep(q.logsumexp, mask) - chosen)


def bradley_terry(
    chosen: Array, rejected: Array, margin: Array | None = None, label_smoothing: float | Array = 0.0
) -> Array:
    """Negative log-likelihood, in nats, of preferring ``chosen``, for every pair.

        d    = chosen - rejected - margin
        loss = -(1 - e) * log sigmoid(d) - e * log sigmoid(-d)        e = label_smoothing

    Args:
        chosen, rejected: scores [B].
        margin: [B], by how much the chosen score should be higher; None: 0.
        label_smoothing: the share of pairs that are taken to be labelled the wrong way round.

    Returns:
        f32[B]; finite for any finite scores.

    Source: Bradley and Terry 1952; Stiennon et al. 2020 (arXiv:2009.01325), section 3.4; margin: Touvron et al. 2023
    (arXiv:2307.09288), equation 2; smoothing: Mitchell 2023, "A note on DPO with noisy preferences".
    """
    assert chosen.shape == rejected.shape, (chosen.shape, rejected.shape)
    assert margin is None or margin.shape == chosen.shape, (None if margin is None else margin.shape, chosen.shape)
    difference = chosen.astype(jnp.float32) - rejected
    if margin is not None:
        difference = difference - margin
    right, wrong = jax.nn.log_sigmoid(difference), jax.nn.log_sigmoid(-difference)
    return -(1.0 - label_smoothing) * right - label_smoothing * wrong


def rao_kupper(chosen: Array, rejected: Array, tie: Array, threshold: float) -> Array:
    """Negative log-likelihood, in nats, of a comparison that may be a tie.

        d       = chosen - rejected
        no tie  -log sigmoid(d - threshold)
        tie     -log((exp(2 threshold) - 1) sigmoid(d - threshold) sigmoid(-d - threshold))

    Args:
        chosen, rejected: scores [B].
        tie: bool[B].
        threshold: log theta of the source, more than 0.

    Returns:
        f32[B]; finite for any finite scores.

    Source: Rao and Kupper 1967, "Ties in paired-comparison experiments: a generalization of the Bradley-Terry model".
    """
    assert chosen.shape == rejected.shape == tie.shape, (chosen.shape, rejected.shape, tie.shape)
    difference = chosen.astype(jnp.float32) - rejected
    win, lose = jax.nn.log_sigmoid(difference - threshold), jax.nn.log_sigmoid(-difference - threshold)
    return -jnp.where(tie, jnp.log(jnp.expm1(2.0 * threshold)) + win + lose, win)


def log_odds(logprobs: Array) -> Array:
    """f32, the shape of ``logprobs`` (log p, nats): log(p / (1 - p)); p is held below 1 - 1e-6.

    Source: Hong et al. 2024 (arXiv:2403.07691), equation 4.
    """
    held = jnp.minimum(logprobs.astype(jnp.float32), -1e-6)
    return held - jnp.log(-jnp.expm1(held))


def ipo(
    chosen: Array,
    rejected: Array,
    beta: float | Array,
    margin: Array | None = None,
    label_smoothing: float | Array = 0.0,
) -> Array:
    """Squared distance of the implicit rewards' difference from 1/2, in units of beta, for every pair.

        d    = chosen - rejected - margin
        loss = ((1 - e) * (d - 1/2)^2 + e * (d + 1/2)^2) / beta^2        e = label_smoothing

    Unlike ``bradley_terry`` it has a finite minimum, d = 1/2 - e, so that it does not push a policy that already gets a
    pair right ever further from its reference.

    Args:
        chosen, rejected: [B], implicit rewards: beta * (log p - log p_ref) of the whole response.
        beta: of those rewards.
        margin, label_smoothing: as in ``bradley_terry``; the source has neither.

    Returns:
        f32[B].

    Source: Azar et al. 2023 (arXiv:2310.12036), equation 17 (tau there is beta here).
    """
    assert chosen.shape == rejected.shape, (chosen.shape, rejected.shape)
    assert margin is None or margin.shape == chosen.shape, (None if margin is None else margin.shape, chosen.shape)
    difference = chosen.astype(jnp.float32) - rejected
    if margin is not None:
        difference = difference - margin
    right, wrong = jnp.square(difference - 0.5), jnp.square(difference + 0.5)
    return ((1.0 - label_smoothing) * right + label_smoothing * wrong) / beta**2


def centering(chosen: Array, rejected: Array) -> Array:
    """(chosen + rejected)^2, f32[B]: holds scores near 0, which a loss on their difference alone leaves free to drift.

    Source: Eisenstein et al. 2023 (arXiv:2312.09244).
    """
    assert chosen.shape == rejected.shape, (chosen.shape, rejected.shape)
    return jnp.square(chosen.astype(jnp.float32) + rejected)


def aggregate(x: Array, mask: Array, how: Aggregation) -> Mean:
    """Per-token terms ``x`` [B, S] under ``mask`` (bool[B, S]) as total and count.

        token-mean           sum over tokens           / tokens       every token weighs the same
        seq-mean-token-sum   sum over tokens           / sequences    long responses weigh more
        seq-mean-token-mean  sum over sequences' means / sequences    every response weighs the same

    Micro-batches and devices add up before they are divided. A row with an empty mask is not a sequence: padding a
    batch with such rows changes nothing. The total of the first two is the plain sum.

    Raises:
        ValueError: for another ``how``.
    """
    if how == "token-mean":
        return masked.sums(x, mask)
    tokens = jnp.sum(mask, axis=1, dtype=jnp.float32)
    sequences = jnp.sum(tokens > 0, dtype=jnp.float32)
    row_sums = jnp.sum(masked.keep(x, mask), axis=1)
    if how == "seq-mean-token-sum":
        return Mean(total=jnp.sum(row_sums), count=sequences)
    if how == "seq-mean-token-mean":
        return Mean(total=jnp.sum(row_sums / jnp.maximum(tokens, 1.0)), count=sequences)
    raise ValueError(f"aggregation {how!r}: expected one of {', '.join(get_args(Aggregation))}")


def aggregated(mask: Array, how: Aggregation) -> Array:
    """f32[]: what ``aggregate`` divides by over the whole batch, on all devices: tokens, or sequences."""
    return across(aggregate(jnp.zeros_like(mask, jnp.float32), mask, how)).count
