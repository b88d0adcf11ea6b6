"""PPO under a constraint: a multiplier holds the expected cost of a response at a limit (Safe RLHF, Dai et al. 2023,
arXiv:2310.12773, sections 3.3 and B.3; the Lagrangian of a constrained decision process: Altman 1999).

    maximise E[score]  subject to  J = E[cost] - cost_limit <= 0
    min over lambda >= 0 of max over policies of  E[score] - lambda * J

As PPO, with a second critic, cost_value, which predicts the cost to come. Of every response token:

    reward  = score, at the last one  - kl_coef * KL        A_reward, by GAE with ``value``
    cost    = cost, at the last one   + kl_coef * KL        A_cost, by GAE with ``cost_value``
    A       = (A_reward - lambda * A_cost) / (1 + lambda)   what the policy learns from

Both pay for KL, so that it weighs kl_coef in A whatever lambda is. After the updates of an iteration, by its mean cost:

    lambda = min(max(0, lambda + multiplier_learning_rate * J), multiplier_max)      projected gradient ascent

The paper moves log lambda by the gradient, lambda * J: that stalls where lambda is small and leaps where it is large.
With multiplier_learning_rate 0 the weight of the cost is fixed: reward shaping, the baseline of the paper.

A cost is a grader like any other: models.cost (a run of ``cm``, or a list of them), or the function under
rewards.functions.cost, of weight 0 in the score. Above 0 a response is unsafe. In an environment a model gives every
action a cost, as it gives a reward: a run of ``rm`` on segments whose chosen side costs more.
"""

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp

from jaxrlhf.algorithm import read_logprobs
from jaxrlhf.algorithms import on_policy, ppo
from jaxrlhf.algorithms.ppo import PPOConfig, PPOExperience
from jaxrlhf.ops.masked import keep, sums
from jaxrlhf.ops.token_rewards import score_to_rewards
from jaxrlhf.types import (
    Array,
    Ask,
    AskedHead,
    Batch,
    Mean,
    Metrics,
    Nets,
    Role,
    Sequences,
    TrainState,
    Trees,
    given,
)

CRITICS = ("value", "cost_value")


@dataclasses.dataclass(frozen=True)
class PPOLagrangianConfig(PPOConfig):
    """PPO whose expected cost is held at a limit by a multiplier, with a critic for the cost (Safe RLHF)."""

    cost_limit: float = 0.0  # expected cost of a response that is allowed
    multiplier: float = 1.0  # where the multiplier starts: score lost for each unit of cost
    multiplier_learning_rate: float = 0.1  # its rise in an iteration for each unit above the limit; 0: a fixed weight
    multiplier_max: float = 100.0  # it never rises above


class PPOLagrangianExperience(PPOExperience, kw_only=True):
    """That of PPO, whose advantages are those of score and cost together."""

    cost_returns: Array  # f32[B, S]
    cost_values: Array  # f32[B, S]


def roles(cfg: PPOLagrangianConfig) -> tuple[dict[Role, AskedHead], dict[Role, AskedHead]]:
    """Those of PPO, a cost model, and a critic for it."""
    trained, slow = ppo.roles(cfg)
    return {**trained, "cost_value": "scalar"}, {**slow, "cost": "scalar"}


def prepare(
    nets: Nets, state: TrainState, batch: Batch, cfg: PPOLagrangianConfig
) -> tuple[PPOLagrangianExperience, dict[str, Mean]]:
    """Score the responses, find their costs, charge both for KL, and work out one advantage and two returns."""
    sequences = given(batch.sequences, "batch.sequences")
    costs, sequences = on_policy.costs_of(nets, state.trees, sequences)
    scores, members = on_policy.scores_of(nets, state.trees, sequences)
    logprobs, (values, cost_values) = ppo.before_updates(nets, state, sequences, cfg, CRITICS)
    ref_logprobs = read_logprobs(nets, "reference", state.trees, sequences)
    metrics = on_policy.rollout_metrics(sequences, scores, logprobs, ref_logprobs, members)
    sequences = on_policy.scorable(sequences)
    mask = sequences.response_mask
    rewards = ppo.shaped_rewards(nets, state, sequences, scores, logprobs, ref_logprobs, cfg)
    charged = costs_with_kl(nets, state, sequences, costs, logprobs, ref_logprobs, cfg)
    gains, returns = ppo.estimated(rewards, values, sequences, cfg)
    losses, cost_returns = ppo.estimated(charged, cost_values, sequences, cfg)
    values, cost_values = keep(values, mask), keep(cost_values, mask)
    multiplier = state.controls["multiplier"]
    advantages = (gains - multiplier * losses) / (1 + multiplier)
    metrics |= {"reward/mean": sums(rewards.sum(-1), mask.any(-1))}
    metrics |= ppo.value_metrics("value", mask, values, returns)
    metrics |= ppo.value_metrics("cost_value", mask, cost_values, cost_returns)
    metrics |= on_policy.cost_metrics(costs, mask.any(-1))
    one = jnp.float32(1)
    metrics |= {"kl/coef": Mean(ppo.kl_coef(state, cfg), one), "cost/multiplier": Mean(multiplier, one)}
    advantages, corrected = ppo.normalised(advantages, logprobs, sequences, cfg)
    experience = PPOLagrangianExperience(
        responses=sequences.replace(scores=scores, logprobs=logprobs),
        advantages=advantages,
        returns=returns,
        values=values,
        cost_returns=cost_returns,
        cost_values=cost_values,
        positive=ppo.positive_weights(sequences.replace(scores=scores), cfg),
        pairs=ppo.pairs_of(batch, cfg),
    )
    return experience, metrics | corrected


