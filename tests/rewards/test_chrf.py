"""chrF by hand, against a loop over its definition, and mistakes."""

import math
import sys
from collections import Counter

import numpy as np
import pytest

from jaxrlhf.rewards.chrf import ChrF
from jaxrlhf.rewards.functions import resolve


def grade(texts: list[str], right: list, **given) -> np.ndarray:
    return resolve("chrf", given)(texts, [{given.get("column", "answer"): one} for one in right])


def test_by_hand():
    """ "ab" of "abc": precision 1 and 1, recall 2/3 and 1/2 (no trigram in it), so P = 1 and R = 7/12."""
    f = lambda p, r, beta: (1 + beta**2) * p * r / (beta**2 * p + r)
    texts = ["ab", "abc", "a b c", "xyz", "", "abcab"]
    # of "abcab" a, b and its bigram are there twice: 3 of 5, 2 of 4, 1 of 3 trigrams
    expected = [f(1, 7 / 12, 2), 1, 1, 0, 0, f((3 / 5 + 2 / 4 + 1 / 3) / 3, 1, 2)]
    np.testing.assert_allclose(grade(texts, ["abc"] * 6), expected, rtol=1e-6)
    np.testing.assert_allclose(grade(["ab"], ["abc"], beta=1), [f(1, 7 / 12, 1)], rtol=1e-6)
    np.testing.assert_allclose(grade(["ab"], ["abc"], char_order=1), [f(1, 2 / 3, 2)], rtol=1e-6)


def ngrams(units, n: int) -> Counter:
    return Counter(tuple(units[at : at + n]) for at in range(len(units) - n + 1))


def by_definition(text: str, right: str, char_order: int, word_order: int, beta: int) -> float:
    pairs = [(ngrams(text.replace(" ", ""), n), ngrams(right.replace(" ", ""), n)) for n in range(1, char_order + 1)]
    pairs += [(ngrams(text.split(), n), ngrams(right.split(), n)) for n in range(1, word_order + 1)]
    pairs = [(one, other) for one, other in pairs if one and other]
    shared = [sum(min(count, other[gram]) for gram, count in one.items()) for one, other in pairs]
    precision = np.mean([share / one.total() for share, (one, _) in zip(shared, pairs)]) if pairs else 0
    recall = np.mean([share / other.total() for share, (_, other) in zip(shared, pairs)]) if pairs else 0
    return float((1 + beta**2) * precision * recall / max(beta**2 * precision + recall, 1e-9))


@pytest.mark.parametrize(("char_order", "word_order", "beta"), [(6, 0, 2), (6, 2, 2), (3, 1, 1)])
def test_against_a_loop(char_order, word_order, beta):
    rng = np.random.default_rng(0)
    write = lambda: "".join(rng.choice([*"abcd "], rng.integers(1, 25))).strip() or "a"
    texts, right = ([write() for _ in range(50)] for _ in range(2))
    expected = [by_definition(*pair, char_order, word_order, beta) for pair in zip(texts, right)]
    found = grade(texts, right, char_order=char_order, word_order=word_order, beta=beta)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_the_best_of_several_references_and_none():
    found = grade(["ab", "ab", "AB", "ab"], [["xyz", "ab"], "xyz", "ab", None], column="es")
    np.testing.assert_allclose(found, [1, 0, 0, math.nan])
    np.testing.assert_allclose(grade(["AB"], ["ab"], lowercase=True), [1])


@pytest.mark.parametrize(
    ("given", "record", "line"),
    [
        ({"word_order": -1}, {}, "chrf: word_order: -1: expected an integer of at least 0"),
        ({"char_order": 0}, {}, "chrf: char_order: 0: expected an integer of at least 1"),
        ({"beta": 0.5}, {}, "chrf: beta: 0.5: expected an integer of at least 1"),
        ({}, {"prompt": "a"}, "chrf: answer: missing among prompt"),
        ({}, {"answer": 3}, "chrf: answer: 3: expected a text, or a list of texts"),
        ({}, {"answer": " "}, 'chrf: answer: " ": expected a text, or a list of texts'),
        ({}, {"answer": []}, r"chrf: answer: \[\]: expected a text, or a list of texts"),
    ],
)
def test_mistakes_are_one_line(given, record, line):
    with pytest.raises(ValueError, match=f"^{line}$"):
        ChrF(**given)(["a"], [record])


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.chrf", None)
    with pytest.raises(ImportError, match=r"^chrf: needs sacrebleu; pip install 'jaxrlhf\[graders\]'$"):
        ChrF()
