"""Monte-Carlo returns (the baseline of Abdulhai et al. 2023, arXiv:2311.18232): Q of the policy that wrote the data.

Offline, from trajectories with rewards. A state s is what was written so far, an action a the next token. The Q head
stands on the policy's trunk and is regressed on what came after the token in the data, without a bootstrap:

    Q(s_t, a_t)  ->  r_t + gamma * r_t+1 + gamma^2 * r_t+2 + ...

So it values the behaviour of the data, not the best behaviour, and joins no pieces of two trajectories. What a limit
cut has no whole return: it teaches the policy alone. The policy imitates the data, loss -log pi(a | s); responses are
sampled from pi * exp(beta * Q): generate.beta.
"""

import dataclasses

import jax.numpy as jnp

from jaxrlhf.algorithm import Algorithm
from jaxrlhf.algorithms.trajectories import Rewarded, plan_updates, take_trajectories
from jaxrlhf.ops.advantages import gae
from jaxrlhf.ops.losses import conservative_q_terms
from jaxrlhf.ops.masked import sums
from jaxrlhf.types import Ask, HeadSpec, Mean, Nets, Trees, given


@dataclasses.dataclass(frozen=True)
class MCReturnsConfig:
    """Monte-Carlo returns: trajectories with rewards, and a Q head on the policy's trunk that is regressed on them."""

    gamma: float = 0.99  # discount a token
    cql_coef: float = 0.0  # weight of log sum exp Q - Q(chosen), which lowers the Q of actions that the data lack
    num_epochs: int = 1  # passes over the trajectories of an iteration
    num_minibatches: int = 1  # optimizer steps of a pass; the trajectories are shuffled and split among them


def loss(
    nets: Nets, trees: Trees, minibatch: Rewarded, cfg: MCReturnsConfig
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Mean losses of a response token, of both heads in one pass; Q counts the tokens of whole trajectories."""
    rows = given(minibatch.responses, "responses")
    mask = rows.response_mask
    whole = mask & ~minibatch.truncated[:, None]
    stats, q = nets.read(trees, rows, Ask("policy", "token_stats"), Ask("q", "q"))
    _, returns = gae(minibatch.rewards, jnp.zeros_like(minibatch.rewards), mask, gamma=cfg.gamma, gae_lambda=1.0)
    losses = {
        "policy": sums(-stats.logprobs, mask),
        "q": sums(conservative_q_terms(q, returns, whole, cfg.cql_coef), whole),
    }
    return losses, {f"loss/{role}": mean for role, mean in losses.items()} | {
        "policy/entropy": sums(stats.entropy, mask),
        "q/chosen": sums(q.chosen, mask),
        "q/largest": sums(q.largest, mask),
    }


ALGORITHM = Algorithm(
    config=MCReturnsConfig,
    online=False,
    batch=lambda cfg: ("trajectories",),
    roles=lambda cfg: ({"policy": "lm", "q": HeadSpec("action", trunk="policy")}, {}),
    updates=plan_updates,
    prepare=take_trajectories,
    loss=loss,
)
