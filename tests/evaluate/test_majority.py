"""pass@k and majority@k, by hand."""

import itertools
import math

import numpy as np
import pytest

from jaxrlhf.evaluate import majority as majorities
from jaxrlhf.evaluate.best_of import best_of_rows
from jaxrlhf.evaluate.majority import majority
from jaxrlhf.rewards.math_text import final_answer


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    """1 - C(n - c, k) / C(n, k): Chen et al. 2021, arXiv:2107.03374."""
    right = np.array([[1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]], float)
    rows = best_of_rows((1, 2, 4), {"reward": right})
    for row in rows:
        k = int(row["n"])
        each = [1 - math.comb(6 - int(c), k) / math.comb(6, k) for c in right.sum(1)]
        assert row["pass"] == row["reward"] == round(float(np.mean(each)), 4)
    assert "majority" not in rows[0]
    assert "pass" not in best_of_rows((1,), {"reward": right / 2})[0]


def test_a_majority_by_hand():
    """Of three, 7 has two votes and is wrong, 5 is right. k 2: 7 7 wrong; 7 5 and 7 5 half."""
    answers, right = ["7", "5", "7"], np.array([0.0, 1.0, 0.0])
    assert majority(answers, right, 3) == 0
    assert majority(answers, right, 2) == pytest.approx((0 + 0.5 + 0.5) / 3)
    assert majority(answers, right, 1) == pytest.approx(1 / 3)


def test_who_gives_no_answer_has_no_vote():
    assert majority([None, None, "5"], np.array([0.0, 0.0, 1.0]), 3) == 1
    assert majority([None, None, "5"], np.array([0.0, 0.0, 1.0]), 1) == pytest.approx(1 / 3)
    assert majority([None], np.zeros(1), 1) == 0


def test_some_subsets_stand_for_all(monkeypatch):
    answers = ["1", "2", "1", "3", "2", "1", "4", None]
    right = np.array([answer == "1" for answer in answers], float)
    whole = majority(answers, right, 4)
    loop = []
    for four in itertools.combinations(range(8), 4):
        votes = [answers[at] for at in four if answers[at] is not None]
        most = max(map(votes.count, votes))
        top = {vote for vote in votes if votes.count(vote) == most}
        loop.append(("1" in top) / len(top))
    assert whole == pytest.approx(np.mean(loop))
    monkeypatch.setattr(majorities, "SUBSETS", 60)
    assert majority(answers, right, 4) == pytest.approx(whole, abs=0.15)
    assert majority(answers, right, 4) != whole


def test_equal_numbers_are_one_answer():
    assert final_answer(r"so \boxed{1/2} it is") == final_answer("#### 0.5") == final_answer("it is 0.50") == "1/2"
    assert final_answer("I do not know") is None


def test_the_rows_of_the_best_of_n_have_both():
    right = np.array([[1, 1, 0], [0, 0, 1], [np.nan, 1, 1]])
    answers = [["1", "1", "2"], ["3", "3", "4"], ["5"] * 3]
    rows = best_of_rows((1, 3), {"reward": right}, answers)
    assert [(row["prompts"], row["pass"], row["majority"]) for row in rows] == [(2, 0.5, 0.5), (2, 1.0, 0.5)]
    assert "majority" not in best_of_rows((1,), {"reward": right}, [[None] * 3] * 3)[0]
