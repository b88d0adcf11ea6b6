"""Graders on a server: what is posted, what is taken back, what fails."""

from typing import Any

import numpy as np
import pytest

from jaxrlhf.rewards.functions import resolve
from jaxrlhf.rewards.graders import Graders
from tests.support.fake_judge import FakeJudge

HTTP, SERVED = "http", "reward_model_server"
RECORDS = [{"prompt": f"p{n}", "answer": n} for n in range(5)]
RESPONSES = [f"r{n}" for n in range(5)]


def grade(judge: FakeJudge, name: str = HTTP, **more: Any) -> np.ndarray:
    given = {"url": judge.url, "retries": 0, "timeout": 2.0, "batch": 2, "concurrency": 1} | more
    return resolve(name, given)(RESPONSES, RECORDS)


def by_record(body: dict[str, Any]) -> dict[str, Any]:
    return {"scores": [None if one["answer"] == 3 else one["answer"] * 2 for one in body["records"]]}


def test_prompts_responses_and_records_are_posted():
    with FakeJudge(by_record) as judge:
        np.testing.assert_array_equal(grade(judge), [0, 2, 4, np.nan, 8])
    assert [len(body["responses"]) for body in judge.bodies] == [2, 2, 1] and set(judge.paths) == {"/v1"}
    assert judge.bodies[1] == {"prompts": ["p2", "p3"], "responses": ["r2", "r3"], "records": RECORDS[2:4]}


@pytest.mark.parametrize("fault", ["garbage", "close", "hang", 500, 413])
def test_a_request_that_fails_leaves_its_responses_without_scores(fault):
    with FakeJudge(by_record, [None, fault]) as judge:
        np.testing.assert_array_equal(grade(judge, timeout=0.3), [0, 2, np.nan, np.nan, 8])


@pytest.mark.parametrize(
    "reply, said",
    [
        ({"scores": [1.0]}, r"none of 3 requests was answered: the server gave 1 score: expected scores, a list of 2"),
        ({"score": 1.0}, r'none of 3 requests was answered: the server gave {"score": 1.0}: expected scores'),
    ],
)
def test_another_protocol_is_an_error(reply, said):
    with FakeJudge(lambda body: reply if len(body["responses"]) == 2 else {}) as judge:
        graders = Graders((resolve(HTTP, {"url": judge.url, "batch": 2}),))
        with pytest.raises(ValueError, match=f"^rewards.function: {HTTP}: http://.*: {said}"):
            graders.grade(RESPONSES, RECORDS)


def test_scores_that_are_no_numbers_are_an_error():
    high = lambda body: {"scores": ["high"] * len(body["responses"])}
    with FakeJudge(high) as judge, pytest.raises(ValueError, match="score 0 is 'high': expected a finite number, or N"):
        grade(judge)


def test_a_server_that_is_down_is_an_error():
    said = "none of 3 requests was answered: Error code: 500"
    with FakeJudge(by_record, always=500) as judge, pytest.raises(ValueError, match=said):
        grade(judge)


def test_a_reward_model_that_is_served():
    scores = lambda body: {"data": [{"score": len(one["response"])} for one in body["input"]]}
    with FakeJudge(scores) as judge:
        np.testing.assert_array_equal(grade(judge, SERVED, model="rm"), [2] * 5)
    assert judge.paths[0] == "/v1/scores"
    assert judge.bodies[2] == {"model": "rm", "input": [{"prompt": "p4", "response": "r4"}]}
    with (
        FakeJudge(lambda body: {"data": [{}]}) as judge,
        pytest.raises(ValueError, match="expected data, a list of sc"),
    ):
        grade(judge, SERVED, model="rm")


def test_a_conversation_is_scored_as_one():
    messages = [{"role": "user", "content": "hello"}]
    with FakeJudge(lambda body: {"data": [{"score": 1.0}]}) as judge:
        resolve(SERVED, {"url": judge.url, "model": "rm"})(["hi"], [{"messages": messages}])
    assert judge.bodies[0]["input"] == [{"messages": [*messages, {"role": "assistant", "content": "hi"}]}]


@pytest.mark.parametrize("batch", [0, "many", 1.5])
def test_a_batch_is_a_number(batch):
    with pytest.raises(ValueError, match=r"batch: .*: expected at least 1 response"):
        resolve(HTTP, {"url": "http://a", "batch": batch})(["a"], [{"prompt": "p"}])
