"""Processes so small that every response is listed: exact rewards and KL, and the best that they can be.

Arrays are f64[prompts, responses]: log-probs of every response to every prompt under a policy, and its reward. What is
expected of several prompts is their mean.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Point(NamedTuple):
    """Where a policy stands."""

    kl: float  # KL(policy || reference), nats a response
    reward: float  # expected


def every_response(tokens: Sequence[Any], end: Any, longest: int) -> list[tuple[Any, ...]]:
    """All responses of at most ``longest`` tokens: those that ``end`` ends, and those that the length cuts."""
    others = [token for token in tokens if token != end]
    ended = [(*head, end) for size in range(longest) for head in itertools.product(others, repeat=size)]
    return ended + list(itertools.product(others, repeat=longest))


def expected(log_p: np.ndarray, log_ref: np.ndarray, rewards: np.ndarray) -> Point:
    """KL and reward of a policy. A response that it never gives (-inf) counts for nothing.

    Raises:
        ValueError: where probabilities do not add up to 1: a response is missing, or there twice.
    """
    p = np.exp(log_p)
    if not np.allclose(p.sum(1), 1, rtol=0, atol=1e-5):
        raise ValueError(f"probabilities of all responses add up to {p.sum(1)}; expected 1")
    nats = np.where(p > 0, p * (np.where(p > 0, log_p, 0) - log_ref), 0)
    return Point(float(nats.sum(1).mean()), float((p * rewards).sum(1).mean()))


def tilt(log_ref: np.ndarray, rewards: np.ndarray, beta: float) -> np.ndarray:
    """log of the policy with the largest E[reward] - beta * KL: reference * exp(reward / beta) / Z."""
    logits = log_ref + rewards / beta
    most = logits.max(1, keepdims=True)
    return logits - most - np.log(np.exp(logits - most).sum(1, keepdims=True))


def highest_reward(log_ref: np.ndarray, rewards: np.ndarray, kl: float) -> float:
    """The largest expected reward of any policy with this KL: that of the tilt whose KL it is, found by bisection."""
    at = lambda log_beta: expected(tilt(log_ref, rewards, float(np.exp(log_beta))), log_ref, rewards)
    low, high = -8.0, 12.0  # of log beta: KL falls as beta grows
    if kl >= at(low).kl:
        return float(rewards.max(1).mean())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).kl > kl else (low, middle)
    return at(high).reward


def best_of(log_ref: np.ndarray, rewards: np.ndarray, n: int) -> np.ndarray:
    """log of the policy that answers with the best of ``n`` samples of the reference; equal ones take equal shares.

    p(y) = ref(y) / ref(reward = r) * (ref(reward <= r)^n - ref(reward < r)^n)          r: the reward of y
    """
    found = np.empty_like(log_ref)
    for row, p, scores in zip(found, np.exp(log_ref), rewards, strict=True):
        _, which = np.unique(scores, return_inverse=True)
        mass = np.bincount(which, p)
        up_to = np.minimum(np.cumsum(mass), 1.0)
        share = np.diff(up_to**n, prepend=0.0) / mass
        with np.errstate(divide="ignore"):
            row[:] = np.log(p) + np.log(share[which])
    return found
