"""An algorithm outside the package, in the shape of ILQL (Snell et al. 2022, arXiv:2206.11871): two Q heads and a V
head on the policy's trunk, target heads that follow by a Polyak average. All of them are read in one pass."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrlhf.algorithm import Algorithm, update_once
from jaxrlhf.ops.masked import keep, sums
from jaxrlhf.ops.token_rewards import score_to_rewards
from jaxrlhf.types import Array, Ask, Batch, Experience, HeadSpec, Mean, Nets, Params, TrainState, Trees, given

QS = ("q1", "q2")


@dataclasses.dataclass(frozen=True)
class Config:
    """Values of the best actions in the data, beside a policy that imitates them."""

    gamma: float = 0.9  # discount a token
    expectile: float = 0.7  # of the target Q, that V fits
    conservative: float = 0.1  # weight of logsumexp Q - Q(chosen)
    polyak: float = 0.1  # share of the way to its Q head that a target goes after each update


class Rewarded(Experience, kw_only=True):
    rewards: Array  # f32[B, S]


def prepare(nets: Nets, state: TrainState, batch: Batch, cfg: Config) -> tuple[Rewarded, dict[str, Mean]]:
    """A response's reward, 1 where it is good, comes with its last token."""
    rows = given(batch.unpaired, "batch.unpaired")
    mask = rows.responses.response_mask
    rewards = score_to_rewards(rows.desirable.astype(jnp.float32), jnp.zeros(mask.shape), mask)
    return Rewarded(responses=rows.responses, rewards=rewards), {}


def loss(nets: Nets, trees: Trees, minibatch: Rewarded, cfg: Config) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Q: squared error from reward + gamma * V(next state), 0 after the last token; V: expectile of the smaller target
    Q; policy: likelihood of the tokens."""
    rows = given(minibatch.responses, "responses")
    mask = rows.response_mask
    asks = [Ask("policy", "token_stats"), Ask("value", "values")]
    asks += [Ask(role, "q") for role in QS] + [Ask(f"target_{role}", "q") for role in QS]
    stats, values, q1, q2, *targets = nets.read(trees, rows, *asks)
    values = keep(values, mask)
    following = jnp.pad(jax.lax.stop_gradient(values)[:, 1:], ((0, 0), (0, 1)))
    backup = minibatch.rewards + cfg.gamma * following
    best = jax.lax.stop_gradient(jnp.minimum(*(target.chosen for target in targets)))
    error = keep(best - values, mask)
    losses = {
        "policy": sums(-stats.logprobs, mask),
        "value": sums(jnp.where(error > 0, cfg.expectile, 1 - cfg.expectile) * error**2, mask),
    }
    for role, q in zip(QS, (q1, q2), strict=True):
        terms = (q.chosen - backup) ** 2 + cfg.conservative * (q.logsumexp - q.chosen)
        losses[role] = sums(terms, mask)
    return losses, {f"loss/{role}": mean for role, mean in losses.items()} | {"value/mean": sums(values, mask)}


def follow(state: TrainState, cfg: Config) -> TrainState:
    """target = polyak * q + (1 - polyak) * target."""

    def moved(role: str) -> Params:
        move = lambda new, old: cfg.polyak * new + (1 - cfg.polyak) * old
        return jax.tree.map(move, state.params[role], state.slow[f"target_{role}"])

    return state.replace(slow=state.slow | {f"target_{role}": moved(role) for role in QS})


ON_POLICY = HeadSpec("action", trunk="policy")
ALGORITHM = Algorithm(
    config=Config,
    online=False,
    batch=lambda cfg: ("unpaired",),
    roles=lambda cfg: (
        {"policy": "lm", "value": HeadSpec("scalar", trunk="policy", gradient=0.5), "q1": ON_POLICY, "q2": ON_POLICY},
        {"target_q1": ON_POLICY, "target_q2": ON_POLICY},
    ),
    updates=update_once,
    prepare=prepare,
    loss=loss,
    after_update=follow,
)
