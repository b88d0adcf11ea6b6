"""The client of judges and graders: limits, retries, and every way in which a server may fail."""

import time
from typing import Any

import pytest

from jaxrlhf.rewards import remote
from jaxrlhf.rewards.event_loop import wait_for
from jaxrlhf.rewards.remote import Client, Failed, RemoteConfig, settings_of
from tests.support.fake_judge import FakeJudge, chat

BODIES = [{"messages": [{"role": "user", "content": str(n)}], "n": n} for n in range(4)]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """The library's waits between tries, ten times as short."""
    from openai import _base_client  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(_base_client, "INITIAL_RETRY_DELAY", 0.05)
    monkeypatch.setattr(_base_client, "MAX_RETRY_DELAY", 0.8)


def says(body: dict[str, Any]) -> dict[str, Any]:
    return {"n": body["n"], "usage": {"prompt_tokens": 10, "completion_tokens": 3}}


def ask(judge: FakeJudge, bodies=BODIES, read=lambda reply, body: reply["n"], **limits: Any) -> tuple[Client, list]:
    client = Client(RemoteConfig(**({"url": judge.url, "timeout": 5.0, "retries": 2, "deadline": 20.0} | limits)))
    return client, wait_for(client.post_all("/chat/completions", bodies, read))


def test_replies_are_in_the_order_of_the_requests():
    def slowest_first(body: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.05 * (4 - body["n"]))
        return says(body)

    with FakeJudge(slowest_first) as judge:
        client, found = ask(judge)
    assert found == [0, 1, 2, 3] and judge.paths == ["/v1/chat/completions"] * 4
    assert (client.usage.requests, client.usage.prompt_tokens, client.usage.completion_tokens) == (4, 40, 12)


def test_no_more_requests_at_once_than_allowed():
    def slow(body: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.03)
        return says(body)

    many = [{"n": n} for n in range(12)]
    for limit in (1, 3):
        with FakeJudge(slow) as judge:
            assert ask(judge, many, concurrency=limit)[1] == [*range(12)]
        assert judge.most == limit


@pytest.mark.parametrize("fault", [429, 500, 503, 408, "close"])
def test_what_passes_is_tried_again(fault):
    with FakeJudge(says, [fault, fault]) as judge:
        client, found = ask(judge, BODIES[:1])
    assert found == [0] and client.usage.requests == 3
    first, second = judge.times[1] - judge.times[0], judge.times[2] - judge.times[1]
    assert 0.03 < first < second  # 0.05 and 0.1 s, less at most a quarter


def test_it_waits_as_long_as_the_server_says():
    with FakeJudge(says, [(429, {"Retry-After": "0.7"})]) as judge:
        assert ask(judge, BODIES[:1])[1] == [0]
    assert 0.7 <= judge.times[1] - judge.times[0] < 1.5


@pytest.mark.parametrize(
    "fault, why, tries",
    [
        (500, "Error code: 500 - fault 500", 3),
        (400, "Error code: 400 - fault 400", 1),
        ("garbage", "a reply that is no JSON", 1),
        ("close", "no connection: ", 3),
        ("hang", "no reply within 0.2 s, in 3 tries", 3),
        ("drip", "no reply within 0.2 s, in 3 tries", 3),
    ],
)
def test_one_request_fails_and_the_others_do_not(fault, why, tries):
    with FakeJudge(says, [fault] * tries) as judge:
        client, found = ask(judge, concurrency=1, timeout=0.2)
    assert found[0].why.startswith(why) and found[1:] == [1, 2, 3] and client.usage.requests == tries + 3


def test_a_reply_is_read_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(remote, "LARGEST", 2**16)
    with FakeJudge(says, ["huge"]) as judge:
        assert ask(judge, concurrency=1)[1] == [Failed("a reply that is no JSON"), 1, 2, 3]


def test_what_cannot_be_read_fails_alone():
    def read(reply: dict[str, Any], body: Any) -> int:
        if reply["n"] == 1:
            raise ValueError("expected\nanother")
        return reply["n"]

    with FakeJudge(says) as judge:
        assert ask(judge, read=read)[1] == [0, Failed("expected another"), 2, 3]


def test_the_deadline_is_of_all_requests():
    with FakeJudge(lambda body: says(body), [None, "hang"]) as judge:
        started = time.monotonic()
        _, found = ask(judge, concurrency=1, deadline=0.6)
    assert time.monotonic() - started < 3 and found[0] == 0
    assert found[1:] == [Failed("no reply within 0.6 s, the deadline of all requests")] * 3


@pytest.mark.parametrize(
    "fault, message",
    [
        (401, "Error code: 401 - fault 401; expected a key in MY_KEY"),
        (404, "Error code: 404 - fault 404; expected a URL and a model that exist"),
        (500, "none of 4 requests was answered: Error code: 500 - fault 500"),
    ],
)
def test_what_is_wrong_with_all_of_them_is_one_error(fault, message):
    with FakeJudge(says, always=fault) as judge, pytest.raises(ValueError) as error:
        ask(judge, key_variable="MY_KEY", retries=0)
    assert str(error.value) == f"{judge.url}: {message}"


def test_no_server_is_one_error():
    with FakeJudge(says) as judge:
        pass
    with pytest.raises(ValueError, match=r"none of 4 requests was answered: no connection: .*"):
        ask(judge, retries=0)


def test_the_key_comes_from_the_variable_and_goes_nowhere_else(monkeypatch):
    monkeypatch.setenv("JAXRLHF_JUDGE_KEY", "secret")
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    monkeypatch.setenv("OPENAI_ORG_ID", "org")
    with FakeJudge(says) as judge:
        client, _ = ask(judge)
    assert {head["authorization"] for head in judge.heads} == {"Bearer secret"}
    assert not any(value in ("another", "org") for head in judge.heads for value in head.values())
    assert "secret" not in repr(client.cfg)
    monkeypatch.delenv("JAXRLHF_JUDGE_KEY")
    with FakeJudge(says) as judge:
        ask(judge)
    assert {head["authorization"] for head in judge.heads} == {"Bearer none"}


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "url: expected a value"),
        ({"url": "localhost:8000"}, 'url: "localhost:8000": expected an address, as in https://api.openai.com/v1'),
        ({"url": "http://me:key@a"}, "url: a key for a is in it; expected the key in an environment variable"),
        ({"url": "http://a", "retry": 3}, "retry: unknown key; nearest: retries"),
        ({"url": "http://a", "concurrency": 0}, "concurrency: 0: expected at least 1"),
        ({"url": "http://a", "timeout": float("nan")}, "timeout: nan: expected at least 0.001"),
        (
            {"url": "http://a", "retries": "many"},
            'retries: "many": Input should be a valid integer, unable to parse string as an integer',
        ),
    ],
)
def test_settings_are_checked(given, message):
    with pytest.raises(ValueError) as error:
        settings_of(RemoteConfig, given)
    assert str(error.value) == message


def test_no_requests_no_call():
    with FakeJudge(lambda body: chat("")) as judge:
        assert ask(judge, [])[1] == []
    assert judge.bodies == []
