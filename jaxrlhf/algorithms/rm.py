"""A reward model from preference pairs (Bradley and Terry 1952; Ouyang et al. 2022, equation 1), or an ensemble.

A list under models.reward is an ensemble: its members start from weights, or heads, of their own, and learn from the
same pairs in one program, each with an optimizer of its own. rewards.combine says what their score is.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxrlhf.algorithm import Algorithm, Normalization, update_once
from jaxrlhf.algorithms.grading import combined, over_members, read_members
from jaxrlhf.ops.ensembles import bootstrap_counts, disagreement, row_hash
from jaxrlhf.ops.losses import bradley_terry, centering
from jaxrlhf.ops.masked import keep, sums
from jaxrlhf.ops.rows import deinterleave, interleave
from jaxrlhf.types import Array, Batch, Experience, Mean, Nets, Params, Preferences, Role, TrainState, Trees, given


@dataclasses.dataclass(frozen=True)
class RMConfig:
    """A Bradley-Terry reward model."""

    centering: float = 0.0  # weight of (score_chosen + score_rejected)^2, which keeps scores near 0
    label_smoothing: float = 0.0  # the share of pairs taken to be labelled the wrong way round
    bootstrap: bool = False  # an ensemble's members each count a pair as often as it is in their own bootstrap sample
    normalize_samples: int = 0  # responses of models.policy on which final scores get mean 0, std 1; 0: leave them


class RMExperience(Experience, kw_only=True):
    """Pairs, as they come."""

    pairs: Preferences


def score_pairs(
    nets: Nets, trees: Trees, pairs: Preferences, grader: Role = "reward"
) -> dict[Role, tuple[Array, Array]]:
    """Scores f32[B] of the chosen and of the rejected rows by each member, in one pass of each."""
    scores = read_members(nets, trees, interleave(pairs.chosen, pairs.rejected), grader)
    return {role: deinterleave(each) for role, each in scores.items()}


def combined_sides(nets: Nets, scores: dict[Role, tuple[Array, Array]], grader: Role = "reward") -> tuple[Array, Array]:
    """What the members say of the chosen rows together, and of the rejected ones; each f32[B]."""
    chosen, rejected = (combined(nets, {role: pair[side] for role, pair in scores.items()}, grader) for side in (0, 1))
    return chosen, rejected


def preference_losses(
    nets: Nets, trees: Trees, pairs: Preferences, label_smoothing: float, center: float, bootstrap: bool = False
) -> tuple[dict[Role, Mean], dict[str, Mean]]:
    """The loss of each member over pairs, and the metrics of all together; padding rows (no valid token) count for
    nothing. ``bootstrap``: each member counts each pair as often as it is in its own bootstrap sample."""
    scores, losses, likelihoods = score_pairs(nets, trees, pairs), {}, []
    real = pairs.chosen.valid.any(-1)
    for number, (role, (chosen, rejected)) in enumerate(scores.items()):
        terms = bradley_terry(chosen, rejected, pairs.margin, label_smoothing)
        likelihoods.append(sums(terms, real))
        counts = bootstrap_counts(hash_of(pairs), number) if bootstrap else None
        loss = likelihoods[-1] if counts is None else weighted_sums(terms, counts, real)
        if center:
            away = centering(chosen, rejected)
            drift = sums(away, real) if counts is None else weighted_sums(away, counts, real)
            loss = Mean(loss.total + center * drift.total, loss.count)
        losses[role] = loss
    return losses, {"loss/reward": over_members(likelihoods)} | pair_metrics(nets, scores, real)


def weighted_sums(x: Array, counts: Array, real: Array) -> Mean:
    """The mean of ``x`` over the rows in ``real``, each as often as ``counts`` says; all [B]."""
    weights = keep(counts, real)
    return Mean(jnp.sum(weights * keep(x, real)), jnp.sum(weights))


def hash_of(pairs: Preferences) -> Array:
    """u32[B]: what tells a pair from all others."""
    chosen, rejected = (row_hash(side.tokens, side.valid) for side in (pairs.chosen, pairs.rejected))
    return chosen ^ (rejected * jnp.uint32(3))


def pair_metrics(nets: Nets, scores: dict[Role, tuple[Array, Array]], real: Array) -> dict[str, Mean]:
    """What the combined score gets right of the pairs in ``real`` (bool[B]), and how far members are apart.

    Calibration: ``reward/confidence`` is the mean probability given to the preference that the model itself predicts;
    a calibrated model has it equal to ``reward/accuracy``. ``reward/brier`` is the squared error of that probability.
    """
    chosen, rejected = combined_sides(nets, scores)
    difference = chosen - rejected
    probability = jax.nn.sigmoid(difference)
    metrics = {
        "reward/accuracy": sums(right(difference), real),
        "reward/margin": sums(difference, real),
        "reward/confidence": sums(jnp.maximum(probability, 1 - probability), real),
        "reward/brier": sums(jnp.square(1 - probability), real),
        "reward/chosen": sums(chosen, real),
        "reward/rejected": sums(rejected, real),
    }
    if len(scores) > 1:
        each = {role: chosen - rejected for role, (chosen, rejected) in scores.items()}
        metrics |= {f"reward/accuracy/{role}": sums(right(one), real) for role, one in each.items()}
        metrics["reward/disagreement"] = sums(disagreement(jnp.stack([*each.values()])), real)
    return metrics


def right(difference: Array) -> Array:
    """f32[B]: 1 where the chosen side has the higher score, 1/2 for a tie."""
    return (difference > 0) + 0.5 * (difference == 0)


def prepare(nets: Nets, state: TrainState, batch: Batch, cfg: RMConfig) -> tuple[RMExperience, dict[str, Mean]]:
    """Pairs are learned from as they come."""
    return RMExperience(pairs=given(batch.preferences, "batch.preferences")), {}


def loss(nets: Nets, trees: Trees, minibatch: RMExperience, cfg: RMConfig) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """-log p(chosen is preferred) of a pair, in nats, plus the centring term."""
    return preference_losses(nets, trees, minibatch.pairs, cfg.label_smoothing, cfg.centering, cfg.bootstrap)


def fold(head: Params, mean: float, std: float) -> Params:
    """The head whose scores are (old scores - mean) / std: kernel / std and (bias - mean) / std."""
    scale = 1.0 / jnp.maximum(std, 1e-6)
    return {"kernel": head["kernel"] * scale, "bias": (head["bias"] - mean) * scale}


def finish(cfg: RMConfig) -> Normalization | None:
    """Normalise the scores on ``normalize_samples`` responses, so that a nat of KL costs the same against every reward
    model (Ziegler et al. 2019; Stiennon et al. 2020)."""
    return Normalization("reward", cfg.normalize_samples, fold) if cfg.normalize_samples else None


def problems(cfg: RMConfig) -> Iterator[str]:
    """A standard deviation needs two scores."""
    if cfg.normalize_samples == 1:
        yield "normalize_samples: 1: a score alone has no deviation; expected 0 or 2 and more; nearest: 2"


ALGORITHM = Algorithm(
    config=RMConfig,
    online=False,
    batch=lambda cfg: ("preferences",),
    roles=lambda cfg: ({"reward": "scalar"}, {}),
    updates=update_once,
    prepare=prepare,
    loss=loss,
    finish=finish,
    problems=problems,
)
