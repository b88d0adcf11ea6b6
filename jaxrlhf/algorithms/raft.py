"""Rejection-sampling fine-tuning: likelihood of the best of the policy's own responses (RAFT, Dong et al. 2023,
arXiv:2304.06767; ReST, Gulcehre et al. 2023, arXiv:2308.08998).

Every prompt gets batch.samples_per_prompt responses. The ``keep`` with the highest scores become demonstrations:

    loss = - sum over tokens of the responses kept of log pi(token | before) / tokens kept

There is no value model, no baseline and no ratio to the old policy: as many epochs may follow as SFT would take. The
reference is not read; the learning rate and the number of iterations are what holds the policy near it.
"""

import dataclasses

from jaxrlhf.algorithm import Algorithm, Updates, two_samples
from jaxrlhf.algorithms import on_policy
from jaxrlhf.ops.masked import keep, sums
from jaxrlhf.ops.selection import best_in_group
from jaxrlhf.types import Array, Ask, AskedHead, Batch, Experience, Mean, Nets, Role, TrainState, Trees, given


@dataclasses.dataclass(frozen=True)
class RAFTConfig:
    """Rejection-sampling fine-tuning: the best responses to each prompt become demonstrations."""

    keep: int = 1  # responses to a prompt that are learned from: those with the highest scores
    num_epochs: int = 1  # passes over the responses of an iteration
    num_minibatches: int = 1  # updates an epoch
    missing_eos_penalty: float = 0.0  # taken off the score of a response that did not end


class RAFTExperience(Experience, kw_only=True):
    """Responses, and which of their tokens are learned."""

    learned: Array  # bool[B, S]


def roles(cfg: RAFTConfig) -> tuple[dict[Role, AskedHead], dict[Role, AskedHead]]:
    """The policy learns; the reward model stays."""
    return {"policy": "lm"}, {"reward": "scalar"}


def prepare(nets: Nets, state: TrainState, batch: Batch, cfg: RAFTConfig) -> tuple[RAFTExperience, dict[str, Mean]]:
    """Score the responses and keep the best of each prompt's. A row without a response, or without a score, is none."""
    sequences = given(batch.sequences, "batch.sequences")
    group_size = len(sequences.tokens) // len(given(batch.prompts, "batch.prompts").tokens)
    scores, members = on_policy.scores_of(nets, state.trees, sequences)
    logprobs = given(sequences.logprobs, "sequences.logprobs")
    metrics = on_policy.rollout_metrics(sequences, scores, logprobs, None, members)
    mask = on_policy.scorable(sequences).response_mask
    marks = on_policy.penalised(scores, sequences, cfg.missing_eos_penalty)
    best = best_in_group(marks, mask.any(-1), group_size, cfg.keep)
    metrics["score/kept"] = sums(scores, best)
    sequences = sequences.replace(scores=scores)
    return RAFTExperience(responses=sequences, learned=mask & best[:, None]), metrics


def loss(
    nets: Nets, trees: Trees, minibatch: RAFTExperience, cfg: RAFTConfig
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Mean negative log-likelihood of a token of the responses that were kept, in nats."""
    (stats,) = nets.read(trees, given(minibatch.responses, "responses"), Ask("policy", "token_stats"))
    nll = sums(-keep(stats.logprobs, minibatch.learned), minibatch.learned)
    return {"policy": nll}, {"loss/policy": nll, "policy/entropy": sums(stats.entropy, minibatch.learned)}


def updates(cfg: RAFTConfig) -> Updates:
    """Epochs x minibatches."""
    return Updates(cfg.num_epochs, cfg.num_minibatches)


ALGORITHM = Algorithm(
    config=RAFTConfig,
    online=True,
    batch=lambda cfg: ("prompts",),
    roles=roles,
    updates=updates,
    prepare=prepare,
    loss=loss,
    min_samples=two_samples,
)
