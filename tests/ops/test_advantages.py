"""Rewards, advantages and returns against published numbers and the textbook recursion on the kept tokens only."""

import json
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrlhf.ops import advantages as ops
from jaxrlhf.ops import token_rewards
from jaxrlhf.sharding import MeshConfig, make_mesh
from tests.support.tiny import program, put

gae = jax.jit(ops.gae)
missing_eos, score_to_rewards = jax.jit(token_rewards.missing_eos), jax.jit(token_rewards.score_to_rewards)
group_advantages = jax.jit(ops.group_advantages, static_argnums=(2, 3))
BASELINES: tuple[ops.GroupBaseline, ...] = tuple(how for how in get_args(ops.GroupBaseline) if how != "none")
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


# ---- groups ---------------------------------------------------------------------------------------------------------


def groups(seed: int, count: int = 8, size: int = 4):
    """scores and rows of groups: one of equal scores, one with a single row, one with none; junk outside the rows."""
    rng = np.random.default_rng(seed)
    scores, rows = rng.normal(size=(count, size)).astype(np.float32), rng.random((count, size)) < 0.8
    rows[:, :2] = True
    scores[1] = 1000.1  # whose mean is rounded
    rows[2], rows[3] = np.arange(size) == 1, False
    return np.where(rows, scores, rng.choice([np.nan, np.inf, 7.0], rows.shape)).astype(
        np.float32
    ).ravel(), rows.ravel()


def groups_loop(scores, rows, size: int, how: str):
    """(advantages, share of groups without a difference), a response at a time."""
    advantages, equal = np.zeros(len(scores)), []
    for start in range(0, len(scores), size):
        kept = [i for i in range(start, start + size) if rows[i]]
        values = {i: float(scores[i]) for i in kept}
        if kept:
            equal.append(len(set(values.values())) == 1)
        if len(set(values.values())) < 2:
            continue
        mean = np.mean(list(values.values()))
        for i in kept:
            others = [values[j] for j in kept if j != i]
            by = {
                "mean": values[i] - mean,
                "mean_std": (values[i] - mean) / (np.std(list(values.values()), ddof=1) + 1e-6),
                "leave_one_out": values[i] - np.mean(others),
            }
            advantages[i] = by[how]
    return advantages, np.mean(equal)


@pytest.mark.parametrize("how", BASELINES)
def test_groups_published(how):
    case = GOLDEN["group_baselines"]
    size = max(map(len, case["groups"]))
    pad = lambda groups: np.array([[*group, *[0] * (size - len(group))] for group in groups], np.float32).ravel()
    rows = np.array([[True] * len(group) + [False] * (size - len(group)) for group in case["groups"]]).ravel()
    ours, equal = group_advantages(jnp.array(pad(case["groups"])), jnp.array(rows), size, how)
    np.testing.assert_allclose(ours, pad(case[how]), atol=1e-6)
    assert equal.value() == 0.5


def test_leave_one_out_published():
    case = GOLDEN["leave_one_out"]
    scores = jnp.array(case["scores"])  # integers
    ours, _ = group_advantages(scores, jnp.ones(6, bool), case["size"], "leave_one_out")
    np.testing.assert_allclose(ours, case["advantages"], atol=1e-6)
    assert ours.dtype == jnp.float32


@pytest.mark.parametrize("how", BASELINES)
def test_a_response_that_is_alone_gets_nothing(how):
    """A decision: verl gives it its score of 5 (4.999995 by the deviation), which is no comparison with anything."""
    for size, rows in ((1, [True]), (2, [True, False])):
        ours, equal = group_advantages(jnp.full(size, 5.0), jnp.array(rows), size, how)
        assert not ours.any() and (equal.total, equal.count) == (1, 1)


@pytest.mark.parametrize("how", BASELINES)
@pytest.mark.parametrize("seed", range(3))
def test_groups_are_a_numpy_loop(seed, how):
    scores, rows = groups(seed)
    ours, equal = group_advantages(jnp.array(scores), jnp.array(rows), 4, how)
    expected, share = groups_loop(scores, rows, 4, how)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(equal.value(), share, rtol=1e-6)
    assert share == 2 / 7 and not np.asarray(ours)[~rows].any() and not np.asarray(ours)[4:12].any()


