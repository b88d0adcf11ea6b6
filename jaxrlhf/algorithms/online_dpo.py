"""Online DPO (direct alignment from AI feedback, Guo et al. 2024, arXiv:2402.04792): the pairs are the policy's own.

Every prompt gets batch.samples_per_prompt responses. Those with the highest and the lowest score are a pair, and an
iteration is one step on DPO's loss of these pairs (dpo.py):

    r    = beta * (log pi(y | x) - log reference(y | x))
    loss = -log sigmoid(d)        d = r(best) - r(worst);  ipo: (d - 1/2)^2 / beta^2

The step starts at the policy that sampled, where ``prepare`` knows d. So the gradient is a sum over responses, each by
itself, and no pair has to stay together:

    gradient of loss = loss'(d) * beta * (gradient of log pi(best) - gradient of log pi(worst))
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxrlhf.algorithm import Algorithm, read_logprobs, two_samples, update_once
from jaxrlhf.algorithms import on_policy
from jaxrlhf.algorithms.offline import pair_terms, reward_metrics
from jaxrlhf.ops.masked import keep, sums
from jaxrlhf.ops.rows import group_rows, repeat_rows
from jaxrlhf.ops.selection import best_in_group
from jaxrlhf.types import Array, Ask, AskedHead, Batch, Experience, Mean, Nets, Role, TrainState, Trees, given


@dataclasses.dataclass(frozen=True)
class OnlineDPOConfig:
    """Online DPO: pairs of the policy's own responses, ranked by their scores, and a reference."""

    beta: float = 0.1  # implicit reward for each nat between policy and reference
    objective: Literal["sigmoid", "ipo"] = "sigmoid"  # log-likelihood; ipo: its squared error, with a finite optimum
    label_smoothing: float = 0.0  # the share of pairs taken to be ranked the wrong way round
    missing_eos_penalty: float = 0.0  # taken off the score of a response that did not end
    old_logprobs: Literal["sampler", "recompute"] = "recompute"  # sampler: saves a pass, equal to rounding


class OnlineDPOExperience(Experience, kw_only=True):
    """Responses, and the slope of the loss in the log-prob of each."""

    slopes: Array  # f32[B]: below 0 of the best, above 0 of the worst, 0 of the others
    best: Array  # bool[B]: one a pair


def roles(cfg: OnlineDPOConfig) -> tuple[dict[Role, AskedHead], dict[Role, AskedHead]]:
    """The policy learns; the reward model and the reference stay."""
    return {"policy": "lm"}, {"reward": "scalar", "reference": "lm"}


def ranked(marks: Array, rows: Array, size: int) -> tuple[Array, Array]:
    """(bool[B]: the best response to each prompt, bool[B]: the worst), neither where all ``marks`` f32[B] are equal.

    ``rows``: bool[B], the real ones."""
    best, worst = (best_in_group(sign * marks, rows, size, 1) for sign in (1, -1))
    of = lambda which: jnp.sum(group_rows(keep(marks, which), size), axis=1)
    differ = repeat_rows(of(best) > of(worst), size)
    return best & differ, worst & differ


def prepare(
    nets: Nets, state: TrainState, batch: Batch, cfg: OnlineDPOConfig
) -> tuple[OnlineDPOExperience, dict[str, Mean]]:
    """Score the responses, pair the best with the worst, and differentiate the loss in the implicit rewards."""
    sequences = given(batch.sequences, "batch.sequences")
    size = len(sequences.tokens) // len(given(batch.prompts, "batch.prompts").tokens)
    scores, members = on_policy.scores_of(nets, state.trees, sequences)
    logprobs = on_policy.old_logprobs(nets, state, sequences, cfg.old_logprobs)
    ref_logprobs = read_logprobs(nets, "reference", state.trees, sequences)
    metrics = on_policy.rollout_metrics(sequences, scores, logprobs, ref_logprobs, members)
    sequences = on_policy.scorable(sequences)
    mask = sequences.response_mask
    marks = on_policy.penalised(scores, sequences, cfg.missing_eos_penalty)
    best, worst = ranked(marks, mask.any(-1), size)
    rewards = cfg.beta * (keep(logprobs, mask) - keep(ref_logprobs, mask)).sum(-1)
    of = lambda which: jnp.sum(group_rows(keep(rewards, which), size), axis=1)
    chosen, rejected, real = of(best), of(worst), group_rows(best, size).any(1)
    slope = jax.grad(lambda chosen: jnp.sum(pair_terms(chosen, rejected, None, cfg)))(chosen)
    sign = best.astype(jnp.float32) - worst
    metrics |= {
        "loss/policy": sums(pair_terms(chosen, rejected, None, cfg), real),
        **reward_metrics(chosen, rejected, real),
        "group/zero_variance": sums(~real, group_rows(mask.any(-1), size).any(1)),
    }
    slopes = cfg.beta * repeat_rows(slope, size) * sign
    sequences = sequences.replace(scores=scores, logprobs=logprobs)
    return OnlineDPOExperience(responses=sequences, slopes=slopes, best=best), metrics


def loss(
    nets: Nets, trees: Trees, minibatch: OnlineDPOExperience, cfg: OnlineDPOConfig
) -> tuple[dict[Role, Mean], dict[str, Mean]]:
    """The slopes times the log-probs of the responses, a pair: the gradient of DPO's loss, though not its value."""
    sequences = given(minibatch.responses, "responses")
    mask = sequences.response_mask
    (stats,) = nets.read(trees, sequences, Ask("policy", "token_stats"))
    terms = minibatch.slopes * keep(stats.logprobs, mask).sum(-1)
    total = Mean(jnp.sum(terms), jnp.sum(minibatch.best, dtype=jnp.float32))
    return {"policy": total}, {"policy/entropy": sums(stats.entropy, mask)}


def informative(nets: Nets, state: TrainState, batch: Batch, cfg: OnlineDPOConfig) -> tuple[Array, Array]:
    """(bool[G]: groups that give a pair; scores f32[B])."""
    sequences = given(batch.sequences, "batch.sequences")
    size = len(sequences.tokens) // len(given(batch.prompts, "batch.prompts").tokens)
    scores, _ = on_policy.scores_of(nets, state.trees, sequences)
    marks = on_policy.penalised(scores, sequences, cfg.missing_eos_penalty)
    best, _ = ranked(marks, on_policy.scorable(sequences).response_mask.any(-1), size)
    return group_rows(best, size).any(1), scores


ALGORITHM = Algorithm(
    config=OnlineDPOConfig,
    online=True,
    batch=lambda cfg: ("prompts",),
    roles=roles,
    updates=update_once,
    prepare=prepare,
    loss=loss,
    min_samples=two_samples,
    informative=informative,
)
