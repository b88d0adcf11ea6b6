"""A language model as a judge: what counts as its verdict, both orders, scores within a group, ratings."""

import math
from typing import Any

import numpy as np
import pytest

from jaxrlhf.rewards.functions import Details, resolve
from jaxrlhf.rewards.llm_judge import (
    JudgeConfig,
    PairJudge,
    Pairwise,
    Pointwise,
    filled,
    meet,
    prompt_text,
    rating,
    stretches,
    verdict,
    yes,
)
from tests.support.fake_judge import FakeJudge, chat, texts_of


def longest(body: dict[str, Any]) -> str:
    """A judge that likes what is longer, whatever comes first."""
    texts = texts_of(body)
    a, b = len(texts["first"]), len(texts["second"])
    return f"Because of its length.\nVerdict: {'first' if a > b else 'second' if b > a else 'tie'}"


def settings(judge: FakeJudge, **more: Any) -> dict[str, Any]:
    return {"model": "m", "url": judge.url, "retries": 0, "timeout": 5.0} | more


# ---- what it says ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply, expected",
    [
        ("It is clearer.\nVerdict: first", "first"),
        ("verdict : SECOND.", "second"),
        ("a\n\n**Verdict: tie**\n", "tie"),
        ('{"verdict": "second", "why": "shorter"}', "second"),
        ('```json\n{"Verdict": "first"}\n```', "first"),
        ("Verdict: first\nVerdict: second", "second"),
        ("Verdict: first\nI am sure.", None),
        ("The verdict: first", None),
        ("Verdict: first or second", None),
        ("first", None),
        ("", None),
        ('{"verdict": 1}', None),
        ('{"verdict": true}', None),
        ('{"verdict": "first"', None),
        ('["first"]', None),
    ],
)
def test_a_verdict_is_the_last_line_or_json(reply, expected):
    assert verdict(reply) == expected


@pytest.mark.parametrize(
    "reply, expected",
    [
        ("Fine.\nRating: 7", 7.0),
        ("Rating: 7.5", 7.5),
        ("Rating: 8/10", 8.0),
        ('{"rating": 3}', 3.0),
        ("**Rating:** 10", 10.0),
        ("Rating: 0", None),
        ("Rating: 11", None),
        ("Rating: seven", None),
        ("Rating: -3", None),
        ("7", None),
        ("Rating: 7\nor so", None),
    ],
)
def test_a_rating_is_a_number_from_1_to_10(reply, expected):
    assert rating(reply) == expected


def likely(**chances: float) -> dict[str, Any]:
    told = [{"token": token, "logprob": math.log(chance)} for token, chance in chances.items()]
    return chat("Yes", logprobs={"content": [{"token": "Yes", "top_logprobs": told}]})


def test_yes_is_a_probability_where_logprobs_are_given():
    assert yes(likely(Yes=0.5, yes=0.1, No=0.2, Perhaps=0.2)) == pytest.approx(0.6 / 0.8)
    assert yes(likely(Perhaps=0.9)) is None
    assert [yes(chat(text)) for text in ("Yes.", "no", "Yes and no")] == [1.0, 0.0, None]
    assert yes(chat("No", logprobs=None)) == 0.0
    with pytest.raises(ValueError, match="a reply without a text"):
        yes({"choices": []})


# ---- two responses --------------------------------------------------------------------------------------------------


def test_a_win_counts_when_both_orders_agree():
    says = iter(["first", "second", "second", "first", "first", "first", "first", "tie", "tie", "tie", "first", "?"])
    with FakeJudge(lambda body: f"Verdict: {next(says)}") as judge:
        found = PairJudge(JudgeConfig(**settings(judge, concurrency=1)))([("p", "a", "b")] * 6)
    assert [pair.win for pair in found] == [1.0, 0.0, 0.5, 0.5, 0.5, None]
    assert found[5] == ("first", None)


def test_both_orders_are_asked_of_the_model():
    with FakeJudge(longest) as judge:
        made = PairJudge(JudgeConfig(**settings(judge, concurrency=1, extra={"top_p": 0.5}, max_tokens=None)))
        found = made([("say {first}", "a long one", "short"), ("q", "a", "b")])
    assert [texts_of(body) for body in judge.bodies[:2]] == [
        {"prompt": "say {first}", "first": "a long one", "second": "short"},
        {"prompt": "say {first}", "first": "short", "second": "a long one"},
    ]
    assert [pair.win for pair in found] == [1.0, 0.5]
    body = judge.bodies[0]
    assert body.keys() == {"model", "messages", "temperature", "top_p"} and body["temperature"] == 0.0
    assert (made.usage.requests, made.usage.prompt_tokens, made.usage.completion_tokens) == (4, 40, 12)


def test_the_prompt_can_be_replaced(tmp_path):
    own = "Which is nicer after {prompt}: {first} or {second}? Verdict: first|second|tie"
    (tmp_path / "own.txt").write_text(own)
    for given in ({"prompt": own}, {"prompt_file": str(tmp_path / "own.txt")}):
        with FakeJudge(lambda body: "Verdict: first") as judge:
            PairJudge(JudgeConfig(**settings(judge, **given)))([("p", "a", "b")])
        asked = {body["messages"][0]["content"] for body in judge.bodies}
        assert asked == {own.format(prompt="p", first=a, second=b) for a, b in (("a", "b"), ("b", "a"))}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"prompt": "{first} {second}"}, r"prompt: has no {prompt}; expected a text with {prompt}, {first}, {second}"),
        ({"prompt": "", "prompt_file": "a"}, "prompt: prompt_file is given too; expected one of them"),
        ({"prompt_file": "/no/such"}, "prompt_file: /no/such: .*; expected a text file"),
    ],
)
def test_a_prompt_without_its_places_is_an_error(given, message):
    with pytest.raises(ValueError, match=message):
        PairJudge(JudgeConfig(model="m", url="http://a", **given))


