"""A reward model by regression on ratings: of whole responses (Wang et al. 2024, arXiv:2406.08673), or of marked steps,
a process reward model (Lightman et al. 2023, arXiv:2305.20050; Uesato et al. 2022, arXiv:2211.14275).

Offline, from trajectories with rewards, which are the ratings r:

    loss = mean of (score - r)^2
    at: response    one score per response, at its last token; r: the sum of its rewards
    at: steps       the score at every token with a reward other than 0; r: that reward

A step is rated at its last token. A rating of 0 is no mark: label the steps of a process -1 and 1.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from jaxrlhf.algorithm import Algorithm, update_once
from jaxrlhf.algorithms import rm
from jaxrlhf.algorithms.grading import members_of, over_members, read_members
from jaxrlhf.algorithms.trajectories import Rewarded, take_trajectories
from jaxrlhf.ops.masked import at_last, keep, sums
from jaxrlhf.types import Array, Ask, Mean, Nets, Sequences, Trees, given


@dataclasses.dataclass(frozen=True)
class RMRatingsConfig:
    """A reward model by regression on ratings of responses, or of marked steps."""

    at: Literal["response", "steps"] = "response"  # where a score is rated: a response's end, or tokens with a reward
    normalize_samples: int = 0  # responses of models.policy on which final scores get mean 0, std 1; 0: leave them


def loss(
    nets: Nets, trees: Trees, minibatch: Rewarded, cfg: RMRatingsConfig
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Mean squared error of a rated score, of each member of an ensemble."""
    rows = given(minibatch.responses, "responses")
    rewards = keep(minibatch.rewards, rows.response_mask)
    if cfg.at == "response":
        ratings, rated = rewards.sum(-1), rows.response_mask.any(-1)
        scores = read_members(nets, trees, rows)
    else:
        ratings, rated = rewards, rewards != 0
        scores = {role: step_scores(nets, trees, rows, role) for role in members_of(nets)}
    losses = {role: sums(jnp.square(score - ratings), rated) for role, score in scores.items()}
    mean_score = jnp.mean(jnp.stack([*scores.values()]), axis=0)
    return losses, {
        "loss/reward": over_members(losses.values()),
        "reward/rating": sums(ratings, rated),
        "reward/score": sums(mean_score, rated),
        "reward/error": sums(jnp.abs(mean_score - ratings), rated),
    }


def step_scores(nets: Nets, trees: Trees, rows: Sequences, role: str) -> Array:
    """f32[B, S]: column t of the state after token t, at the valid tokens: the value of the next state, and after the
    last token the score of the row."""
    scores, values = nets.read(trees, rows, Ask(role, "scores"), Ask(role, "values"))
    following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    return jnp.where(at_last(rows.valid), scores[:, None], following)


ALGORITHM = Algorithm(
    config=RMRatingsConfig,
    online=False,
    batch=lambda cfg: ("trajectories",),
    roles=lambda cfg: ({"reward": "scalar"}, {}),
    updates=update_once,
    prepare=take_trajectories,
    loss=loss,
    finish=rm.finish,
    problems=rm.problems,
)
