"""Calls of a user's code that may never return: ended after a time, and soon after a signal that stops the run.

The call stays in the main thread, which some code needs (signal.alarm works nowhere else). A thread watches the clock
and sends that thread a SIGURG, which nobody uses and which is ignored by default; its handler raises ``Interrupted``
there, out of a sleep, a read from a socket, a wait for a lock or a loop of Python. Code that does not come back to
Python at all can't be interrupted: then the process ends."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

PATIENCE = 10.0  # seconds that a call has after a signal: clusters give 30 at least, and saving takes some of them
AGAIN = 1.0  # seconds between interruptions that a call seems to swallow
LONGEST = 10.0  # seconds from the first interruption to the end of the process


class Interrupted(BaseException):
    """The call took too long; no Exception, which code of many kinds swallows."""


class TimedOut(Interrupted):
    """It took longer than the seconds that it was given; no signal asked for its end."""


class Call:
    """One call under way in the main thread."""

    def __init__(self):
        self.over, self.why, self.code = threading.Event(), Interrupted(), 1
        self.deadline = float("inf")
        self.watching: threading.Thread | None = None

    def end_in(self, seconds: float, why: Interrupted, code: int) -> None:
        """Interrupts it after ``seconds``, if nothing does before; ``code``: the exit code, where that is in vain."""
        deadline = time.monotonic() + seconds
        if deadline < self.deadline:
            self.deadline, self.why, self.code = deadline, why, code
        if self.watching is None:
            self.watching = threading.Thread(target=self.watch, name="interrupts", daemon=True)
            self.watching.start()

    def watch(self) -> None:
        while (left := self.deadline - time.monotonic()) > 0:
            if self.over.wait(min(left, 0.2)):  # a signal may bring the deadline forward
                return
        began = time.monotonic()
        while time.monotonic() - began < LONGEST:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGURG)
            if self.over.wait(AGAIN):
                return
        print(f"{self.why}, and the call can't be interrupted: ended without saving", file=sys.stderr, flush=True)
        os._exit(self.code)

    def interrupt(self, *_: object) -> None:
        """The handler, in the main thread."""
        if not self.over.is_set():
            raise self.why


UNDER_WAY: list[Call] = []
SIGNALS: list[tuple[str, int]] = []  # (name, exit code) of the signal that stops the run


@contextlib.contextmanager
def interruptible(seconds: float | None) -> Iterator[None]:
    """Raises Interrupted in the block ``seconds`` after its begin, or PATIENCE after ``hasten``. Outside the main
    thread, where Python has no handlers, and within another such block it does nothing."""
    if threading.current_thread() is not threading.main_thread() or UNDER_WAY:
        yield
        return
    call = Call()
    previous = signal.signal(signal.SIGURG, call.interrupt)
    UNDER_WAY.append(call)
    try:
        if seconds is not None:
            call.end_in(seconds, TimedOut(f"no answer within {round(seconds, 3):g} s"), 1)
        for name, code in SIGNALS:
            call.end_in(PATIENCE, Interrupted(f"no answer within {PATIENCE:g} s after {name}"), code)
        yield
    finally:
        call.over.set()
        UNDER_WAY.remove(call)
        signal.signal(signal.SIGURG, previous)


def hasten(name: str, code: int) -> None:
    """The signal ``name`` came: a call that is under way, or begins before ``forget``, has PATIENCE seconds left."""
    SIGNALS.append((name, code))
    for call in [*UNDER_WAY]:
        call.end_in(PATIENCE, Interrupted(f"no answer within {PATIENCE:g} s after {name}"), code)


def forget() -> None:
    """The run that the signals were for has ended."""
    SIGNALS.clear()
