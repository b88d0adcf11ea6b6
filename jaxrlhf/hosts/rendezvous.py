"""Waiting for all processes of a run before JAX does, to say who is missing: JAX's timeout aborts without a name.

Process 0 listens at the coordinator's address, where JAX's service will; each other process sends one line of JSON that
says who it is, and is answered by one: "go", or what is wrong. Nothing that is read is run or kept, and what is no such
line is not printed. Whoever connects and says nothing keeps nobody waiting.
"""

import contextlib
import json
import selectors
import socket
import time
from typing import Any, NamedTuple

from jaxrlhf.errors import one_line

MAX_BYTES = 4096
GO = "go"
ANSWER = "jaxrlhf"  # the field of an answer
HELLO_SECONDS = 5.0  # that a connection has to say who it is
STRANGERS = 64  # connections beyond the number of processes that may be open and silent


class Guest(NamedTuple):
    """One process that has come."""

    connection: socket.socket
    host: str


class Hearing(NamedTuple):
    """A connection that has not said yet who it is."""

    peer: str
    until: float  # when it is hung up on, by time.monotonic
    heard: bytearray


def meet(address: str, count: int, process: int, timeout: float) -> None:
    """Returns on all processes once all have come. Raises ConnectionError, in one line, on all of them where some have
    not within ``timeout`` seconds, or two say that they are the same, or one counts otherwise."""
    if count == 1:
        return
    host, port = address.rsplit(":", 1)
    deadline = time.monotonic() + timeout
    if process == 0:
        receive_all(address, int(port), count, deadline, timeout)
    else:
        announce(address, (host.strip("[]"), int(port)), count, process, deadline, timeout)


def receive_all(address: str, port: int, count: int, deadline: float, timeout: float) -> None:
    """Process 0: wait for the others, answer them, and free the port."""
    dual = socket.has_dualstack_ipv6()
    family, where = (socket.AF_INET6, ("::", port)) if dual else (socket.AF_INET, ("", port))
    try:
        listener = socket.create_server(where, family=family, dualstack_ipv6=dual, backlog=count + STRANGERS)
    except OSError as error:
        why = error.strerror or str(error)
        raise ConnectionError(f"distributed.coordinator: {address}: process 0 can't listen there: {why}") from None
    listener.setblocking(False)
    gathering = Gathering(listener, count)
    try:
        problem = gathering.run(deadline) or gathering.missing(address, timeout)
        for guest in gathering.guests.values():
            send(guest.connection, json.dumps({ANSWER: problem or GO}))
        for guest in gathering.guests.values():  # they hang up first, so that the port is free at once
            guest.connection.settimeout(2)
            receive(guest.connection)
    finally:
        gathering.close()
    if problem:
        raise ConnectionError(problem)


