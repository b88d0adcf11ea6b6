"""Loss terms and their sums, against published numbers and NumPy loops."""

import json
import math
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrlhf.ops import masked
from jaxrlhf.ops.losses import (
    Aggregation,
    aggregate,
    bradley_terry,
    centering,
    clipped_policy_terms,
    clipped_value_terms,
    conservative_q_terms,
    expectile_terms,
    ipo,
    weighted_likelihood_terms,
)
from jaxrlhf.types import QStats

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text())
WAYS: tuple[Aggregation, ...] = get_args(Aggregation)


def ragged(seed: int, rows: int = 8, columns: int = 7):
    """logprobs, old_logprobs, advantages (finite everywhere) and a mask with gaps, an empty row and a full row."""
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, columns)) < 0.6
    mask[0], mask[1] = False, True
    old = -rng.exponential(1.0, mask.shape)
    arrays = old + rng.normal(0, 0.3, mask.shape), old, rng.normal(size=mask.shape)
    return *(x.astype(np.float32) for x in arrays), mask


# --- policy


@pytest.mark.parametrize("setting", GOLDEN["policy_clip"]["settings"])
def test_policy_published(setting):
    case = GOLDEN["policy_clip"]
    ratios = jnp.array(case["ratios"])
    loss, ratio, clipped = clipped_policy_terms(
        jnp.log(ratios),
        jnp.zeros(5),
        jnp.array(case["advantages"], jnp.float32),
        setting["clip_low"],
        setting["clip_high"],
        setting["dual_clip"],
    )
    np.testing.assert_allclose(loss.mean(), setting["loss"], rtol=1e-6)
    np.testing.assert_allclose(clipped.mean(), case["clip_fraction"], rtol=1e-6)
    np.testing.assert_allclose(ratio, ratios, rtol=1e-6)


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.4)])
def test_policy_is_a_loop_and_clipped_tokens_have_no_gradient(low, high, dual_clip):
    new, old, advantages, _ = ragged(0)

    def total(new):
        terms = clipped_policy_terms(new, jnp.array(old), jnp.array(advantages), low, high, dual_clip)
        return jnp.sum(terms[0]), terms

    gradient, (loss, ratio, clipped) = jax.tree.map(np.asarray, jax.jit(jax.grad(total, has_aux=True))(jnp.array(new)))
    cap = np.inf if dual_clip is None else dual_clip
    for i in np.ndindex(*new.shape):
        r, a = math.exp(float(new[i]) - float(old[i])), float(advantages[i])
        is_clipped = r > 1 + high if a > 0 else r < 1 - low
        expected = -a * ((1 + high if a > 0 else 1 - low) if is_clipped else r)
        is_capped = a < 0 and r > cap
        expected = -a * cap if is_capped else expected
        np.testing.assert_allclose([loss[i], ratio[i]], [expected, r], rtol=1e-5)
        np.testing.assert_allclose(gradient[i], 0.0 if is_clipped or is_capped else -a * r, rtol=1e-5)
        assert bool(clipped[i]) == is_clipped
    assert 0 < clipped.sum() < clipped.size


def test_ratio_one_gives_the_policy_gradient():
    _, old, advantages, _ = ragged(1)
    gradient = jax.grad(lambda new: clipped_policy_terms(new, jnp.array(old), jnp.array(advantages), 0.2, 0.2)[0].sum())
    np.testing.assert_allclose(gradient(jnp.array(old)), -advantages, rtol=1e-6)


def test_a_runaway_ratio_stays_finite():
    loss, ratio, _ = clipped_policy_terms(jnp.array([0.0, -200.0]), jnp.array([-200.0, 0.0]), -jnp.ones(2), 0.2, 0.2)
    np.testing.assert_allclose(ratio, [math.exp(20), math.exp(-20)], rtol=1e-5)
    assert jnp.isfinite(loss).all()


def test_the_eos_token_learns_and_padding_does_not():
    """EOS is the last token inside the mask (column 3); what follows is padding."""
    mask = jnp.array([[False, True, True, True, False, False]])
    advantages = jnp.ones(mask.shape)

    def loss(logprobs):
        return aggregate(clipped_policy_terms(logprobs, -jnp.ones(mask.shape), advantages, 0.2, 0.2)[0], mask, WAYS[0])

    gradient = jax.grad(lambda x: loss(x).value())(-jnp.ones(mask.shape))
    np.testing.assert_allclose(gradient, [[0, -1 / 3, -1 / 3, -1 / 3, 0, 0]], rtol=1e-6)


