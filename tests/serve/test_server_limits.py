"""What a client may not do, what becomes of one that goes away, and many at once."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai  # pyright: ignore[reportMissingImports]
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxrlhf.serve.listen import check_address
from jaxrlhf.serve.listen import listening as socket_of
from jaxrlhf.serve.server import Limits, Server
from tests.serve.conftest import SLOTS
from tests.support import runs
from tests.support.served import PROMPT, complete, listening

TOO_LARGE = {
    "error": {
        "message": "The body has more than 2000 bytes",
        "type": "invalid_request_error",
        "param": None,
        "code": "request_too_large",
    }
}


def waits_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def slow(service, monkeypatch) -> None:
    """A step takes 20 ms."""
    decode = service.engine.slots.decode
    monkeypatch.setattr(service.engine.slots, "decode", lambda *given: time.sleep(0.02) or decode(*given))


@pytest.fixture
def held(service, monkeypatch) -> Iterator[Callable[[], None]]:
    """No step is computed until this is called."""
    decode, go_on = service.engine.slots.decode, threading.Event()
    monkeypatch.setattr(service.engine.slots, "decode", lambda *given: go_on.wait(60) and decode(*given))
    yield go_on.set
    go_on.set()


@pytest.fixture(scope="module")
def strict(service) -> Iterator[str]:
    """The address of a server with a token, and a limit of what it takes."""
    with listening(Server(service, "secret", Limits(body=2000))) as found:
        yield found


@pytest.fixture(scope="module")
def hurried(service) -> Iterator[str]:
    """That of one with a token and little time."""
    with listening(Server(service, "secret", Limits(seconds=0.5, body_seconds=0.3))) as found:
        yield found


def post(address: str, data: bytes, **headers: str) -> tuple[int, dict, Any]:
    """(status, headers, JSON) of a raw request for text."""
    request = urllib.request.Request(f"{address}/completions", data, {"Authorization": "Bearer secret", **headers})
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, dict(reply.headers), json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), json.load(error)


def test_a_token_is_needed_but_for_health(strict):
    wrong = openai.OpenAI(base_url=strict, api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError, match="Incorrect API key provided"):
        wrong.models.list()
    with openai.OpenAI(base_url=strict, api_key="secret", max_retries=0) as right:
        assert complete(right).choices[0].text
    root = strict.removesuffix("/v1")
    assert json.load(urllib.request.urlopen(f"{root}/health")) == {"status": "ok"}
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{root}/metrics")


def test_bodies_that_are_no_request(strict):
    good = json.dumps({"model": "tiny", "prompt": PROMPT}).encode()
    assert post(strict, good)[0] == 200
    assert post(strict, good + b" " * 2000)[::2] == (413, TOO_LARGE)
    for body in (b"{", b"\xff", b"[" * 1500, b"[]"):
        status, _, told = post(strict, body)
        assert status == 400 and told["error"]["type"] == "invalid_request_error"
        assert "Traceback" not in json.dumps(told)


def test_a_body_that_is_slow(hurried):
    with socket.create_connection(("127.0.0.1", int(hurried.split(":")[2].split("/")[0]))) as raw:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer secret\r\nContent-Length: 100\r\n\r\n{"
        )
        raw.sendall(head.encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 408")


def test_a_request_may_not_take_longer_than_it_may(hurried, slow, service):
    with openai.OpenAI(base_url=hurried, api_key="secret", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError, match=r"No response within 0\.5 s") as error:
            complete(client, max_tokens=200, temperature=2, seed=1)
        assert error.value.status_code == 504
        with pytest.raises(openai.APIError, match=r"No response within 0\.5 s"):
            list(complete(client, max_tokens=200, temperature=2, seed=1, stream=True))
    waits_until(lambda: not service.engine.running)


def test_a_full_queue_is_told_with_when_to_try_again(address, held, service, monkeypatch):
    monkeypatch.setattr(service.engine, "most", 0)
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        stream = complete(client, n=SLOTS, max_tokens=100, stream=True)
        waits_until(lambda: service.engine.running == SLOTS)
        with pytest.raises(openai.RateLimitError, match="The server is busy") as error:
            complete(client)
        assert error.value.response.headers["retry-after"] == "1"
        held()
        stream.close()
        waits_until(lambda: not service.engine.running)
        assert complete(client).choices


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_goes_away_frees_its_slots(address, slow, service, streams):
    before = service.engine.counts.cancelled
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 200, "n": SLOTS, "seed": 1, "temperature": 2}
    data = json.dumps(body | {"stream": streams})
    with socket.create_connection(("127.0.0.1", int(address.split(":")[2].split("/")[0]))) as raw:
        raw.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n\r\n{data}".encode())
        waits_until(lambda: service.engine.running == SLOTS)
    waits_until(lambda: service.engine.running == 0)
    assert service.engine.counts.cancelled >= before + SLOTS - 1  # one may have ended by then


def test_metrics(client, address, service):
    def read() -> dict[str, float]:
        with urllib.request.urlopen(address.replace("/v1", "/metrics")) as reply:
            families = text_string_to_metric_families(reply.read().decode())
        return {
            sample.name + str([*sample.labels.values()]): sample.value for one in families for sample in one.samples
        }

    before, reply, after = read(), complete(client), read()  # a slot is free before its reply
    change = lambda name: after[name] - before.get(name, 0)
    assert change("jaxrlhf_generated_tokens_total[]") == reply.usage.completion_tokens
    assert change("jaxrlhf_prompt_tokens_total[]") == reply.usage.prompt_tokens
    assert change("jaxrlhf_requests_total['/v1/completions', '200']") == 1
    assert [after["jaxrlhf_slots[]"], after["jaxrlhf_slots_in_use[]"], after["jaxrlhf_queue_length[]"]] == [SLOTS, 0, 0]


def test_only_loopback_without_a_token(monkeypatch):
    monkeypatch.delenv("JAXRLHF_SERVE_TOKEN", raising=False)
    for host in ("127.0.0.1", "localhost", "::1"):
        check_address(host)
    for host in ("0.0.0.0", "10.0.0.1", "example.org"):
        with pytest.raises(ValueError, match=f"--host {host}: others can reach it; expected JAXRLHF_SERVE_TOKEN"):
            check_address(host)
    monkeypatch.setenv("JAXRLHF_SERVE_TOKEN", "secret")
    check_address("0.0.0.0")


def ask_many(address: str, clients: int, seconds: float, expected: dict[int, str]) -> int:
    """``clients`` at once ask for the responses of seeds for so long: how many came, each of them the right one."""

    def one(number: int) -> int:
        count, end = 0, time.monotonic() + seconds
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
            while time.monotonic() < end or not count:
                seed = (number + count) % len(expected)
                stream = (number + count) % 3 == 0
                reply = complete(client, seed=seed, stream=stream)
                texts = [part.choices[0].text for part in reply] if stream else [reply.choices[0].text]
                assert "".join(texts) == expected[seed]
                count += 1
        return count

    with ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(one, range(clients)))


def test_many_clients_at_once(address, client):
    expected = {seed: complete(client, seed=seed).choices[0].text for seed in range(5)}
    assert len({*expected.values()}) == 5
    assert ask_many(address, 12, 0.0, expected) == 12


@pytest.mark.nightly  # by day: test_many_clients_at_once
def test_64_clients_for_a_minute(address, client):
    expected = {seed: complete(client, seed=seed).choices[0].text for seed in range(50)}
    assert ask_many(address, 64, 60.0, expected) > 64


@pytest.mark.nightly  # a process of its own: it compiles the programs again
def test_sigterm_finishes_what_is_being_answered(folder):
    command = [sys.executable, "-m", "jaxrlhf", "serve", str(folder), "--port", "0", "--context", "512"]
    environment = runs.environment(1)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as server:
        assert server.stdout
        address = server.stdout.readline().split()[0]
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
            stream = complete(client, max_tokens=400, temperature=2, seed=1, stream=True)
            parts = [next(stream)]
            server.send_signal(signal.SIGTERM)
            parts += list(stream)
        assert parts[-1].choices[0].finish_reason in ("length", "stop")
        assert server.wait(60) == 0
        assert server.stderr and "1 response to be finished; Ctrl-C stops at once" in server.stderr.read()


def test_a_port_in_use_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: 127.0.0.1: Address already in use; expected a free one"):
            socket_of("127.0.0.1", port)


def test_clients_that_come_before_the_server_is_ready_wait():
    with socket_of("127.0.0.1", 0) as where, socket.create_connection(where.getsockname(), timeout=5) as early:
        assert early.getpeername() == where.getsockname()
