"""Group-relative policy optimisation (Shao et al. 2024, arXiv:2402.03300): PPO's clipped step without a value model.

Every prompt gets batch.samples_per_prompt responses. A response's advantage, the same for each of its tokens, is how
much better its score is than those of the others; the KL from the reference is a term of the loss, not of the reward:

    A = (score - mean of the group) / standard deviation of the group             ratio = pi / pi_old
    loss = - min(A * ratio, A * clip(ratio, 1 - clip_range_low, 1 + clip_range_high)) + kl_coef * KL

Variants are fields (named together by ``preset``):

    the paper      advantages: mean_std        aggregation: seq-mean-token-mean
    Dr. GRPO       advantages: mean            aggregation: seq-mean-token-sum    (arXiv:2503.20783)
    RLOO           advantages: leave_one_out   aggregation: seq-mean-token-sum    kl_in: score, kl_estimator: k1
                                                                                  (arXiv:2402.14740)
    REINFORCE++    advantages: none, kl_in: rewards, kl_estimator: k1, whiten_advantages    (arXiv:2501.03262)
      w/ baseline  advantages: mean, kl_in: loss, kl_estimator: k2, whiten_advantages
    DAPO           aggregation: token-mean, clip_range_high: 0.28, kl_coef: 0, batch.max_rollouts (arXiv:2503.14476)
    CISPO          objective: cispo, clip_range_low: 1, clip_range_high, kl_coef: 0    (arXiv:2506.13585)
    GSPO           ratio: sequence, aggregation: seq-mean-token-mean, clip_range_low: 3e-4, clip_range_high: 4e-4,
                   kl_coef: 0                                                     (arXiv:2507.18071)
    GDPO           rewards.normalize: group_then_sum, of several rewards.functions (arXiv:2601.05242)

REINFORCE++ normalises over all tokens of the iteration, not within a group, and the KL is taken from the reward of each
token, so that a token answers for its own KL and what follows:

    A[t] = score - baseline - kl_coef * sum of KL[t'] over t' >= t,      whitened over the iteration
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from jaxrlhf.algorithm import Algorithm, read_logprobs
from jaxrlhf.algorithms import on_policy
from jaxrlhf.ops.advantages import GroupBaseline, decoupled_advantages, group_advantages
from jaxrlhf.ops.kl import Estimator, kl_estimate
from jaxrlhf.ops.losses import Aggregation, Objective, aggregate
from jaxrlhf.ops.masked import keep, row_means, whiten
from jaxrlhf.ops.rows import group_rows
from jaxrlhf.ops.token_rewards import returns_to_go
from jaxrlhf.types import (
    Array,
    Ask,
    AskedHead,
    Batch,
    Experience,
    Mean,
    Nets,
    Role,
    Sequences,
    TrainState,
    Trees,
    given,
)


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Group-relative policy optimisation: the responses to one prompt are each other's baseline."""

    num_epochs: int = 1  # passes over the responses of an iteration
    num_minibatches: int = 1  # updates an epoch
    advantages: GroupBaseline = "mean_std"  # score - mean of the group, / its std; leave_one_out: - mean of the others
    std_eps: float = 1e-6  # mean_std: added to the standard deviation, in units of score
    whiten_advantages: Literal["no", "unbiased", "biased"] = "no"  # over all tokens of the iteration, by which variance
    objective: Objective = "clip"  # cispo: log-likelihood weighted by the clipped ratio, which has no gradient
    ratio: Literal["token", "sequence"] = "token"  # sequence: the geometric mean of a response's token ratios
    clip_range_low: float = 0.2  # how far the ratio may fall under 1
    clip_range_high: float = 0.2  # how far it may rise over 1
    dual_clip: float | None = None  # the largest ratio that counts against a response; null: no bound
    aggregation: Aggregation = "token-mean"  # mean over all tokens; or over responses, of their token sums or means
    kl_coef: float = 0.04  # weight of the KL from the reference; 0: no reference is held
    kl_estimator: Estimator = "k3"  # of that KL; in the loss k1 has no gradient on average
    kl_in: Literal["loss", "score", "rewards"] = "loss"  # score: taken off before groups are compared; rewards: a token
    entropy_coef: float = 0.0  # bonus for each nat of a token's entropy
    missing_eos_penalty: float = 0.0  # taken off the score of a response that did not end
    stop_kl: float | None = None  # KL from the old policy, nats per token, above which further updates are skipped
    old_logprobs: Literal["sampler", "recompute"] = "sampler"  # recompute: the ratio starts at exactly 1
    sampler_ratio_cap: float | None = None  # recompute: policy loss times min(trainer's p / sampler's, this); null: off
    sampler_ratio: on_policy.SamplerRatio = "token"  # sequence: the product over a response; -mean: the geometric mean
    sampler_ratio_above: on_policy.AboveCap = "cap"  # drop: what is above the cap counts nothing
    sampler_ratio_floor: float | None = None  # drop: nor what is below


class GRPOExperience(Experience, kw_only=True):
    """Responses, each with its advantage over the others to its prompt."""

    advantages: Array  # f32[B, S]
    ref_logprobs: Array | None  # f32[B, S]; None where the KL does not count


def roles(cfg: GRPOConfig) -> tuple[dict[Role, AskedHead], dict[Role, AskedHead]]:
    """The policy learns; the reward model stays, and so does the reference where the KL counts."""
    slow: dict[Role, AskedHead] = {"reward": "scalar"}
    if cfg.kl_coef:
        slow["reference"] = "lm"
    return {"policy": "lm"}, slow


