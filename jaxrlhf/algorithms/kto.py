"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306): responses that are each good or bad.

As in DPO, a policy has an implicit reward, beta * (log pi - log reference) of a whole response. A good response should
have more than a baseline and a bad one less; gains and losses saturate, as people value them (equation 8):

    r      = log pi(y | x) - log reference(y | x)
    z      = max(0, mean over rows of log pi(y' | x) - log reference(y' | x))       y': the response of another row
    loss   = weight * (1 - sigmoid(beta * (r - z)))      desirable;  sigmoid(beta * (z - r)) where undesirable

z estimates KL(pi || reference), of the policy as it is when the iteration starts, and has no gradient.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrlhf.algorithm import Algorithm, update_once
from jaxrlhf.algorithms.offline import response_logprobs
from jaxrlhf.ops import masked
from jaxrlhf.ops.masked import sums
from jaxrlhf.ops.rows import deinterleave, interleave
from jaxrlhf.types import Array, Batch, Experience, Mean, Nets, TrainState, Trees, Unpaired, given


@dataclasses.dataclass(frozen=True)
class KTOConfig:
    """Kahneman-Tversky optimisation: responses labelled good or bad, a reference, no pairs and no sampling."""

    beta: float = 0.1  # implicit reward for each nat between policy and reference
    desirable_weight: float = 1.0  # of good responses; times their number: 1 to 4/3 of the same of the bad ones
    undesirable_weight: float = 1.0  # of bad responses


class KTOExperience(Experience, kw_only=True):
    """Labelled responses, and what the reference says of them."""

    rows: Unpaired
    ref_logprobs: Array  # f32[B] of whole responses, nats
    baseline: Array  # f32[B]: nats, the same in all rows


def prepare(nets: Nets, state: TrainState, batch: Batch, cfg: KTOConfig) -> tuple[KTOExperience, dict[str, Mean]]:
    """The reference's log-probs of the responses, and the baseline of the whole batch."""
    rows = given(batch.unpaired, "batch.unpaired")
    others = given(rows.mismatched, "batch.unpaired.mismatched")
    real = rows.responses.valid.any(-1)
    reference, of_others = deinterleave(
        response_logprobs(nets, "reference", state.trees, interleave(rows.responses, others))
    )
    difference = response_logprobs(nets, "policy", state.trees, others) - of_others
    baseline = jnp.maximum(masked.mean(difference, real), 0.0)
    experience = KTOExperience(
        rows=rows.replace(mismatched=None),
        ref_logprobs=reference,
        baseline=jnp.where(real, baseline, 0.0),
    )
    return experience, {"kl/baseline": Mean(baseline, jnp.float32(1))}


def loss(nets: Nets, trees: Trees, minibatch: KTOExperience, cfg: KTOConfig) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Mean loss of a response, between 0 and its weight. Padding rows count for nothing."""
    rows = minibatch.rows
    real, good = rows.responses.valid.any(-1), rows.desirable
    logprobs = response_logprobs(nets, "policy", trees, rows.responses)
    ratio = logprobs - minibatch.ref_logprobs
    gain = jnp.where(good, 1.0, -1.0) * (ratio - minibatch.baseline)
    weight = jnp.where(good, cfg.desirable_weight, cfg.undesirable_weight)
    total = sums(weight * jax.nn.sigmoid(-cfg.beta * gain), real)
    reward = cfg.beta * ratio
    return {"policy": total}, {
        "loss/policy": total,
        "implicit_reward/desirable": sums(reward, real & good),
        "implicit_reward/undesirable": sums(reward, real & ~good),
        "implicit_reward/accuracy": sums((gain > 0) + 0.5 * (gain == 0), real),
        "logprobs/desirable": sums(logprobs, real & good),
        "logprobs/undesirable": sums(logprobs, real & ~good),
    }


ALGORITHM = Algorithm(
    config=KTOConfig,
    online=False,
    batch=lambda cfg: ("unpaired",),
    roles=lambda cfg: ({"policy": "lm"}, {"reference": "lm"}),
    updates=update_once,
    prepare=prepare,
    loss=loss,
)
