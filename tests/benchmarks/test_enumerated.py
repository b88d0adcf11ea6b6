"""Closed forms on processes that are listed: by hand, by brute force, and by sampling."""

import itertools

import numpy as np
import pytest

from jaxrlhf.benchmarks import enumerated
from jaxrlhf.ops.best_of import best_of, best_of_kl

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 40))
LOG_REF = LOGITS - np.log(np.exp(LOGITS).sum(1, keepdims=True))
REWARDS = RNG.normal(size=(3, 40))


def test_every_response_is_there_once():
    found = enumerated.every_response("ab.", ".", 2)
    assert found == [(".",), ("a", "."), ("b", "."), ("a", "a"), ("a", "b"), ("b", "a"), ("b", "b")]
    assert len({*enumerated.every_response(range(4), 1, 3)}) == 13 + 27


def test_the_tilt_by_hand():
    log_p = enumerated.tilt(np.log([[0.5, 0.5]]), np.array([[1.0, 0.0]]), 0.5)
    assert np.exp(log_p[0, 0]) == pytest.approx(1 / (1 + np.exp(-2.0)))
    p = np.exp(log_p[0])
    point = enumerated.expected(log_p, np.log([[0.5, 0.5]]), np.array([[1.0, 0.0]]))
    assert point == pytest.approx((np.log(2) + (p * np.log(p)).sum(), p[0]))


def test_no_policy_is_above_the_frontier():
    """Random policies at every distance, and mixtures of the tilt with others."""
    for scale, _ in itertools.product((0.1, 0.5, 1.0, 3.0), range(8)):
        logits = LOG_REF + scale * (RNG.normal(size=LOG_REF.shape) + REWARDS)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        kl, reward = enumerated.expected(log_p, LOG_REF, REWARDS)
        assert reward < enumerated.highest_reward(LOG_REF, REWARDS, kl)


@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_the_tilt_is_on_the_frontier(beta):
    kl, reward = enumerated.expected(enumerated.tilt(LOG_REF, REWARDS, beta), LOG_REF, REWARDS)
    assert enumerated.highest_reward(LOG_REF, REWARDS, kl) == pytest.approx(reward, abs=1e-9)
    other = enumerated.expected(enumerated.tilt(LOG_REF, -REWARDS, beta), LOG_REF, REWARDS)
    assert other.reward < enumerated.highest_reward(LOG_REF, REWARDS, other.kl)


@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_the_tilt_reaches_the_closed_form_of_the_penalised_reward(beta):
    """max of E[reward] - beta * KL = beta * log E_reference[exp(reward / beta)]"""
    kl, reward = enumerated.expected(enumerated.tilt(LOG_REF, REWARDS, beta), LOG_REF, REWARDS)
    wanted = beta * np.log(np.exp(LOG_REF + REWARDS / beta).sum(1))
    assert reward - beta * kl == pytest.approx(wanted.mean(), abs=1e-9)


def test_beyond_the_largest_kl_the_best_response_is_left():
    assert enumerated.highest_reward(LOG_REF, REWARDS, 100.0) == REWARDS.max(1).mean()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_best_of_n_is_that_of_all_draws(n):
    """Of every n responses in every order; the last two rewards are equal."""
    log_ref, rewards = np.log([[0.1, 0.2, 0.3, 0.4]]), np.array([[0.0, 2.0, 1.0, 1.0]])
    wanted = np.zeros(4)
    for draw in itertools.product(range(4), repeat=n):
        best = [at for at in draw if rewards[0, at] == max(rewards[0, list(draw)])]
        for at in best:
            wanted[at] += np.exp(log_ref[0, list(draw)].sum()) / len(best)
    np.testing.assert_allclose(np.exp(enumerated.best_of(log_ref, rewards, n)[0]), wanted, atol=1e-12)


def test_the_estimator_of_samples_agrees_with_the_closed_form():
    draws = np.stack([RNG.choice(40, 4000, p=np.exp(row)) for row in LOG_REF])
    scores = np.take_along_axis(REWARDS, draws, 1)
    for n, estimate in zip((1, 4, 16), best_of(scores, scores, (1, 4, 16)).mean(1), strict=True):
        kl, reward = enumerated.expected(enumerated.best_of(LOG_REF, REWARDS, n), LOG_REF, REWARDS)
        assert estimate == pytest.approx(reward, abs=0.05)
        assert kl <= best_of_kl(n) + 1e-9  # a bound where responses are few


def test_a_response_that_is_missing_is_seen():
    with pytest.raises(ValueError, match="probabilities of all responses add up to"):
        enumerated.expected(LOG_REF[:, 1:], LOG_REF[:, 1:], REWARDS[:, 1:])
