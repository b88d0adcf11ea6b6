"""Waiting for all processes of a run before JAX does, to say who is missing: JAX's timeout aborts without a name.

Process 0 listens at the coordinator's address, where JAX's service will; each other process sends one line of JSON that
says who it is, and is answered "go", or what is wrong. Nothing that is read is run or kept.
"""

import json
import selectors
import socket
import time
from typing import Any, NamedTuple

MAX_BYTES = 4096
GO = "go"


class Guest(NamedTuple):
    """One process that has come."""

    connection: socket.socket
    host: str


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
        listener = socket.create_server(where, family=family, dualstack_ipv6=dual, backlog=count)
    except OSError as error:
        why = error.strerror or str(error)
        raise ConnectionError(f"distributed.coordinator: {address}: process 0 can't listen there: {why}") from None
    guests: dict[int, Guest] = {}
    try:
        problem = gather(listener, guests, count, deadline, timeout, address)
        for guest in guests.values():
            send(guest.connection, problem or GO)
        for guest in guests.values():  # they hang up first, so that the port is free at once
            guest.connection.settimeout(2)
            receive(guest.connection)
    finally:
        for guest in guests.values():
            guest.connection.close()
        listener.close()
    if problem:
        raise ConnectionError(problem)


def gather(
    listener: socket.socket, guests: dict[int, Guest], count: int, deadline: float, timeout: float, address: str
) -> str:
    """Fill ``guests`` with all but process 0; what is wrong, or "" where nothing is."""
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while len(guests) < count - 1:
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                missing = [str(number) for number in range(1, count) if number not in guests]
                named = ", ".join(missing[:8]) + (" and others" if len(missing) > 8 else "")
                return (
                    f"distributed.coordinator: {address}: {len(guests) + 1} of {count} processes came within "
                    f"{timeout:g} s (distributed.init_timeout); missing: process_id {named}"
                )
            connection, peer = listener.accept()
            connection.settimeout(5)
            hello = parse(receive(connection))
            if hello is None:
                connection.close()  # no process of a run
                continue
            guest, number = Guest(connection, f"{hello['host']} ({peer[0]})"), hello["process"]
            if hello["count"] != count or not 0 <= number < count:
                wrong = f"process {number} on {guest.host} was told of {hello['count']} processes, process 0 of {count}"
            elif number == 0 or number in guests:
                other = guests[number].host if number else socket.gethostname()
                wrong = f"two processes are process_id {number}: on {other} and on {guest.host}"
            else:
                guests[number] = guest
                continue
            send(connection, f"distributed: {wrong}")
            connection.close()
            return f"distributed: {wrong}"
    return ""


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
            answer = receive(connection)
        if answer == GO:
            return
        if answer:
            raise ConnectionError(answer)
        why = "process 0 hung up"
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


def receive(connection: socket.socket) -> str:
    """One line; "" where the peer hung up, said nothing in time or too much."""
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < MAX_BYTES and (piece := connection.recv(1024)):
            data += piece
    except OSError:
        return ""
    return data.decode(errors="replace").strip() if data.endswith(b"\n") else ""


def parse(line: str) -> dict[str, Any] | None:
    """The hello of a process; None for anything else."""
    try:
        hello = json.loads(line)
        return {"process": int(hello["process"]), "count": int(hello["count"]), "host": str(hello["host"])[:200]}
    except (ValueError, KeyError, TypeError):
        return None
