"""Proximal policy optimisation of scores (Ziegler et al. 2019; Stiennon et al. 2020; Ouyang et al. 2022).

A response is an episode: a state is the tokens so far, an action the next token. A reward model or functions on the
host give the response a score. The reward of a token is -kl_coef times its estimated KL from the reference, plus the
score at the last token. With d the error of the Bellman equation, the advantages (GAE) and the losses are

    d[t] = r[t] + gamma * V[t + 1] - V[t]         A[t] = d[t] + gamma * gae_lambda * A[t + 1]
    policy: - min(A * ratio, A * clip(ratio, 1 - clip_range, 1 + clip_range))        ratio = pi / pi_old
    value:  1/2 * max((V - R)^2, (clip(V, V_old - value_clip_range, V_old + value_clip_range) - R)^2)     R = A + V_old

VAPO (arXiv:2504.05118) is PPO for long responses; ``preset: vapo`` sets its fields: returns with a lambda of their own
(gae_lambda_value), a lambda of the policy that grows with a response (gae_length_alpha), a higher bound of the ratio
(clip_range_high), the likelihood of good responses (positive_coef), a value model that learns first
(optimizer.policy.delay).
"""

import dataclasses
from functools import partial
from typing import Literal

import jax.numpy as jnp

from jaxrlhf.algorithm import Algorithm, read_logprobs
from jaxrlhf.algorithms import on_policy
from jaxrlhf.algorithms.rm import preference_losses
from jaxrlhf.ops.advantages import gae, length_lambda
from jaxrlhf.ops.kl import adaptive_kl_coef, kl_estimate
from jaxrlhf.ops.losses import Objective, clipped_value_terms
from jaxrlhf.ops.masked import count, keep, sums, variance, whiten
from jaxrlhf.ops.token_rewards import score_to_rewards
from jaxrlhf.types import (
    Array,
    Ask,
    AskedHead,
    Batch,
    Experience,
    Mean,
    Metrics,
    Nets,
    Preferences,
    Role,
    Rows,
    Sequences,
    TokenStats,
    TrainState,
    Trees,
    given,
)


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation. The value model is one of its own, or a head on the policy's trunk
    (models.value.share_trunk)."""

    num_epochs: int = 4  # passes over the responses of an iteration
    num_minibatches: int = 1  # updates an epoch
    clip_range: float = 0.2  # of the policy ratio, around 1
    clip_range_high: float | None = None  # how far the ratio may rise over 1; null: clip_range
    dual_clip: float | None = None  # the largest ratio that counts against a token; null: no bound
    objective: Objective = "clip"  # cispo: log-likelihood weighted by the clipped ratio, which has no gradient
    value_clip_range: float | None = 0.2  # of a value, around the old one; null: no clipping
    gamma: float = 1.0  # discount a token
    gae_lambda: float = 0.95  # 1: advantages from whole returns; 0: from the value model's one-step errors
    gae_lambda_value: float | None = None  # of the returns that the value model learns; null: that of the advantages
    gae_length_alpha: float | None = None  # gae_lambda is 1 - 1 / (this x tokens of the response); null: gae_lambda
    positive_coef: float = 0.0  # weight of -log p of a token of the responses whose score is above 0
    kl_coef: float = 0.05  # reward lost per nat of KL from the reference
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # of the KL in the reward
    kl_controller: Literal["fixed", "adaptive"] = "fixed"  # adaptive: kl_coef moves so that the KL meets kl_target
    kl_target: float = 6.0  # nats per response (adaptive)
    kl_horizon: int = 10000  # responses (adaptive)
    entropy_coef: float = 0.0  # bonus for each nat of a token's entropy
    whiten_advantages: Literal["no", "unbiased", "biased"] = "unbiased"  # by which variance
    whiten_rewards: bool = False  # divide rewards by their standard deviation; their mean stays
    missing_eos_penalty: float = 0.0  # taken off the score of a response that did not end, before KL shaping
    score_clip: float | None = None  # what is left counts as this at most, and as its negative at least; null: as it is
    stop_kl: float | None = None  # KL from the old policy, nats per token, above which further updates are skipped
    old_logprobs: Literal["sampler", "recompute"] = "sampler"  # recompute: the ratio starts at exactly 1
    sampler_ratio_cap: float | None = None  # recompute: policy loss times min(trainer's p / sampler's, this); null: off
    sampler_ratio: on_policy.SamplerRatio = "token"  # sequence: the product over a response; -mean: the geometric mean
    sampler_ratio_above: on_policy.AboveCap = "cap"  # drop: what is above the cap counts nothing
    sampler_ratio_floor: float | None = None  # drop: nor what is below
    reward_update: bool = False  # also train the reward model on preference pairs, in the same program
    reward_label_smoothing: float = 0.0  # reward_update: as in rm
    reward_centering: float = 0.0  # reward_update: as in rm


class PPOExperience(Experience, kw_only=True):
    """Responses, and what ``prepare`` computed for each of their tokens."""

    advantages: Array  # f32[B, S]
    returns: Array  # f32[B, S]
    values: Array  # f32[B, S]
    positive: Array | None = None  # f32[B, S]: weight of a token's -log p, where positive_coef is not 0
    pairs: Rows | None = None  # Preferences, where the reward model learns too


def roles(cfg: PPOConfig) -> tuple[dict[Role, AskedHead], dict[Role, AskedHead]]:
    """Policy and value learn; the reference stays; the reward model learns when asked to."""
    trained: dict[Role, AskedHead] = {"policy": "lm", "value": "scalar"}
    slow: dict[Role, AskedHead] = {"reference": "lm"}
    (trained if cfg.reward_update else slow)["reward"] = "scalar"
    return trained, slow


def prepare(nets: Nets, state: TrainState, batch: Batch, cfg: PPOConfig) -> tuple[PPOExperience, dict[str, Mean]]:
    """Score the responses, charge for KL, and work out advantages and returns. Nothing here is differentiated."""
    sequences = given(batch.sequences, "batch.sequences")
    scores, members = on_policy.scores_of(nets, state.trees, sequences)
    logprobs, (values,) = before_updates(nets, state, sequences, cfg, ("value",))
    ref_logprobs = read_logprobs(nets, "reference", state.trees, sequences)
    metrics = on_policy.rollout_metrics(sequences, scores, logprobs, ref_logprobs, members)
    sequences = on_policy.scorable(sequences)
    mask = sequences.response_mask
    rewards = shaped_rewards(nets, state, sequences, scores, logprobs, ref_logprobs, cfg)
    advantages, returns = estimated(rewards, values, sequences, cfg)
    values = keep(values, mask)
    metrics |= {"reward/mean": sums(rewards.sum(-1), mask.any(-1))} | value_metrics("value", mask, values, returns)
    metrics["kl/coef"] = Mean(kl_coef(state, cfg), jnp.float32(1))
    advantages, corrected = normalised(advantages, logprobs, sequences, cfg)
    sequences = sequences.replace(scores=scores, logprobs=logprobs)
    experience = PPOExperience(
        responses=sequences,
        advantages=advantages,
        returns=returns,
        values=values,
        positive=positive_weights(sequences, cfg),
        pairs=pairs_of(batch, cfg),
    )
    return experience, metrics | corrected


def before_updates(
    nets: Nets, state: TrainState, sequences: Sequences, cfg: PPOConfig, critics: tuple[Role, ...]
) -> tuple[Array, tuple[Array, ...]]:
    """(old log-probs f32[B, S], the values f32[B, S] of each critic), in one pass where they share a trunk."""
    asks = [Ask(role, "values") for role in critics]
    if cfg.old_logprobs == "sampler":
        return given(sequences.logprobs, "sequences.logprobs"), nets.read(state.trees, sequences, *asks)
    stats, *values = nets.read(state.trees, sequences, Ask("policy", "token_stats"), *asks)
    return stats.logprobs, tuple(values)


def normalised(
    advantages: Array, logprobs: Array, sequences: Sequences, cfg: PPOConfig
) -> tuple[Array, dict[str, Mean]]:
    """(advantages f32[B, S], whitened and corrected for the sampler as the config asks; the correction's metrics)."""
    if cfg.whiten_advantages != "no":
        advantages = whiten(advantages, sequences.response_mask, variance=cfg.whiten_advantages)
    return on_policy.correct_for_sampler(advantages, logprobs, sequences, cfg)


def positive_weights(sequences: Sequences, cfg: PPOConfig) -> Array | None:
    """f32[B, S]: positive_coef at the tokens of responses whose score is above 0, scaled so that their mean -log p is
    over them alone, while the loss is divided by all response tokens; 0 elsewhere. The counts are the iteration's.

    Source: Yue et al. 2025 (arXiv:2504.05118), equation 10."""
    if not cfg.positive_coef:
        return None
    mask = sequences.response_mask
    good = mask & (given(sequences.scores, "scores") > 0)[:, None]
    return jnp.where(good, cfg.positive_coef * count(mask) / jnp.maximum(count(good), 1.0), 0.0)


def pairs_of(batch: Batch, cfg: PPOConfig) -> Rows | None:
    """The pairs that the reward model learns from, where it does."""
    return Rows(given(batch.preferences, "batch.preferences")) if cfg.reward_update else None


def shaped_rewards(
    nets: Nets,
    state: TrainState,
    sequences: Sequences,
    scores: Array,
    logprobs: Array,
    ref_logprobs: Array,
    cfg: PPOConfig,
) -> Array:
    """f32[B, S]: -kl_coef * KL on every response token, and the score on the last, or on each what it earned."""
    mask = sequences.response_mask
    marks = on_policy.penalised(scores, sequences, cfg.missing_eos_penalty)
    if cfg.score_clip is not None:
        marks = jnp.clip(marks, -cfg.score_clip, cfg.score_clip)
    penalty = kl_penalty(state, logprobs, ref_logprobs, mask, cfg)
    earned = on_policy.earned_by_actions(nets, state.trees, sequences)
    if earned is None:
        rewards = score_to_rewards(marks, penalty, mask)
    elif sequences.observations is None:  # turns of text, of which the last pays for an end that is missing
        rewards = score_to_rewards(marks - scores, penalty - earned, mask)
    else:
        rewards = keep(earned - penalty, mask)
    if cfg.whiten_rewards:
        rewards = whiten(rewards, mask, variance="unbiased", shift_mean=False)
    return rewards


def kl_penalty(state: TrainState, logprobs: Array, ref_logprobs: Array, mask: Array, cfg: PPOConfig) -> Array:
    """f32[B, S]: kl_coef times the KL from the reference at each response token."""
    return kl_coef(state, cfg) * kl_estimate(keep(logprobs, mask), keep(ref_logprobs, mask), cfg.kl_estimator)


def estimated(rewards: Array, values: Array, sequences: Sequences, cfg: PPOConfig) -> tuple[Array, Array]:
    """(advantages, returns), f32[B, S], by GAE: ``rewards`` of response tokens, ``values`` of all columns."""
    mask = sequences.response_mask
    whole = on_policy.with_what_follows(rewards, values, sequences, cfg.gamma)
    of = partial(gae, whole, keep(values, mask), mask, gamma=cfg.gamma)
    alpha, lambda_value = cfg.gae_length_alpha, cfg.gae_lambda_value
    advantages, returns = of(gae_lambda=cfg.gae_lambda if alpha is None else length_lambda(mask, alpha))
    return advantages, returns if lambda_value is None else of(gae_lambda=lambda_value)[1]


def value_metrics(critic: Role, mask: Array, values: Array, returns: Array) -> dict[str, Mean]:
    """Mean value of a critic and explained variance of the returns."""
    error, spread = variance(keep(returns, mask) - values, mask, False), variance(returns, mask, False)
    explained = jnp.where(spread > 0, 1 - error / jnp.maximum(spread, 1e-8), 0.0)
    return {
        f"{critic}/mean": sums(values, mask),
        f"{critic}/explained_variance": Mean(explained, jnp.float32(1)),
    }


def loss(nets: Nets, trees: Trees, minibatch: PPOExperience, cfg: PPOConfig) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Clipped policy loss less the entropy bonus; clipped value loss; the reward model's own when it learns too."""
    sequences = given(minibatch.responses, "responses")
    mask = sequences.response_mask
    stats, values = nets.read(trees, sequences, Ask("policy", "token_stats"), Ask("value", "values"))
    policy, metrics = policy_loss(stats, minibatch, cfg)
    value, value_metrics = value_loss("value", values, minibatch.values, minibatch.returns, mask, cfg)
    reward, reward_metrics = reward_losses(nets, trees, minibatch, cfg)
    return policy | value | reward, metrics | value_metrics | reward_metrics


def policy_loss(
    stats: TokenStats, minibatch: PPOExperience, cfg: PPOConfig
) -> tuple[dict[Role, Mean], dict[str, Mean]]:
    """The clipped loss of a response token less its entropy bonus, and how far the update is from the old policy."""
    sequences = given(minibatch.responses, "responses")
    mask = sequences.response_mask
    logprobs, old = keep(stats.logprobs, mask), keep(given(sequences.logprobs, "responses.logprobs"), mask)
    clip = cfg.clip_range, cfg.clip_range if cfg.clip_range_high is None else cfg.clip_range_high
    terms = on_policy.policy_terms(cfg.objective, logprobs, logprobs - old, minibatch.advantages, clip, cfg.dual_clip)
    policy, ratio, clipped = terms
    entropy = keep(stats.entropy, mask)
    metrics = {"loss/policy": sums(policy, mask)}
    metrics |= on_policy.update_metrics(logprobs, old, entropy, ratio, clipped, mask)
    total = policy - cfg.entropy_coef * entropy
    if minibatch.positive is not None:
        metrics["loss/positive"] = sums(-logprobs, mask & (minibatch.positive > 0))
        total = total - minibatch.positive * logprobs
    return {"policy": sums(total, mask)}, metrics


def value_loss(
    critic: Role, values: Array, old: Array, returns: Array, mask: Array, cfg: PPOConfig
) -> tuple[dict[Role, Mean], dict[str, Mean]]:
    """The clipped squared error of a critic, a response token; all [B, S]."""
    terms, clipped = clipped_value_terms(keep(values, mask), old, returns, cfg.value_clip_range)
    value = sums(terms, mask)
    return {critic: value}, {f"loss/{critic}": value, f"{critic}/clip_fraction": sums(clipped, mask)}


def reward_losses(
    nets: Nets, trees: Trees, minibatch: PPOExperience, cfg: PPOConfig
) -> tuple[dict[Role, Mean], dict[str, Mean]]:
    """Of the reward model where it learns, or of its members."""
    if minibatch.pairs is None:
        return {}, {}
    pairs: Preferences = minibatch.pairs.data
    return preference_losses(nets, trees, pairs, cfg.reward_label_smoothing, cfg.reward_centering)


def kl_coef(state: TrainState, cfg: PPOConfig) -> Array:
    """f32[]: that of the config, or where the controller has moved it to. A run may go on with another controller."""
    return state.controls["kl_coef"] if cfg.kl_controller == "adaptive" else jnp.float32(cfg.kl_coef)


def controls(cfg: PPOConfig) -> dict[str, Array]:
    return {"kl_coef": jnp.float32(cfg.kl_coef)}


def after(state: TrainState, metrics: Metrics, cfg: PPOConfig) -> TrainState:
    """Adapt the KL coefficient."""
    if cfg.kl_controller == "fixed":
        return state
    adapted = adaptive_kl_coef(
        state.controls["kl_coef"], metrics["kl/reference"], cfg.kl_target, cfg.kl_horizon, metrics["response/count"]
    )
    return state.replace(controls=state.controls | {"kl_coef": adapted})


ALGORITHM = Algorithm(
    config=PPOConfig,
    online=True,
    batch=lambda cfg: ("prompts", "preferences") if cfg.reward_update else ("prompts",),
    roles=roles,
    updates=on_policy.updates,
    prepare=prepare,
    loss=loss,
    controls=controls,
    after=after,
    problems=on_policy.problems,
)
