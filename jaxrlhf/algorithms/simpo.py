"""Simple preference optimisation (SimPO, Meng et al. 2024, arXiv:2405.14734): preferences without a reference.

The implicit reward of a response is the mean log-prob of its tokens, which is what decoding follows. The chosen side
should have more of it, by a margin (equation 6):

    r    = beta * log pi(y | x) / tokens of y
    loss = -log sigmoid(r(chosen) - r(rejected) - target_margin)

No reference holds the policy: the learning rate and the number of iterations do.
"""

import dataclasses

import jax.numpy as jnp

from jaxrlhf.algorithm import Algorithm, update_once
from jaxrlhf.algorithms.offline import (
    PairsExperience,
    logprob_metrics,
    pair_likelihoods,
    prepare_pairs,
    reward_metrics,
)
from jaxrlhf.ops.losses import bradley_terry
from jaxrlhf.ops.masked import sums
from jaxrlhf.types import Mean, Nets, Trees


@dataclasses.dataclass(frozen=True)
class SimPOConfig:
    """Simple preference optimisation: preference pairs, no reference, rewards per token."""

    beta: float = 2.0  # implicit reward for each nat of the mean log-prob of a response's tokens
    target_margin: float = 1.0  # by how much the chosen side's reward should be higher, beside the margin of the data
    label_smoothing: float = 0.0  # the share of pairs taken to be labelled the wrong way round


def loss(
    nets: Nets, trees: Trees, minibatch: PairsExperience, cfg: SimPOConfig
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Mean loss of a pair; a margin of the data is in units of implicit reward. Padding pairs count for nothing."""
    pairs = minibatch.pairs
    real = pairs.chosen.valid.any(-1)
    chosen, rejected = pair_likelihoods(nets, "policy", trees, pairs)
    of_chosen, of_rejected = cfg.beta * chosen.mean, cfg.beta * rejected.mean
    margin = cfg.target_margin + (jnp.zeros_like(of_chosen) if pairs.margin is None else pairs.margin)
    terms = bradley_terry(of_chosen, of_rejected, margin, cfg.label_smoothing)
    total = sums(terms, real)
    return {"policy": total}, {
        "loss/policy": total,
        **reward_metrics(of_chosen, of_rejected, real),
        **logprob_metrics(chosen, rejected, real),
    }


ALGORITHM = Algorithm(
    config=SimPOConfig,
    online=False,
    batch=lambda cfg: ("preferences",),
    roles=lambda cfg: ({"policy": "lm"}, {}),
    updates=update_once,
    prepare=prepare_pairs,
    loss=loss,
)