def test_zero_advantages_give_zero_gradient():
    new, old, _, mask = map(jnp.array, ragged(2))
    whitened = masked.whiten(jnp.full(new.shape, 0.5), mask, variance="unbiased")
    gradient = jax.grad(lambda x: aggregate(clipped_policy_terms(x, old, whitened, 0.2, 0.2)[0], mask, WAYS[0]).value())
    np.testing.assert_array_equal(gradient(new), np.zeros(new.shape))


@pytest.mark.parametrize("low, high", [(1.0, 0.28), (0.2, 0.4)])
def test_weighted_likelihood_is_a_loop_and_clipped_tokens_keep_their_gradient(low, high):
    new, old, advantages, _ = ragged(0)

    def total(new):
        terms = weighted_likelihood_terms(new, new - jnp.array(old), jnp.array(advantages), low, high)
        return jnp.sum(terms[0]), terms

    gradient, (loss, ratio, clipped) = jax.tree.map(np.asarray, jax.jit(jax.grad(total, has_aux=True))(jnp.array(new)))
    for i in np.ndindex(*new.shape):
        r = math.exp(float(new[i]) - float(old[i]))
        weight = min(max(r, 1 - low), 1 + high)
        np.testing.assert_allclose(loss[i], -weight * advantages[i] * new[i], rtol=1e-5)
        np.testing.assert_allclose([gradient[i], ratio[i]], [-weight * float(advantages[i]), r], rtol=1e-5)
        assert bool(clipped[i]) == (not 1 - low <= r <= 1 + high)
    assert 0 < clipped.sum() < clipped.size


def test_weighted_likelihood_by_hand():
    """Ratios 0.5, 1 and 5 under a bound of 1.28, advantages 1, -1, -1, and log-probs -1, -2, -3."""
    terms = weighted_likelihood_terms(
        jnp.array([-1.0, -2.0, -3.0]), jnp.log(jnp.array([0.5, 1.0, 5.0])), jnp.array([1.0, -1.0, -1.0]), 1.0, 0.28
    )
    np.testing.assert_allclose(terms[0], [0.5, -2.0, -3.84], rtol=1e-6)
    np.testing.assert_array_equal(terms[2], [False, False, True])
    runaway = weighted_likelihood_terms(jnp.array([-1.0]), jnp.array([200.0]), jnp.array([1.0]), 1.0, 1e30)
    np.testing.assert_allclose(runaway[1], [math.exp(20)], rtol=1e-5)


# --- value


def test_value_published():
    case = GOLDEN["value_clip"]
    values, old, returns = (jnp.array(case[name], jnp.float32) for name in ("values", "old_values", "returns"))
    loss, clipped = clipped_value_terms(values, old, returns, case["clip_range"])
    np.testing.assert_allclose(loss.mean(), case["loss"], atol=1e-6)
    np.testing.assert_allclose(clipped.mean(), case["clip_fraction"], atol=1e-6)


def test_value_is_a_loop_and_clipped_tokens_have_no_gradient():
    values, old, returns, _ = ragged(3)

    def total(values):
        terms = clipped_value_terms(values, jnp.array(old), jnp.array(returns), 0.2)
        return jnp.sum(terms[0]), terms

    gradient, (loss, clipped) = jax.tree.map(np.asarray, jax.jit(jax.grad(total, has_aux=True))(jnp.array(values)))
    for i in np.ndindex(*values.shape):
        v, o, r = float(values[i]), float(old[i]), float(returns[i])
        near = min(max(v, o - 0.2), o + 0.2)
        is_clipped = (near - r) ** 2 > (v - r) ** 2
        np.testing.assert_allclose(loss[i], max((v - r) ** 2, (near - r) ** 2) / 2, rtol=1e-5)
        np.testing.assert_allclose(gradient[i], 0.0 if is_clipped else v - r, rtol=1e-5)
        assert bool(clipped[i]) == is_clipped
    assert 0 < clipped.sum() < clipped.size


