"""Masked statistics against published numbers and NumPy on the kept values only."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrlhf.ops import masked

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "masked.json").read_text())
JUNK = [np.nan, np.inf, -np.inf, 1e30]


def ragged(seed: int, rows: int = 6, columns: int = 9):
    """Values with junk outside a random mask that has gaps, an empty row and a full row."""
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, columns)) < 0.5
    mask[0], mask[1] = False, True
    x = rng.normal(1.0, 2.0, mask.shape).astype(np.float32)
    return np.where(mask, x, rng.choice(JUNK, mask.shape)).astype(np.float32), mask


@pytest.mark.parametrize("seed", range(3))
def test_statistics_are_those_of_the_kept_values(seed):
    x, mask = ragged(seed)
    kept = x[mask].astype(np.float64)
    both = masked.sums(jnp.array(x), jnp.array(mask))
    np.testing.assert_allclose(both.total, kept.sum(), rtol=1e-5)
    assert both.count == len(kept) and both.count.dtype == jnp.float32
    np.testing.assert_allclose(masked.mean(jnp.array(x), jnp.array(mask)), kept.mean(), rtol=1e-5)
    for unbiased in (True, False):
        ours = masked.variance(jnp.array(x), jnp.array(mask), unbiased)
        np.testing.assert_allclose(ours, kept.var(ddof=int(unbiased)), rtol=1e-5)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("variance", ["unbiased", "biased"])
def test_whiten_is_a_numpy_loop(variance, shift_mean):
    x, mask = ragged(7)
    kept = x[mask].astype(np.float64)
    spread = kept.std(ddof=1 if variance == "unbiased" else 0)
    expected = np.zeros(x.shape)
    for row, column in zip(*np.nonzero(mask)):
        expected[row, column] = (x[row, column] - kept.mean()) / spread + (0.0 if shift_mean else kept.mean())
    ours = masked.whiten(jnp.array(x), jnp.array(mask), variance=variance, shift_mean=shift_mean)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_whiten_published_scale_only():
    case = GOLDEN["whiten_scale_only"]
    x = jnp.array(case["x"])
    everywhere = jnp.ones(x.shape, bool)
    unbiased = masked.whiten(x, everywhere, variance="unbiased", shift_mean=False)
    biased = masked.whiten(x, everywhere, variance="biased", shift_mean=False)
    np.testing.assert_allclose(unbiased[0], case["unbiased_first_row"], atol=2e-6)
    np.testing.assert_allclose(biased[0], case["biased_first_row"], atol=6e-5)  # printed to 4 decimals


def test_whiten_published_advantages():
    case = GOLDEN["whiten_advantages"]
    x = jnp.array(case["x"])
    np.testing.assert_allclose(
        masked.whiten(x, jnp.ones(x.shape, bool), variance="unbiased"), case["unbiased"], atol=2e-5
    )


def test_whiten_published_ragged_batch():
    case = GOLDEN["whiten_ragged"]
    mask = np.arange(3)[None] < np.array(case["lengths"])[:, None]
    x = np.where(mask, np.array(case["scores"], np.float32)[:, None], 100.0)
    ours = masked.whiten(jnp.array(x), jnp.array(mask), variance="unbiased")
    np.testing.assert_allclose(ours, np.where(mask, np.array(case["unbiased"])[:, None], 0.0), atol=2e-6)


def test_nothing_under_the_mask_gives_zero_not_nan():
    x, nothing = jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), bool)
    assert masked.mean(x, nothing) == 0
    assert masked.variance(x, nothing, True) == 0
    np.testing.assert_array_equal(masked.whiten(x, nothing, variance="unbiased"), np.zeros((2, 3)))
    np.testing.assert_array_equal(masked.whiten(x, nothing, variance="biased", shift_mean=False), np.zeros((2, 3)))


def test_one_position_whitens_to_zero():
    x, one = jnp.array([[3.0, jnp.nan]]), jnp.array([[True, False]])
    np.testing.assert_array_equal(masked.whiten(x, one, variance="unbiased"), [[0.0, 0.0]])


@pytest.mark.parametrize("value", [0.1, 1000.1, -7e4])
def test_equal_values_whiten_to_zero(value):
    x = jnp.full((37, 9), value)  # the mean of 333 of them is rounded, and 1 / sqrt(eps) is 1e4
    np.testing.assert_allclose(
        masked.whiten(x, jnp.ones(x.shape, bool), variance="unbiased"), np.zeros(x.shape), atol=1e-3
    )


def test_whiten_refuses_another_variance():
    with pytest.raises(ValueError, match="'no': expected unbiased or biased"):
        masked.whiten(jnp.ones((1, 2)), jnp.ones((1, 2), bool), variance="no")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "statistic",
    [
        masked.mean,
        lambda x, mask: masked.variance(x, mask, True),
        lambda x, mask: jnp.sum(jnp.sin(masked.whiten(x, mask, variance="unbiased"))),
        lambda x, mask: jnp.sum(jnp.sin(masked.whiten(x, mask, variance="biased", shift_mean=False))),
    ],
)
def test_gradients_are_finite_and_zero_outside_the_mask(statistic):
    x, mask = ragged(3)
    gradient = np.asarray(jax.jit(jax.grad(statistic))(jnp.array(x), jnp.array(mask)))
    assert np.isfinite(gradient).all()
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).all()


def test_integers_are_summed_as_float32():
    both = masked.sums(jnp.array([[1, 2, 4]]), jnp.array([[True, False, True]]))
    assert both.total == 5.0 and both.total.dtype == jnp.float32


def test_micro_batches_add_up_to_the_batch():
    x, mask = ragged(5, rows=8)
    whole = masked.mean(jnp.array(x), jnp.array(mask))
    for pieces in (2, 4):
        parts = [masked.sums(jnp.array(a), jnp.array(b)) for a, b in zip(np.split(x, pieces), np.split(mask, pieces))]
        np.testing.assert_allclose(sum(parts[1:], parts[0]).value(), whole, rtol=1e-6)


def test_row_means_stand_where_the_row_is_kept():
    x, mask = ragged(3)
    ours = masked.row_means(jnp.array(x), jnp.array(mask))
    for row, kept, found in zip(x.astype(np.float64), mask, np.asarray(ours)):
        np.testing.assert_allclose(found, np.where(kept, row[kept].mean() if kept.any() else 0, 0), rtol=1e-5)
    gradient = jax.grad(lambda x: masked.row_means(x, jnp.array(mask)).sum())(jnp.array(x))
    np.testing.assert_allclose(gradient, mask, rtol=1e-6)  # n places of sum / n


def test_last_index_and_at_last():
    mask = np.array([[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]], bool)
    np.testing.assert_array_equal(masked.last_index(jnp.array(mask)), [1, 3, -1, 1])
    np.testing.assert_array_equal(
        masked.at_last(jnp.array(mask)), np.array([[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]], bool)
    )


def test_shapes_must_agree():
    with pytest.raises(AssertionError):
        masked.sums(jnp.ones((4, 1)), jnp.ones((4, 3), bool))


def test_rows_sharded_over_an_explicit_mesh():
    x, mask = ragged(11, rows=8)
    devices = jax.devices()[: 8 if jax.device_count() >= 8 else 1]
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Explicit,), devices=devices)
    rows = NamedSharding(mesh, PartitionSpec("data", None))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, rows), jax.device_put(mask, rows)
        whitened = jax.jit(lambda *a: masked.whiten(*a, variance="unbiased"))(*sharded)
        last = jax.jit(masked.at_last)(sharded[1])
    assert whitened.sharding.spec == rows.spec and last.sharding.spec == rows.spec
    alone = masked.whiten(jnp.array(x), jnp.array(mask), variance="unbiased")
    np.testing.assert_allclose(np.asarray(whitened), alone, atol=1e-6)  # statistics of all rows, not of a device's