class Gathering:
    """Process 0 while it waits: one loop over all connections, so that none holds up another."""

    def __init__(self, listener: socket.socket, count: int):
        self.listener, self.count = listener, count
        self.guests: dict[int, Guest] = {}
        self.unknown: dict[socket.socket, Hearing] = {}  # the oldest first
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ)

    def run(self, deadline: float) -> str:
        """Until all have come, or ``deadline``: what two of them contradict each other in, or ""."""
        while len(self.guests) < self.count - 1 and (now := time.monotonic()) < deadline:
            self.hang_up(now)
            until = min([deadline, *(one.until for one in self.unknown.values())])
            for key, _ in self.selector.select(max(0.0, until - now)):
                connection: Any = key.fileobj
                if connection is self.listener:
                    self.accept()
                elif connection in self.unknown:
                    if wrong := self.hear(connection):
                        return wrong
                elif not peek(connection):  # a guest: it was ended, and may come anew
                    self.guests = {number: one for number, one in self.guests.items() if one.connection != connection}
                    self.drop(connection)
        return ""

    def accept(self) -> None:
        with contextlib.suppress(OSError):  # it is gone already
            connection, peer = self.listener.accept()
            connection.setblocking(False)
            self.unknown[connection] = Hearing(peer[0], time.monotonic() + HELLO_SECONDS, bytearray())
            self.selector.register(connection, selectors.EVENT_READ)

    def hang_up(self, now: float) -> None:
        """On those that have said nothing for too long, or are too many."""
        surplus = len(self.unknown) - self.count - STRANGERS
        for place, (connection, one) in enumerate([*self.unknown.items()]):
            if one.until <= now or place < surplus:
                self.drop(connection)

    def drop(self, connection: socket.socket) -> None:
        self.unknown.pop(connection, None)
        self.selector.unregister(connection)
        connection.close()

    def hear(self, connection: socket.socket) -> str:
        """Reads what a connection has to say. What contradicts other processes in it is returned, and told to it."""
        one = self.unknown[connection]
        try:
            piece = connection.recv(1024)
        except OSError:
            piece = b""
        one.heard.extend(piece)
        if piece and b"\n" not in piece and len(one.heard) < MAX_BYTES:
            return ""
        hello = parse(one.heard.decode(errors="replace"))
        if hello is None:
            self.drop(connection)  # no process of a run
            return ""
        guest, number = Guest(connection, f"{hello['host']} ({one.peer})"), hello["process"]
        if hello["count"] != self.count or not 0 <= number < self.count:
            wrong = (
                f"process {number} on {guest.host} was told of {hello['count']} processes, process 0 of {self.count}"
            )
        elif number == 0 or number in self.guests:
            other = self.guests[number].host if number else socket.gethostname()
            wrong = f"two processes are process_id {number}: on {other} and on {guest.host}"
        else:
            del self.unknown[connection]
            self.guests[number] = guest
            return ""
        send(connection, json.dumps({ANSWER: f"distributed: {wrong}"}))
        self.drop(connection)
        return f"distributed: {wrong}"

    def missing(self, address: str, timeout: float) -> str:
        """Who has not come; "" where all have."""
        missing = [str(number) for number in range(1, self.count) if number not in self.guests]
        if not missing:
            return ""
        named = ", ".join(missing[:8]) + (" and others" if len(missing) > 8 else "")
        return (
            f"distributed.coordinator: {address}: {len(self.guests) + 1} of {self.count} processes came within "
            f"{timeout:g} s (distributed.init_timeout); missing: process_id {named}"
        )

    def close(self) -> None:
        self.selector.close()
        for connection in [self.listener, *self.unknown, *(guest.connection for guest in self.guests.values())]:
            connection.close()


def announce(address: str, where: tuple[str, int], count: int, process: int, deadline: float, timeout: float) -> None:
    """Another process: knock until process 0 answers, and wait for its word."""
    hello = json.dumps({"process": process, "count": count, "host": socket.gethostname()})
    why = "it came to nothing"
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection(where, timeout=max(1.0, min(5.0, deadline - time.monotonic())))
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(0.3)
            continue
        with connection:
            send(connection, hello)
            connection.settimeout(max(1.0, deadline + 10 - time.monotonic()))  # process 0 says it first, and says more
            heard = receive(connection)
        answer = understood(heard)
        if answer == GO:
            return
        if answer:
            raise ConnectionError(answer)
        why = "what answers there is another service" if heard else "it hung up, or said nothing"
        time.sleep(0.3)
    raise ConnectionError(
        f"distributed.coordinator: {address}: process {process} of {count} could not reach process 0 there within "
        f"{timeout:g} s (distributed.init_timeout): {why}"
    )


def send(connection: socket.socket, text: str) -> None:
    """One line; a peer that is gone is no matter here: the wait for it ends by itself."""
    try:
        connection.sendall(text.encode() + b"\n")
    except OSError:
        return


def peek(connection: socket.socket) -> bytes:
    """What comes next, which stays; b"" where the peer hung up."""
    try:
        return connection.recv(1, socket.MSG_PEEK)
    except OSError:
        return b""


def receive(connection: socket.socket) -> str:
    """One line, or what came before the peer hung up, fell silent or said too much."""
    data = b""
    with contextlib.suppress(OSError):
        while b"\n" not in data and len(data) < MAX_BYTES and (piece := connection.recv(1024)):
            data += piece
    return data.decode(errors="replace").strip()


def parse(line: str) -> dict[str, Any] | None:
    """The hello of a process; None for anything else."""
    try:
        hello = json.loads(line)
        return {"process": int(hello["process"]), "count": int(hello["count"]), "host": printable(hello["host"], 200)}
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None


def understood(line: str) -> str:
    """What process 0 answered; "" where it is no answer of a process 0."""
    try:
        answer = json.loads(line)[ANSWER]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return ""
    return printable(answer, 1000) if isinstance(answer, str) else ""


def printable(text: object, length: int) -> str:
    """``text`` on one line, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in one_line(text))[:length]
