"""On-policy distillation: the policy samples, and a frozen teacher scores each token (GKD, Agarwal et al. 2023,
arXiv:2306.13649; MiniLLM, Gu et al. 2023, arXiv:2306.08543).

The teacher has the policy's tokenizer, and an architecture of its own. ``divergence_in`` says where it counts:

    loss      divergence_coef * D(policy, teacher) at each token of the responses     D: ops/divergence.py, exact
    rewards   A[t] -= divergence_coef * (log pi_old - log teacher)[t], of the sampled token alone: an estimate of the
              reverse KL whose gradient comes with PPO's clipped step (Lu 2025, "On-Policy Distillation"); each token
              answers for itself, so there is no discount

With ``reward_coef`` the responses are scored too, by a reward model or by functions, and A is reward_coef times what
each response earned over its group, as in grpo. The step is then

    loss = - min(A * ratio, A * clip(ratio, 1 - clip_range_low, 1 + clip_range_high)) + divergence_coef * D

``on_policy_share`` (GKD's lambda) below 1: the other share of the loss is D at the response tokens of demonstrations,

    loss = on_policy_share * mean over sampled tokens + (1 - on_policy_share) * mean over tokens of data

which is the mean of GKD's loss over its draws, without their noise.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax.numpy as jnp

from jaxrlhf.algorithm import TEACHER, Algorithm, Updates, read_logprobs
from jaxrlhf.algorithms import on_policy, teaching
from jaxrlhf.ops.advantages import GroupBaseline, group_advantages
from jaxrlhf.ops.losses import Aggregation, aggregate, aggregated
from jaxrlhf.ops.masked import keep, sums
from jaxrlhf.types import (
    Array,
    Ask,
    AskedHead,
    Batch,
    Experience,
    Mean,
    Nets,
    Role,
    Rows,
    Sequences,
    TrainState,
    Trees,
    given,
)


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """On-policy distillation: a teacher scores each token that the policy samples."""

    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"  # of policy and teacher: ops/divergence.py
    beta: float = 0.5  # jsd: weight of the teacher in the mixture; TRL's 0 and 1 are forward_kl and reverse_kl
    top_k: int = 0  # only so many tokens, those that the teacher holds likeliest; 0: the whole vocabulary
    tail: Literal["bucket", "drop"] = "bucket"  # top_k: the rest is one outcome more, or both are renormalised without
    temperature: float = 1.0  # both models' logits are divided by it, whatever generate.temperature is
    divergence_in: Literal["loss", "rewards"] = "loss"  # rewards: log-ratio of the sampled token, in its advantage
    divergence_coef: float = 1.0  # weight of the divergence
    reward_coef: float = 0.0  # weight of the advantages of scored responses; 0: no reward model is held
    advantages: GroupBaseline = "mean_std"  # score - mean of the group, / its std; leave_one_out: - mean of the others
    std_eps: float = 1e-6  # mean_std: added to the standard deviation, in units of score
    clip_range_low: float = 0.2  # how far the ratio may fall under 1, where there are advantages
    clip_range_high: float = 0.2  # how far it may rise over 1
    aggregation: Aggregation = "token-mean"  # mean over all tokens; or over responses, of their token sums or means
    on_policy_share: float = 1.0  # of the loss; the rest is that of demonstrations, sequences_per_step of them
    num_epochs: int = 1  # passes over the responses of an iteration
    num_minibatches: int = 1  # updates an epoch


class Demonstrated(Experience, kw_only=True):
    """Responses of data, and what each row counts."""

    weights: Array  # f32[D]


class DistillExperience(Experience, kw_only=True):
    """Responses, what each row counts, and what each token earned."""

    weights: Array | None = None  # f32[B], where on_policy_share is below 1
    advantages: Array | None = None  # f32[B, S]; None: nothing is earned, and the divergence is all
    data: Rows | None = None  # Demonstrated, where on_policy_share is below 1


def roles(cfg: DistillConfig) -> tuple[dict[Role, AskedHead], dict[Role, AskedHead]]:
    """The policy learns; the teacher stays, and so does the reward model where scores count."""
    slow: dict[Role, AskedHead] = {TEACHER: "lm"}
    if cfg.reward_coef:
        slow["reward"] = "scalar"
    return {"policy": "lm"}, slow


def prepare(
    nets: Nets, state: TrainState, batch: Batch, cfg: DistillConfig
) -> tuple[DistillExperience, dict[str, Mean]]:
    """Score the responses where something scores them; the teacher reads them here if its log-probs are rewards."""
    sequences = given(batch.sequences, "batch.sequences")
    scores, members = None, {}
    if cfg.reward_coef or sequences.scores is not None:
        scores, members = on_policy.scores_of(nets, state.trees, sequences)
    logprobs = given(sequences.logprobs, "sequences.logprobs")
    metrics = on_policy.rollout_metrics(sequences, scores, logprobs, None, members)
    # a response without a score teaches nothing of it, and of the teacher neither
    learned = on_policy.scorable(sequences) if cfg.reward_coef else sequences
    mask, advantages = learned.response_mask, None
    if cfg.reward_coef:
        size = len(mask) // len(given(batch.prompts, "batch.prompts").tokens)
        each, equal = group_advantages(given(scores, "scores"), mask.any(-1), size, cfg.advantages, cfg.std_eps)
        advantages = jnp.where(mask, cfg.reward_coef * each[:, None], 0.0)
        metrics |= {} if cfg.advantages == "none" else {"group/zero_variance": equal}
    if cfg.divergence_in == "rewards":
        found = read_logprobs(nets, TEACHER, state.trees, sequences)
        apart = keep(logprobs, mask) - keep(found, mask)
        advantages = (0.0 if advantages is None else advantages) - cfg.divergence_coef * apart
        metrics["kl/teacher"] = sums(apart.sum(-1), mask.any(-1))
    sequences = learned.replace(scores=scores)
    weights, data = shares(sequences, batch.demonstrations, cfg)
    return DistillExperience(responses=sequences, weights=weights, advantages=advantages, data=data), metrics


def shares(
    sequences: Sequences, demonstrations: Sequences | None, cfg: DistillConfig
) -> tuple[Array | None, Rows | None]:
    """(f32[B]: what a sampled row counts; the rows of data, with what each of those counts), so that the loss over all
    of them, divided by all that is counted, is the mean over each kind times its share. None without data."""
    if cfg.on_policy_share == 1.0:
        return None, None
    rows = given(demonstrations, "batch.demonstrations")
    masks = [sequences.response_mask, rows.response_mask]
    counts = [aggregated(mask, cfg.aggregation) for mask in masks]
    sampled, of_data = (
        jnp.ones_like(mask[:, 0], jnp.float32) * share * sum(counts) / jnp.maximum(count, 1.0)
        for mask, share, count in zip(masks, (cfg.on_policy_share, 1.0 - cfg.on_policy_share), counts, strict=True)
    )
    return sampled, Rows(Demonstrated(responses=rows, weights=of_data))


def loss(
    nets: Nets, trees: Trees, minibatch: DistillExperience, cfg: DistillConfig
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """The divergence, the clipped loss of the advantages, or both; and the divergence on demonstrations."""
    sequences = given(minibatch.responses, "responses")
    mask, ask = sequences.response_mask, teaching.ask_teacher(cfg)
    in_loss, earned = cfg.divergence_in == "loss", minibatch.advantages is not None
    asks = [*([ask] if in_loss else []), *([Ask("policy", "token_stats")] if earned else [])]
    answers = list(nets.read(trees, sequences, *asks))
    each, metrics = jnp.zeros(mask.shape), {}
    if in_loss:
        stats = answers.pop(0)
        each = each + cfg.divergence_coef * keep(stats.divergence, mask)
        metrics |= teaching.divergence_metrics(stats, mask, cfg)
    if earned:
        clip, old = (cfg.clip_range_low, cfg.clip_range_high), keep(given(sequences.logprobs, "logprobs"), mask)
        logprobs, entropy = keep(answers[0].logprobs, mask), keep(answers[0].entropy, mask)
        advantages = given(minibatch.advantages, "advantages")
        policy, ratio, clipped = on_policy.policy_terms("clip", logprobs, logprobs - old, advantages, clip, None)
        each = each + policy
        metrics = on_policy.update_metrics(logprobs, old, entropy, ratio, clipped, mask) | metrics
    total = metrics["loss/policy"] = aggregate(each, mask, cfg.aggregation)
    if minibatch.data is not None:
        weights = given(minibatch.weights, "weights")[:, None]
        more, metrics["teacher/divergence_data"] = loss_on_data(nets, trees, minibatch.data.data, cfg)
        total = metrics["loss/policy"] = aggregate(each * weights, mask, cfg.aggregation) + more
    return {"policy": total}, metrics


def loss_on_data(nets: Nets, trees: Trees, rows: Demonstrated, cfg: DistillConfig) -> tuple[Mean, Mean]:
    """(the weighted divergence at the response tokens of demonstrations; nats a token)."""
    sequences = given(rows.responses, "responses")
    mask = sequences.response_mask
    (stats,) = nets.read(trees, sequences, teaching.ask_teacher(cfg))
    each = cfg.divergence_coef * keep(stats.divergence, mask) * rows.weights[:, None]
    return aggregate(each, mask, cfg.aggregation), sums(stats.divergence, mask)


def min_samples(cfg: DistillConfig) -> int:
    """Two where the scores of responses are compared."""
    return 2 if cfg.reward_coef and cfg.advantages != "none" else 1


def problems(cfg: DistillConfig) -> Iterator[str]:
    """A field that would do nothing is refused, and a divergence that a sampled token does not tell."""
    yield from teaching.problems(cfg)
    if cfg.divergence_in == "rewards":
        for name, needed in (("divergence", "reverse_kl"), ("top_k", 0), ("temperature", 1.0)):
            if (value := getattr(cfg, name)) != needed:
                told = f"{value:g}" if isinstance(value, (int, float)) else value
                yield (
                    f"{name}: {told}: divergence_in rewards is the reverse KL of sampled tokens; "
                    f"expected {needed}, or divergence_in loss"
                )
    if not cfg.reward_coef and cfg.advantages != "mean_std":
        yield f"advantages: {cfg.advantages}: reward_coef is 0, so no group is compared; expected mean_std"
    if not cfg.divergence_coef and not cfg.reward_coef:
        yield "divergence_coef: 0: nothing would be learned; expected more than 0, or a reward_coef"


ALGORITHM = Algorithm(
    config=DistillConfig,
    online=True,
    batch=lambda cfg: ("prompts",) if cfg.on_policy_share == 1.0 else ("prompts", "demonstrations"),
    roles=roles,
    updates=lambda cfg: Updates(cfg.num_epochs, cfg.num_minibatches),
    prepare=prepare,
    loss=loss,
    problems=problems,
    min_samples=min_samples,
)
