"""Equality of two mathematical answers by the math-verify library, in processes of their own.

SymPy can take minutes, or all memory, for what a policy writes (9^{9^{9^9}}). So a worker process compares the answers,
within limits on its CPU time and memory; where it passes one the kernel ends it, the answers count as different, and
another worker goes on. No signal handler is set here, so this works off the main thread too.
"""

import atexit
import contextlib
import importlib.util
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

CPU_SECONDS = 2.0  # of a worker, for one comparison: CPU time, so that the result does not depend on other work
WALL_SECONDS = 120.0  # to start, or for one comparison, on a machine that hardly gets to it
MEMORY_BYTES = 4 << 30  # address space of a worker
PAIRS_PER_WORKER = 32  # fewer are not worth another process

Pair = tuple[str, str]  # (the right answer, another one), in LaTeX


def equal_answers(pairs: Sequence[Pair]) -> list[bool]:
    """Whether the two answers of each pair are mathematically equal. Equal pairs are compared once.

    Raises ImportError, in one line, without math-verify."""
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("math_answer: needs math-verify; pip install 'jaxrlhf[math]'")
    different = [*dict.fromkeys(pairs)]
    with LOCK:
        known = dict(zip(different, compared(different), strict=True))
    return [known[pair] for pair in pairs]


# ---- this process ---------------------------------------------------------------------------------------------------


class Worker:
    """A process that compares answers, started when it is first needed and again when it was ended."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def start(self) -> subprocess.Popen:
        """A process that is ready. Raises RuntimeError, in one line, where it ends before it is."""
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
        # a session of its own: Ctrl-C on the terminal is for the run, not for its workers
        command, pipe = [sys.executable, "-c", code], subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        if reply(process) != b"ready\n":
            process.kill()
            said = process.communicate()[1].decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"math_answer: its worker process did not start: {said[-1] if said else 'no reply'}")
        return process

    def compare(self, pair: Pair) -> bool:
        """Whether they are equal; False where a limit was passed. A worker that something else ended gets a successor
        that tries again, once."""
        for _ in range(2):
            if self.process is None or self.process.poll() is not None:
                self.stop()
                self.process = self.start()
            assert self.process.stdin
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps(pair).encode() + b"\n")
                self.process.stdin.flush()
            found = reply(self.process)
            if found:
                return found == b"true\n"
            try:
                ended = self.process.wait(1)
            except subprocess.TimeoutExpired:  # WALL_SECONDS have passed
                break
            if ended == -signal.SIGPROF:
                break
        self.stop()
        return False

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            with contextlib.suppress(BrokenPipeError):
                self.process.communicate()
            self.process = None


def reply(process: subprocess.Popen) -> bytes:
    """The next line that a worker writes; empty where it ends, or writes nothing for WALL_SECONDS."""
    assert process.stdout
    ready, _, _ = select.select([process.stdout], [], [], WALL_SECONDS)
    return process.stdout.readline() if ready else b""


LOCK = threading.Lock()  # over the workers: one caller at a time
WORKERS: list[Worker] = []


def compared(pairs: Sequence[Pair]) -> list[bool]:
    """Worker i takes every n-th pair from the i-th on."""
    count = min(4, max(1, (os.cpu_count() or 1) // 2), -(-len(pairs) // PAIRS_PER_WORKER))
    while len(WORKERS) < count:
        WORKERS.append(Worker())
    found: dict[int, bool] = {}

    def work(number: int) -> None:
        for at in range(number, len(pairs), count):
            found[at] = WORKERS[number].compare(pairs[at])

    if count == 1:
        work(0)
    elif count:
        with ThreadPoolExecutor(count) as threads:
            list(threads.map(work, range(count)))
    return [found[at] for at in range(len(pairs))]


@atexit.register
def stop_workers() -> None:
    for worker in WORKERS:
        worker.stop()


# ---- the worker's process -------------------------------------------------------------------------------------------


def serve() -> None:
    """Answers a line of JSON, [right, other], with true or false, until there are no more."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
    with contextlib.suppress(OSError, ValueError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    logging.disable(logging.CRITICAL)
    is_equal("1", "x")  # before the clock runs: imports, grammars
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with open(os.devnull, "w") as nothing:  # what nobody reads would fill the pipe
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        right, other = json.loads(line)
        try:
            equal = is_equal(right, other)
        except (Exception, RecursionError, MemoryError):
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(bool(equal)), file=replies, flush=True)


def is_equal(right: str, other: str) -> bool:
    """What math-verify says of two answers in LaTeX. Its own time limits, which use SIGALRM, are off."""
    from math_verify import LatexExtractionConfig, parse, verify

    boxes = [LatexExtractionConfig(boxed_match_priority=0)]
    no_limit: Any = None  # which its types don't know
    first, second = (parse(rf"\boxed{{{text}}}", boxes, parsing_timeout=no_limit) for text in (right, other))
    return bool(first and second) and verify(first, second, timeout_seconds=None)