def prepare(nets: Nets, state: TrainState, batch: Batch, cfg: GRPOConfig) -> tuple[GRPOExperience, dict[str, Mean]]:
    """Score the responses and compare each with its group. Rows without a response or a score are excluded."""
    sequences = given(batch.sequences, "batch.sequences")
    group_size = len(sequences.tokens) // len(given(batch.prompts, "batch.prompts").tokens)
    scores, members = on_policy.scores_of(nets, state.trees, sequences)
    logprobs = on_policy.old_logprobs(nets, state, sequences, cfg.old_logprobs)
    ref_logprobs = read_logprobs(nets, "reference", state.trees, sequences) if cfg.kl_coef else None
    metrics = on_policy.rollout_metrics(sequences, scores, logprobs, ref_logprobs, members)
    sequences = on_policy.scorable(sequences)
    advantages, found = compared(nets, sequences, scores, logprobs, ref_logprobs, group_size, cfg)
    advantages, corrected = on_policy.correct_for_sampler(advantages, logprobs, sequences, cfg)
    sequences = sequences.replace(scores=scores, logprobs=logprobs)
    held = ref_logprobs if cfg.kl_in == "loss" else None
    experience = GRPOExperience(responses=sequences, advantages=advantages, ref_logprobs=held)
    return experience, metrics | found | corrected


def compared(
    nets: Nets,
    sequences: Sequences,
    scores: Array,
    logprobs: Array,
    ref_logprobs: Array | None,
    group_size: int,
    cfg: GRPOConfig,
) -> tuple[Array, dict[str, Mean]]:
    """(advantages f32[B, S], 0 outside the responses; group/zero_variance, where groups are compared)."""
    mask = sequences.response_mask
    marks, penalty = on_policy.penalised(scores, sequences, cfg.missing_eos_penalty), jnp.zeros(mask.shape)
    if ref_logprobs is not None and cfg.kl_in != "loss":
        penalty = cfg.kl_coef * kl_estimate(keep(logprobs, mask), keep(ref_logprobs, mask), cfg.kl_estimator)
    if cfg.kl_in == "score":
        marks = marks - penalty.sum(-1)
    each, equal = against_group(nets, sequences, marks, group_size, cfg)
    advantages = jnp.where(mask, each[:, None], 0.0)
    if cfg.kl_in == "rewards":
        advantages = keep(advantages - returns_to_go(penalty), mask)
    if cfg.whiten_advantages != "no":
        advantages = whiten(advantages, mask, variance=cfg.whiten_advantages)
    return advantages, {} if cfg.advantages == "none" else {"group/zero_variance": equal}


def against_group(
    nets: Nets, sequences: Sequences, marks: Array, group_size: int, cfg: GRPOConfig
) -> tuple[Array, Mean]:
    """(f32[B]: what each response earned over its group, by its ``marks`` or by each grader apart; the share of groups
    that nothing tells apart)."""
    rows, how = sequences.response_mask.any(-1), cfg.advantages
    if nets.apart:
        grades = given(sequences.grades, "sequences.grades")
        return decoupled_advantages(grades, nets.apart, rows, group_size, how, cfg.std_eps)
    return group_advantages(marks, rows, group_size, how, cfg.std_eps)


def informative(nets: Nets, state: TrainState, batch: Batch, cfg: GRPOConfig) -> tuple[Array, Array]:
    """(bool[G]: groups in which some response has an advantage; scores f32[B]). The KL tells nothing of a group."""
    sequences = given(batch.sequences, "batch.sequences")
    group_size = len(sequences.tokens) // len(given(batch.prompts, "batch.prompts").tokens)
    scores, _ = on_policy.scores_of(nets, state.trees, sequences)
    marks = on_policy.penalised(scores, sequences, cfg.missing_eos_penalty)
    each, _ = against_group(nets, on_policy.scorable(sequences), marks, group_size, cfg)
    return jnp.any(group_rows(each, group_size) != 0, axis=1), scores


def loss(
    nets: Nets, trees: Trees, minibatch: GRPOExperience, cfg: GRPOConfig
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """The policy's loss, plus kl_coef times the KL from the reference where kl_in is loss, less the entropy bonus."""
    sequences = given(minibatch.responses, "responses")
    mask = sequences.response_mask
    (stats,) = nets.read(trees, sequences, Ask("policy", "token_stats"))
    old = keep(given(sequences.logprobs, "responses.logprobs"), mask)
    logprobs, entropy = keep(stats.logprobs, mask), keep(stats.entropy, mask)
    log_ratio = logprobs - old if cfg.ratio == "token" else row_means(logprobs - old, mask)
    clip = cfg.clip_range_low, cfg.clip_range_high
    terms = on_policy.policy_terms(cfg.objective, logprobs, log_ratio, minibatch.advantages, clip, cfg.dual_clip)
    policy, ratio, clipped = terms
    total = policy - cfg.entropy_coef * entropy
    metrics = on_policy.update_metrics(logprobs, old, entropy, ratio, clipped, mask)
    metrics["loss/policy"] = aggregate(policy, mask, cfg.aggregation)
    if minibatch.ref_logprobs is not None:
        kl = kl_estimate(logprobs, keep(minibatch.ref_logprobs, mask), cfg.kl_estimator)
        total = total + cfg.kl_coef * kl
        metrics["loss/kl"] = aggregate(kl, mask, cfg.aggregation)
    return {"policy": aggregate(total, mask, cfg.aggregation)}, metrics


def min_samples(cfg: GRPOConfig) -> int:
    """Two, unless a score counts as it is."""
    return 1 if cfg.advantages == "none" else 2


ALGORITHM = Algorithm(
    config=GRPOConfig,
    online=True,
    batch=lambda cfg: ("prompts",),
    roles=roles,
    updates=on_policy.updates,
    prepare=prepare,
    loss=loss,
    problems=on_policy.problems,
    graders_apart=True,
    min_samples=min_samples,
    informative=informative,
)
