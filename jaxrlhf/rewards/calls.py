"""Calls of several reward functions with the same responses: at the same time where they allow it, each within its
limits, and repeated after what may pass."""

import concurrent.futures
import contextlib
import ctypes
import logging
import random
import threading
import time
from asyncio import sleep as async_sleep
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxrlhf import user_code
from jaxrlhf.errors import counted, one_line, show
from jaxrlhf.hosts.call_timeout import Interrupted, TimedOut, interruptible
from jaxrlhf.rewards import event_loop
from jaxrlhf.rewards.functions import Details, RewardFunction

LOG = logging.getLogger(__name__)
LONGEST_PAUSE = 30.0  # seconds before a call is repeated
MOST_LEFT_BEHIND = 8  # threads whose call took too long and goes on
# mistakes in the function, which no other call mends
MISTAKES = (AssertionError, AttributeError, ImportError, LookupError, NameError, NotImplementedError, TypeError)


class GraderError(RuntimeError):
    """A reward function raised something, or took too long: one line, with the place in its file."""


class CallLimits(NamedTuple):
    """What the calls of the functions may take."""

    timeouts: tuple[float | None, ...]  # seconds of each function for one batch; None: any number
    retries: tuple[int, ...]  # of each function
    deadline: float | None = None  # seconds of all together
    on_timeout: Literal["stop", "unscorable"] = "stop"
    threads: bool = False  # functions that are not async run in threads


class ToGrade(NamedTuple):
    """What every function is given."""

    responses: list[str]
    records: Sequence[dict[str, Any]]
    details: Details | None


class Outcome(NamedTuple):
    """What a function gave."""

    grades: np.ndarray  # f32[len(responses)]; NaN: none
    seconds: float
    late: bool = False  # it took too long, and gave none


def call_all(functions: Sequence[RewardFunction], batch: ToGrade, limits: CallLimits) -> list[Outcome]:
    """The answer of each function. Async functions run at the same time as all others; others one after the other in
    this thread, or with ``limits.threads`` each in one of its own.

    Raises as ``answers``, where one raises or takes too long; the others are then ended, if they can be."""
    end = float("inf") if limits.deadline is None else time.monotonic() + limits.deadline
    left = lambda at: min(limits.timeouts[at] or float("inf"), end - time.monotonic())
    begun: dict[int, Begun] = {}
    found: dict[int, Outcome] = {}
    try:
        for at, function in enumerate(functions):
            if function.is_async:
                later = repeated_later(function, batch, limits.retries[at])
                begun[at] = Begun(lambda later=later: event_loop.begin(later), left(at))
            elif limits.threads and len(functions) > 1:
                work = lambda function=function, at=at: repeated(function, batch, limits.retries[at])
                begun[at] = Begun(lambda work=work, function=function: in_thread(work, function), left(at))
        for at, function in enumerate(functions):
            if at not in begun:
                work = lambda function=function, at=at: repeated(function, batch, limits.retries[at])
                found[at] = answered(work, function, batch, left(at), limits.on_timeout)
        for at, one in begun.items():
            answer = answered(one.result, functions[at], batch, None, limits.on_timeout)
            found[at] = answer._replace(seconds=one.seconds())
    finally:
        for one in begun.values():
            one.future.cancel()
    return [found[at] for at in range(len(functions))]


class Begun:
    """A call under way elsewhere, which may take ``limit`` seconds."""

    def __init__(self, begin: Callable[[], Future], limit: float):
        self.limit, self.began, self.done = limit, time.monotonic(), 0.0
        self.future = begin()
        self.future.add_done_callback(self.note)

    def note(self, future: Future) -> None:
        self.done = time.monotonic()

    def seconds(self) -> float:
        return (self.done or time.monotonic()) - self.began

    def result(self) -> np.ndarray:
        """What it gives. Raises what it raises, and TimedOut at its end."""
        left = None if self.limit == float("inf") else max(self.began + self.limit - time.monotonic(), 0)
        concurrent.futures.wait([self.future], left)
        if not self.future.done():
            self.future.cancel()
            raise TimedOut(f"no answer within {round(self.limit, 3):g} s")
        return self.future.result()


