"""The config key ``profile``: which iterations of a run are traced, and what is written."""

import gzip
import json

import jax
import pytest

from jaxrlhf import train as trainer
from jaxrlhf.hosts.profiler import Profiler
from tests.support import runs


@pytest.fixture
def noted(monkeypatch):
    """What the profiler does, in order; nothing is traced."""
    events: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: events.append(f"start {folder}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    return events


def iterate(profiler: Profiler, events: list[str], steps: range) -> None:
    for step in steps:
        profiler.before(step, lambda: events.append("wait"))
        events.append(str(step))
        profiler.after(step, lambda: events.append("wait"))
    profiler.close()


@pytest.mark.parametrize(
    "steps, done, expected",
    [
        (range(2, 4), range(1, 6), ["1", "wait", "start here", "2", "3", "wait", "stop", "4", "5"]),
        (range(1, 2), range(1, 3), ["wait", "start here", "1", "wait", "stop", "2"]),
        (range(2, 9), range(3, 5), ["wait", "start here", "3", "4", "stop"]),  # resumed in the middle, ended in it
        (range(0), range(1, 3), ["1", "2"]),
        (range(1, 3), range(4, 6), ["4", "5"]),  # resumed behind them
    ],
)
def test_the_steps_asked_for_are_traced_and_no_others(noted, steps, done, expected):
    iterate(Profiler("here", steps), noted, done)
    assert noted == expected


@pytest.mark.nightly  # by day: the steps that are traced, above
def test_a_run_leaves_a_perfetto_trace(root, tmp_path, one_device):
    off = ["eval.every=0", "data.eval_demonstrations=null", "log.trackers=[]", "checkpoint.every=4"]
    cfg = runs.config("sft", root, tmp_path, *off, 'profile="2:4"')
    assert trainer.run(cfg) == "done"
    (trace,) = (tmp_path / "sft" / "profile").glob("**/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    executed = [event for event in events if "Executable::Execute" in event.get("name", "")]
    assert len(executed) >= 2, "two iterations"
