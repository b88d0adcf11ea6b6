"""What the benchmark control is made of: segments, their labels, and which pairs are asked about."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxrlhf.benchmarks.published import control
from jaxrlhf.rewards.upright import reward_of


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("control") / "data"
    folder.mkdir()
    control.write_data(folder, 5, pool=300)
    return folder


def test_labels_are_by_the_true_reward_of_the_segments(data):
    pairs = read(data / "pairs_700.jsonl")
    assert pairs[:50] == read(data / "pairs_50.jsonl") and pairs[:200] == read(data / "pairs_200.jsonl")
    chosen, rejected = (np.array([pair[f"{side}_observations"] for pair in pairs]) for side in ("chosen", "rejected"))
    assert chosen.shape == (700, 26, 4) and {len(pair["chosen_actions"]) for pair in pairs} == {25}
    gaps = reward_of(chosen[:, 1:]).sum(1) - reward_of(rejected[:, 1:]).sum(1)
    assert gaps.min() > -1e-2  # rounded observations
    held_out = read(data / "held_out_pairs.jsonl")
    assert len(held_out) == control.HELD_OUT and not [pair for pair in held_out if pair in pairs]


def test_the_pairs_that_are_asked_about_are_those_of_most_disagreement(data, monkeypatch):
    """Two models agree on every pair but for a few of the pool."""
    disputed = list(range(7, 157))

    def scores(run_dir: Path, pairs: list[dict], side: str) -> np.ndarray:
        assert run_dir == data.parent / "rm_50" and len(pairs) == 300
        found = np.full((2, 300), float(side == "chosen"))
        found[1, disputed] *= -1
        return found

    monkeypatch.setattr(control, "segment_scores", scores)
    control.ask_by_disagreement(data.parent, 5)
    asked, pool = read(data / "asked.jsonl"), read(data / "pool.jsonl")
    assert asked == read(data / "pairs_50.jsonl") + [pool[at] for at in disputed]