def test_values_inside_the_clip_range_are_never_counted_as_clipped():
    rng = np.random.default_rng(0)
    old = jnp.array(rng.normal(0, 5, (64, 64)), jnp.float32)
    values = old + jnp.array(rng.uniform(-0.1, 0.1, old.shape), jnp.float32)
    loss, clipped = clipped_value_terms(values, old, jnp.zeros(old.shape), 0.2)
    assert not clipped.any()
    np.testing.assert_array_equal(loss, 0.5 * jnp.square(values))


def test_value_without_clipping():
    loss, clipped = clipped_value_terms(jnp.array([1.0, 5.0]), jnp.zeros(2), jnp.array([2.0, 1.0]), None)
    np.testing.assert_array_equal(loss, [0.5, 8.0])
    assert clipped.dtype == bool and not clipped.any()


# --- preferences


def test_pairwise_published():
    case = GOLDEN["pairwise"]
    chosen, rejected = jnp.array(case["chosen"]), jnp.array(case["rejected"])
    np.testing.assert_allclose(bradley_terry(chosen, rejected).mean(), case["loss"], atol=1e-6)
    margin = jnp.full(3, case["margin"])
    np.testing.assert_allclose(bradley_terry(chosen, rejected, margin).mean(), case["loss_with_margin"], atol=1e-6)


def implicit_rewards(case):
    """(chosen, rejected) of a published case."""
    read = lambda name: jnp.array(case[name], jnp.float32)
    return tuple(case["beta"] * (read(side) - read(f"ref_{side}")) for side in ("chosen", "rejected"))


@pytest.mark.parametrize("name", ["dpo", "dpo_far"])
def test_losses_of_implicit_rewards_published(name):
    case = GOLDEN[name]
    chosen, rejected = implicit_rewards(case)
    if "rewards_chosen" in case:
        np.testing.assert_allclose(chosen, case["rewards_chosen"], atol=1e-6)
        np.testing.assert_allclose(rejected, case["rewards_rejected"], atol=1e-6)
    for row in case["losses"]:
        smoothing = {"label_smoothing": row["label_smoothing"]}
        if row["objective"] == "sigmoid":
            loss = bradley_terry(chosen, rejected, **smoothing)
        else:
            loss = ipo(chosen, rejected, case["beta"], **smoothing)
        np.testing.assert_allclose(loss.mean(), row["loss"], rtol=1e-6, atol=1e-6)


def test_ipo_is_a_loop():
    rng = np.random.default_rng(0)
    chosen, rejected, margin = rng.normal(0, 0.3, (3, 12)).astype(np.float32)
    ours = ipo(jnp.array(chosen), jnp.array(rejected), 0.2, jnp.array(margin), 0.1)
    for c, r, m, loss in zip(chosen.tolist(), rejected.tolist(), margin.tolist(), ours.tolist()):
        nats = (c - r - m) / 0.2  # of the log-ratios' difference, in which the paper writes it
        np.testing.assert_allclose(loss, 0.9 * (nats - 2.5) ** 2 + 0.1 * (nats + 2.5) ** 2, rtol=1e-5)


def test_ipo_is_least_where_it_says():
    gradient = jax.grad(lambda d, e: ipo(d, jnp.zeros(1), 0.1, None, e).sum())
    for smoothing in (0.0, 0.2):
        np.testing.assert_allclose(gradient(jnp.array([0.5 - smoothing]), smoothing), 0, atol=1e-5)
        assert gradient(jnp.array([0.4 - smoothing]), smoothing) < -1 < 1 < gradient(jnp.array([0.6]), smoothing)


def test_ipo_refuses_a_column_of_rewards():
    with pytest.raises(AssertionError):
        ipo(jnp.ones((3, 1)), jnp.ones(3), 0.1)


def test_pairwise_is_a_loop():
    rng = np.random.default_rng(0)
    chosen, rejected, margin = rng.normal(0, 2, (3, 12)).astype(np.float32)
    ours = bradley_terry(jnp.array(chosen), jnp.array(rejected), jnp.array(margin), 0.2)
    for c, r, m, loss in zip(chosen.tolist(), rejected.tolist(), margin.tolist(), ours.tolist()):
        p = 1 / (1 + math.exp(-(c - r - m)))
        np.testing.assert_allclose(loss, -0.8 * math.log(p) - 0.2 * math.log(1 - p), rtol=1e-5)


