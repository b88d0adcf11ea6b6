"""Files in the format of RewardBench: what a row is, and accuracies worked out by hand."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxrlhf.cli import app
from jaxrlhf.errors import ConfigError
from jaxrlhf.evaluate import rewardbench
from jaxrlhf.evaluate.rewardbench import (
    DOMAINS,
    SECTIONS,
    Item,
    accuracies,
    item_of,
    points,
    print_rewardbench,
    read_items,
    rewardbench_report,
    ties_score,
)

USER, RIGHT, WRONG = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "r"), ("assistant", "w"))
)


def item(subset: str, right: int = 1, id: str = "", candidates: int = 2) -> Item:
    return Item(subset, [{}] * candidates, right, id)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": "r", "rejected": "w"},
        {"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]},
        {"prompt": "q", "chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
        {"chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
    ],
)
def test_conversations_of_every_form_are_the_same_rows(row):
    expected = [{"messages": [USER, RIGHT]}, {"messages": [USER, WRONG]}]
    assert item_of(row | {"subset": "donotanswer", "id": 3}) == Item("donotanswer", expected, 1, "3")


def test_texts_stay_texts_and_lists_are_candidates():
    texts = [{"prompt": "q", "response": one} for one in ("r", "w", "v", "u")]
    assert item_of({"prompt": "q", "chosen": "r", "rejected": "w"}) == Item("all", texts[:2], 1, "")
    row = {"prompt": "q", "chosen": ["r", "w"], "rejected": ["v", "u"], "subset": "Ties", "id": "tied:0"}
    assert item_of(row) == Item("Ties", texts, 2, "tied:0")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "q", "chosen": "r"}, "rejected"),
        (
            {"prompt": "q", "chosen": [], "rejected": ["w"]},
            "expected a prompt, and one chosen and one rejected response",
        ),
        ({"chosen": ["r"], "rejected": ["w"]}, "expected a prompt, and one chosen and one rejected response"),
        ({"prompt": "q", "chosen": "r", "rejected": 3}, "rejected"),
    ],
)
def test_a_row_that_is_none_is_named(row, message, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "q", "chosen": "r", "rejected": "w"}, row])
    with pytest.raises(ConfigError) as error:
        read_items(path)
    assert str(error.value).startswith(f"--rewardbench {path}:2: ") and message in str(error.value)


def test_a_file_that_is_none_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^--rewardbench: .*rows.jsonl' does not exist"):
        read_items(str(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds no rows; expected prompt, chosen and rejected"):
        read_items(str(tmp_path / "rows.jsonl"))


def test_parquet_is_read_and_the_version_is_told(tmp_path):
    import pyarrow
    import pyarrow.parquet

    one = [{"prompt": "q", "chosen": "r", "rejected": "w", "subset": "hep-go", "id": 7}]
    two = [{"prompt": "q", "chosen": ["r"], "rejected": ["w", "v", "u"], "subset": "Math", "id": "7"}]
    for version, rows in ((1, one), (2, two)):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{version}.parquet")
        assert read_items(str(tmp_path / f"{version}.parquet")) == (version, [item_of(rows[0])])


# ---- accuracy -------------------------------------------------------------------------------------------------------


def test_a_tie_is_wrong_in_the_first_and_shared_in_the_second():
    assert [points(pair, 1, 1) for pair in ((2, 1), (1, 1), (1, 2))] == [1, 0, 0]
    four = ((3, 1, 2, 0), (3, 3, 2, 0), (3, 3, 3, 3), (1, 3, 0, 0))
    assert [points(each, 1, 2) for each in four] == [1, 1 / 2, 1 / 4, 0]


def test_the_weights_are_the_pairs_but_for_maths():
    assert {name: sum(weights.values()) for name, weights in SECTIONS.items()} == {
        "Chat": 358,
        "Chat Hard": 456,
        "Safety": 740,
        "Reasoning": 1968,
    }
    code = sum(weight for name, weight in SECTIONS["Reasoning"].items() if name.startswith("hep-"))
    assert SECTIONS["Reasoning"]["math-prm"] == code
    pairs = sum(sum(weights.values()) for weights in SECTIONS.values()) - 984 + 447
    assert pairs == 2985  # of the data set


def test_sections_by_hand():
    """Reasoning of maths (1 of 2 right) and of one subset of code, Chat of two subsets, and a subset of no section."""
    found = accuracies(
        1,
        [item(name) for name in ("math-prm", "math-prm", "hep-go", "alpacaeval-easy", "mt-bench-med", "mine", "mine")],
        [(2, 1), (1, 2), (2, 1), (1, 1), (2, 1), (2, 1), (1, 1)],
    )
    assert found["subsets"] == {
        "math-prm": {"rows": 2, "ties": 0, "accuracy": 0.5},
        "hep-go": {"rows": 1, "ties": 0, "accuracy": 1.0},
        "alpacaeval-easy": {"rows": 1, "ties": 1, "accuracy": 0.0},
        "mt-bench-med": {"rows": 1, "ties": 0, "accuracy": 1.0},
        "mine": {"rows": 2, "ties": 1, "accuracy": 0.5},
    }
    assert found["sections"] == {
        "Chat": pytest.approx(40 / 140),
        "Reasoning": pytest.approx((984 * 0.5 + 164) / (984 + 164)),
    }
    assert "score" not in found and (found["version"], found["rows"]) == (1, 7)


def test_the_score_is_the_mean_of_all_sections():
    names = ["mt-bench-easy", "mt-bench-hard", "donotanswer", "hep-rust"]
    found = accuracies(1, [item(name) for name in names], [(2, 1), (1, 2), (2, 1), (2, 1)])
    assert found["sections"] == {"Chat": 1.0, "Chat Hard": 0.0, "Safety": 1.0, "Reasoning": 1.0}
    assert found["score"] == 0.75


def test_ties_by_hand():
    """Prompt 0: right 5 and 4, wrong 2: spread 1, gap 2; its twin: gap 3. Prompt 1: right 6 and 3, wrong 4: spread 3,
    gap -1; its twin: gap 0.5. Prompt 2: right equal: spread 0, gap 1; twin: gap 1."""
    rows = [
        ("tied:0", 2, (5, 4, 2, 1)),
        ("ref:0", 1, (4, 1)),
        ("ref:1", 1, (2, 1.5)),
        ("tied:1", 2, (6, 3, 4)),
        ("tied:2", 2, (2, 2, 1)),
        ("ref:2", 1, (2, 1)),
    ]
    items, scores = [item("Ties", right, name) for name, right, _ in rows], [each for *_, each in rows]
    margin = (math.tanh(2 / 1 - 1) + math.tanh(-1 / 3 - 1) + 1) / 3
    expected = 0.3 * 2 / 3 + 0.3 * 1 + 0.2 * 2 / 3 + 0.2 * 2 / 3 + 0.01 * margin
    assert ties_score(items, scores) == pytest.approx(expected)
    for wrong, message in (("0", "expected ref:NUMBER or tied:NUMBER"), ("ref:9", "expected both ref:9 and tied:9")):
        with pytest.raises(ConfigError, match=message):
            ties_score([*items, item("Ties", 1, wrong)], [*scores, (1, 2)])


def test_the_second_score_is_the_mean_of_six_domains():
    others = [item(name, candidates=4) for name in DOMAINS[:-1]]
    ties = [item("Ties", 2, "tied:0", 3), item("Ties", 1, "ref:0")]
    scores = [(2, 1, 1, 1), (1, 2, 1, 1), (2, 2, 1, 1), (2, 1, 1, 1), (1, 1, 1, 1), (5, 4, 2), (3, 1)]
    found = accuracies(2, [*others, *ties], scores)
    tied = 0.3 + 0.3 + 0.2 + 0.2 + 0.01 * math.tanh(1)
    assert found["score"] == pytest.approx((1 + 0 + 0.5 + 1 + 0.25 + tied) / 6)
    assert found["sections"] == {} and found["subsets"]["Ties"]["accuracy"] == pytest.approx(tied)
    assert "score" not in accuracies(2, others, scores[:5])


# ---- a model --------------------------------------------------------------------------------------------------------


@pytest.fixture
def longest_wins(monkeypatch):
    """A stand-in for a reward model: a row is its characters, its score their number. It reads 8 tokens at most."""
    asked: list[Any] = []

    class Scorer:
        def __init__(self, name: str):
            self.model = SimpleNamespace(chat=False, tokenizer=SimpleNamespace(chat_template=None), config=None)

        def encode(self, records):
            return [np.zeros(len(record["response"])) for record in records]

        def score(self, rows):
            asked.append([len(row) for row in rows])
            return [float(len(row)) for row in rows]

    monkeypatch.setattr(rewardbench, "Scorer", Scorer)
    monkeypatch.setattr(rewardbench, "row_limit", lambda cfg: 8)
    return asked


def test_a_report_leaves_out_what_is_too_long(longest_wins, tmp_path, monkeypatch, capsys):
    sides = [("mt-bench-easy", "aaa", "a"), ("mt-bench-hard", "a", "aaaa"), ("donotanswer", "aa", "aa")]
    sides += [("hep-cpp", "a" * 9, "a"), ("hep-go", "aaaaa", "a")]
    rows = [{"prompt": "q", "chosen": one, "rejected": other, "subset": name} for name, one, other in sides]
    path = write(tmp_path / "rows.jsonl", rows)
    found = rewardbench_report("model", path)
    assert longest_wins == [[1, 1, 1, 2, 2, 3, 4, 5]]
    bench = found["rewardbench"]
    assert (bench["rows"], bench["too_long"], bench["score"]) == (4, 1, 0.5)
    assert bench["sections"] == {"Chat": 1.0, "Chat Hard": 0.0, "Safety": 0.0, "Reasoning": 1.0}
    print_rewardbench(found)
    shown = capsys.readouterr().out
    assert "4 rows of" in shown and "1 row too long for the model" in shown and "Chat Hard" in shown
    monkeypatch.setattr(sys, "argv", ["jaxrlhf", "evaluate", "model", "--rewardbench", path, "--json"])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert not ended.value.code and json.loads(capsys.readouterr().out) == found
    monkeypatch.setattr(sys, "argv", ["jaxrlhf", "evaluate", "model", "--rewardbench", path, "--best-of", "2"])
    with pytest.raises(SystemExit, match="2"):
        app.main()
    assert "measures the file alone; expected no --best-of" in capsys.readouterr().err


def test_nothing_short_enough_is_one_line(longest_wins, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "q", "chosen": "a" * 9, "rejected": "b"}])
    with pytest.raises(ConfigError, match="every row is longer than the 8 tokens that model can read"):
        rewardbench_report("model", path)
