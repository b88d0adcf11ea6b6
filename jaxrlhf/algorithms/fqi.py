"""Fitted Q iteration, a token at a time (Ernst et al. 2005; with a target network Mnih et al. 2015).

Offline, from trajectories with rewards. A state s is what was written so far, an action a the next token. The Q head
stands on the policy's trunk and is fitted to the Bellman optimality backup of a target head Q' that follows it:

    Q(s, a)  ->  r + gamma * max_b Q'(s', b)                  r alone where the trajectory ended

Where trajectories hold every action this is value iteration. Where they do not, the maximum is over actions that
nobody took: ilql avoids it, cql_coef lowers it. The policy imitates the data, loss -log pi(a | s); responses are
sampled from pi * exp(beta * Q): generate.beta.
"""

import dataclasses

from jaxrlhf.algorithm import Algorithm
from jaxrlhf.algorithms.trajectories import Rewarded, follow_targets, following, plan_updates, take_trajectories
from jaxrlhf.ops.losses import conservative_q_terms
from jaxrlhf.ops.masked import sums
from jaxrlhf.types import Ask, HeadSpec, Mean, Nets, Trees, given


@dataclasses.dataclass(frozen=True)
class FQIConfig:
    """Fitted Q iteration: trajectories with rewards, a Q head on the policy's trunk and its target."""

    gamma: float = 0.99  # discount a token
    cql_coef: float = 0.0  # weight of log sum exp Q - Q(chosen), which lowers the Q of actions that the data lack
    polyak: float = 0.005  # share of the way to the Q head that the target goes when it moves; 1: it is copied
    target_period: int = 1  # iterations from one move of the target to the next
    num_epochs: int = 1  # passes over the trajectories of an iteration
    num_minibatches: int = 1  # optimizer steps of a pass; the trajectories are shuffled and split among them


def loss(nets: Nets, trees: Trees, minibatch: Rewarded, cfg: FQIConfig) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Mean losses of a response token, of all heads in one pass."""
    rows = given(minibatch.responses, "responses")
    mask = rows.response_mask
    stats, q, target = nets.read(trees, rows, Ask("policy", "token_stats"), Ask("q", "q"), Ask("target_q", "q"))
    goal = minibatch.rewards + cfg.gamma * following(target.largest, rows, minibatch.truncated)
    losses = {
        "policy": sums(-stats.logprobs, mask),
        "q": sums(conservative_q_terms(q, goal, mask, cfg.cql_coef), mask),
    }
    return losses, {f"loss/{role}": mean for role, mean in losses.items()} | {
        "policy/entropy": sums(stats.entropy, mask),
        "q/chosen": sums(q.chosen, mask),
        "q/largest": sums(q.largest, mask),
    }


ON_POLICY = HeadSpec("action", trunk="policy")
ALGORITHM = Algorithm(
    config=FQIConfig,
    online=False,
    batch=lambda cfg: ("trajectories",),
    roles=lambda cfg: ({"policy": "lm", "q": ON_POLICY}, {"target_q": ON_POLICY}),
    updates=plan_updates,
    prepare=take_trajectories,
    loss=loss,
    after_update=lambda state, cfg: follow_targets(state, cfg.polyak, cfg.target_period),
)
