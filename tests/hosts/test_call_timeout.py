"""Calls that never return: ended after a time or soon after a signal, wherever Python waits; else the process ends."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from jaxrlhf.hosts import call_timeout
from jaxrlhf.hosts.call_timeout import Interrupted, interruptible
from jaxrlhf.hosts.signals import Stop
from tests.support import runs

WAITS = {
    "sleep": lambda: time.sleep(30),
    "loop": lambda: [None for _ in iter(int, 1)],
    "lock": lambda: threading.Semaphore(0).acquire(),
    "event": lambda: threading.Event().wait(),
    "pipe": lambda: os.read(os.pipe()[0], 1),
    "child": lambda: subprocess.run(["sleep", "30"]),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_call_that_waits_is_ended_after_its_time(name):
    began = time.monotonic()
    with pytest.raises(Interrupted, match=r"^no answer within 0\.1 s$"), interruptible(0.1):
        WAITS[name]()
    assert time.monotonic() - began < 10


def test_a_call_that_swallows_every_exception_is_ended_too(monkeypatch):
    monkeypatch.setattr(call_timeout, "AGAIN", 0.05)

    def stubborn() -> None:
        for _ in range(3):
            try:
                time.sleep(30)
            except BaseException:
                continue

    with pytest.raises(Interrupted), interruptible(0.05):
        stubborn()
        time.sleep(30)


def test_nothing_is_left_of_a_call_that_returns():
    before, threads = signal.getsignal(signal.SIGURG), {*threading.enumerate()}
    for seconds in (None, 30.0):
        with interruptible(seconds):
            assert signal.getsignal(signal.SIGURG) != before
    time.sleep(0.1)
    assert signal.getsignal(signal.SIGURG) == before and not call_timeout.UNDER_WAY
    assert {*threading.enumerate()} <= threads


def test_other_threads_are_left_alone():
    """Python has handlers in the main thread alone."""
    ended: list[str] = []

    def work() -> None:
        with interruptible(0.05):
            time.sleep(0.3)
        ended.append("whole")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == ["whole"]


@pytest.mark.parametrize("during", [True, False], ids=["during the call", "before it"])
def test_a_signal_gives_a_call_some_time(monkeypatch, during):
    monkeypatch.setattr(call_timeout, "PATIENCE", 0.3)
    send = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with Stop(signal.SIGTERM) as stop:
        stop.saves, stop.tell = True, lambda _: None
        if during:
            threading.Timer(0.1, send).start()
        else:
            send()
            time.sleep(0.1)
        with pytest.raises(Interrupted, match=r"^no answer within 0\.3 s after SIGTERM$"), interruptible(None):
            time.sleep(30)
        assert stop.asked == "SIGTERM"
    with interruptible(None):  # of the next run
        time.sleep(0.5)


DEAF = """
import hashlib, os, signal, sys
from jaxrlhf.hosts import call_timeout
from jaxrlhf.hosts.signals import Stop
call_timeout.PATIENCE = call_timeout.LONGEST = call_timeout.AGAIN = 0.2
with Stop(signal.SIGTERM, leaves=True) as stop:
    stop.saves = True
    with call_timeout.interruptible({seconds}):
        print("busy", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # Python runs no handler before it is done
"""


@pytest.mark.parametrize(("seconds", "code"), [("0.2", 1), ("None", 75)])
def test_a_call_that_never_comes_back_to_python_ends_the_process(seconds, code):
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(DEAF.format(seconds=seconds))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, env=environment, **pipes)  # type: ignore[call-overload]
    assert process.stdout and process.stdout.readline() == "busy\n"
    if code == 75:
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "the call can't be interrupted: ended without saving" in err
