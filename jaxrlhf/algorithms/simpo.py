"""Simple preference optimisation (SimPO, Meng et al. 2024, arXiv:2405.14734): preferences without a reference.

The implicit reward of a response is the mean log-prob of its tokens, which is what decoding follows. The chosen side
should have more of it, by a margin (equation 6):

    r    = beta * log pi(y | x) / tokens of y
    loss = -log sigmoid(r(chosen) - r(rejected) - target_margin)

No reference holds the policy: the learning rate and the number of iterations do.
"""

import dataclasses

from jaxrlhf.algorithm import Algorithm, update_once
from jaxrlhf.algorithms.offline import pair_likelihoods
from jaxrlhf.ops.losses import bradley_terry
from jaxrlhf.ops.masked import sums
from jaxrlhf.types import Batch, Experience, Mean, Nets, Preferences, TrainState, Trees, given


@dataclasses.dataclass(frozen=True)
class SimPOConfig:
    """Simple preference optimisation: preference pairs, no reference, rewards per token."""

    beta: float = 2.0  # implicit reward for each nat of the mean log-prob of a response's tokens
    target_margin: float = 1.0  # by how much the chosen side's reward should be higher, beside the margin of the data
    label_smoothing: float = 0.0  # the share of pairs taken to be labelled the wrong way round


class SimPOExperience(Experience, kw_only=True):
    """Pairs, as they come."""

    pairs: Preferences


def prepare(nets: Nets, state: TrainState, batch: Batch, cfg: SimPOConfig) -> tuple[SimPOExperience, dict[str, Mean]]:
    """Pairs are learned from as they come."""
    return SimPOExperience(pairs=given(batch.preferences, "batch.preferences")), {}


def loss(
    nets: Nets, trees: Trees, minibatch: SimPOExperience, cfg: SimPOConfig
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Mean loss of a pair; a margin of the data is in units of implicit reward. Padding pairs count for nothing."""
    pairs = minibatch.pairs
    real = pairs.chosen.valid.any(-1)
    chosen, rejected = pair_likelihoods(nets, "policy", trees, pairs)
    margin = cfg.target_margin + (0.0 if pairs.margin is None else pairs.margin)
    difference = cfg.beta * (chosen.mean - rejected.mean)
    terms = bradley_terry(difference - margin, 0.0 * difference, None, cfg.label_smoothing)
    total = sums(terms, real)
    return {"policy": total}, {
        "loss/policy": total,
        "implicit_reward/chosen": sums(cfg.beta * chosen.mean, real),
        "implicit_reward/rejected": sums(cfg.beta * rejected.mean, real),
        "implicit_reward/margin": sums(difference, real),
        "implicit_reward/accuracy": sums((difference > 0) + 0.5 * (difference == 0), real),
        "logprobs/chosen": sums(chosen.total, real),
        "logprobs/rejected": sums(rejected.total, real),
    }


ALGORITHM = Algorithm(
    config=SimPOConfig,
    online=False,
    batch=lambda cfg: ("preferences",),
    roles=lambda cfg: ({"policy": "lm"}, {}),
    updates=update_once,
    prepare=prepare,
    loss=loss,
)
