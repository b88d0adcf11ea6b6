"""Reward models by regression, of responses and of steps, against a NumPy loop; a process reward is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithms import rm_ratings
from jaxrlhf.algorithms.rm_ratings import RMRatingsConfig
from jaxrlhf.algorithms.trajectories import Rewarded
from jaxrlhf.optim import OptimizerConfig
from jaxrlhf.types import Batch, Grader, Sequences, Trajectories, Trees
from tests.support import fake, tiny

# The state after token t has the score table[t, row]: values are of the state before a token.
FAKE = fake.answering(
    scores=lambda params, rows: jnp.stack(
        [params["after"][row, last] for row, last in enumerate(rows.valid.sum(1) - 1)]
    ),
    values=lambda params, rows: jnp.pad(params["after"], ((0, 0), (1, 0)))[:, :-1],
)


def case(junk: float = 0.0):
    """(rows, rewards, scores after each token): row 3 is padding, the last column of row 0 is a response token."""
    rng = np.random.default_rng(0)
    columns, lengths, starts = np.arange(6), np.array([6, 4, 5, 0]), np.array([2, 1, 3, 0])
    valid = columns < lengths[:, None]
    mask = valid & (columns >= starts[:, None])
    rewards = np.where(mask & (rng.random((4, 6)) < 0.6), rng.normal(size=(4, 6)), 0).astype(np.float32)
    rewards[0, 5] = 1.5
    after = np.where(valid, rng.normal(size=(4, 6)), junk).astype(np.float32)
    rows = Sequences(jnp.zeros((4, 6), jnp.int32), jnp.array(valid), jnp.array(mask))
    return rows, np.where(mask, rewards, junk).astype(np.float32), after


def by_loop(cfg: RMRatingsConfig) -> list[float]:
    rows, rewards, after = case()
    mask, found = np.asarray(rows.response_mask), []
    for row in range(4):
        at = np.flatnonzero(mask[row])
        if cfg.at == "response" and len(at):
            found.append((after[row, at[-1]] - rewards[row].sum()) ** 2)
        if cfg.at == "steps":
            found += [(after[row, t] - rewards[row, t]) ** 2 for t in at if rewards[row, t] != 0]
    return found


@pytest.mark.parametrize("at", ["response", "steps"])
@pytest.mark.parametrize("junk", [0.0, 99.0])
def test_loss_is_a_numpy_loop(at, junk):
    cfg = RMRatingsConfig(at)
    rows, rewards, after = case(junk)
    experience = Rewarded(responses=rows, rewards=jnp.array(rewards), truncated=jnp.zeros(4, bool))
    loss = lambda table: rm_ratings.loss(FAKE, Trees({"reward": {"after": table}}, {}), experience, cfg)
    losses, metrics = loss(jnp.array(after))
    expected = by_loop(cfg)
    assert losses["reward"].count == len(expected)
    np.testing.assert_allclose(losses["reward"].total, sum(expected), rtol=1e-5)
    np.testing.assert_allclose(metrics["reward/error"].value(), np.mean(np.sqrt(expected)), rtol=1e-5)
    slope = jax.grad(lambda table: loss(table)[0]["reward"].total)(jnp.array(after))
    assert ((np.asarray(slope) != 0).sum()) == len(expected)


def test_members_of_an_ensemble_learn_each_by_itself():
    rows, rewards, after = case()
    experience = Rewarded(responses=rows, rewards=jnp.array(rewards), truncated=jnp.zeros(4, bool))
    nets = FAKE._replace(graders={"reward": Grader(("reward_0", "reward_1"))})
    trees = Trees({"reward_0": {"after": jnp.array(after)}, "reward_1": {"after": jnp.array(after) + 1}}, {})
    losses, _ = rm_ratings.loss(nets, trees, experience, RMRatingsConfig("steps"))
    np.testing.assert_allclose(losses["reward_0"].total, sum(by_loop(RMRatingsConfig("steps"))), rtol=1e-5)
    assert losses["reward_0"].total != losses["reward_1"].total


def test_it_learns_which_steps_are_good():
    """A token's rating is 1 where it is even, else -1."""
    rows = tiny.sequences(rows=32, room=6)
    rewards = jnp.where(rows.response_mask, jnp.where(rows.tokens % 2 == 0, 1.0, -1.0), 0.0)
    batch = Batch(trajectories=Trajectories(rows, rewards, jnp.zeros(32, bool)))
    optimizer = OptimizerConfig(learning_rate=3e-2)
    run = tiny.build("rm_ratings", RMRatingsConfig("steps"), batch=batch, optimizer=optimizer)
    learn, state, errors = tiny.program(steps.make_learn(run.recipe)), run.state, []
    for _ in range(60):
        state, metrics = learn(state, batch)
        errors.append(float(metrics["reward/error"]))
    assert errors[-1] < 0.3 < 0.7 < errors[0]
