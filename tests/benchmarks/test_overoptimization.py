"""The parts of the benchmark of over-optimisation: labels, the true score, and what is worked out of curves."""

import json

import numpy as np
import pytest

from jaxrlhf.benchmarks.published import overoptimization as task


def test_typos_and_other_lengths_lose_gold():
    best = max(task.LETTERS[: task.SEEN_WELL], key=lambda letter: task.worth(0)[letter])
    right = best * task.BEST_LENGTH
    assert task.gold_of(right, 0) == pytest.approx(4 * task.worth(0)[best])
    assert task.gold_of(right + best * 4, 0) == pytest.approx(task.gold_of(right, 0) - 0.05 * 16)
    assert task.gold_of(right[:-1] + task.LETTERS[-1], 0) < task.gold_of(right, 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """name -> rows of seed 3."""
    folder = tmp_path_factory.mktemp("data")
    task.write_data(folder, 3, held_out=5)
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]
    return {path.stem: read(path) for path in folder.glob("*.jsonl")}


def test_a_quarter_of_the_labels_is_wrong_and_none_of_the_clean_ones(data):
    wrong = lambda name: np.mean(
        [task.gold_of(one["chosen"], 3) < task.gold_of(one["rejected"], 3) for one in data[name]]
    )
    assert wrong("clean_pairs") == wrong("held_out_pairs") == 0
    assert abs(wrong("pairs") - task.NOISE) < 0.03  # 4 sigma
    both = zip(data["pairs"], data["clean_pairs"], strict=True)
    assert all({one["chosen"], one["rejected"]} == {other["chosen"], other["rejected"]} for one, other in both)


def test_the_few_pairs_are_the_first(data):
    assert data["few_pairs"] == data["pairs"][: task.FEW] and len(data["held_out"]) == 5
    assert task.gold(["ab"], data["held_out"][:1]) == [task.gold_of("ab", 3)]


def test_pairs_hold_fewer_typos_than_the_policy_writes(data):
    share = lambda name, key: np.mean(
        [letter in task.LETTERS[task.SEEN_WELL :] for row in data[name] for letter in row[key]]
    )
    assert share("pairs", "rejected") < 0.6 * share("demonstrations", "response")


def test_letters_of_every_seed_are_worth_the_same_in_another_order():
    one, other = (task.worth(seed) for seed in (0, 1))
    assert one != other and sorted(one.values()) == sorted(other.values())


def test_what_a_curve_lost_of_its_rise():
    assert task.fall([0.0, 2.0, 1.5]) == 0.25 and task.fall([1.0, 2.0, 1.0]) == 1 and task.fall([0.0, 1.0]) == 0
    assert task.fall([1.0, 0.5]) == 0  # there was no rise


def test_gaos_forms_are_fitted():
    distance = np.linspace(0.5, 3, 9)
    assert task.fitted(distance, distance * (2 - 0.7 * distance), distance) == pytest.approx((2, 0.7))
    kl, rises = distance**2, distance * (1.5 - 0.4 * np.log(distance))
    assert task.fit_training(kl.tolist(), [5.0, *(5 + rises[1:])]) == pytest.approx((1.5, 0.4))