def test_pairwise_of_far_scores_is_finite_and_its_gradient_too():
    chosen = jnp.array([1e4, -1e4])
    np.testing.assert_allclose(bradley_terry(chosen, -chosen), [0.0, 2e4])
    gradient = jax.grad(lambda c: bradley_terry(c, -chosen).sum())(chosen)
    np.testing.assert_allclose(gradient, [0.0, -1.0], atol=1e-6)


def test_pairwise_refuses_a_column_of_scores():
    with pytest.raises(AssertionError):
        bradley_terry(jnp.ones((3, 1)), jnp.ones(3))
    with pytest.raises(AssertionError):
        bradley_terry(jnp.ones(3), jnp.ones(3), jnp.ones((3, 1)))


def test_centering_ignores_the_difference():
    np.testing.assert_array_equal(centering(jnp.array([1.0, 2.0, 3]), jnp.array([1.0, -2.0, 0])), [4.0, 0.0, 9.0])


# --- aggregation


@pytest.mark.parametrize("how", WAYS)
def test_aggregation_published(how):
    case = GOLDEN["aggregation"]
    result = aggregate(jnp.array(case["x"]), jnp.array(case["mask"], bool), how)
    np.testing.assert_allclose(result.value(), case["how"][how], atol=1e-6)
    if how != "seq-mean-token-mean":
        assert result.total == case["token_sum"]


@pytest.mark.parametrize("seed", range(3))
def test_aggregation_is_a_loop(seed):
    x, _, _, mask = ragged(seed)
    rows = [row[kept].astype(np.float64) for row, kept in zip(x, mask) if kept.any()]
    expected = {
        "token-mean": np.concatenate(rows).mean(),
        "seq-mean-token-sum": np.mean([row.sum() for row in rows]),
        "seq-mean-token-mean": np.mean([row.mean() for row in rows]),
    }
    for how in WAYS:
        ours = aggregate(jnp.where(mask, x, jnp.nan), jnp.array(mask), how)
        np.testing.assert_allclose(ours.value(), expected[how], rtol=1e-5)


@pytest.mark.parametrize("how", WAYS)
def test_empty_rows_change_nothing_and_nothing_is_zero(how):
    x, _, _, mask = ragged(4)
    padded = np.pad(x, ((0, 3), (0, 0)), constant_values=np.nan), np.pad(mask, ((0, 3), (0, 0)))
    alone = aggregate(jnp.array(x), jnp.array(mask), how)
    wide = aggregate(jnp.array(padded[0]), jnp.array(padded[1]), how)
    np.testing.assert_allclose(wide.value(), alone.value(), rtol=1e-6)
    assert wide.count == alone.count

    nothing = jnp.zeros(mask.shape, bool)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: aggregate(x, nothing, how).value()))(jnp.array(x))
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("how", WAYS)
def test_micro_batches_add_up_to_the_batch(how):
    """Loss and gradient: totals and counts are summed over 1, 2 and 4 pieces of ragged rows, then divided once."""
    new, old, advantages, mask = ragged(5)

    def piece(new, old, advantages, mask):
        return aggregate(clipped_policy_terms(new, old, advantages, 0.2, 0.2)[0], mask, how)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient_of_total(*arrays):
        both = piece(*arrays)
        return both.total, both

    def accumulate(pieces):
        parts = list(zip(*(np.split(x, pieces) for x in (new, old, advantages, mask))))
        gradients, means = zip(*(gradient_of_total(*part) for part in parts))
        both = reduce(add, means)
        return both.value(), np.concatenate(gradients) / both.count

    loss, gradient = accumulate(1)
    for pieces in (2, 4):
        other_loss, other_gradient = accumulate(pieces)
        np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
        np.testing.assert_allclose(other_gradient, gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("how", WAYS)
def test_gradients_are_finite_with_junk_outside_the_mask(how):
    new, old, advantages, mask = map(jnp.array, ragged(6))

    def loss(new, spoilt):
        old_, advantages_ = (masked.keep(jnp.where(mask, x, spoilt), mask) for x in (old, advantages))
        policy, _, _ = clipped_policy_terms(masked.keep(new, mask), old_, advantages_, 0.2, 0.2)
        value, _ = clipped_value_terms(masked.keep(new, mask), old_, advantages_, 0.2)
        return aggregate(policy + value, mask, how).value()

    both = jax.jit(jax.value_and_grad(loss))
    clean_value, clean_gradient = both(new, 0.0)
    assert jnp.isfinite(clean_gradient).all() and clean_gradient.any()
    for junk in (np.nan, np.inf, -np.inf):
        value, gradient = both(jnp.where(mask, new, junk), junk)
        np.testing.assert_array_equal(gradient, clean_gradient)
        assert value == clean_value


def test_another_aggregation_is_refused():
    with pytest.raises(ValueError, match="aggregation 'mean': expected one of token-mean, "):
        aggregate(jnp.ones((1, 2)), jnp.ones((1, 2), bool), "mean")  # pyright: ignore[reportArgumentType]


def test_rows_sharded_over_an_explicit_mesh():
    host = ragged(8)
    devices = jax.devices()[: 8 if jax.device_count() >= 8 else 1]
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Explicit,), devices=devices)
    rows = NamedSharding(mesh, PartitionSpec("data", None))

    def loss(new, old, advantages, mask):
        policy, _, _ = clipped_policy_terms(new, old, advantages, 0.2, 0.2, 3.0)
        value, _ = clipped_value_terms(new, old, advantages, 0.2)
        return sum(aggregate(policy + value, mask, how).value() for how in WAYS)

    alone = jax.jit(jax.value_and_grad(loss))(*map(jnp.array, host))
    with jax.set_mesh(mesh):
        ours = jax.jit(jax.value_and_grad(loss))(*(jax.device_put(x, rows) for x in host))
    assert ours[1].sharding.spec == rows.spec
    np.testing.assert_allclose(np.asarray(ours[0]), alone[0], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(ours[1]), alone[1], rtol=1e-6, atol=1e-8)


