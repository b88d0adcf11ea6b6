"""How a command is stopped: by SIGINT (Ctrl-C) or SIGTERM, while it builds, compiles, computes, evaluates or saves.

A run that has something to save remembers the first signal and stops after the iteration. A second SIGINT stops it at
once, as the first one does where nothing would be lost. Python calls signal handlers between two bytecodes of the main
thread only, which may wait minutes for a compiler or a device. Therefore a thread reads the pipe that the C handler
writes to: it answers in the meantime, and ends the process where the main thread does not.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxrlhf.hosts import call_timeout
from jaxrlhf.hosts.exit_codes import EXIT_INTERRUPTED, EXIT_PREEMPTED

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
CODES = {"Ctrl-C": EXIT_INTERRUPTED, "SIGTERM": EXIT_PREEMPTED}
CLOSE = b"\0"
LAST_WORDS = 3.0  # seconds that a process has to say why it ends


class Stop:
    """What this process heard of ``signals`` while it is open (a context manager).

    ``leaves``: a signal that stops at once ends the process there and then (the command line: KeyboardInterrupt would
    be swallowed in a callback, or wait for threads); otherwise KeyboardInterrupt is raised (notebooks). Signals that
    were ignored stay ignored (a background job's SIGINT, nohup). Outside the main thread, where Python has no handlers,
    nothing is heard."""

    def __init__(self, *signals: signal.Signals, leaves: bool = False):
        self.signals, self.leaves = signals, leaves
        self.asked: str | None = None  # the name of the first signal
        self.began = time.monotonic()
        self.saves = False  # whether there is something to save, so that the first signal is remembered only
        self.last_words: Callable[[], str] = lambda: "stopped"
        self.tell: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
        self.relay: Callable[[], None] | None = None  # tells the other processes of a run of the first signal
        self.heard, self.seen = dict.fromkeys(signals, 0), dict.fromkeys(signals, 0)  # by the handler, by the thread
        self.previous: dict[signal.Signals, Any] = {}
        self.thread: threading.Thread | None = None

    @property
    def code(self) -> int:
        """The exit code of a process that stopped."""
        return CODES[self.asked or "SIGTERM"]

    def __enter__(self) -> "Stop":
        if threading.current_thread() is not threading.main_thread():
            return self
        found = {number: signal.getsignal(number) for number in self.signals}
        self.previous = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}
        self.reads, self.writes = os.pipe()
        os.set_blocking(self.writes, False)
        self.outer = signal.set_wakeup_fd(self.writes, warn_on_full_buffer=False)
        for number in self.previous:
            signal.signal(number, self.hear)
        self.thread = threading.Thread(target=self.watch, name="signals", daemon=True)
        self.thread.start()
        OPEN.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self.thread is None:
            return
        OPEN.remove(self)
        call_timeout.forget()
        for number, handler in self.previous.items():
            if signal.getsignal(number) == self.hear:
                signal.signal(number, handler)
        signal.set_wakeup_fd(self.outer)
        os.write(self.writes, CLOSE)
        self.thread.join()
        os.close(self.reads)
        os.close(self.writes)

    def hear(self, number: int, _: object) -> None:
        """The handler, in the main thread. Several signals that came while it could not run are one call."""
        which = signal.Signals(number)
        count = self.heard[which] = max(self.heard[which] + 1, self.seen[which])
        self.asked = self.asked or NAMES[which]
        if self.stops_now(which, count):
            if self.leaves:
                self.leave()
            raise KeyboardInterrupt

    def stops_now(self, number: signal.Signals, count: int) -> bool:
        return not self.saves or (number is signal.SIGINT and count > 1)

    def watch(self) -> None:
        """The thread."""
        while True:
            for byte in os.read(self.reads, 64):
                if byte == CLOSE[0]:
                    return
                if byte in self.previous:
                    self.notice(signal.Signals(byte))

    def notice(self, number: signal.Signals) -> None:
        """Answers one signal."""
        self.seen[number] += 1
        if self.stops_now(number, self.seen[number]):
            if self.leaves:
                self.asked = self.asked or NAMES[number]
                self.leave()
        elif self.seen[number] == 1:
            if self.relay:
                self.relay()
            again = "; again: stops at once" if number is signal.SIGINT else ""
            self.tell(f"{NAMES[number]}: stops after this iteration and saves{again}")
            call_timeout.hasten(NAMES[number], CODES[NAMES[number]])

    def leave(self) -> None:
        """Ends the process: without waiting for threads, or for what is being saved in the background."""
        # never given back: of two threads, the second waits for the end; not for ever: the main thread may hold a lock
        # that the last words need, or wait for it itself
        if not LEAVING.acquire(timeout=LAST_WORDS):
            os._exit(self.code)
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # RuntimeError: it came in the middle of a print
            sys.stdout.flush()
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            if sys.stderr.isatty():
                sys.stderr.write("\x1b[?25h\r\x1b[K")  # a progress bar hides the cursor
            print(f"{self.asked}: {self.last_words()}", file=sys.stderr)
            sys.stderr.flush()
        os._exit(self.code)


OPEN: list[Stop] = []
LEAVING = threading.Lock()


def forget() -> None:
    """In a forked child, which is no part of the command: signals act as they would without a Stop."""
    if OPEN:
        signal.set_wakeup_fd(-1)
        for number in {number for stop in OPEN for number in stop.previous}:
            signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)
        OPEN.clear()


os.register_at_fork(after_in_child=forget)
