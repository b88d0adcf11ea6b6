"""How often the answer that most of k responses give is right."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

SUBSETS = 500  # of k of a prompt's responses; all of them where there are no more


def subsets_of(count: int, k: int) -> np.ndarray:
    """i64[.., k]: all subsets of ``count``, or SUBSETS of them, the same each time."""
    if math.comb(count, k) <= SUBSETS:
        return np.array([*itertools.combinations(range(count), k)])
    return np.random.default_rng(0).random((SUBSETS, count)).argsort(1)[:, :k]


def majority(answers: Sequence[str | None], right: np.ndarray, k: int) -> float:
    """How likely the answer that most of ``k`` of a prompt's responses give is right (Wang et al. 2023,
    arXiv:2203.11171). Responses without an answer have no vote; no vote is wrong; equal votes share.

    Args:
        right: f64[N], 1 or 0, of each response.
    """
    names = [*dict.fromkeys(answer for answer in answers if answer is not None)]
    if not names:
        return 0.0
    gives = np.array([[answer == name for name in names] for answer in answers], np.float64)  # [N, answers]
    value = right @ gives / gives.sum(0)
    votes = gives[subsets_of(len(answers), k)].sum(1)
    most = votes.max(1, keepdims=True)
    top = (votes == most) & (most > 0)
    return float(((top @ value) / np.maximum(top.sum(1), 1)).mean())
