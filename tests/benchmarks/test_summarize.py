"""The parts of the benchmark of summaries: gold, pairs and their labels, and what is worked out of samples."""

import json
import random
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest

from jaxrlhf.benchmarks.published import summarize as task
from jaxrlhf.benchmarks.record import FinishedCell, Measured, Results
from jaxrlhf.evaluate import win_intervals
from jaxrlhf.serve import writer

POST = "aAbBcGda>"  # marked: A and B of weight 2, G of weight 1


@pytest.mark.parametrize(
    "summary, gold",
    [
        ("ABG", 1 - 3 * 0.02),
        ("GBA", 1 - 3 * 0.02),  # in any order
        ("A", 2 * 2 / (2 + 5) - 0.02),
        ("G", 2 * 1 / (1 + 5) - 0.02),  # it weighs less
        ("AA", 2 * 2 / (2 + 5) - 0.1 - 2 * 0.02),  # said twice
        ("Aa", 2 * 2 / (3 + 5) - 2 * 0.02),  # a word of the post without a mark
        ("AC", 2 * 2 / (4 + 5) - 2 * 0.02),  # a marked word that is not in the post
        ("", 0.0),
    ],
)
def test_gold_by_hand(summary, gold):
    assert task.gold_of(summary, POST) == pytest.approx(gold)
    assert task.gold([summary], [{"prompt": POST}]) == [task.gold_of(summary, POST)]


def test_a_summary_of_full_care_is_the_marked_words_and_one_of_none_is_not_empty():
    rng = random.Random(0)
    assert task.summarize(rng, POST, keep=1, wrong=0, again=0) == "ABG"
    assert task.summarize(rng, POST, keep=0, wrong=0, again=0) == "A"
    assert task.summarize(rng, POST, keep=1, wrong=0, again=1) == "AABBGG"
    assert len(task.summarize(rng, POST * 3, keep=1, wrong=1, again=1)) == task.LONGEST


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder of a seed's data."""
    folder = tmp_path_factory.mktemp("summarize") / "data"
    task.write_data(folder, 3, held_out=60)
    return folder


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_posts_have_their_marked_words_once(data):
    rows = [row["prompt"] for name in ("demonstrations", "prompts", "held_out") for row in read(data / f"{name}.jsonl")]
    marked = [[word for word in post if word in task.MARKED] for post in rows]
    assert all(len(post) == task.POST + 1 and post[-1] == task.END for post in rows)
    assert {len(words) for words in marked} == {4, 5, 6, 7} and all(len(set(words)) == len(words) for words in marked)


def test_references_are_of_middling_quality(data):
    rows = read(data / "demonstrations.jsonl")
    gold = np.mean([task.gold_of(row["response"], row["prompt"]) for row in rows])
    whole = np.mean([task.gold_of("".join(filter(str.isupper, row["prompt"])), row["prompt"]) for row in rows])
    assert 0.45 < gold < 0.6 and whole > 0.85


def test_labels_agree_with_gold_as_often_as_those_of_people_and_held_out_ones_always(data):
    better = lambda row: task.gold_of(row["chosen"], row["prompt"]) - task.gold_of(row["rejected"], row["prompt"])
    assert 0.7 < task.agreement(data.parent) < 0.75
    assert min(map(better, read(data / "held_out_pairs.jsonl"))) >= 0
    pairs = read(data / "pairs.jsonl")
    clear = [better(row) > 0 for row in pairs if abs(better(row)) > 0.5]
    close = [better(row) > 0 for row in pairs if 0 < abs(better(row)) < 0.1]
    assert np.mean(clear) > 0.9 and np.mean(close) < 0.65  # as Bradley and Terry have it: who is far ahead wins
    assert [read(data / f"pairs_{size}.jsonl") for size in (250, 1000)] == [pairs[:250], pairs[:1000]]


class Written(NamedTuple):
    text: str
    finish_reason: str


def said(at: int, record: dict) -> str:
    """All marked words of two posts, and one of the third."""
    return "".join(filter(str.isupper, record["prompt"]))[: 1 if at % 3 == 2 else None]


class Stub:
    """A model that gives ``said``; behind its first 12 responses no ending token."""

    def __init__(self, name, cfg, seed):
        assert (cfg.max_new_tokens, cfg.temperature) == (task.ROOM, task.TEMPERATURE)

    def __call__(self, records):
        for at, record in enumerate(records):
            yield [Written(said(at, record), "length" if at < 12 else "eos")]


def test_a_policy_is_measured_against_the_references(data, monkeypatch):
    monkeypatch.setattr(writer, "Writer", Stub)
    found = task.measure(FinishedCell("sft", data.parent / "sft", data.parent, 3))
    rows = read(data / "held_out.jsonl")
    texts = [said(at, row) for at, row in enumerate(rows)]
    gold = lambda text, row: task.gold_of(text, row["prompt"])
    differences = [gold(text, row) - gold(row["reference"], row) for text, row in zip(texts, rows, strict=True)]
    wins = np.array([(by > 0) + 0.5 * (by == 0) for by in differences])
    longer = np.array([len(text) - len(row["reference"]) for text, row in zip(texts, rows, strict=True)], float)
    assert found["ended"] == pytest.approx(48 / 60) and found["win_rate"] == pytest.approx(wins.mean(), abs=1e-4)
    assert found["gold"] == pytest.approx(np.mean([gold(text, row) for text, row in zip(texts, rows, strict=True)]))
    assert found["words"] == pytest.approx(np.mean([*map(len, texts)]))
    assert found["longer"] == pytest.approx(longer.mean())
    assert found["length_controlled"] == pytest.approx(win_intervals.length_controlled(wins, longer), abs=1e-4)
    assert found["length_controlled"] != pytest.approx(found["win_rate"], abs=0.1)


def test_curves_of_ppo_come_from_its_metrics(data, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "Writer", Stub)
    rows = [{"step": at, "score/mean": at / 3, "response/ended": at / 4} for at in (1, 2)]
    rows += [{"step": at, "eval/gold/mean": at / 7, "eval/kl/reference": at / 2} for at in (0, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = task.measure(FinishedCell("no_trick", tmp_path, data.parent, 3))
    assert (found["score_curve"], found["ended_curve"]) == ([0.333, 0.667], [0.25, 0.5])
    assert (found["gold_at"], found["gold_curve"], found["kl"]) == ([0.0, 2.0], [0.0, 0.286], 1.0)


def results(quantity: str, **cells: list[float]) -> Results:
    return Results(range(2), {name: [{quantity: value} for value in values] for name, values in cells.items()})


def test_lines_of_its_signature():
    found = results("accuracy", a=[0.5, 0.6], b=[0.7, 0.5], c=[0.9, 0.9])
    assert task.rising(found, ("a", "b", "c"), "accuracy") == (True, "a 0.550, b 0.600, c 0.900")  # means, not seeds
    assert not task.rising(found, ("a", "b", "b"), "accuracy")[0]
    ended = partial(results, "ended", sft=[0.8, 0.9], no_trick=[0.9, 0.95])
    assert task.rises_more(ended(ppo=[1.0, 0.96]))[0] and not task.rises_more(ended(ppo=[1.0, 0.95]))[0]


def test_whether_length_control_lowers_the_win_rate_with_every_seed():
    rates: list[Measured] = [{"win_rate": 0.8, "length_controlled": fair} for fair in (0.7, 0.8)]
    assert task.shorter_wins_less(Results([0, 1], {"ppo": rates})) == (False, "0.800 to 0.700, 0.800 to 0.800")
    assert task.shorter_wins_less(Results([0], {"ppo": rates[:1]}))[0]
