"""Several reward functions called with the same responses: at the same time, within their limits, and again after what
may pass. What a function may ask for beside responses and records."""

import asyncio
import functools
import itertools
import logging
import threading
import time
from typing import Any

import numpy as np
import pytest

from jaxrlhf.hosts import call_timeout
from jaxrlhf.rewards import calls
from jaxrlhf.rewards.calls import CallLimits, GraderError, ToGrade, call_all
from jaxrlhf.rewards.functions import Details, GraderConfig, RewardFunction, RewardsConfig
from jaxrlhf.rewards.graders import Graders, find_graders

BATCH = ToGrade(["a", "bb"], [{"answer": "a"}, {"answer": "b"}], None)


def of(*functions: Any) -> list[RewardFunction]:
    return [RewardFunction(f"my:f{at}", function) for at, function in enumerate(functions)]


def limits(count: int, **given: Any) -> CallLimits:
    return CallLimits(**({"timeouts": (10.0,) * count, "retries": (0,) * count} | given))


def call(*functions: Any, **given: Any) -> list[calls.Outcome]:
    return call_all(of(*functions), BATCH, limits(len(functions), **given))


def lengths(responses, records):
    return [len(text) for text in responses]


# ---- details --------------------------------------------------------------------------------------------------------

DETAILS = Details([[7, 2], [8]], [True, False], [3, 3], 64)


def test_a_function_is_given_the_details_that_it_has_parameters_for():
    def asks(responses, records, groups, token_ids):
        return [len(ids) + number for ids, number in zip(token_ids, groups)]

    def keywords(responses, records, *, ended, max_new_tokens):
        return [end * max_new_tokens for end in ended]

    def anything(responses, records, **given):
        return [len(given)] * len(responses)

    for function, expected in ((asks, [5, 4]), (keywords, [64, 0]), (anything, [0, 0]), (lengths, [1, 2])):
        np.testing.assert_array_equal(RewardFunction("my:f", function)(*BATCH[:2], DETAILS), expected)  # type: ignore


def test_each_function_has_lists_of_its_own_and_arguments_come_first():
    def greedy(responses, records, token_ids, max_new_tokens):
        return [max_new_tokens + token_ids[0].pop(), len(token_ids.pop())]

    first, second = of(greedy, greedy)
    for function in (first, second, first):
        np.testing.assert_array_equal(function(*BATCH[:2], DETAILS), [66, 1])  # type: ignore[misc]
    assert DETAILS.token_ids == [[7, 2], [8]]
    given = RewardFunction("my:f", functools.partial(greedy, max_new_tokens=1))
    np.testing.assert_array_equal(given(*BATCH[:2], DETAILS), [3, 1])  # type: ignore[misc]


# ---- at the same time -----------------------------------------------------------------------------------------------


def test_async_functions_run_beside_each_other_and_beside_the_others():
    """Each waits for the other two: one after the other none would end."""
    here = [threading.Event() for _ in range(3)]

    def meets(at: int) -> Any:
        async def waits(responses, records):
            here[at].set()
            while not all(event.is_set() for event in here):
                await asyncio.sleep(0.001)
            return [at] * len(responses)

        return waits

    def sync(responses, records):
        assert threading.current_thread() is threading.main_thread()
        here[2].set()
        assert all(event.wait(5) for event in here)
        return [2] * len(responses)

    found = call(meets(0), sync, meets(1))
    assert [one.grades.tolist() for one in found] == [[0, 0], [2, 2], [1, 1]]


def test_threads_run_functions_that_are_not_async_at_the_same_time():
    barrier = threading.Barrier(2)

    def meets(responses, records):
        barrier.wait(5)
        return [threading.current_thread() is threading.main_thread()] * len(responses)

    assert [one.grades.tolist() for one in call(meets, meets, threads=True)] == [[0, 0], [0, 0]]
    order = []

    def notes(responses, records):
        order.append(threading.current_thread() is threading.main_thread())
        return [0] * len(responses)

    call(notes, notes)
    call(notes, threads=True)  # alone
    assert order == [True] * 3


