"""Distinct-n and self-BLEU, by hand."""

import math

import pytest

from jaxrlhf.rewards.ngrams import bleu_with_others, distinct, self_bleu


def words(*texts):
    return [text.split() for text in texts]


def test_distinct_counts_over_all_texts():
    texts = words("a b a b", "a b c", "")
    assert distinct(texts, 1) == 3 / 7
    assert distinct(texts, 2) == 3 / 5  # ab ba ab, ab bc
    assert distinct(texts, 3) == 3 / 3
    assert math.isnan(distinct(words("a", ""), 2))


def test_self_bleu_of_the_same_and_of_nothing_in_common():
    assert self_bleu(words(*["a b c d e"] * 3)) == pytest.approx(1.0)
    assert self_bleu(words("a b c d", "e f g h")) == 0.0
    assert math.isnan(self_bleu(words("a b", "")))


def test_self_bleu_by_hand():
    """a b c d x against a b c d e: 4/5 3/4 2/3 1/2. a b: 2/2 1/1, then 0.1/1 twice; its closest other has 5 words.
    Of the last the other with the same words is no reference of itself."""
    long = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    short = (1.0 * 1.0 * 0.1 * 0.1) ** 0.25 * math.exp(1 - 5 / 2)
    assert self_bleu(words("a b c d x", "a b c d e", "a b")) == pytest.approx((2 * long + short) / 3)


def test_a_word_counts_as_often_as_in_one_other_text():
    """a a a against a a b, of which a is there twice: 2/3 1/2, then 0.1/1, 0.1/1; a a b: 2/3 1/2 0.1 0.1."""
    each = (2 / 3 * 1 / 2 * 0.1 * 0.1) ** 0.25
    assert self_bleu(words("a a a", "a a b")) == pytest.approx(each)


def test_each_text_has_its_own_and_empty_ones_have_none():
    found = bleu_with_others(words("a b c d", "", "a b c d", "e"))
    assert found[0] == found[2] == pytest.approx(1.0) and math.isnan(found[1]) and found[3] == 0
    assert all(map(math.isnan, bleu_with_others(words("a", ""))))
    assert self_bleu(words("a b c d", "", "a b c d", "e")) == pytest.approx(2 / 3)
