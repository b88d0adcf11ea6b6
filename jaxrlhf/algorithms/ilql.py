"""Implicit language Q-learning (Snell et al. 2022, arXiv:2206.11871): the best of the actions that data contain.

Offline, from trajectories with rewards. A state s is what was written so far, an action a the next token. Two Q heads
and a V head stand on the policy's trunk; the target heads Q' follow the Q heads by a Polyak average (equations 3-5):

    loss of V   = |expectile - [u < 0]| * u^2                  u = min(Q1'(s, a), Q2'(s, a)) - V(s)
    loss of Qi  = (Qi(s, a) - r - gamma * V(s'))^2 + cql_coef * (log sum exp Qi(s, .) - Qi(s, a))
    loss of pi  = -log pi(a | s)

V is an upper expectile over the actions that were taken, so that no action is valued that the data lack. The policy
imitates the data; responses are sampled from pi * exp(beta * (Q - V)): generate.beta.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrlhf.algorithm import Algorithm
from jaxrlhf.algorithms.trajectories import Rewarded, follow_targets, following, plan_updates, take_trajectories
from jaxrlhf.ops.losses import conservative_q_terms, expectile_terms
from jaxrlhf.ops.masked import keep, sums
from jaxrlhf.types import Ask, HeadSpec, Mean, Nets, Trees, given

QS = ("q1", "q2")


@dataclasses.dataclass(frozen=True)
class ILQLConfig:
    """Implicit language Q-learning: trajectories with rewards, twin Q heads and a V head on the policy's trunk."""

    gamma: float = 0.99  # discount a token
    expectile: float = 0.7  # of the target Q over the actions of the data, that V is; near 1: their maximum
    cql_coef: float = 0.1  # weight of log sum exp Q - Q(chosen), which lowers the Q of actions that the data lack
    polyak: float = 0.005  # share of the way to its Q head that a target goes after each update
    num_epochs: int = 1  # passes over the trajectories of an iteration
    num_minibatches: int = 1  # optimizer steps of a pass; the trajectories are shuffled and split among them


def loss(nets: Nets, trees: Trees, minibatch: Rewarded, cfg: ILQLConfig) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Mean losses of a response token, of all heads in one pass."""
    rows = given(minibatch.responses, "responses")
    mask = rows.response_mask
    asks = [Ask("policy", "token_stats"), Ask("value", "values")]
    asks += [Ask(role, "q") for role in QS] + [Ask(f"target_{role}", "q") for role in QS]
    stats, values, *found = nets.read(trees, rows, *asks)
    qs, targets = dict(zip(QS, found[:2], strict=True)), found[2:]
    goal = minibatch.rewards + cfg.gamma * following(values, rows, minibatch.truncated)
    best = jax.lax.stop_gradient(jnp.minimum(*(target.chosen for target in targets)))
    losses = {
        "policy": sums(-stats.logprobs, mask),
        "value": sums(expectile_terms(keep(best - values, mask), cfg.expectile), mask),
    }
    losses |= {role: sums(conservative_q_terms(q, goal, mask, cfg.cql_coef), mask) for role, q in qs.items()}
    highest = jnp.minimum(*(q.largest for q in qs.values()))
    return losses, {f"loss/{role}": mean for role, mean in losses.items()} | {
        "policy/entropy": sums(stats.entropy, mask),
        "value/mean": sums(values, mask),
        "value/above_q": sums(values > highest, mask),
        "q/chosen": sums(jnp.minimum(*(q.chosen for q in qs.values())), mask),
        "q/largest": sums(highest, mask),
    }


ON_POLICY = HeadSpec("action", trunk="policy")
ALGORITHM = Algorithm(
    config=ILQLConfig,
    online=False,
    batch=lambda cfg: ("trajectories",),
    roles=lambda cfg: (
        {"policy": "lm", "value": HeadSpec("scalar", trunk="policy"), **dict.fromkeys(QS, ON_POLICY)},
        {f"target_{role}": ON_POLICY for role in QS},
    ),
    updates=plan_updates,
    prepare=take_trajectories,
    loss=loss,
    after_update=lambda state, cfg: follow_targets(state, cfg.polyak),
)
