"""A reward model from preference pairs (Bradley and Terry 1952; Ouyang et al. 2022, equation 1)."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxrlhf.algorithm import Algorithm, Normalization, update_once
from jaxrlhf.ops.losses import bradley_terry, centering
from jaxrlhf.ops.masked import sums
from jaxrlhf.ops.rows import deinterleave, interleave
from jaxrlhf.types import Array, Ask, Batch, Experience, Mean, Nets, Params, Preferences, TrainState, Trees, given


@dataclasses.dataclass(frozen=True)
class RMConfig:
    """A Bradley-Terry reward model."""

    centering: float = 0.0  # weight of (score_chosen + score_rejected)^2, which keeps scores near 0
    label_smoothing: float = 0.0  # the share of pairs taken to be labelled the wrong way round
    normalize_samples: int = 0  # responses of models.policy on which final scores get mean 0, std 1; 0: leave them


class RMExperience(Experience, kw_only=True):
    """Pairs, as they come."""

    pairs: Preferences


def score_pairs(nets: Nets, trees: Trees, pairs: Preferences) -> tuple[Array, Array]:
    """Scores f32[B] of the chosen and of the rejected rows, in one pass of the reward model."""
    (scores,) = nets.read(trees, interleave(pairs.chosen, pairs.rejected), Ask("reward", "scores"))
    return deinterleave(scores)


def preference_loss(
    nets: Nets, trees: Trees, pairs: Preferences, label_smoothing: float, center: float
) -> tuple[Mean, dict[str, Mean]]:
    """The reward model's loss over pairs, and its metrics; padding rows (no valid token) count for nothing.

    Calibration: ``reward/confidence`` is the mean probability given to the preference that the model itself predicts;
    a calibrated model has it equal to ``reward/accuracy``. ``reward/brier`` is the squared error of that probability.
    """
    chosen, rejected = score_pairs(nets, trees, pairs)
    real = pairs.chosen.valid.any(-1)
    likelihood = sums(bradley_terry(chosen, rejected, pairs.margin, label_smoothing), real)
    loss = likelihood
    if center:
        loss = Mean(likelihood.total + center * sums(centering(chosen, rejected), real).total, likelihood.count)
    difference = chosen - rejected
    probability = jax.nn.sigmoid(difference)
    right = (difference > 0) + 0.5 * (difference == 0)
    return loss, {
        "loss/reward": likelihood,
        "reward/accuracy": sums(right, real),
        "reward/margin": sums(difference, real),
        "reward/confidence": sums(jnp.maximum(probability, 1 - probability), real),
        "reward/brier": sums(jnp.square(1 - probability), real),
        "reward/chosen": sums(chosen, real),
        "reward/rejected": sums(rejected, real),
    }


def prepare(nets: Nets, state: TrainState, batch: Batch, cfg: RMConfig) -> tuple[RMExperience, dict[str, Mean]]:
    """Pairs are learned from as they come."""
    return RMExperience(pairs=given(batch.preferences, "batch.preferences")), {}


def loss(nets: Nets, trees: Trees, minibatch: RMExperience, cfg: RMConfig) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """-log p(chosen is preferred) of a pair, in nats, plus the centring term."""
    total, metrics = preference_loss(nets, trees, minibatch.pairs, cfg.label_smoothing, cfg.centering)
    return {"reward": total}, metrics


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
