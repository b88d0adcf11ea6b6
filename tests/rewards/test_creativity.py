"""Graders of variety, novelty and agreement, by hand and against loops."""

import json
from typing import Any

import numpy as np
import pytest

from jaxrlhf.rewards import creativity
from jaxrlhf.rewards.functions import Details, resolve
from jaxrlhf.rewards.ngrams import self_bleu


def grade(name: str, texts: list[str], groups: list[int] | None = None, **given) -> np.ndarray:
    """What the grader called ``name`` gives; token ids are the letters' codes."""
    groups = groups or [0] * len(texts)
    details = Details([[*map(ord, text)] for text in texts], [True] * len(texts), groups, 64)
    return resolve(name, given)(texts, [{} for _ in texts], details)


def test_distinct_and_repetition_are_of_the_response_alone():
    texts = ["a b a b", "a b c", "a", "", "x x x x x"]
    np.testing.assert_allclose(grade("distinct", texts), [2 / 3, 1, 0, 0, 1 / 4])
    np.testing.assert_allclose(grade("repetition", texts, n=2), [-1 / 3, 0, 0, 0, -3 / 4], rtol=1e-6)
    np.testing.assert_allclose(grade("distinct", texts, n=1), [1 / 2, 1, 1, 0, 1 / 5])
    np.testing.assert_allclose(grade("repetition", ["abab", "aaaaa"], n=2, unit="tokens"), [-1 / 3, -3 / 4], rtol=1e-6)


def test_self_bleu_is_of_each_group():
    texts = ["a b c d", "a b c d", "a b c d", "a b c e", "a b c e", "alone", "", "b"]
    groups = [3, 3, 4, 4, 4, 5, 6, 6]
    found = grade("self_bleu", texts, groups)
    np.testing.assert_allclose(found[[0, 1]], 1)
    assert np.isnan(found[5:]).all()
    words = [text.split() for text in texts[2:5]]
    np.testing.assert_allclose(found[2:5].mean(), self_bleu(words), rtol=1e-6)
    np.testing.assert_allclose(found[3], found[4])
    assert found[2] < found[3] == pytest.approx(1)


def test_unlike_others_counts_what_no_other_has():
    texts = ["a b c", "a b d", "x", "a b c", "a b c"]
    found = grade("unlike_others", texts, [0, 0, 0, 1, 2], n=2)
    np.testing.assert_allclose(found, [1 / 2, 1 / 2, 0, np.nan, np.nan])
    np.testing.assert_allclose(grade("unlike_others", ["a a b", "a c"], n=1), [1 / 2, 1 / 2])  # different ones
    np.testing.assert_allclose(grade("unlike_others", ["ab", "b"], n=1, unit="tokens"), [1 / 2, 0])


@pytest.mark.parametrize("seed", range(2))
def test_unlike_others_is_a_loop(seed):
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice([*"abcd"], rng.integers(0, 6))) for _ in range(12)]
    groups = [*np.repeat([0, 1, 2], [5, 3, 4])]
    expected = []
    for mine, group in zip(texts, groups):
        pairs = lambda text: {tuple(text.split()[at : at + 2]) for at in range(len(text.split()) - 1)}
        others = [pairs(text) for at, text in enumerate(texts) if groups[at] == group]
        others.remove(pairs(mine))
        new = [pair for pair in pairs(mine) if not any(pair in other for other in others)]
        expected.append(len(new) / max(len(pairs(mine)), 1))
    np.testing.assert_allclose(grade("unlike_others", texts, groups), expected, rtol=1e-6)


# ---- agreement ------------------------------------------------------------------------------------------------------

ANSWERS = ["it is 4", "#### 4", r"\boxed{5}", "no idea", "7", "7.0", "8"]
GROUPS = [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        ("own", [2 / 4, 2 / 4, 1 / 4, 0, 2 / 3, 2 / 3, 1 / 3]),
        ("majority", [1, 1, 0, 0, 1, 1, 0]),
        ("group", [2 / 4] * 4 + [2 / 3] * 3),
    ],
)
def test_agreement(of, expected):
    np.testing.assert_allclose(grade("agreement", ANSWERS, GROUPS, of=of), expected, rtol=1e-6)