def test_places_are_filled_once():
    assert filled("{first}{second}{other}", {"first": "{second}", "second": "2"}) == "{second}2{other}"


def details(*groups: int) -> Details:
    return Details(token_ids=[], ended=[], groups=[*groups], max_new_tokens=8)


# ---- graders --------------------------------------------------------------------------------------------------------


def test_the_responses_to_a_prompt_meet_each_other():
    assert [*stretches([5, 5, 5, 6, 5])] == [range(3), range(3, 4), range(4, 5)]
    assert [*stretches([])] == []
    assert {frozenset(pair) for pair in meet(range(2, 6), None)} == {
        frozenset((a, b)) for a in range(2, 6) for b in range(2, a)
    }
    for size in range(1, 9):
        pairs = [*meet(range(size), None)]
        assert len(pairs) == len({frozenset(pair) for pair in pairs}) == size * (size - 1) // 2
        for least in range(1, size):
            counts = np.bincount(np.array([*meet(range(size), least)]).reshape(-1), minlength=size)
            assert least <= counts.min() and counts.max() <= min(least + 1, size - 1)


def test_pairwise_scores_are_shares_of_wins():
    """Of three responses to one prompt the longest wins twice; the response of the record is as long as the second."""
    records = [{"prompt": "p", "chosen": "xx"}] * 3 + [{"prompt": "q", "chosen": "x"}]
    responses = ["x", "yy", "zzz", "yyyy"]
    with FakeJudge(longest) as judge:
        alone = resolve("llm_pairwise", settings(judge))(responses, records, details(0, 0, 0, 1))
        beside = resolve("llm_pairwise", settings(judge, column="chosen"))(responses, records, details(0, 0, 0, 1))
    np.testing.assert_allclose(alone, [0, 0.5, 1, np.nan])
    np.testing.assert_allclose(beside, [0, 0.5, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(beside[1], (1 + 0 + 0.5) / 3)


def test_a_judge_that_has_nothing_to_compare_is_tried_once():
    """The sample responses before a run are to different prompts."""
    with FakeJudge(longest) as judge:
        grader = resolve("llm_pairwise", settings(judge))
        for _ in range(2):
            scores = grader(["x", "yy"], [{"prompt": "p"}, {"prompt": "q"}], details(0, 1))
            assert np.isnan(scores).all() and len(judge.bodies) == 2
    with (
        FakeJudge(longest, always=401) as judge,
        pytest.raises(ValueError, match="expected a key in JAXRLHF_JUDGE_KEY"),
    ):
        resolve("llm_pairwise", settings(judge))(["x"], [{"prompt": "p"}], details(0))


def test_a_comparison_without_a_verdict_counts_for_nobody():
    def shy(body: dict[str, Any]) -> str:
        return "I can't say." if "yy" in texts_of(body).values() else longest(body)

    with FakeJudge(shy) as judge:
        asked = (["x", "yy", "zzz"], [{"prompt": "p"}] * 3, details(0, 0, 0))
        scores = resolve("llm_pairwise", settings(judge))(*asked)
    np.testing.assert_allclose(scores, [0, np.nan, 1])


def test_pointwise_rates_each_response():
    ratings = {"a": "Rating: 3", "b": "no idea", "c": "Rating: 9"}
    with FakeJudge(lambda body: ratings[texts_of(body)["response"]]) as judge:
        scores = resolve("llm_pointwise", settings(judge))(["a", "b", "c"], [{"prompt": "p"}] * 3)
    np.testing.assert_allclose(scores, [3, np.nan, 9])


def test_yes_or_no_asks_for_logprobs():
    with FakeJudge(lambda body: likely(Yes=0.3, No=0.1)) as judge:
        scores = resolve("llm_pointwise", settings(judge, scale="yes_no"))(["a"], [{"prompt": "p"}])
    np.testing.assert_allclose(scores, [0.75])
    asked = judge.bodies[0]
    assert (asked["logprobs"], asked["top_logprobs"], asked["max_tokens"]) == (True, 5, 1)


def test_what_fails_has_no_score():
    with FakeJudge(lambda body: "Rating: 5", ["garbage", 500, None]) as judge:
        scores = resolve("llm_pointwise", settings(judge, concurrency=1))(["a", "b", "c"], [{"prompt": "p"}] * 3)
    np.testing.assert_allclose(scores, [np.nan, np.nan, 5])


def test_a_conversation_is_read_as_text():
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    assert (
        prompt_text({"messages": messages}) == prompt_text({"prompt": messages}) == "[system]\nbe kind\n[user]\nhello"
    )
    with pytest.raises(ValueError, match="has no prompt and no messages"):
        prompt_text({"text": "a"})


@pytest.mark.parametrize(
    "kind, given, message",
    [
        (Pairwise, {"opponents": 0}, "opponents: 0: expected at least 1"),
        (Pairwise, {"modle": "m"}, "modle: unknown key; nearest: model"),
        (Pointwise, {"scale": "stars"}, "scale: stars: choices: rating, yes_no"),
        (Pointwise, {"url": "http://a"}, "model: expected a value"),
    ],
)
def test_arguments_are_checked(kind, given, message):
    with pytest.raises(ValueError, match=message):
        kind(**given)
