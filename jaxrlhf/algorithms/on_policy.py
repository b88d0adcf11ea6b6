"""What algorithms that learn from the policy's own responses share: scores, old log-probs, the sampler's correction,
what they report."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, Protocol

import jax.numpy as jnp

from jaxrlhf.algorithm import Updates, read_logprobs
from jaxrlhf.algorithms.grading import combined, member_metrics, members_of, read_members, read_scores
from jaxrlhf.ops.kl import LARGEST_LOG_RATIO, kl_estimate
from jaxrlhf.ops.losses import Objective, clipped_policy_terms, weighted_likelihood_terms
from jaxrlhf.ops.masked import at_last, count, keep, row_means, sums, variance
from jaxrlhf.ops.token_rewards import missing_eos
from jaxrlhf.types import Array, Mean, Nets, Role, Sequences, TrainState, Trees, given

SamplerRatio = Literal["token", "sequence", "sequence-mean"]
AboveCap = Literal["cap", "drop"]


class Correction(Protocol):
    """The fields of a config that correct for the sampler."""

    @property
    def sampler_ratio(self) -> SamplerRatio: ...
    @property
    def sampler_ratio_cap(self) -> float | None: ...
    @property
    def sampler_ratio_above(self) -> AboveCap: ...
    @property
    def sampler_ratio_floor(self) -> float | None: ...


def scores_of(nets: Nets, trees: Trees, sequences: Sequences) -> tuple[Array, dict[Role, Array]]:
    """(f32[B]: what the host gave, else what the reward model says, or its members together; what each of several
    members says)."""
    return read_scores(nets, trees, sequences) if sequences.scores is None else (sequences.scores, {})


def costs_of(nets: Nets, trees: Trees, sequences: Sequences) -> tuple[Array, Sequences]:
    """(f32[B]: what the cost model says, or its members together, else what the host's grader ``cost`` gave;
    ``sequences``, without a score where that gave none)."""
    if members_of(nets, "cost")[0] in {**trees.params, **trees.slow}:
        return read_scores(nets, trees, sequences, "cost")[0], sequences
    costs = given(given(sequences.grades, "sequences.grades").get("cost"), "sequences.grades['cost']")
    scores = jnp.where(jnp.isnan(costs), jnp.nan, given(sequences.scores, "sequences.scores"))
    return costs, sequences.replace(scores=scores)


def cost_metrics(costs: Array, rows: Array) -> dict[str, Mean]:
    """The cost of a response, and how many are unsafe. ``rows``: bool[B], those that count."""
    return {
        "cost/mean": sums(costs, rows),
        "cost/std": Mean(jnp.sqrt(variance(costs, rows, True)), jnp.float32(1)),
        "cost/violations": sums(costs > 0, rows),
    }


def earned_by_actions(nets: Nets, trees: Trees, sequences: Sequences, grader: Role = "reward") -> Array | None:
    """f32[B, S]: what every action of an episode earned (of the grader "cost": what it cost), by the reward model, or
    its members together; a reward by the environment, where that scored. None of text that has one score; where an
    environment of text scored, what each of its tokens earned."""
    if sequences.observations is None:
        return sequences.rewards if grader == "reward" and sequences.scores is not None else None
    if grader == "reward" and sequences.scores is not None:
        return given(sequences.rewards, "sequences.rewards")
    return combined(nets, read_members(nets, trees, sequences, grader, "rewards"), grader)


def with_what_follows(rewards: Array, values: Array, sequences: Sequences, gamma: float) -> Array:
    """f32[B, S]: ``rewards``, and at the last action of an episode that a limit cut gamma * V of the state it came to,
    for what would have followed: else a constant reward would teach to look young. As they are for text.

    That state is the one before the column behind the actions, which is valid where an episode was cut."""
    if sequences.observations is None:
        return rewards
    behind = at_last(sequences.valid) & ~sequences.response_mask
    last = jnp.where(behind, values, 0.0).sum(-1, keepdims=True)
    return rewards + gamma * jnp.where(at_last(sequences.response_mask), last, 0.0)


def scorable(sequences: Sequences) -> Sequences:
    """``sequences`` with an empty ``response_mask`` in the rows whose score is NaN, which the host's graders could not
    score: such a response counts in no loss, baseline or metric. Where the reward model scores, nothing is changed: its
    NaN is a fault, to be seen.

    Networks compute the rows as they were before, since they may do so before the scores are known."""
    if sequences.scores is None:
        return sequences
    return sequences.replace(response_mask=sequences.response_mask & ~jnp.isnan(sequences.scores)[:, None])


def penalised(scores: Array, sequences: Sequences, penalty: float) -> Array:
    """f32[B]: ``scores`` less ``penalty`` where it is known that a response did not end by itself."""
    if not penalty or sequences.ended is None:
        return scores
    return missing_eos(scores, sequences.ended, penalty)


def old_logprobs(nets: Nets, state: TrainState, sequences: Sequences, how: Literal["sampler", "recompute"]) -> Array:
    """f32[B, S]: log-probs of the responses before any update, as sampled or by a pass of the trainer's own."""
    if how == "sampler":
        return given(sequences.logprobs, "sequences.logprobs")
    return read_logprobs(nets, "policy", state.trees, sequences)


