"""Rewards for programs: the share of a record's tests that the program in a response passes.

A process of its own (code_runner.py) forks for each test, within limits on CPU time, time, memory, files and processes.
Where the kernel allows it, the process has no network, no writable file but a small folder in memory, and sees no other
process; and it is another user where this one is root. That keeps a policy's mistakes away from a run. It is no sandbox
against an attacker: use a virtual machine for that. A test of assert lines runs in the program's own process, which a
program that means to can fool; input and output are compared outside of it."""

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from jaxrlhf.errors import cut, one_line, show

RUNNER = Path(__file__).with_name("code_runner.py")
FILES = ("work", "job", "results")  # of the folder that a runner is given
MIB = 1 << 20
FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.S | re.M)
GRACE = 15.0  # seconds for all but the tests, after which a runner is ended
LOG = logging.getLogger(__name__)
SAID: set[str] = set()  # what is not in force, and was said once


@dataclasses.dataclass(frozen=True)
class CodeLimits:
    """What a program may take in one test."""

    cpu_seconds: int = 4  # of each of its processes
    seconds: float = 10.0  # until it is ended
    memory_mib: int = 1024  # address space of each of its processes
    file_mib: int = 8  # of a file, its output among them; twice that of all files together
    processes: int = 16  # at a time, threads included


class RunCode:
    """A grader (rewards.function: code): which share of the tests of a record the program of a response passes.

    The program is the last block of the response that is fenced by ```python or ```, or all of it. The ``column`` of a
    record has a list of tests, or one: Python code that raises where the program is wrong ("assert add(1, 2) == 3"),
    run after the program; or {"input": ..., "output": ...}, what it reads and what it has to print. Blanks at the ends
    of lines, and empty lines at the end, are all the same. A record whose column is null has no score (None).

    Args:
        column: of the records.
        score: share of the tests passed; or "all": 1 where it is all of them, else 0.
        packages: whether programs may import what is installed here, and not the standard library alone.
        parallel: programs at a time; None: one a core of this machine, at most 8.
        limits: the fields of CodeLimits.
    """

    def __init__(
        self,
        column: str = "tests",
        score: Literal["share", "all"] = "share",
        packages: bool = False,
        parallel: int | None = None,
        **limits: Any,
    ):
        if score not in ("share", "all"):
            raise ValueError(f"code: score: {show(score)}: expected share or all")
        known = {field.name for field in dataclasses.fields(CodeLimits)}
        if wrong := [name for name in limits if name not in known]:
            raise ValueError(f"code: {wrong[0]}: no such limit; choices: {', '.join(sorted(known))}")
        for name, most in limits.items():
            if not isinstance(most, (int, float)) or most <= 0:
                raise ValueError(f"code: {name}: {show(most)}: expected a number above 0")
        self.column, self.score, self.packages, self.limits = column, score, packages, CodeLimits(**limits)
        self.parallel = parallel or min(8, os.cpu_count() or 1)

    def __call__(self, responses: list[str], records: list[dict[str, Any]]) -> list[float | None]:
        tests = [tests_of(record, self.column) for record in records]
        programs = [program_in(response) for response in responses]
        over = threading.Event()
        grade = lambda program, tests: self.grade(program, tests, over)
        with ThreadPoolExecutor(self.parallel) as pool:
            try:
                return list(pool.map(grade, programs, tests))
            except BaseException:  # the call is interrupted
                over.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def grade(self, program: str, tests: list[Any] | None, over: threading.Event) -> float | None:
        """The score of one program; ``over`` ends it early."""
        if tests is None or over.is_set():
            return None
        passed = passes(program, tests, self.limits, self.packages, self.score == "all", over)
        return float(all(passed)) if self.score == "all" else sum(passed) / len(tests)


def program_in(response: str) -> str:
    """The last fenced block of a response in Python, or in no language; else the response."""
    blocks = [text for language, text in FENCE.findall(response) if language.lower() in ("", "py", "python", "python3")]
    return blocks[-1] if blocks else response


