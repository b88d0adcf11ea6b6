"""Scores of several models as one, against hand-worked numbers and a NumPy loop; bootstrap samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.ops.ensembles import bootstrap_counts, combine_scores, disagreement, row_hash

SCORES = np.array([[1.0, 0.0, -2.0], [3.0, 0.0, 4.0], [5.0, 0.0, 1.0]], np.float32)  # [members, rows]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [3, 0, 1]),
        ("median", [3, 0, 1]),
        ("min", [1, 0, -2]),
        ("mean_minus_variance", [3 - 0.5 * 8 / 3, 0, 1 - 0.5 * 6]),
    ],
)
def test_by_hand(how, expected):
    np.testing.assert_allclose(combine_scores(jnp.array(SCORES), how, 0.5), expected, rtol=1e-6, atol=1e-6)


def one_row(scores: np.ndarray, how: str, coef: float) -> float:
    ordered = sorted(float(score) for score in scores)
    mean = sum(ordered) / len(ordered)
    if how == "mean":
        return mean
    if how == "min":
        return ordered[0]
    if how == "median":
        middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
        return sum(middle) / len(middle)
    return mean - coef * sum((score - mean) ** 2 for score in ordered) / len(ordered)


@pytest.mark.parametrize("how", ["mean", "median", "min", "mean_minus_variance"])
@pytest.mark.parametrize("members", [1, 2, 5, 6])
def test_it_is_a_numpy_loop(how, members):
    scores = np.random.default_rng(members).normal(size=(members, 7)).astype(np.float32)
    expected = [one_row(row, how, 0.3) for row in scores.T]
    np.testing.assert_allclose(combine_scores(jnp.array(scores), how, 0.3), expected, rtol=1e-5, atol=1e-6)
    apart = [np.sqrt(np.mean((row - row.mean()) ** 2)) for row in scores.T.astype(np.float64)]
    np.testing.assert_allclose(disagreement(jnp.array(scores)), apart, rtol=1e-5, atol=1e-6)


def test_another_way_to_combine_is_refused():
    with pytest.raises(ValueError, match="combine 'max': expected mean, median, min or mean_minus_variance"):
        combine_scores(jnp.array(SCORES), "max", 0.0)  # type: ignore[arg-type]


def rows(count: int = 4000, columns: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    valid = np.arange(columns) < rng.integers(3, columns + 1, (count, 1))
    return np.where(valid, rng.integers(0, 500, (count, columns)), 7), valid


def test_a_hash_is_of_valid_tokens_alone():
    tokens, valid = rows(50)
    found = np.asarray(row_hash(jnp.array(tokens), jnp.array(valid)))
    junk = np.where(valid, tokens, 99)
    wide = [np.pad(x, ((0, 0), (0, 3))) for x in (junk, valid)]
    np.testing.assert_array_equal(row_hash(*map(jnp.array, wide)), found)
    order = np.random.default_rng(1).permutation(50)
    np.testing.assert_array_equal(row_hash(jnp.array(tokens[order]), jnp.array(valid[order])), found[order])
    assert len(np.unique(found)) == len(np.unique(tokens, axis=0))
    swapped = (
        row_hash(jnp.array([[3, 4]]), jnp.ones((1, 2), bool)),
        row_hash(jnp.array([[4, 3]]), jnp.ones((1, 2), bool)),
    )
    assert int(swapped[0][0]) != int(swapped[1][0])


def test_bootstrap_samples_are_poisson_and_each_member_has_its_own():
    hashes = row_hash(*map(jnp.array, rows()))
    counts = np.array([jax.jit(bootstrap_counts, static_argnums=1)(hashes, member) for member in range(4)])
    assert abs(counts.mean() - 1) < 0.03 and abs(counts.var() - 1) < 0.06
    assert abs((counts == 0).mean() - np.exp(-1)) < 0.02 and set(np.unique(counts)) <= set(range(8))
    apart = np.corrcoef(counts) - np.eye(4)
    assert np.abs(apart).max() < 5 / np.sqrt(counts.shape[1])