def correct_for_sampler(
    advantages: Array, old: Array, sequences: Sequences, cfg: Correction
) -> tuple[Array, dict[str, Mean]]:
    """Importance sampling, where the sampler's probabilities are not quite the trainer's.

        ratio = exp(old - sampler)        how much likelier the trainer holds the token than the sampler did
        A     = A * weight

        sampler_ratio        token: that of the token; sequence: the product over the response; sequence-mean: the
                             geometric mean
        sampler_ratio_above  cap: weight = min(ratio, sampler_ratio_cap)
                             drop: weight = ratio, and 0 where it is above the cap or below sampler_ratio_floor

    A policy loss is positively homogeneous in the advantage, so this weights a token's share of it; values, returns,
    the KL from the reference, the entropy bonus and what the loss is divided by stay as they are. A cap of null:
    nothing is changed or reported.

    Args:
        advantages: f32[B, S], normalised already, 0 outside the responses.
        old: f32[B, S], log-probs that the trainer recomputed before any update.
        sequences: as sampled: ``sequences.logprobs`` are the sampler's.
        cfg: its cap is the largest weight. Below 1 it scales also those tokens down on which both agree.

    Returns:
        (advantages f32[B, S]; policy/sampler_ratio, the mean of the ratio over tokens, and their share that is above
        the cap, policy/sampler_ratio_capped, or is dropped, policy/sampler_ratio_dropped). Log-ratios are held within
        20 nats.

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"; of sequences, and
    dropping: Liu et al. 2025, "When Speed Kills Stability"; the truncation: Espeholt et al. 2018 (arXiv:1802.01561),
    section 4.1.
    """
    if (cap := cfg.sampler_ratio_cap) is None:
        return advantages, {}
    assert sequences.logprobs is not None, "the sampler's log-probs are missing"
    mask = sequences.response_mask
    log_ratio = keep(old, mask) - keep(sequences.logprobs, mask)
    if cfg.sampler_ratio == "sequence":
        log_ratio = keep(jnp.broadcast_to(log_ratio.sum(-1, keepdims=True), mask.shape), mask)
    elif cfg.sampler_ratio == "sequence-mean":
        log_ratio = row_means(log_ratio, mask)
    ratio = jnp.exp(jnp.clip(log_ratio, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))
    metrics = {"policy/sampler_ratio": sums(ratio, mask)}
    if cfg.sampler_ratio_above == "cap":
        return advantages * jnp.minimum(ratio, cap), metrics | {"policy/sampler_ratio_capped": sums(ratio > cap, mask)}
    outside = (ratio > cap) | (ratio < (cfg.sampler_ratio_floor or 0.0))
    return jnp.where(outside, 0.0, advantages * ratio), metrics | {"policy/sampler_ratio_dropped": sums(outside, mask)}