def test_agreement_of_other_answers():
    np.testing.assert_allclose(grade("agreement", ["a ", "a", "b"], answer="whole"), [2 / 3, 2 / 3, 1 / 3], rtol=1e-6)
    texts = ["label: x label: y", "label: y", "y"]
    np.testing.assert_allclose(grade("agreement", texts, answer=r"label: (\w)"), [2 / 3, 2 / 3, 0], rtol=1e-6)
    assert grade("agreement", ["none", "nothing"], of="group").tolist() == [0, 0]
    assert grade("agreement", ["1", "2"], of="majority").tolist() == [1, 0]  # of equals the first


# ---- novelty --------------------------------------------------------------------------------------------------------


def test_novelty_is_the_share_of_ngrams_that_the_corpus_lacks(tmp_path):
    (tmp_path / "corpus.txt").write_text("the cat sat\non the mat\n\n")
    texts = ["the cat sat", "the cat ran", "on the cat", "sat on the", "mat", "", "new new new"]
    given = {"path": str(tmp_path / "corpus.txt"), "n": 2}
    # no bigram goes over the end of a line: sat on is new
    np.testing.assert_allclose(grade("novelty", texts, **given), [0, 1 / 2, 0, 1 / 2, 0, 0, 1])
    np.testing.assert_allclose(grade("novelty", ["new new the cat"], **given), [2 / 3], rtol=1e-6)
    rows = [{"text": "no", "says": "a b c"}, {"text": "no", "says": "c d"}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"path": str(tmp_path / "corpus.jsonl"), "column": "says", "n": 1}
    np.testing.assert_allclose(grade("novelty", ["a d e"], **given), [1 / 3], rtol=1e-6)


def test_a_large_corpus_is_read_in_parts(tmp_path, monkeypatch):
    lines = [f"w{at} w{at % 7} w{at % 11}\n" for at in range(400)]
    (tmp_path / "corpus.txt").write_text("".join(lines))
    monkeypatch.setattr(creativity, "PART", 100)
    found = creativity.Novelty(str(tmp_path / "corpus.txt"), n=2)
    assert len(found.known) == len({tuple(line.split()[at : at + 2]) for line in lines for at in (0, 1)})
    assert found([lines[0], lines[399], "w0 w399"], []) == [0, 0, 1]


@pytest.mark.parametrize(
    ("name", "given", "line"),
    [
        ("distinct", {"n": 0}, "distinct: n: 0: expected an integer of at least 1"),
        ("distinct", {"unit": "characters"}, 'distinct: unit: "characters": choices: words, tokens'),
        ("agreement", {"of": "groups"}, 'agreement: of: "groups": nearest: group'),
        ("agreement", {"answer": "a"}, 'agreement: answer: "a": expected number, whole, or a pattern with a group'),
        ("agreement", {"answer": "("}, 'agreement: answer: "\\(": missing'),
        ("novelty", {"path": "{tmp}/none"}, "novelty: path: .*/none: no such file"),
        ("novelty", {"path": "{tmp}/empty.txt"}, "novelty: path: .*/empty.txt: holds no 4-gram of words"),
        ("novelty", {"path": "{tmp}/rows.jsonl"}, "novelty: column: text: no text at .*/rows.jsonl:1; it has a"),
    ],
)
def test_mistakes_are_one_line(name, given, line, tmp_path):
    (tmp_path / "empty.txt").write_text("a b c\n")
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    there = lambda value: value.format(tmp=tmp_path) if isinstance(value, str) else value
    filled: dict[str, Any] = {key: there(value) for key, value in given.items()}
    with pytest.raises(ValueError, match=f"^{line}"):
        grade(name, ["a"], **filled)