def test_no_baseline_leaves_the_scores():
    scores, rows = groups(1)
    ours, equal = group_advantages(jnp.array(scores), jnp.array(rows), 4, "none")
    np.testing.assert_array_equal(ours, np.where(rows, scores, 0))
    assert equal.value() == group_advantages(jnp.array(scores), jnp.array(rows), 4, "mean")[1].value()


def test_the_deviation_s_epsilon_is_in_units_of_score():
    ours, _ = ops.group_advantages(jnp.array([1.0, 0.0, 2.0]), jnp.ones(3, bool), 3, "mean_std", 0.25)
    np.testing.assert_allclose(ours, [0, -0.8, 0.8], rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.05, 0.5])
def test_length_lambda_by_hand(alpha):
    """1 - 1 / (alpha * l), never below 0; GAE with it is the loop with that number in each row."""
    rewards, values, mask = ragged(6)
    found = np.asarray(ops.length_lambda(jnp.array(mask), alpha))
    expected = [max(0.0, 1 - 1 / (alpha * max(int(row.sum()), 1))) for row in mask]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    advantages, _ = gae(*map(jnp.array, (rewards, values, mask)), gamma=0.9, gae_lambda=jnp.array(found))
    for row in range(len(mask)):
        one = slice(row, row + 1)
        loop = gae_loop(rewards[one], values[one], mask[one], 0.9, expected[row])
        np.testing.assert_allclose(advantages[one], loop, rtol=1e-5, atol=1e-6)


def test_length_lambda_of_the_source():
    """alpha 0.05: 0.8 for 100 tokens, 0.98 for 1000."""
    mask = np.arange(1000) < np.array([[100], [1000], [0]])
    np.testing.assert_allclose(ops.length_lambda(jnp.array(mask), 0.05), [0.8, 0.98, 0.0], rtol=1e-6)


def test_returns_to_go():
    ours = token_rewards.returns_to_go(jnp.array([[1.0, 2.0, 0.0, 4.0], [0.0, 0.0, 0.0, -1.0]]))
    np.testing.assert_array_equal(ours, [[7, 6, 4, 4], [-1, -1, -1, -1]])


def test_mean_is_leave_one_out_made_smaller():
    scores, rows = jnp.array(np.random.default_rng(0).normal(size=12), jnp.float32), jnp.ones(12, bool)
    mean, others = (group_advantages(scores, rows, 4, how)[0] for how in ("mean", "leave_one_out"))
    np.testing.assert_allclose(mean, 0.75 * others, rtol=1e-6)


def test_groups_of_no_response_at_all():
    for how in BASELINES:
        ours, equal = group_advantages(jnp.full(8, jnp.nan), jnp.zeros(8, bool), 4, how)
        assert not ours.any() and equal.count == 0 and equal.value() == 0


def test_wrong_groups_are_refused():
    with pytest.raises(ValueError, match="group baseline 'median': expected one of mean_std, mean, leave_one_out"):
        ops.group_advantages(jnp.ones(4), jnp.ones(4, bool), 2, "median")  # pyright: ignore[reportArgumentType]
    with pytest.raises(AssertionError):
        ops.group_advantages(jnp.ones(5), jnp.ones(5, bool), 2, "mean")


@pytest.mark.parametrize("how", BASELINES)
def test_groups_on_a_mesh_are_those_of_one_device(how):
    """And need no word between devices but for the count of equal groups."""
    scores, rows = groups(4, count=16)
    alone, equal = group_advantages(jnp.array(scores), jnp.array(rows), 4, how)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        split = program(lambda scores, rows: ops.group_advantages(scores, rows, 4, how))
        meshed, meshed_equal = split(*put((scores, rows)))
        advantages_only = jax.jit(lambda scores, rows: ops.group_advantages(scores, rows, 4, how)[0])
        text = advantages_only.lower(*put((scores, rows))).compile().as_text()
    np.testing.assert_allclose(meshed, alone, rtol=1e-6)
    assert meshed.sharding.spec == PartitionSpec(("slice", "data", "fsdp", "decode", "expert"))
    assert (meshed_equal.total, meshed_equal.count) == (equal.total, equal.count)
    assert text is not None and not any(word in text for word in ("all-gather", "all-to-all", "all-reduce", "permute"))


