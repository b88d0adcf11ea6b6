"""Answers of word problems: read out of responses and records."""

import pytest

from jaxrlhf.rewards.functions import resolve
from jaxrlhf.rewards.math_answer import lenient, strict

GSM8K = {"question": "How many?", "answer": "She sold 48/2 = <<48/2=24>>24 clips in May.\n48+24 = 72 clips.\n#### 72"}


@pytest.mark.parametrize(
    "response, marked, mentioned",
    [
        ("48 + 24 = 72\n#### 72", 1, 1),
        ("#### 72.0", 1, 1),
        ("so \\boxed{72}", 1, 1),
        ("\\boxed{\\$72}.", 1, 1),
        ("#### 71 no, #### 72", 1, 1),
        ("#### $72", 1, 1),
        ("the answer is 72.", 0, 1),
        ("72 clips, sold in 2 months", 0, 0),
        ("#### 7,2", 0, 0),
        ("#### 72 clips in 2 months", 1, 0),
        ("#### -72", 0, 0),
        ("#### 720", 0, 0),
        ("####", 0, 0),
        ("", 0, 0),
        ("none", 0, 0),
    ],
)
def test_responses(response, marked, mentioned):
    assert strict([response], [GSM8K]) == [marked]
    assert lenient([response], [GSM8K]) == [mentioned]


@pytest.mark.parametrize(
    "answer, response",
    [("1,234", "#### 1234"), (1234, "#### 1,234"), ("-0.5", "#### -.5"), ("x\n#### 10,000", "#### 10000")],
)
def test_numbers_are_compared_and_not_their_spelling(answer, response):
    assert strict([response], [{"answer": answer}]) == lenient([response], [{"answer": answer}]) == [1.0]


def test_each_response_has_its_own_record():
    records = [{"answer": "1"}, {"answer": "2"}, {"answer": "3"}]
    assert lenient(["1", "1", "3"], records) == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError):
        lenient(["1"], records)


@pytest.mark.parametrize("record", [{"question": "?"}, {"answer": "none"}, {"answer": "#### none"}])
def test_a_record_without_an_answer_is_one_line(record):
    with pytest.raises(ValueError, match=r"^rewards: answer: .*expected a number"):
        strict(["1"], [record])


def test_a_config_finds_them():
    function = resolve("jaxrlhf.rewards.math_answer:lenient")
    assert function(["it is 72", "it is 7"], [GSM8K, GSM8K]).tolist() == [1.0, 0.0]
