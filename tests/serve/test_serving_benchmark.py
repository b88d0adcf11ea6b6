"""The benchmark of the server's speed: its table, its limits, and a measurement beside a stand-in."""

import os
import sys

import pytest

from jaxrlhf.benchmarks import serving
from jaxrlhf.benchmarks.serving import Measured
from tests.support import runs

STAND_IN = "import sys\nprint('ready', flush=True)\nfor line in sys.stdin: print(0.5, flush=True)"


def test_a_row_of_the_table():
    """Ratios are those of each round: their median, not that of the medians."""
    one = Measured(1, [30.0, 20.0, 10.0], {"transformers": [10.0, 10.0, 10.0], "llama.cpp": [10.0, 40.0, 20.0]})
    assert serving.row_of(one, ["transformers", "llama.cpp"]) == "| 1 | 3 | 20.0 | 10.0 | 2.00 | 20.0 | 0.50 |"
    eight = Measured(8, [40.0], {"transformers": [20.0]})
    assert serving.row_of(eight, ["transformers", "llama.cpp"]) == "| 8 | 1 | 40.0 | 20.0 | 2.00 |  |  |"


def test_another_that_ends_is_named():
    with serving.process([sys.executable, "-c", ""]) as ended, pytest.raises(RuntimeError, match="a process ended"):
        serving.line_of(ended.stdout)


def test_llama_needs_a_model():
    with pytest.raises(ValueError, match="--llama: needs --gguf"):
        serving.main(["folder", "--torch", "python", "--llama", "python"])


@pytest.mark.nightly  # a process of its own: it compiles the programs again
def test_both_are_measured(folder, monkeypatch):
    for name, value in runs.environment(1).items():
        monkeypatch.setitem(os.environ, name, value)
    others = {name: [sys.executable, "-c", STAND_IN] for name in ("transformers", "llama.cpp")}
    one, two = serving.measure(str(folder), others, [1, 2], tokens=8, rounds=2, seconds=600)
    assert one.others == {"transformers": [16.0, 16.0], "llama.cpp": [16.0, 16.0]}
    assert two.others == {"transformers": [32.0, 32.0]}
    assert len(one.served) == len(two.served) == 2 and min(one.served + two.served) > 0
    (hurried,) = serving.measure(str(folder), others, [1], tokens=8, rounds=9, seconds=0)
    assert len(hurried.served) == 1
