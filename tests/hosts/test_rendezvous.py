"""Processes find each other, in any order, beside whoever else connects; who is missing is named."""

import contextlib
import json
import re
import socket
import threading
import time

import pytest

from jaxrlhf.hosts import rendezvous
from tests.support import runs


def meet_all(count: int, present: list[int], timeout: float = 1.5, claims: int | None = None) -> dict[int, str]:
    """What rendezvous.meet says to each of the processes that are ``present``; "" where it returned."""
    address, said = f"localhost:{runs.free_port()}", {}

    def one(place: int, process: int) -> None:
        try:
            rendezvous.meet(address, claims if process and claims else count, process, timeout)
            said[place] = ""
        except ConnectionError as error:
            said[place] = str(error).replace(address, "ADDRESS")

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(present)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return said


def test_all_meet_in_any_order():
    assert meet_all(4, [3, 1, 0, 2], timeout=20) == dict.fromkeys(range(4), "")


def test_who_is_missing_is_told_to_all():
    text = "distributed.coordinator: ADDRESS: 3 of 5 processes came within 1.5 s (distributed.init_timeout); "
    assert meet_all(5, [0, 1, 3]) == dict.fromkeys(range(3), text + "missing: process_id 2, 4")


def test_a_missing_coordinator_is_told_with_its_address():
    (text,) = meet_all(2, [1]).values()
    expected = "distributed.coordinator: ADDRESS: process 1 of 2 could not reach process 0 there within 1.5 s "
    assert text == expected + "(distributed.init_timeout): Connection refused"


def test_processes_that_contradict_each_other_are_told():
    text = meet_all(3, [0, 1], claims=2)[0]
    assert re.fullmatch(r"distributed: process 1 on .* was told of 2 processes, process 0 of 3", text)
    said = meet_all(3, [0, 1, 1], timeout=5)
    assert re.fullmatch(r"distributed: two processes are process_id 1: on .* and on .*", said[0])


@pytest.fixture
def waiting():
    """(port, errors) of a process 0 that waits for another one; errors: what it raised, None for nothing."""
    port, said = runs.free_port(), []

    def wait() -> None:
        try:
            said.append(rendezvous.meet(f"localhost:{port}", 2, 0, 20))
        except ConnectionError as error:
            said.append(error)

    main = threading.Thread(target=wait)
    main.start()
    yield port, said
    main.join(20)
    assert said == [None]


def connect(port: int) -> socket.socket:
    """A connection to ``port``, once something listens there."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("localhost", port), timeout=5)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_strangers_are_not_counted(waiting):
    port, said = waiting
    for text in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process": 1}\n', b"[" * 4000 + b"\n", b"x" * 5000, b""):
        with connect(port) as stranger:
            stranger.sendall(text)
    assert said == []
    rendezvous.meet(f"localhost:{port}", 2, 1, 20)


def test_silent_strangers_keep_nobody_waiting(waiting, monkeypatch):
    monkeypatch.setattr(rendezvous, "HELLO_SECONDS", 30)  # none of them is hung up on before the end
    with contextlib.ExitStack() as strangers:
        for _ in range(200):
            strangers.enter_context(connect(waiting[0]))
        began = time.monotonic()
        rendezvous.meet(f"localhost:{waiting[0]}", 2, 1, 20)
        assert time.monotonic() - began < 5


def test_a_process_that_is_ended_while_it_waits_may_come_again():
    port, said = runs.free_port(), []
    main = threading.Thread(target=lambda: said.append(rendezvous.meet(f"localhost:{port}", 3, 0, 20)))
    main.start()
    with connect(port) as ended:
        ended.sendall(b'{"process": 1, "count": 3, "host": "a"}\n')
        time.sleep(0.1)
    others = [threading.Thread(target=rendezvous.meet, args=(f"localhost:{port}", 3, one, 20)) for one in (1, 2)]
    for thread in others:
        thread.start()
    for thread in (*others, main):
        thread.join(20)
    assert said == [None]


@pytest.mark.parametrize(
    "reply", [b"HTTP/1.1 400 \x1b[31mBad\r\n\r\n", b'{"jaxrlhf": 5}\n', b"go\n", b"\xff\n", b"no line"]
)
def test_another_service_at_the_address_is_not_believed_and_not_printed(reply):
    with socket.create_server(("localhost", 0)) as service:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with service.accept()[0] as connection:
                        connection.recv(100)
                        connection.sendall(reply)

        threading.Thread(target=serve, daemon=True).start()
        address = f"localhost:{service.getsockname()[1]}"
        with pytest.raises(ConnectionError) as refused:
            rendezvous.meet(address, 2, 1, 0.2)
    assert str(refused.value) == (
        f"distributed.coordinator: {address}: process 1 of 2 could not reach process 0 there within 0.2 s "
        "(distributed.init_timeout): what answers there is another service"
    )


def test_what_strangers_say_is_printed_on_one_line_and_obeyed_by_no_terminal():
    hello = {"process": 1, "count": 2, "host": "a\x1b[2Jb\nc" + "d" * 1000}
    found = rendezvous.parse(json.dumps(hello))
    assert found is not None and found["host"].startswith("a?[2Jb cddd") and len(found["host"]) == 200
    assert rendezvous.understood(json.dumps({"jaxrlhf": "no\n\x07way"})) == "no ?way"