@pytest.mark.parametrize("seed", range(3))
def test_next_values_are_those_of_the_next_kept_token(seed):
    """Gaps are stepped over; after the last token comes what is given for it, whatever stands outside the mask."""
    _, values, mask = ragged(seed)
    last = np.random.default_rng(seed).normal(size=len(mask)).astype(np.float32)
    found = np.asarray(jax.jit(ops.next_values)(values, mask, last))
    expected = np.zeros(mask.shape, np.float32)
    for row in range(len(mask)):
        kept = np.flatnonzero(mask[row])
        for at, t in enumerate(kept):
            expected[row, t] = values[row, kept[at + 1]] if at + 1 < len(kept) else last[row]
    np.testing.assert_array_equal(found, expected)


# ---- several graders, each in its group -----------------------------------------------------------------------------


def decoupled(grades, weights, rows, size, how):
    """As a jitted program: (advantages, share of groups without one)."""
    return jax.jit(lambda grades, rows: ops.decoupled_advantages(grades, weights, rows, size, how))(grades, rows)


def test_two_graders_by_hand():
    """Figure 2 of the paper: the sums 1 and 2 of a better response look the same to GRPO, and not here.

    Divided by the batch's deviation, the root of (2 * 0.5 + 2 * 2) / 3."""
    grades = {"a": jnp.array([0.0, 1, 0, 1]), "b": jnp.array([0.0, 0, 0, 1])}
    rows = jnp.ones(4, bool)
    found, equal = decoupled(grades, {"a": 1.0, "b": 1.0}, rows, 2, "mean_std")
    root = np.sqrt(5 / 3)
    np.testing.assert_allclose(found, np.array([-1, 1, -2, 2]) / np.sqrt(2) / root, rtol=1e-5)
    np.testing.assert_allclose(found, [-0.547723, 0.547723, -1.095445, 1.095445], atol=1e-5)
    alike, _ = group_advantages(grades["a"] + grades["b"], rows, 2, "mean_std")
    np.testing.assert_allclose(alike, np.array([-1, 1, -1, 1]) / np.sqrt(2), rtol=1e-5)
    assert equal.value() == 0


@pytest.mark.parametrize("how", BASELINES)
@pytest.mark.parametrize("seed", range(2))
def test_several_graders_are_a_numpy_loop(seed, how):
    """The paper's equations, the mean over the batch taken off; missing grades, rows that are none, equal groups."""
    rng = np.random.default_rng(seed)
    scores, rows = groups(seed)
    grades = {name: np.where(rng.random(len(rows)) < 0.2, np.nan, rng.normal(size=len(rows))) for name in "ab"}
    for name in "ab":
        grades[name][4:8] = 3.7  # the group of equal scores
    grades["a"][0] = np.nan
    grades = {name: grade.astype(np.float32) for name, grade in grades.items()} | {"c": 1e3 * scores}
    weights = {"a": 1.0, "b": -0.5, "c": 2.0}
    total, differ = np.zeros(len(rows)), np.zeros(len(rows) // 4, bool)
    for name, weight in weights.items():
        counted = rows & ~np.isnan(grades[name])
        each, _ = groups_loop(grades[name], counted, 4, how)
        total += weight * each
        differ |= (each != 0).reshape(-1, 4).any(1)
    real = total[rows]
    expected = np.where(rows, (total - real.mean()) / (real.std(ddof=1) + 1e-6), 0.0)
    found, equal = decoupled({name: jnp.array(grade) for name, grade in grades.items()}, weights, rows, 4, how)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not np.asarray(found)[4:8].any()
    np.testing.assert_allclose(equal.value(), np.mean(~differ[rows.reshape(-1, 4).any(1)]))


def test_several_graders_that_tell_nothing_apart_give_exactly_nothing():
    grades = {"a": jnp.full(8, 1000.1), "b": jnp.full(8, jnp.nan)}
    found, equal = decoupled(grades, {"a": 1.0, "b": 1.0}, jnp.ones(8, bool), 4, "mean_std")
    assert not found.any() and equal.value() == 1


def test_several_graders_on_a_mesh_are_those_of_one_device():
    scores, rows = groups(4, count=16)
    grades, weights = {"a": scores, "b": np.cos(np.arange(64, dtype=np.float32))}, {"a": 1.0, "b": 0.3}
    alone, equal = decoupled(grades, weights, rows, 4, "mean_std")
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        split = program(lambda grades, rows: ops.decoupled_advantages(grades, weights, rows, 4, "mean_std"))
        meshed, meshed_equal = split(*put((grades, rows)))
    np.testing.assert_allclose(meshed, alone, rtol=1e-5, atol=1e-6)
    assert meshed_equal.value() == equal.value()