def answered(
    work: Callable[[], np.ndarray],
    function: RewardFunction,
    batch: ToGrade,
    seconds: float | None,
    on_timeout: str,
) -> Outcome:
    """What ``work`` gives within ``seconds``; None: it raises TimedOut itself. Raises, in one line, GraderError
    where the function raises anything (that is the cause of it), is interrupted, or takes too long with on_timeout
    "stop"; ValueError where this package did: what the function gives is no list of numbers, say."""
    began = time.monotonic()
    try:
        with interruptible(None if seconds in (None, float("inf")) else max(seconds, 0.0)):
            if seconds is not None and seconds <= 0:
                raise TimedOut("no answer within 0 s, as rewards.deadline has passed,")
            return Outcome(work(), time.monotonic() - began)
    except Interrupted as error:
        first = f", the first of them to the record {show(batch.records[0])}" if batch.records else ""
        line = f"{function}: {error} to {counted(len(batch.responses), 'response')}{first}"
        if not isinstance(error, TimedOut) or on_timeout == "stop":
            raise GraderError(line) from error
        LOG.warning("%s; they have no score by it", line)
        return Outcome(np.full(len(batch.responses), np.nan, np.float32), time.monotonic() - began, late=True)
    except (Exception, SystemExit) as error:
        if not user_code.raised_in(user_code.PACKAGE, error):
            raise GraderError(f"{function}: raised {user_code.describe(error)}") from error
        if str(error).startswith(str(function)):
            raise
        raise ValueError(f"{function}: {one_line(error)}") from error


# ---- again ----------------------------------------------------------------------------------------------------------


def may_pass(error: Exception) -> bool:
    """Whether another call may do without this error: not where the function has a mistake, or answers wrongly."""
    ours = isinstance(error, ValueError) and user_code.raised_in(user_code.PACKAGE, error)
    return not ours and not isinstance(error, MISTAKES)


def pause(function: RewardFunction, error: Exception, attempt: int) -> float:
    """Seconds until the next call: 1, 2, 4, ..., each times 0.5 to 1.5, so that processes do not call together."""
    seconds = min(2.0**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.5)
    LOG.warning("%s: raised %s; called again in %.1f s", function, user_code.describe(error), seconds)
    return seconds


def repeated(function: RewardFunction, batch: ToGrade, retries: int) -> np.ndarray:
    """What the function gives, called again up to ``retries`` times after what may pass."""
    attempt = 0
    while True:
        try:
            return function(batch.responses, list(batch.records), batch.details)
        except Exception as error:
            if attempt >= retries or not may_pass(error):
                raise
            time.sleep(pause(function, error, attempt))
        attempt += 1


async def repeated_later(function: RewardFunction, batch: ToGrade, retries: int) -> np.ndarray:
    """``repeated`` of an async function, in the event loop."""
    attempt = 0
    while True:
        try:
            return await function.later(batch.responses, list(batch.records), batch.details)
        except Exception as error:
            if attempt >= retries or not may_pass(error):
                raise
            await async_sleep(pause(function, error, attempt))
        attempt += 1


# ---- threads --------------------------------------------------------------------------------------------------------

LEFT_BEHIND: list[threading.Thread] = []


class ThreadCall(Future):
    """A call in a thread. Its ``cancel`` raises Interrupted there, which reaches it once it runs Python again."""

    thread: threading.Thread

    def cancel(self) -> bool:
        if self.done() or self.thread in LEFT_BEHIND:
            return False
        LEFT_BEHIND.append(self.thread)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(self.thread.ident or 0), ctypes.py_object(Interrupted)
        )
        return True


def in_thread(work: Callable[[], np.ndarray], function: RewardFunction) -> ThreadCall:
    """``work`` under way. Raises GraderError where too many calls that took too long do not end."""
    LEFT_BEHIND[:] = [thread for thread in LEFT_BEHIND if thread.is_alive()]
    if len(LEFT_BEHIND) >= MOST_LEFT_BEHIND:
        raise GraderError(
            f"{function}: {len(LEFT_BEHIND)} calls that took too long are still under way in their threads; expected "
            "functions that end, or rewards.threads false"
        )
    call = ThreadCall()

    def run() -> None:
        with contextlib.suppress(Interrupted):
            try:
                call.set_result(work())
            except Exception as error:
                call.set_exception(error)
            except SystemExit as error:
                call.set_exception(error)

    call.thread = threading.Thread(target=run, name=f"rewards {function.name}", daemon=True)
    call.thread.start()
    return call
