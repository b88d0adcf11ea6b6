"""Best of n by order statistics, against the enumeration of all subsets."""

import itertools
import math

import numpy as np
import pytest

from jaxrlhf.ops.best_of import best_of, best_of_kl, best_of_weights


def by_enumeration(proxy: np.ndarray, gold: np.ndarray, n: int) -> float:
    """The mean over all subsets of n samples of the gold of the best by proxy; of equally good ones their mean."""
    found = []
    for subset in itertools.combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        found.append(np.mean([gold[i] for i in subset if proxy[i] == top]))
    return float(np.mean(found))


def test_it_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(2, 4, 7))
    found = best_of(proxy, gold, range(1, 8))
    for row in range(4):
        for n in range(1, 8):
            assert found[n - 1, row] == pytest.approx(by_enumeration(proxy[row], gold[row], n))


def test_equal_proxies_share():
    proxy = np.array([[1.0, 1.0, 1.0], [0.0, 2.0, 2.0]])
    gold = np.array([[3.0, 6.0, 0.0], [9.0, 1.0, 2.0]])
    np.testing.assert_allclose(best_of(proxy, gold, [1, 2, 3]), [[3, 4], [3, 1.5], [3, 1.5]])


def test_by_hand():
    np.testing.assert_allclose(best_of_weights(4, 2), [0, 1 / 6, 2 / 6, 3 / 6])
    np.testing.assert_allclose(best_of_weights(4, 4), [0, 0, 0, 1])
    np.testing.assert_allclose(best_of_weights(5000, 300).sum(), 1)


def test_the_proxy_itself_rises_and_ends_at_its_largest():
    scores = np.random.default_rng(1).normal(size=(3, 64))
    found = best_of(scores, scores, [1, 4, 16, 64])
    assert (np.diff(found, axis=0) > 0).all()
    np.testing.assert_allclose(found[0], scores.mean(1))
    np.testing.assert_allclose(found[-1], scores.max(1))


def test_more_than_there_are():
    with pytest.raises(ValueError, match="best of 5: expected 1 to 4, the number of samples"):
        best_of(np.zeros((1, 4)), np.zeros((1, 4)), [5])


@pytest.mark.parametrize("n", [1, 2, 64])
def test_the_kl_is_that_of_the_density_of_the_largest_of_n_ranks(n):
    """Of a rank u in [0, 1] the best of n has density n u^(n - 1): integrate p log p."""
    u = (np.arange(2_000_00) + 0.5) / 2_000_00
    density = n * u ** (n - 1)
    integral = np.mean(np.where(density > 0, density * np.log(np.maximum(density, 1e-300)), 0))
    assert best_of_kl(n) == pytest.approx(integral, abs=1e-3) and best_of_kl(1) == 0
    assert best_of_kl(n) <= math.log(n)
