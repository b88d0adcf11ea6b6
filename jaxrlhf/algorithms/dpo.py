"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): the reward model inside the policy.

The policy that is best under a reward and a KL penalty of beta is pi ~ reference * exp(reward / beta). Read the other
way round, a policy has an implicit reward, beta * (log pi - log reference) of a whole response, and preferences teach
it as they teach a reward model.
"""

import dataclasses
from typing import Literal

from jaxrlhf.algorithm import Algorithm, update_once
from jaxrlhf.algorithms.offline import logprob_metrics, pair_likelihoods, pair_terms, reward_metrics
from jaxrlhf.ops.masked import sums
from jaxrlhf.types import Array, Batch, Experience, Mean, Nets, Preferences, TrainState, Trees, given


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimisation: preference pairs, a reference, no reward model and no sampling."""

    beta: float = 0.1  # implicit reward for each nat between policy and reference
    objective: Literal["sigmoid", "ipo"] = "sigmoid"  # log-likelihood; ipo: its squared error, with a finite optimum
    label_smoothing: float = 0.0  # the share of pairs taken to be labelled the wrong way round


class DPOExperience(Experience, kw_only=True):
    """Pairs, and what the reference says of them."""

    pairs: Preferences
    ref_logprobs: tuple[Array, Array]  # f32[B] of the whole chosen and rejected responses, nats


def prepare(nets: Nets, state: TrainState, batch: Batch, cfg: DPOConfig) -> tuple[DPOExperience, dict[str, Mean]]:
    """Pairs are learned from as they come; the reference computes them once."""
    pairs = given(batch.preferences, "batch.preferences")
    chosen, rejected = pair_likelihoods(nets, "reference", state.trees, pairs)
    return DPOExperience(pairs=pairs, ref_logprobs=(chosen.total, rejected.total)), {}


def loss(nets: Nets, trees: Trees, minibatch: DPOExperience, cfg: DPOConfig) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Mean loss of a pair; a margin is in units of implicit reward. Padding pairs count for nothing."""
    pairs = minibatch.pairs
    real = pairs.chosen.valid.any(-1)
    sides = pair_likelihoods(nets, "policy", trees, pairs)
    chosen, rejected = (cfg.beta * (ours.total - ref) for ours, ref in zip(sides, minibatch.ref_logprobs, strict=True))
    total = sums(pair_terms(chosen, rejected, pairs.margin, cfg), real)
    return {"policy": total}, {
        "loss/policy": total,
        **reward_metrics(chosen, rejected, real),
        **logprob_metrics(*sides, real),
    }


ALGORITHM = Algorithm(
    config=DPOConfig,
    online=False,
    batch=lambda cfg: ("preferences",),
    roles=lambda cfg: ({"policy": "lm"}, {"reference": "lm"}),
    updates=update_once,
    prepare=prepare,
    loss=loss,
)