def tests_of(record: dict[str, Any], column: str) -> list[Any] | None:
    """The tests of a record; None where it says that it has none. Raises ValueError, in one line, for anything else
    than tests."""
    if column not in record:
        raise ValueError(f"code: {column}: missing among {', '.join(record)}")
    given = record[column]
    if given is None:
        return None
    tests = [given] if isinstance(given, (str, dict)) else given
    right = lambda test: isinstance(test, str) or (isinstance(test, dict) and {*test} >= {"input", "output"})
    if not isinstance(tests, Iterable) or not (tests := [*tests]) or not all(map(right, tests)):
        raise ValueError(f'code: {column}: {show(given)}: expected tests: code, or {{"input": ..., "output": ...}}')
    return tests


def passes(
    program: str,
    tests: Sequence[str | dict[str, Any]],
    limits: CodeLimits,
    packages: bool = False,
    stop: bool = False,
    over: threading.Event | None = None,
) -> list[bool]:
    """Whether the program passes each of the tests, within the limits, and before ``over`` is set. ``stop``: after one
    that did not come to its end, the others count as failed."""
    given = [{"test": test} if isinstance(test, str) else {"input": str(test["input"])} for test in tests]
    found = run(program, given, limits, packages, stop, over or threading.Event())
    passed = [False] * len(tests)
    for at, (test, one) in enumerate(zip(tests, found)):
        ended = one["code"] == 0  # then a test with input has an output
        passed[at] = ended and (isinstance(test, str) or lines_of(one["output"]) == lines_of(str(test["output"])))
    return passed


def lines_of(text: str) -> list[str]:
    """Without blanks at the ends of lines, and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def run(
    program: str,
    tests: Sequence[dict[str, str]],
    limits: CodeLimits,
    packages: bool,
    stop: bool,
    over: threading.Event,
) -> list[dict[str, Any]]:
    """What came of each test, as far as they were run: ``code``, its exit code (124: it took too long; 125: it did not
    come to its end), and ``output``, what was printed, of a test with input. Raises RuntimeError, in one line, where
    this machine could not begin."""
    folder = Path(tempfile.mkdtemp(prefix="code-"))
    try:
        job = {
            "program": program,
            "tests": tests,
            "stop": stop,
            "cpu_seconds": max(1, round(limits.cpu_seconds)),
            "seconds": limits.seconds,
            "memory": int(limits.memory_mib * MIB),
            "file_size": int(limits.file_mib * MIB),
            "processes": int(limits.processes),
        }
        (folder / "work").mkdir(mode=0o755)
        folder.chmod(0o755)
        (folder / "job").write_text(json.dumps(job))
        start(folder, packages, limits.seconds * len(tests) + GRACE, over)
        say_what_is_missing(folder / "work" / "status.json")
        results = (folder / "results").read_text() if (folder / "results").exists() else ""
        if said := (folder / "said").read_text(errors="replace").strip().splitlines():
            LOG.warning("code: the tests of a program were ended: %s", cut(said[-1]))
        if not results and not over.is_set():
            raise RuntimeError(f"code: no test was begun: {one_line(said[-1])[:200] if said else 'nothing was said'}")
        return [json.loads(line) for line in results.splitlines() if line]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def start(folder: Path, packages: bool, seconds: float, over: threading.Event) -> None:
    """Runs the runner. It is ended, with all of its group, after ``seconds`` and once ``over`` is set."""
    site, end = () if packages else ("-S",), time.monotonic() + seconds
    command = [sys.executable, "-I", "-B", *site, str(RUNNER), *(str(folder / name) for name in FILES)]
    nothing, env = subprocess.DEVNULL, {"PATH": os.defpath, "LANG": "C.UTF-8"}
    with open(folder / "said", "wb") as said:
        process = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=said, env=env, start_new_session=True)
    try:
        while time.monotonic() < end and not over.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
                return
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


MISSING = {
    "network": "there are no namespaces for this user; programs can reach the network and other processes of the user",
    "files": "files cannot be made read-only; programs can write wherever this user can",
    "processes": "processes are counted for this user, not for a program; it may be able to start more, or none",
}


def say_what_is_missing(path: Path) -> None:
    """A warning, once, of each protection that this machine does not give."""
    status = json.loads(path.read_text()) if path.exists() and path.stat().st_size else dict.fromkeys(MISSING, False)
    for name in [name for name, there in status.items() if not there and name not in SAID]:
        SAID.add(name)
        LOG.warning("code: %s", MISSING[name])
