"""Running other programs: argument lists, never a shell; printed as one could type them."""

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxrlhf.errors import ConfigError


class LaunchError(ValueError):
    """What stopped a launch, in the words of the program that said so; ``code`` is the exit code."""

    def __init__(self, text: str, code: int = 2):
        super().__init__(text)
        self.code = code


class CommandResult(NamedTuple):
    """What a program left."""

    code: int
    out: str
    err: str


def say(text: str) -> None:
    """A line of the launcher's own, with the time, between those of the programs that it runs."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def shown(argv: Sequence[str]) -> str:
    """``argv`` as one types it."""
    return shlex.join(argv)


def capture(argv: Sequence[str]) -> CommandResult:
    """Runs ``argv`` and keeps what it prints. Raises LaunchError where there is no such program."""
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError:
        raise LaunchError(f"{argv[0]}: no such program on PATH; expected it to be installed") from None
    return CommandResult(done.returncode, done.stdout, done.stderr)


def stream(argv: Sequence[str]) -> int:
    """Runs ``argv`` with its output on ours, and gives its exit code. An interrupt ends it too."""
    try:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise LaunchError(f"{argv[0]}: no such program on PATH; expected it to be installed") from None
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def must(argv: Sequence[str]) -> str:
    """What ``argv`` prints. Raises LaunchError where it fails."""
    done = capture(argv)
    if done.code:
        raise LaunchError(f"{shown(argv)}: exit code {done.code}: {last_line(done.err or done.out)}", 1)
    return done.out


def last_line(text: str) -> str:
    """The last line that says something; gcloud puts the error first and details behind it, so ERROR lines win."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR", "error"))]
    return (errors or lines or ["no message"])[-1]


def interruptible(work: Callable[[], int], advice: str) -> int:
    """Runs ``work``; what it refuses is one line, and its exit code is ours.

    ``advice`` is what to do next: said after Ctrl-C or SIGTERM, and after a failure that may leave something behind."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return work()
    except KeyboardInterrupt:
        print(f"\n{advice}", file=sys.stderr)
        return 130
    except LaunchError as error:
        print(error if error.code == 2 else f"{error}\n{advice}", file=sys.stderr)
        return error.code
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
