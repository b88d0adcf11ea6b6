"""Rao and Kupper's reward model: probabilities that sum to 1, a NumPy loop, and scores that ties pull together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import rm_ties
from jaxrlhf.algorithms.rm_ties import RMTiesConfig
from jaxrlhf.ops.losses import bradley_terry, rao_kupper
from jaxrlhf.types import Comparisons, Preferences, Sequences, Trees
from tests.support import fake

FAKE = fake.answering(scores=lambda params, rows: params["table"][rows.tokens[:, 0]])


@pytest.mark.parametrize("threshold", [0.1, 1.0, 3.0])
def test_the_three_outcomes_are_all_there_are(threshold):
    difference = jnp.linspace(-8, 8, 33)
    zero, no, yes = jnp.zeros_like(difference), jnp.zeros(33, bool), jnp.ones(33, bool)
    wins, loses = (jnp.exp(-rao_kupper(a, b, no, threshold)) for a, b in ((difference, zero), (zero, difference)))
    ties = jnp.exp(-rao_kupper(difference, zero, yes, threshold))
    np.testing.assert_allclose(wins + loses + ties, 1, rtol=1e-5)
    np.testing.assert_allclose(
        rao_kupper(difference, zero, no, threshold), bradley_terry(difference, zero, jnp.full(33, threshold)), rtol=1e-6
    )


def test_by_hand():
    """theta = e^threshold = 3: at equal scores each side wins 1/(1 + 3), and 1/2 is left for a tie."""
    loss = lambda tie: float(rao_kupper(jnp.zeros(1), jnp.zeros(1), jnp.array([tie]), float(np.log(3)))[0])
    assert loss(False) == pytest.approx(np.log(4), rel=1e-6) and loss(True) == pytest.approx(np.log(2), rel=1e-6)


def test_a_tie_pulls_scores_together_and_large_scores_stay_finite():
    slope = jax.grad(lambda a: rao_kupper(a, jnp.zeros(3), jnp.ones(3, bool), 0.5).sum())(jnp.array([-2.0, 0.0, 2.0]))
    assert slope[0] < 0 < slope[2] and slope[1] == 0
    far = rao_kupper(jnp.array([1e4, -1e4]), jnp.zeros(2), jnp.array([True, False]), 0.5)
    np.testing.assert_allclose(far, 1e4, rtol=1e-3)


def test_loss_is_a_numpy_loop():
    rng = np.random.default_rng(0)
    scores, tie = rng.normal(size=(2, 6)).astype(np.float32), np.array([True, False, False, True, False, True])
    tokens = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32).reshape(2, 6, 1), (2, 6, 3))
    valid = jnp.ones((6, 3), bool) & (jnp.arange(6) < 5)[:, None]  # the last is padding
    chosen, rejected = (Sequences(side, valid, valid) for side in tokens)
    pairs = Preferences(chosen, rejected)
    experience = rm_ties.RMTiesExperience(comparisons=Comparisons(pairs, jnp.array(tie)))
    trees = Trees({"reward": {"table": jnp.array(scores.reshape(-1))}}, {})
    losses, metrics = rm_ties.loss(FAKE, trees, experience, RMTiesConfig(0.7))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    expected = []
    for a, b, equal in zip(*scores[:, :5].astype(np.float64), tie):
        win, lose = sigmoid(a - b - 0.7), sigmoid(b - a - 0.7)
        expected.append(-np.log(1 - win - lose if equal else win))
    np.testing.assert_allclose(losses["reward"].value(), np.mean(expected), rtol=1e-5)
    assert losses["reward"].count == 5
    decided = (scores[0] > scores[1])[:5][~tie[:5]]
    np.testing.assert_allclose(metrics["reward/accuracy"].value(), decided.mean())
    np.testing.assert_allclose(metrics["reward/ties"].value(), 2 / 5)
