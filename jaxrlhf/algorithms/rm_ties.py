"""A reward model from preference pairs of which some are ties (Rao and Kupper 1967, "Ties in paired-comparison
experiments: a generalization of the Bradley-Terry model").

A side wins where it is better by more than a threshold; else the two are equal. With d = score_chosen - score_rejected:

    P(chosen wins) = sigmoid(d - threshold)        P(rejected wins) = sigmoid(-d - threshold)
    P(tie) = 1 - both = (exp(2 threshold) - 1) sigmoid(d - threshold) sigmoid(-d - threshold)

and the loss is -log of the probability of what the data say. Without ties it is Bradley and Terry's with a margin.
"""

import dataclasses

import jax.numpy as jnp

from jaxrlhf.algorithm import Algorithm, update_once
from jaxrlhf.algorithms import rm
from jaxrlhf.algorithms.rm import pair_metrics, score_pairs
from jaxrlhf.ops.losses import rao_kupper
from jaxrlhf.ops.masked import sums
from jaxrlhf.types import Batch, Comparisons, Experience, Mean, Nets, TrainState, Trees, given


@dataclasses.dataclass(frozen=True)
class RMTiesConfig:
    """A reward model from pairs and ties."""

    tie_threshold: float = 1.0  # sides whose scores differ by less are rather equal; more than 0
    normalize_samples: int = 0  # responses of models.policy on which final scores get mean 0, std 1; 0: leave them


class RMTiesExperience(Experience, kw_only=True):
    """Comparisons, as they come."""

    comparisons: Comparisons


def prepare(nets: Nets, state: TrainState, batch: Batch, cfg: RMTiesConfig) -> tuple[RMTiesExperience, dict[str, Mean]]:
    """Comparisons are learned from as they come."""
    return RMTiesExperience(comparisons=given(batch.comparisons, "batch.comparisons")), {}


def loss(
    nets: Nets, trees: Trees, minibatch: RMTiesExperience, cfg: RMTiesConfig
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Mean negative log-likelihood of a comparison, in nats, of each member of an ensemble; the metrics of pairs are of
    those that are no ties."""
    pairs, tie = minibatch.comparisons.pairs, minibatch.comparisons.tie
    real = pairs.chosen.valid.any(-1)
    scores = score_pairs(nets, trees, pairs)
    losses = {
        role: sums(rao_kupper(chosen, rejected, tie, cfg.tie_threshold), real)
        for role, (chosen, rejected) in scores.items()
    }
    found = [*losses.values()]
    apart = jnp.mean(jnp.stack([jnp.abs(chosen - rejected) for chosen, rejected in scores.values()]), axis=0)
    return losses, {
        "loss/reward": sum(found[1:], found[0]),
        "reward/ties": sums(tie, real),
        "reward/tie_difference": sums(apart, real & tie),
    } | pair_metrics(nets, scores, real & ~tie)


ALGORITHM = Algorithm(
    config=RMTiesConfig,
    online=False,
    batch=lambda cfg: ("comparisons",),
    roles=lambda cfg: ({"reward": "scalar"}, {}),
    updates=update_once,
    prepare=prepare,
    loss=loss,
    finish=rm.finish,
    problems=rm.problems,
)
