"""What algorithms share that learn from trajectories: rewards of tokens, the value that follows, moving targets."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.algorithm import TARGET, Updates
from jaxrlhf.ops.advantages import next_values
from jaxrlhf.ops.masked import at_last, keep, sums
from jaxrlhf.types import Array, Batch, Experience, Mean, Nets, Sequences, TrainState, given


class Rewarded(Experience, kw_only=True):
    """Responses, and what each of their tokens earned."""

    rewards: Array  # f32[B, S]
    truncated: Array  # bool[B]


def take_trajectories(nets: Nets, state: TrainState, batch: Batch, cfg: Any) -> tuple[Rewarded, dict[str, Mean]]:
    """``Algorithm.prepare``: trajectories are learned from as they come; their returns are measured."""
    rows = given(batch.trajectories, "batch.trajectories")
    responses, mask = rows.responses, rows.responses.response_mask
    returns = sums(keep(rows.rewards, mask).sum(-1), mask.any(-1))
    return Rewarded(responses=responses, rewards=rows.rewards, truncated=rows.truncated), {"return/mean": returns}


def plan_updates(cfg: Any) -> Updates:
    """num_epochs x num_minibatches optimizer steps an iteration."""
    return Updates(cfg.num_epochs, cfg.num_minibatches)


def following(values: Array, rows: Sequences, truncated: Array) -> Array:
    """f32[B, S]: of ``values`` (of states) that of the next state, without a gradient: 0 where a trajectory ended, the
    value of its last state where it was cut."""
    last = jnp.where(at_last(rows.valid) & truncated[:, None], values, 0.0).sum(-1)
    return jax.lax.stop_gradient(next_values(values, rows.response_mask, last))


def follow_targets(state: TrainState, polyak: float, period: int = 1) -> TrainState:
    """Every slow role target_X moved the share ``polyak`` of the way to X, in every ``period``-th iteration:

    target = polyak * X + (1 - polyak) * target
    """
    due = (state.step + 1) % period == 0

    def moved(role: str):
        old = state.slow[role]
        new = optax.incremental_update(state.params[role.removeprefix(TARGET)], old, polyak)
        return new if period == 1 else jax.tree.map(lambda new, old: jnp.where(due, new, old), new, old)

    return state.replace(slow=state.slow | {role: moved(role) for role in state.slow if role.startswith(TARGET)})
