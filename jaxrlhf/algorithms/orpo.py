"""Odds-ratio preference optimisation (ORPO, Hong et al. 2024, arXiv:2403.07691): demonstrations and pairs at once.

The policy learns the chosen response as a demonstration, and its odds over the rejected one; there is no reference and
no fine-tuning before (equations 4 to 7):

    log p = log pi(y | x) / tokens of y        odds = p / (1 - p)
    loss  = -log p(chosen) - odds_coef * log sigmoid(log(odds(chosen) / odds(rejected)))
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
from jaxrlhf.ops.losses import bradley_terry, log_odds
from jaxrlhf.ops.masked import sums
from jaxrlhf.types import Mean, Nets, Trees


@dataclasses.dataclass(frozen=True)
class ORPOConfig:
    """Odds-ratio preference optimisation: preference pairs, no reference, a demonstration in each chosen side."""

    odds_coef: float = 0.1  # weight of the odds-ratio term beside the likelihood of the chosen side


def loss(
    nets: Nets, trees: Trees, minibatch: PairsExperience, cfg: ORPOConfig
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Mean loss of a pair; a margin of the data is in units of log odds. Padding pairs count for nothing."""
    pairs = minibatch.pairs
    real = pairs.chosen.valid.any(-1)
    chosen, rejected = pair_likelihoods(nets, "policy", trees, pairs)
    of_chosen, of_rejected = (log_odds(jnp.where(side.tokens > 0, side.mean, -1.0)) for side in (chosen, rejected))
    ratio = bradley_terry(of_chosen, of_rejected, pairs.margin)
    total = sums(cfg.odds_coef * ratio - chosen.mean, real)
    return {"policy": total}, {
        "loss/policy": total,
        "loss/nll": sums(-chosen.mean, real),
        "loss/odds_ratio": sums(ratio, real),
        **reward_metrics(of_chosen, of_rejected, real),
        **logprob_metrics(chosen, rejected, real),
    }


ALGORITHM = Algorithm(
    config=ORPOConfig,
    online=False,
    batch=lambda cfg: ("preferences",),
    roles=lambda cfg: ({"policy": "lm"}, {}),
    updates=update_once,
    prepare=prepare_pairs,
    loss=loss,
)
