"""The benchmarks that reproduce published results, by name: the files of published/. Imports no JAX."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from jaxrlhf.benchmarks.record import Benchmark
from jaxrlhf.errors import ConfigError, nearest

FOLDER = Path(__file__).parent / "published"


def names() -> list[str]:
    """Nothing is imported."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def find(name: str, quick: bool = False, others: Sequence[str] = ()) -> Benchmark:
    """The record of a benchmark, or of its short twin. ``others``: what else might have been meant.

    Raises ConfigError, in one line, where there is none."""
    if name not in names():
        choices = nearest(name, [*names(), *others], "see jaxrlhf benchmark list")
        raise ConfigError(f"benchmark: {name}: no such benchmark; {choices}")
    module = importlib.import_module(f"jaxrlhf.benchmarks.published.{name}")
    return module.QUICK if quick else module.BENCHMARK