@pytest.mark.parametrize("threads", [False, True])
def test_the_seconds_of_each_are_its_own(threads):
    def slow(responses, records):
        time.sleep(0.2)
        return lengths(responses, records)

    async def slow_too(responses, records):
        await asyncio.sleep(0.1)
        return lengths(responses, records)

    first, second, third = call(slow, slow_too, lengths, threads=threads)
    assert 0.2 <= first.seconds < 5 and 0.1 <= second.seconds < first.seconds > third.seconds


# ---- limits ---------------------------------------------------------------------------------------------------------


def hangs(responses, records):
    time.sleep(30)


async def hangs_later(responses, records):
    await asyncio.sleep(30)


def loops(responses, records):
    while True:
        time.sleep(0.001)


HANGS = [(hangs, False), (loops, False), (hangs_later, False), (loops, True)]


@pytest.mark.parametrize(("function", "threads"), HANGS)
def test_a_function_that_hangs_ends_the_run_or_has_no_score(function, threads, caplog):
    line = (
        r"^rewards\.function: my:f0: no answer within 0\.1 s to 2 responses, the first of them to the record "
        r'\{"answer": "a"\}$'
    )
    began = time.monotonic()
    with pytest.raises(GraderError, match=line):
        call(function, lengths, timeouts=(0.1, None), threads=threads)
    assert not caplog.records
    found = call(function, lengths, timeouts=(0.1, None), on_timeout="unscorable", threads=threads)
    assert np.isnan(found[0].grades).all() and found[0].late and found[0].seconds >= 0.1
    assert found[1].grades.tolist() == [1, 2] and not found[1].late
    ((name, level, said),) = caplog.record_tuples
    assert (name, level) == ("jaxrlhf.rewards.calls", logging.WARNING) and said.endswith("they have no score by it")
    assert time.monotonic() - began < 10


def test_a_thread_that_runs_python_ends_and_those_that_do_not_are_bounded(monkeypatch):
    before = {*threading.enumerate()}
    call(loops, loops, timeouts=(0.05, 0.05), on_timeout="unscorable", threads=True)
    end = time.monotonic() + 10
    while mine := {thread for thread in threading.enumerate() if thread.name.startswith("rewards ")} - before:
        assert time.monotonic() < end, mine
        time.sleep(0.01)
    release = threading.Lock()  # whose acquire does not come back to Python
    release.acquire()
    monkeypatch.setattr(calls, "MOST_LEFT_BEHIND", 2)
    monkeypatch.setattr(calls, "LEFT_BEHIND", [])

    def blocked(responses, records):
        release.acquire()

    call(blocked, blocked, timeouts=(0.05, 0.05), on_timeout="unscorable", threads=True)
    with pytest.raises(GraderError, match="2 calls that took too long are still under way in their threads"):
        call(blocked, blocked, timeouts=(0.05, 0.05), on_timeout="unscorable", threads=True)
    release.release()


def test_all_together_have_a_deadline():
    def slow(responses, records):
        time.sleep(0.3)
        return lengths(responses, records)

    found = call(slow, slow, lengths, deadline=0.45, on_timeout="unscorable")
    assert [one.late for one in found] == [False, True, True]
    assert not any(one.late for one in call(slow, slow, lengths, deadline=5.0))


def test_a_signal_ends_a_run_that_leaves_late_answers_out(monkeypatch):
    monkeypatch.setattr(call_timeout, "PATIENCE", 0.1)
    try:
        for function in (hangs, hangs_later):
            threading.Timer(0.1, call_timeout.hasten, ("SIGTERM", 143)).start()
            with pytest.raises(GraderError, match=r"no answer within 0\.1 s after SIGTERM"):
                call(function, on_timeout="unscorable")
            call_timeout.forget()
    finally:
        call_timeout.forget()


# ---- again ----------------------------------------------------------------------------------------------------------


