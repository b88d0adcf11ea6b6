"""PPO-Lagrangian: advantages of score and cost by a NumPy loop, the multiplier by hand, the constraint where all
responses can be enumerated, a cost of the host."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithms import ppo_lagrangian
from jaxrlhf.algorithms.ppo_lagrangian import PPOLagrangianConfig
from jaxrlhf.types import Batch, Trees
from tests.support import tiny
from tests.support.enumerated import run as enumerated_run
from tests.support.fake import FAKE, make_case

CASE = make_case()
RNG = np.random.default_rng(7)
COSTS = RNG.normal(0.3, 1.0, len(CASE.scores)).astype(np.float32)
COST_VALUES = np.where(CASE.mask, RNG.normal(size=CASE.mask.shape), 0).astype(np.float32)


def state_of(multiplier: float = 1.0, model: bool = True):
    """The case's networks; ``model``: a cost model is among them."""
    state = CASE.state(0.05)
    params = state.params | {"cost_value": {"values": jnp.array(COST_VALUES)}}
    slow = state.slow | ({"cost": {"scores": jnp.array(COSTS)}} if model else {})
    controls = state.controls | {"multiplier": jnp.float32(multiplier)}
    return replace(state, params=params, slow=slow, controls=controls)


def gae_by_loop(last: np.ndarray, every: np.ndarray, values: np.ndarray, cfg) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, returns) in float64, one token at a time: ``last`` [B] comes with the last token, ``every`` [B, S]
    with each."""
    advantages = np.zeros(CASE.mask.shape)
    for row in range(len(CASE.mask)):
        next_value = next_advantage = 0.0
        chosen = np.flatnonzero(CASE.mask[row])
        for t in reversed(chosen):
            reward = every[row, t] + (last[row] if t == chosen[-1] else 0.0)
            delta = reward + cfg.gamma * next_value - values[row, t]
            advantages[row, t] = next_advantage = delta + cfg.gamma * cfg.gae_lambda * next_advantage
            next_value = float(values[row, t])
    return advantages, np.where(CASE.mask, advantages + values, 0.0)


@pytest.mark.parametrize("multiplier", [0.0, 1.0, 3.5])
@pytest.mark.parametrize("on_host", [False, True])
def test_advantages_are_a_numpy_loop(multiplier, on_host):
    cfg = PPOLagrangianConfig(gamma=0.9, gae_lambda=0.8, kl_coef=0.3, whiten_advantages="no")
    given = {"scores": jnp.array(CASE.scores), "grades": {"cost": jnp.array(COSTS)}} if on_host else {}
    batch = Batch(sequences=CASE.sequences(**given))
    experience, means = ppo_lagrangian.prepare(FAKE, state_of(multiplier, model=not on_host), batch, cfg)
    kl = np.where(CASE.mask, CASE.sampled.astype(np.float64) - CASE.reference, 0)
    gains, returns = gae_by_loop(CASE.scores, -0.3 * kl, CASE.values, cfg)
    losses, cost_returns = gae_by_loop(COSTS, 0.3 * kl, COST_VALUES, cfg)
    expected = (gains - multiplier * losses) / (1 + multiplier)
    np.testing.assert_allclose(experience.advantages, expected, atol=1e-5)
    np.testing.assert_allclose(experience.returns, returns, atol=1e-5)
    np.testing.assert_allclose(experience.cost_returns, cost_returns, atol=1e-5)
    rows = CASE.mask.any(1)
    metrics = {name: float(mean.value()) for name, mean in means.items()}
    assert metrics["cost/multiplier"] == multiplier
    np.testing.assert_allclose(metrics["cost/mean"], COSTS[rows].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["cost/violations"], (COSTS[rows] > 0).mean(), rtol=1e-6)


@pytest.mark.parametrize("environment_scores", [False, True])
def test_of_an_episode_every_action_has_its_reward_and_its_cost_and_a_limit_cuts_both(environment_scores):
    """Rows 0 and 5 fill all columns: they ended. A limit cut the others, and the last column is what they came to."""
    cfg = PPOLagrangianConfig(gamma=0.9, gae_lambda=0.8, kl_coef=0.3, whiten_advantages="no")
    rng = np.random.default_rng(3)
    rewards, costs, values, cost_values = rng.normal(size=(4, *CASE.mask.shape)).astype(np.float32)
    state = state_of(2.0)
    params = state.params | {"value": {"values": jnp.array(values)}, "cost_value": {"values": jnp.array(cost_values)}}
    of_model = {"reward": {"scores": jnp.array(CASE.scores), "rewards": jnp.array(rewards)}}
    cost = {"cost": {"scores": jnp.array(COSTS), "rewards": jnp.array(costs)}}
    state = replace(state, params=params, slow=state.slow | of_model | cost)
    earned = {"scores": jnp.array(CASE.scores), "rewards": jnp.array(rewards)} if environment_scores else {}
    sequences = CASE.sequences(observations=jnp.zeros((*CASE.mask.shape, 1)), **earned)
    experience, means = ppo_lagrangian.prepare(FAKE, state, Batch(sequences=sequences), cfg)
    kl = np.where(CASE.mask, CASE.sampled.astype(np.float64) - CASE.reference, 0)
    cut = ~CASE.mask[:, -1]
    gains, returns = gae_by_loop(0.9 * np.where(cut, values[:, -1], 0), rewards - 0.3 * kl, values, cfg)
    losses, cost_returns = gae_by_loop(0.9 * np.where(cut, cost_values[:, -1], 0), costs + 0.3 * kl, cost_values, cfg)
    np.testing.assert_allclose(experience.advantages, (gains - 2.0 * losses) / 3.0, atol=1e-5)
    np.testing.assert_allclose(experience.returns, returns, atol=1e-5)
    np.testing.assert_allclose(experience.cost_returns, cost_returns, atol=1e-5)
    np.testing.assert_allclose(means["cost/mean"].value(), COSTS[CASE.mask.any(1)].mean(), rtol=1e-5)


def test_kl_weighs_the_same_whatever_the_multiplier_is():
    """Without score, cost and values the advantage is the KL to come, and the multiplier is no part of it."""
    cfg = PPOLagrangianConfig(kl_coef=0.3, whiten_advantages="no")
    zero = jnp.zeros_like(jnp.array(CASE.scores))
    found = []
    for multiplier in (0.0, 2.0):
        state = state_of(multiplier)
        params = {role: {"values": jnp.zeros(CASE.mask.shape)} for role in ppo_lagrangian.CRITICS}
        slow = state.slow | {"reward": {"scores": zero}, "cost": {"scores": zero}}
        state = replace(state, params=state.params | params, slow=slow)
        found.append(ppo_lagrangian.prepare(FAKE, state, Batch(sequences=CASE.sequences()), cfg)[0].advantages)
    assert np.abs(found[0]).max() > 0.1
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_a_response_without_a_cost_counts_for_nothing():
    costs = COSTS.copy()
    costs[4] = np.nan
    given = {"scores": jnp.array(CASE.scores), "grades": {"cost": jnp.array(costs)}}
    batch, cfg = Batch(sequences=CASE.sequences(**given)), PPOLagrangianConfig()
    experience, means = ppo_lagrangian.prepare(FAKE, state_of(model=False), batch, cfg)
    assert not np.asarray(experience.responses.response_mask)[4].any() and means["score/unscorable"].total == 1
    assert np.isfinite(experience.advantages).all() and not np.asarray(experience.cost_returns)[4].any()
    trees = Trees(state_of().params, {})
    losses, _ = ppo_lagrangian.loss(FAKE, trees, experience, cfg)
    assert {role: int(mean.count) for role, mean in losses.items()} == dict.fromkeys(
        ("policy", "value", "cost_value"), CASE.mask.sum() - CASE.mask[4].sum()
    )
    assert all(np.isfinite(mean.total) for mean in losses.values())


@pytest.mark.parametrize(
    ("multiplier", "cost", "expected"),
    [
        (1.0, 0.8, 1 + 0.1 * 0.3),  # 0.3 above the limit of 0.5: up
        (2.0, 0.0, 2 - 0.1 * 0.5),  # below it: down
        (2.0, 0.5, 2.0),
        (0.02, 0.0, 0.0),  # held at 0
        (4.9, 90.0, 5.0),  # held at its largest
        (0.0, 0.8, 0.03),
    ],
)
def test_the_multiplier_by_hand(multiplier, cost, expected):
    cfg = PPOLagrangianConfig(cost_limit=0.5, multiplier_learning_rate=0.1, multiplier_max=5.0)
    metrics = {"cost/mean": jnp.float32(cost), "response/count": jnp.float32(64), "kl/reference": jnp.float32(1)}
    after = lambda cfg, metrics: float(ppo_lagrangian.after(state_of(multiplier), metrics, cfg).controls["multiplier"])
    np.testing.assert_allclose(after(cfg, metrics), expected, rtol=1e-6)
    assert after(replace(cfg, multiplier_learning_rate=0.0), metrics) == np.float32(multiplier)  # a fixed weight
    assert after(cfg, metrics | {"response/count": jnp.float32(0)}) == np.float32(multiplier)


@pytest.mark.parametrize(
    ("cfg", "line"),
    [
        (PPOLagrangianConfig(multiplier=7, multiplier_max=5), "multiplier: 7: more than multiplier_max; "),
        (PPOLagrangianConfig(whiten_rewards=True), "whiten_rewards: true: "),
    ],
)
def test_problems(cfg, line):
    (found,) = ppo_lagrangian.ALGORITHM.problems(cfg)
    assert found.startswith(line) and "expected" in found
    assert not [*ppo_lagrangian.ALGORITHM.problems(PPOLagrangianConfig())]


def best_under(exact, reference, kl_coef: float, limit: float) -> tuple[float, np.ndarray]:
    """(multiplier, probabilities) of the policy that is best under the constraint, by bisection:
    p = reference * exp((reward - lambda * cost) / ((1 + lambda) * kl_coef)) with E[cost] = limit."""
    log_ref = np.asarray(exact.log_p(reference), np.float64)
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        log_p = log_ref + (exact.rewards - middle * exact.costs) / ((1 + middle) * kl_coef)
        p = np.exp(log_p - log_p.max())
        p /= p.sum()
        low, high = (middle, high) if p @ exact.costs > limit else (low, middle)
    return low, p


@pytest.mark.nightly  # by day: the multiplier by hand; the short twin of the benchmark safe
def test_the_constraint_holds_where_all_responses_are_enumerated():
    """A token 3 is what is rewarded and what costs. The multiplier finds the weight that bisection finds, and the
    policy what is best under it."""
    limit, kl_coef = 0.5, 0.5
    cfg = PPOLagrangianConfig(
        num_epochs=2,
        kl_coef=kl_coef,
        cost_limit=limit,
        multiplier=0.2,
        multiplier_learning_rate=0.3,
        value_clip_range=None,
    )
    made, exact = enumerated_run("ppo_lagrangian", cfg, rows=128)
    step, state, path, costs = tiny.program(steps.make_iteration(made.recipe)), made.state, [], []
    for _ in range(80):
        state, metrics, _ = step(state, made.batch)
        path.append(float(metrics["cost/multiplier"]))
        costs.append(float(np.exp(np.asarray(exact.log_p(state.params["policy"]), np.float64)) @ exact.costs))
    start, end = made.state.params["policy"], state.params["policy"]
    multiplier, p = best_under(exact, start, kl_coef, limit)
    reward, _ = exact(end, start)
    print(
        f"\nmultiplier {path[-1]:.3f}, max {max(path):.3f}, best {multiplier:.3f}; cost {costs[-1]:.3f}; "
        f"reward {reward:.3f}, best {p @ exact.rewards:.3f}, costs {np.round(costs[::8], 2)}"
    )
    assert max(costs) > limit + 0.2  # it was in the way
    assert abs(np.mean(costs[-20:]) - limit) < 0.05
    assert abs(np.mean(path[-20:]) / multiplier - 1) < 0.2
    assert reward > 0.9 * (p @ exact.rewards)