def costs_with_kl(
    nets: Nets,
    state: TrainState,
    sequences: Sequences,
    costs: Array,
    logprobs: Array,
    ref_logprobs: Array,
    cfg: PPOLagrangianConfig,
) -> Array:
    """f32[B, S]: kl_coef * KL on every response token, and the cost on the last, or on each what it cost."""
    mask = sequences.response_mask
    penalty = ppo.kl_penalty(state, logprobs, ref_logprobs, mask, cfg)
    each = on_policy.earned_by_actions(nets, state.trees, sequences, "cost")
    return score_to_rewards(costs, -penalty, mask) if each is None else keep(each + penalty, mask)


def loss(
    nets: Nets, trees: Trees, minibatch: PPOLagrangianExperience, cfg: PPOLagrangianConfig
) -> tuple[dict[Role, Mean], dict[str, Mean]]:
    """Those of PPO, and the clipped squared error of the cost's critic."""
    sequences = given(minibatch.responses, "responses")
    mask = sequences.response_mask
    asks = [Ask("policy", "token_stats"), *(Ask(role, "values") for role in CRITICS)]
    stats, values, cost_values = nets.read(trees, sequences, *asks)
    parts = [
        ppo.policy_loss(stats, minibatch, cfg),
        ppo.value_loss("value", values, minibatch.values, minibatch.returns, mask, cfg),
        ppo.value_loss("cost_value", cost_values, minibatch.cost_values, minibatch.cost_returns, mask, cfg),
        ppo.reward_losses(nets, trees, minibatch, cfg),
    ]
    losses, metrics = ({name: mean for part in side for name, mean in part.items()} for side in zip(*parts))
    return losses, metrics


def controls(cfg: PPOLagrangianConfig) -> dict[str, Array]:
    return ppo.controls(cfg) | {"multiplier": jnp.float32(cfg.multiplier)}


def after(state: TrainState, metrics: Metrics, cfg: PPOLagrangianConfig) -> TrainState:
    """Adapt the multiplier by the iteration's mean cost, and the KL coefficient as PPO does. An iteration without a
    response that counts changes neither."""
    state = ppo.after(state, metrics, cfg)
    multiplier, excess = state.controls["multiplier"], metrics["cost/mean"] - cfg.cost_limit
    rate = jnp.where(metrics["response/count"] > 0, cfg.multiplier_learning_rate, 0.0)
    moved = jnp.clip(multiplier + rate * excess, 0.0, cfg.multiplier_max)
    return state.replace(controls=state.controls | {"multiplier": moved})


def problems(cfg: PPOLagrangianConfig) -> Iterator[str]:
    """Those of PPO; the multiplier lies where it may, and score and cost keep the units that it compares."""
    yield from on_policy.problems(cfg)
    if cfg.multiplier > cfg.multiplier_max:
        most = f"{cfg.multiplier_max:g}"
        yield f"multiplier: {cfg.multiplier:g}: more than multiplier_max; expected at most {most}; nearest: {most}"
    if cfg.whiten_rewards:
        yield "whiten_rewards: true: score and cost would lose the units that the multiplier compares; expected false"


ALGORITHM = ppo.ALGORITHM._replace(
    config=PPOLagrangianConfig,
    roles=roles,
    prepare=prepare,
    loss=loss,
    controls=controls,
    after=after,
    problems=problems,
)
