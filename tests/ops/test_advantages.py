"""Rewards, advantages and returns against published numbers and the textbook recursion on the kept tokens only."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrlhf.ops import advantages as ops

gae, missing_eos, score_to_rewards = map(jax.jit, (ops.gae, ops.missing_eos, ops.score_to_rewards))
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "advantages.json").read_text())


def arrays(case, *names):
    return [jnp.array(case[name], bool if name == "mask" else jnp.float32) for name in names]


def ragged(seed: int, rows: int = 6, columns: int = 9):
    """rewards, values, mask: gaps, an empty row, a full row, and NaN or infinity outside the mask."""
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, columns)) < 0.6
    mask[0], mask[1] = False, True
    junk = rng.choice([np.nan, np.inf, -np.inf], mask.shape)
    rewards, values = (np.where(mask, rng.normal(size=mask.shape), junk).astype(np.float32) for _ in range(2))
    return rewards, values, mask


def gae_loop(rewards, values, mask, gamma, gae_lambda):
    """The definition, not the recursion: discounted sums of one-step errors over the kept tokens of each row."""
    advantages = np.zeros(mask.shape)
    for row in range(len(mask)):
        kept = np.flatnonzero(mask[row])
        r, v = rewards[row, kept].astype(np.float64), np.append(values[row, kept], 0.0).astype(np.float64)
        errors = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(kept))]
        for i, column in enumerate(kept):
            advantages[row, column] = sum((gamma * gae_lambda) ** (j - i) * errors[j] for j in range(i, len(kept)))
    return advantages


def test_gae_published():
    case = GOLDEN["gae_plain"]
    rewards, values = arrays(case, "rewards", "values")
    mask = jnp.ones(rewards.shape, bool)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
    np.testing.assert_allclose(advantages, case["advantages"], atol=1e-6)
    np.testing.assert_allclose(returns, case["returns"], atol=1e-6)
    advantages, _ = gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    np.testing.assert_allclose(advantages, case["advantages_lambda_1"], atol=1e-6)


@pytest.mark.parametrize("outside", [9.0, np.nan, np.inf])
def test_gae_published_masked_value_does_not_leak(outside):
    case = GOLDEN["gae_masked"]
    rewards, values, mask = arrays(case, "rewards", "values", "mask")
    values = jnp.where(mask, values, outside)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
    np.testing.assert_allclose(advantages, case["advantages"], atol=1e-6)
    assert returns[0, 3] == 0


@pytest.mark.parametrize("gae_lambda", [1.0, 0.7])
def test_gae_published_truncated(gae_lambda):
    """A bootstrap value is a last reward of gamma * V; where an episode ends mid-row, it is a row of its own."""
    case = GOLDEN["gae_truncated"]
    rewards, values = (np.array(case[name], np.float32) for name in ("rewards", "values"))
    expected = np.array(case["advantages"][str(gae_lambda)])
    rewards[:, -1] += np.array([0.99, 0.9]) * values[:, -1]
    values = values[:, :-1]

    whole = np.ones((1, 5), bool)
    first, _ = gae(*map(jnp.array, (rewards[:1], values[:1], whole)), gamma=0.99, gae_lambda=gae_lambda)
    np.testing.assert_allclose(first[0], expected[0], atol=6e-5)  # printed to 4 decimals

    episodes = np.array([[1, 1, 1, 1, 0], [0, 0, 0, 0, 1]], bool)
    twice = (np.repeat(x[1:], 2, axis=0) for x in (rewards, values))
    second, _ = gae(*map(jnp.array, (*twice, episodes)), gamma=0.9, gae_lambda=gae_lambda)
    np.testing.assert_allclose(second.sum(axis=0), expected[1], atol=1e-6)


def test_gae_published_steps_over_observation_tokens():
    case = GOLDEN["multi_turn"]
    (mask,) = arrays(case, "mask")
    rewards = score_to_rewards(jnp.array([case["score"]]), jnp.zeros(mask.shape), mask)
    _, returns = gae(rewards, jnp.zeros(mask.shape), mask, gamma=case["gamma"], gae_lambda=1.0)
    np.testing.assert_allclose(returns, case["returns"], atol=1e-6)


@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (0.7, 0.0), (0.0, 0.9)])
@pytest.mark.parametrize("seed", range(3))
def test_gae_is_the_sum_of_discounted_errors(seed, gamma, gae_lambda):
    rewards, values, mask = ragged(seed)
    advantages, returns = gae(*map(jnp.array, (rewards, values, mask)), gamma=gamma, gae_lambda=gae_lambda)
    expected = gae_loop(rewards, values, mask, gamma, gae_lambda)
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, np.where(mask, expected + np.where(mask, values, 0), 0), rtol=1e-5, atol=1e-6)


def test_padding_columns_change_nothing():
    rewards, values, mask = ragged(4)
    plain = gae(*map(jnp.array, (rewards, values, mask)), gamma=0.9, gae_lambda=0.9)
    padded = [np.pad(x, ((0, 0), (3, 2)), constant_values=fill) for x, fill in zip((rewards, values), (np.nan, 5.0))]
    wide = gae(*map(jnp.array, (*padded, np.pad(mask, ((0, 0), (3, 2))))), gamma=0.9, gae_lambda=0.9)
    for narrow, broad in zip(plain, wide):
        np.testing.assert_array_equal(narrow, broad[:, 3:-2])
        assert not broad[:, :3].any() and not broad[:, -2:].any()


def test_gae_gradients_are_finite_and_zero_outside_the_mask():
    rewards, values, mask = map(jnp.array, ragged(2))

    def loss(rewards, values):
        advantages, returns = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.8)
        return jnp.sum(jnp.square(advantages)) + jnp.sum(jnp.sin(returns))

    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1)))(rewards, values):
        assert jnp.isfinite(gradient).all()
        assert not gradient[~mask].any() and gradient[mask].any()


def test_gae_in_bfloat16_recurs_in_float32():
    advantages, returns = gae(
        jnp.full((1, 300), 1.0, jnp.bfloat16), jnp.zeros((1, 300)), jnp.ones((1, 300), bool), gamma=1, gae_lambda=1
    )
    assert advantages[0, 0] == 300 and advantages.dtype == returns.dtype == jnp.float32  # bfloat16 stops at 256


def test_shaped_rewards_published():
    case = GOLDEN["shaped_rewards"]
    scores, kl, mask = arrays(case, "scores", "kl", "mask")
    ours = score_to_rewards(scores, case["kl_coef"] * kl, mask)
    np.testing.assert_allclose(ours, case["rewards"], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32, jnp.bfloat16])
def test_rewards_are_float32_whatever_comes_in(dtype):
    mask = jnp.array([[True, True], [True, False]])
    ours = score_to_rewards(jnp.array([0.75, -0.5]), jnp.zeros((2, 2), dtype), mask)
    assert ours.dtype == jnp.float32
    np.testing.assert_array_equal(ours, [[0, 0.75], [-0.5, 0]])
    whole = score_to_rewards(jnp.array([3, -1], jnp.int32), jnp.full((2, 2), 0.25), mask)
    assert whole.dtype == jnp.float32
    np.testing.assert_array_equal(whole, [[-0.25, 2.75], [-1.25, 0]])


@pytest.mark.parametrize("seed", range(2))
def test_shaped_rewards_are_a_numpy_loop(seed):
    penalty, _, mask = ragged(seed)
    scores = np.random.default_rng(seed).normal(size=len(mask)).astype(np.float32)
    expected = np.zeros(mask.shape, np.float32)
    for row in range(len(mask)):
        kept = np.flatnonzero(mask[row])
        expected[row, kept] = -penalty[row, kept]
        if len(kept):
            expected[row, kept[-1]] += scores[row]
    ours = score_to_rewards(*map(jnp.array, (scores, penalty, mask)))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_an_empty_response_gets_nothing_even_from_a_nan_score():
    mask = jnp.array([[False, False], [True, False]])
    ours = score_to_rewards(jnp.array([jnp.nan, 1.0]), jnp.zeros((2, 2)), mask)
    np.testing.assert_array_equal(ours, [[0, 0], [1, 0]])
    assert not gae(ours, jnp.full((2, 2), jnp.nan), mask, gamma=1.0, gae_lambda=1.0)[0][0].any()


def test_a_column_of_scores_is_refused():
    with pytest.raises(AssertionError):
        score_to_rewards(jnp.ones((2, 1)), jnp.zeros((2, 3)), jnp.ones((2, 3), bool))


def test_missing_eos_takes_from_the_score():
    ours = missing_eos(jnp.array([1.5, 1.5, -2.0]), jnp.array([True, False, False]), 1.0)
    np.testing.assert_array_equal(ours, [1.5, 0.5, -3.0])
    np.testing.assert_array_equal(missing_eos(jnp.array([1, 2]), jnp.array([False, True]), 0.5), [0.5, 2.0])


def test_missing_eos_acts_before_shaping():
    """The last token of a cut response carries score - penalty - its KL penalty."""
    mask = jnp.array([[True, True], [True, True]])
    scores = missing_eos(jnp.array([2.0, 2.0]), jnp.array([True, False]), 1.0)
    np.testing.assert_allclose(score_to_rewards(scores, jnp.full((2, 2), 0.25), mask), [[-0.25, 1.75], [-0.25, 0.75]])


def test_rows_sharded_over_an_explicit_mesh():
    rewards, values, mask = ragged(9, rows=8)
    scores = np.arange(8, dtype=np.float32)
    devices = jax.devices()[: 8 if jax.device_count() >= 8 else 1]
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Explicit,), devices=devices)
    rows = NamedSharding(mesh, PartitionSpec("data", None))

    def shaped(scores, kl, values, mask):
        scores = missing_eos(scores, scores > 3, 1.0)
        return gae(score_to_rewards(scores, kl, mask), values, mask, gamma=0.9, gae_lambda=0.9)

    alone = jax.jit(shaped)(*map(jnp.array, (scores, rewards, values, mask)))
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, rows) for x in (rewards, values, mask)]
        ours = jax.jit(shaped)(jax.device_put(scores, NamedSharding(mesh, PartitionSpec("data"))), *sharded)
    for a, b in zip(ours, alone):
        assert a.sharding.spec == rows.spec
        np.testing.assert_allclose(np.asarray(a), b, atol=1e-6)
