"""Intervals and length control of win rates, against what is worked out another way."""

import math

import numpy as np
import pytest

from jaxrlhf.evaluate.win_intervals import interval, length_controlled, win_report


def test_the_interval_is_that_of_a_binomial():
    """1.96 standard errors on both sides, for many prompts."""
    wins = np.repeat([1.0, 0.0], [120, 80])
    low, high = interval(wins)
    error = 1.96 * math.sqrt(0.6 * 0.4 / 200)
    np.testing.assert_allclose([low, high], [0.6 - error, 0.6 + error], atol=0.006)
    assert interval(wins) == (low, high), "the same each time"
    assert interval(np.ones(7)) == (1.0, 1.0)


def test_at_equal_lengths_the_logits_of_longer_and_shorter_ones_meet_in_the_middle():
    """Longer ones win 9 of 10, shorter ones 5 of 10: logits log 9 and 0, so log 3 at no difference: 3 of 4."""
    wins = np.repeat([1.0, 0.0, 1.0, 0.0], [9, 1, 5, 5])
    longer = np.repeat([4.0, -4.0], 10)
    assert wins.mean() == 0.7
    assert length_controlled(wins, longer) == pytest.approx(0.75, abs=2e-3)
    assert length_controlled(1 - wins, -longer) == pytest.approx(0.25, abs=2e-3)


def test_lengths_that_say_nothing_change_nothing():
    wins = np.repeat([1.0, 0.5, 0.0], [4, 2, 2])
    assert length_controlled(wins, np.zeros(8)) == wins.mean()
    assert length_controlled(np.tile(wins, 2), np.repeat([3.0, -3.0], 8)) == pytest.approx(wins.mean(), abs=1e-4)
    assert length_controlled(np.ones(3), np.arange(3.0)) == 1.0


def test_wins_by_length_alone_are_half_without_it():
    longer = np.array([5.0, 3.0, 4.0, -5.0, -3.0, -4.0])
    assert length_controlled((longer > 0) * 1.0, longer) == pytest.approx(0.5, abs=1e-3)


def test_the_report_leaves_out_what_has_no_number():
    found = win_report(np.array([1, 0, 2, np.nan]), np.array([0, 1, 2, 0]), np.array([0, 0, 0, 9]))
    assert found["prompts"] == 3 and found["rate"] == found["length_controlled"] == 0.5
    assert 0 <= found["low"] <= found["rate"] <= found["high"] <= 1
    assert win_report(np.array([np.nan]), np.ones(1), np.ones(1)) == {"prompts": 0}
