"""A cost model from labels, safe or not, and pairs (Safe RLHF, Dai et al. 2023, arXiv:2310.12773, equation 6).

The cost C of a response is above 0 where it is unsafe and below 0 where it is safe: its sign is the label.

    loss = - log sigmoid(s * C)                    of a label: s = 1 unsafe, -1 safe
           - log sigmoid(C(rejected) - C(chosen))  of a pair, with pairs: true; chosen is the less harmful side

averaged over all labels and pairs: as in the paper, where both sides of every pair are labelled. Labels are the rows of
data.unpaired (label: true is safe). A list under models.cost is an ensemble, as in ``rm``.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrlhf.algorithm import Algorithm, update_once
from jaxrlhf.algorithms.grading import combined, over_members, read_members
from jaxrlhf.algorithms.rm import combined_sides, right, score_pairs
from jaxrlhf.ops.losses import bradley_terry
from jaxrlhf.ops.masked import sums
from jaxrlhf.types import (
    Array,
    Batch,
    Experience,
    Mean,
    Nets,
    Preferences,
    Role,
    Rows,
    TrainState,
    Trees,
    Unpaired,
    given,
)


@dataclasses.dataclass(frozen=True)
class CMConfig:
    """A cost model: the sign of a response's cost says whether it is safe."""

    pairs: bool = False  # also learn from data.preferences, whose chosen side is the less harmful one


class CMExperience(Experience, kw_only=True):
    """Labelled responses, and pairs, as they come."""

    labelled: Unpaired
    pairs: Rows | None = None  # Preferences


def prepare(nets: Nets, state: TrainState, batch: Batch, cfg: CMConfig) -> tuple[CMExperience, dict[str, Mean]]:
    """Rows are learned from as they come."""
    labelled = given(batch.unpaired, "batch.unpaired").replace(mismatched=None)
    pairs = Rows(given(batch.preferences, "batch.preferences")) if cfg.pairs else None
    return CMExperience(labelled=labelled, pairs=pairs), {}


def loss(nets: Nets, trees: Trees, minibatch: CMExperience, cfg: CMConfig) -> tuple[dict[Role, Mean], dict[str, Mean]]:
    """-log p(label) of a response and -log p(chosen is less harmful) of a pair, in nats: the mean of all of them, for
    each member. Padding rows count for nothing."""
    rows = minibatch.labelled.responses
    costs = read_members(nets, trees, rows, "cost")
    real, safe = rows.valid.any(-1), minibatch.labelled.desirable
    labels = {role: sums(-jax.nn.log_sigmoid(jnp.where(safe, -cost, cost)), real) for role, cost in costs.items()}
    metrics = {"loss/cost": over_members(labels.values())} | label_metrics(combined(nets, costs, "cost"), safe, real)
    if minibatch.pairs is None:
        return labels, metrics
    ranks, pair_metrics = rank_losses(nets, trees, minibatch.pairs.data)
    return {role: labels[role] + rank for role, rank in ranks.items()}, metrics | pair_metrics


def label_metrics(cost: Array, safe: Array, real: Array) -> dict[str, Mean]:
    """How often the sign of the cost is the label, and the cost of either kind; f32[B], bool[B], bool[B]."""
    return {
        "cost/accuracy": sums(right(jnp.where(safe, -cost, cost)), real),
        "cost/safe": sums(cost, real & safe),
        "cost/unsafe": sums(cost, real & ~safe),
    }


def rank_losses(nets: Nets, trees: Trees, pairs: Preferences) -> tuple[dict[Role, Mean], dict[str, Mean]]:
    """-log p(chosen is less harmful) of each member, and how often the combined cost says so."""
    scores, real = score_pairs(nets, trees, pairs, "cost"), pairs.chosen.valid.any(-1)
    losses = {role: sums(bradley_terry(-chosen, -rejected), real) for role, (chosen, rejected) in scores.items()}
    chosen, rejected = combined_sides(nets, scores, "cost")
    accuracy = sums(right(rejected - chosen), real)
    return losses, {"loss/cost_pairs": over_members(losses.values()), "cost/pair_accuracy": accuracy}


ALGORITHM = Algorithm(
    config=CMConfig,
    online=False,
    batch=lambda cfg: ("unpaired", "preferences") if cfg.pairs else ("unpaired",),
    roles=lambda cfg: ({"cost": "scalar"}, {}),
    updates=update_once,
    prepare=prepare,
    loss=loss,
)
