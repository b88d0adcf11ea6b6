"""When a run with max_run_duration stops."""

import pytest

from jaxrlhf.hosts.run_duration import TimeLimit


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(TimeLimit, "clock", staticmethod(lambda: now[0]))
    return now


def test_without_a_limit_it_is_never_reached(clock):
    limit = TimeLimit(None, 0.0)
    clock[0] = 1e9
    assert not limit.reached() and not limit.over


def test_the_slowest_iteration_and_the_slowest_save_have_to_fit(clock):
    """By hand: iterations of 10 s and saves of 4 s need 1.5 x 14 + 1 = 22 s."""
    limit = TimeLimit(100.0, 0.0)
    for clock[0] in (5.0, 10.0, 20.0):  # the slowest so far: 10 s
        assert not limit.reached()
    with limit.saving():
        clock[0] = 24.0
    with limit.saving():
        clock[0] = 25.0
    clock[0] = 30.0
    assert not limit.reached() and limit.slowest == {"iteration": 10.0, "save": 4.0}
    for clock[0], late in ((40.0, False), (50.0, False), (60.0, False), (70.0, False), (78.0, False), (78.5, True)):
        assert limit.reached() is limit.over is late


def test_a_limit_that_is_over_before_the_loop_lets_nothing_begin(clock):
    clock[0] = 99.5
    assert TimeLimit(100.0, 0.0).reached()