class Fails:
    """Raises ``error`` so many times, and then answers."""

    def __init__(self, times: int, error: Exception):
        self.left, self.error, self.called = times, error, 0

    def __call__(self, responses, records):
        self.called += 1
        if self.left:
            self.left -= 1
            raise self.error
        return lengths(responses, records)


class FailsLater(Fails):
    async def __call__(self, responses, records):
        return super().__call__(responses, records)


@pytest.mark.parametrize("kind", [Fails, FailsLater])
def test_what_may_pass_is_tried_again(kind, monkeypatch, caplog):
    monkeypatch.setattr(calls, "LONGEST_PAUSE", 0.001)
    function = kind(2, ConnectionError("refused"))
    (found,) = call(function, retries=(2,))
    assert found.grades.tolist() == [1, 2] and function.called == 3
    assert len(caplog.messages) == 2 and "raised ConnectionError: refused" in caplog.messages[0]
    function = kind(2, ConnectionError("refused"))
    with pytest.raises(GraderError, match="my:f0: raised ConnectionError: refused"):
        call(function, retries=(1,))
    assert function.called == 2
    for mistake in (KeyError("answer"), TypeError("no")):
        function = kind(1, mistake)
        with pytest.raises(GraderError, match=type(mistake).__name__):
            call(function, retries=(3,))
        assert function.called == 1


def test_an_answer_of_the_wrong_length_is_not_tried_again():
    called = []

    def short(responses, records):
        called.append(1)
        return [1.0]

    with pytest.raises(ValueError, match="returned 1 scores: expected 2"):
        call(short, retries=(3,))
    assert len(called) == 1


HUGE = {
    "a long text": lambda responses, records: "x" * 10**7,
    "long texts": lambda responses, records: ["x" * 10**7] * len(responses),
    "too many numbers": lambda responses, records: [0.0] * 10**6,
    "numbers without end": lambda responses, records: itertools.count(),
    "a large number": lambda responses, records: [10**4000] * len(responses),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_answer_is_a_short_line(name):
    with pytest.raises(ValueError, match=r"^rewards\.function: my:f0: (returned|score 0 is) ") as caught:
        call(HUGE[name])
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_huge_error_is_a_short_line():
    def raises(responses, records):
        raise RuntimeError("x\n" * 10**6)

    with pytest.raises(GraderError) as caught:
        call(raises)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_the_pauses_double_and_differ(monkeypatch):
    (function,) = of(lengths)
    monkeypatch.setattr(calls.random, "uniform", lambda low, high: (low + high) / 2)
    assert [calls.pause(function, OSError(), attempt) for attempt in (0, 1, 2, 3, 4, 5, 9)] == [1, 2, 4, 8, 16, 30, 30]
    monkeypatch.undo()
    assert len({calls.pause(function, OSError(), 0) for _ in range(5)}) == 5
    assert all(0.5 <= calls.pause(function, OSError(), 0) <= 1.5 for _ in range(20))


def test_retries_are_within_the_time_of_the_function():
    with pytest.raises(GraderError, match=r"no answer within 0\.2 s"):
        call(Fails(9, OSError("busy")), retries=(9,), timeouts=(0.2,))


# ---- from the config ------------------------------------------------------------------------------------------------


def test_the_limits_of_a_config():
    functions = {"a": GraderConfig("operator:add"), "b": GraderConfig("operator:sub", timeout=1.0, retries=0)}
    found = find_graders(RewardsConfig(functions=functions, timeout=5.0, retries=2, deadline=9.0))
    assert found is not None and found.limits == CallLimits((5.0, 1.0), (2, 0), 9.0, "stop", False)


def test_one_that_is_late_on_the_sample_response_is_refused():
    """Also where late answers are left out: it may be late for all of them."""
    slow = Graders(tuple(of(hangs)), limits=limits(1, timeouts=(0.05,), on_timeout="unscorable"))
    with pytest.raises(ValueError, match=r"no answer within 0\.05 s .* on a sample response to a record of data"):
        slow.try_on(BATCH.records, "data.prompts")