# ---- action values --------------------------------------------------------------------------------------------------


def test_expectile_terms_are_hand_worked():
    assert expectile_terms(jnp.array([2.0, -2.0, 0.0]), 0.9).tolist() == pytest.approx([3.6, 0.4, 0.0])
    assert expectile_terms(jnp.array([3, -3]), 0.5).tolist() == [4.5, 4.5]


def test_an_expectile_lies_between_the_mean_and_the_maximum():
    """Found where the gradient over a constant is 0; it rises with the expectile, from the mean to the maximum."""
    values = jnp.array([0.0, 1.0, 1.0, 4.0])
    slope = jax.jit(jax.grad(lambda v, tau: expectile_terms(values - v, tau).sum()))
    found = []
    for tau in (0.5, 0.7, 0.9, 0.999):
        low, high = 0.0, 4.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if slope(middle, tau) < 0 else (low, middle)
        found.append(low)
    assert found[0] == pytest.approx(1.5, abs=1e-4) and found == sorted(found) and 3.9 < found[-1] < 4


def test_conservative_q_terms_are_a_loop():
    """Nothing outside the mask reaches the loss or its gradient."""
    rng = np.random.default_rng(0)
    q, goal, mask = rng.normal(size=(3, 4, 5)), rng.normal(size=(3, 4)), rng.random((3, 4)) < 0.6
    token = rng.integers(0, 5, (3, 4))
    junk = lambda x: np.where(mask, x, np.nan)

    def terms(q, cql_coef):
        chosen = jnp.take_along_axis(q, token[..., None], -1)[..., 0]
        stats = QStats(chosen, q.max(-1), jax.nn.logsumexp(q, -1))
        return conservative_q_terms(stats, jnp.array(junk(goal)), jnp.array(mask), cql_coef)

    wild = np.where(mask[..., None], q, np.nan)
    for cql_coef in (0.0, 0.25):
        found = terms(wild, cql_coef)
        for at in zip(*np.nonzero(mask)):
            chosen = q[at][token[at]]
            expected = (chosen - goal[at]) ** 2 + cql_coef * (np.log(np.exp(q[at]).sum()) - chosen)
            assert float(found[at]) == pytest.approx(expected, rel=1e-5)
        assert (np.asarray(found)[~mask] == 0).all()
