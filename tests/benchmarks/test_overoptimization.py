"""The parts of the benchmark of over-optimisation: labels, the true score, and what is worked out of curves."""

import json
import random

import numpy as np
import pytest

from jaxrlhf.benchmarks.published import overoptimization as task


def test_typos_and_other_lengths_lose_gold():
    best = max(task.LETTERS[: task.SEEN_WELL], key=lambda letter: task.worth(0)[letter])
    right = best * task.BEST_LENGTH
    assert task.gold_of(right, 0) == pytest.approx(4 * task.worth(0)[best])
    assert task.gold_of(right + best * 4, 0) == pytest.approx(task.gold_of(right, 0) - 0.05 * 16)
    assert task.gold_of(right[:-1] + task.LETTERS[-1], 0) < task.gold_of(right, 0)


@pytest.mark.parametrize("noise", [0.0, 0.25])
def test_so_many_labels_are_wrong(noise):
    rng = random.Random(0)
    pairs = [task.pair(rng, "a:", 0, noise) for _ in range(2000)]
    wrong = np.mean([task.gold_of(one["chosen"], 0) < task.gold_of(one["rejected"], 0) for one in pairs])
    assert abs(wrong - noise) < (0.03 if noise else 1e-9)


def test_the_few_pairs_are_the_first(tmp_path):
    task.write_data(tmp_path, 3, held_out=5)
    read = lambda name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert read("few_pairs") == read("pairs")[: task.FEW] and len(read("held_out")) == 5
    assert task.gold(["ab"], read("held_out")[:1]) == [task.gold_of("ab", 3)]


def test_what_a_curve_lost_of_its_rise():
    assert task.fall([0.0, 2.0, 1.5]) == 0.25 and task.fall([1.0, 2.0, 1.0]) == 1 and task.fall([0.0, 1.0]) == 0
    assert task.fall([1.0, 0.5]) == 0  # there was no rise


def test_gaos_forms_are_fitted():
    distance = np.linspace(0.5, 3, 9)
    assert task.fitted(distance, distance * (2 - 0.7 * distance), distance) == pytest.approx((2, 0.7))
    kl, rises = distance**2, distance * (1.5 - 0.4 * np.log(distance))
    assert task.fit_training(kl.tolist(), [5.0, *(5 + rises[1:])]) == pytest.approx((1.5, 0.4))