def rollout_metrics(
    sequences: Sequences,
    scores: Array | None,
    logprobs: Array,
    ref_logprobs: Array | None,
    members: Mapping[Role, Array] = MappingProxyType({}),
) -> dict[str, Mean]:
    """What the responses are like: kl/reference (with a reference) is in nats per response, lengths in tokens. Of those
    that have a score, but for response/tokens, which is of all.

    Args:
        sequences: as sampled, with the scores and grades that the host gave.
        scores: f32[B]; None: nothing scores.
        members: the scores of an ensemble's members, f32[B] each.
        logprobs: the old ones; kl/sampler_mismatch is their mean distance from those of the sampler, nats per token.
    """
    mask = scorable(sequences).response_mask
    rows = mask.any(-1)
    one = jnp.float32(1)
    old = keep(logprobs, mask)
    mismatch = jnp.zeros_like(old) if sequences.logprobs is None else old - keep(sequences.logprobs, mask)
    metrics = {}
    if scores is not None:
        metrics = {"score/mean": sums(scores, rows), "score/std": Mean(jnp.sqrt(variance(scores, rows, True)), one)}
    metrics |= {
        "kl/sampler_mismatch": sums(jnp.abs(mismatch), mask),
        "response/length_mean": sums(mask.sum(-1, dtype=jnp.float32), rows),
        "response/ended": sums(given(sequences.ended, "sequences.ended"), rows),
        "response/tokens": Mean(count(sequences.response_mask), one),
        "response/count": Mean(count(rows), one),
    }
    if sequences.rewards is not None:
        metrics["return/mean"] = sums(keep(sequences.rewards, mask).sum(-1), rows)
    if ref_logprobs is not None:
        metrics["kl/reference"] = sums((old - keep(ref_logprobs, mask)).sum(-1), rows)
    return metrics | grader_metrics(sequences, rows) | member_metrics(members, rows)


def grader_metrics(sequences: Sequences, rows: Array) -> dict[str, Mean]:
    """Where the host scores: score/unscorable, how many responses were left out; of several graders also the mean
    score/NAME over ``rows`` (bool[B], those that count) and score/unscorable/NAME."""
    if sequences.scores is None:
        return {}
    missing = {"score/unscorable": jnp.isnan(sequences.scores)}
    metrics: dict[str, Mean] = {}
    for name, grade in (sequences.grades or {}).items():
        missing[f"score/unscorable/{name}"] = jnp.isnan(grade)
        metrics[f"score/{name}"] = sums(grade, rows & ~jnp.isnan(grade))
    return metrics | {name: Mean(count(which), jnp.float32(1)) for name, which in missing.items()}


def policy_terms(
    objective: Objective,
    logprobs: Array,
    log_ratio: Array,
    advantages: Array,
    clip: tuple[float, float],
    dual_clip: float | None,
) -> tuple[Array, Array, Array]:
    """(loss of every response token, its ratio, whether that was clipped), by the objective that the config names; all
    [B, S]. ``clip``: how far the ratio may fall under 1, and rise over it."""
    if objective == "cispo":
        return weighted_likelihood_terms(logprobs, log_ratio, advantages, *clip)
    return clipped_policy_terms(log_ratio, jnp.zeros_like(log_ratio), advantages, *clip, dual_clip)


def update_metrics(
    logprobs: Array, old: Array, entropy: Array, ratio: Array, clipped: Array, mask: Array
) -> dict[str, Mean]:
    """How far an update is from the policy that sampled; means over response tokens. All [B, S]."""
    return {
        "policy/entropy": sums(entropy, mask),
        "policy/clip_fraction": sums(clipped, mask),
        "policy/ratio": sums(ratio, mask),
        "policy/kl_old": sums(kl_estimate(old, logprobs, "k3"), mask),
    }


def updates(cfg: Any) -> Updates:
    """Epochs x minibatches, until the policy has moved further than ``cfg.stop_kl`` from the one that sampled."""
    stop = None if cfg.stop_kl is None else lambda metrics: metrics["policy/kl_old"] > cfg.stop_kl
    return Updates(cfg.num_epochs, cfg.num_minibatches, stop)


def problems(cfg: Any) -> Iterator[str]:
    """The sampler's probabilities are corrected only where the trainer computes its own; a field that would do nothing
    is refused."""
    cap, floor = cfg.sampler_ratio_cap, cfg.sampler_ratio_floor
    if cap is not None and cfg.old_logprobs == "sampler":
        yield (
            f"sampler_ratio_cap: {cap}: old_logprobs is sampler, so there is no ratio to cap; "
            "expected null or old_logprobs recompute"
        )
    for name, default in (("sampler_ratio", "token"), ("sampler_ratio_above", "cap")):
        if cap is None and (value := getattr(cfg, name)) != default:
            yield f"{name}: {value}: sampler_ratio_cap is null, so no ratio is read; expected {default}"
    if floor is not None and (cap is None or cfg.sampler_ratio_above == "cap" or floor >= cap):
        yield f"sampler_ratio_floor: {floor}: expected null, or sampler_ratio_above drop and a higher sampler_ratio_cap"
    if cfg.objective == "cispo" and cfg.dual_clip is not None:
        yield f"dual_clip: {cfg.dual_clip}: cispo clips every ratio; expected null, or objective clip"
