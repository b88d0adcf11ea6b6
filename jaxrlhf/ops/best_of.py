"""What the best of n samples by one score is worth by another, without bias, from N >= n samples."""

import math
from collections.abc import Sequence

import numpy as np


def best_of_weights(count: int, n: int) -> np.ndarray:
    """f64[count]: how likely it is, of each of ``count`` samples in ascending order, that it is the best of ``n`` drawn
    without replacement.

        w_i = C(i - 1, n - 1) / C(count, n)        i = 1 ... count

    Raises:
        ValueError: where there are fewer than ``n`` samples, or n is less than 1.
    """
    if not 1 <= n <= count:
        raise ValueError(f"best of {n}: expected 1 to {count}, the number of samples")
    logs = np.array([log_choose(i, n - 1) if i >= n - 1 else -np.inf for i in range(count)])
    return np.exp(logs - log_choose(count, n))


def log_choose(count: int, n: int) -> float:
    """log C(count, n)."""
    return math.lgamma(count + 1) - math.lgamma(n + 1) - math.lgamma(count - n + 1)


def best_of(proxy: np.ndarray, gold: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """f64[sizes, prompts]: the expected ``gold`` of the sample that ``proxy`` holds best of n, for each n in ``sizes``.

    It is the mean over all subsets of n of the N samples, by order statistics: unbiased for n fresh samples. Samples of
    equal proxy take equal shares.

    Args:
        proxy, gold: f[prompts, N].

    Source: Nakano et al. 2021 (arXiv:2112.09332), appendix I; Gao et al. 2022 (arXiv:2210.10760), section 2.
    """
    order = np.argsort(proxy, axis=1, kind="stable")
    ordered = np.take_along_axis(np.asarray(proxy, np.float64), order, 1)
    golden = np.take_along_axis(np.asarray(gold, np.float64), order, 1)
    for row, scores in zip(golden, ordered):  # the mean gold of each run of equal proxies
        _, which = np.unique(scores, return_inverse=True)
        row[:] = (np.bincount(which, row) / np.bincount(which))[which]
    return np.stack([golden @ best_of_weights(proxy.shape[1], n) for n in sizes])


def best_of_kl(n: int) -> float:
    """Nats between the best of n and the policy that is sampled, at most: log n - (n - 1) / n.

    It is exact where no two samples have the same score. Source: Stiennon et al. 2020 (arXiv:2009.01325), appendix G.3;
    that it is a bound: Beirami et al. 2024 (arXiv:2401.01879)."""
    return math.log(n) - (n - 1) / n
