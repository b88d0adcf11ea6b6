"""What a benchmark that reproduces a published result is: its cells, what is measured of each, and its signature.

Imports neither JAX nor flax, so that ``jaxrlhf benchmark list`` answers at once: a benchmark's file imports what is
heavy inside its functions.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrlhf.benchmarks.signature import SignatureLine
from jaxrlhf.errors import ConfigError, nearest

Measured = dict[str, float | list[float]]  # quantity -> a number, or a curve


@dataclasses.dataclass(frozen=True)
class Cell:
    """A method or a control: one ordinary run for each seed."""

    name: str  # its run directory is OUT/seed<N>/NAME
    about: str  # what it is, in the table of the README
    config: str = ""  # a file of configs/benchmarks/BENCHMARK/ without .yaml; "": the one of its name
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # config key -> value, on top of the file
    prepare: Callable[[Path, int], None] | None = None  # (OUT/seed<N>, seed): writes data that earlier cells decide


class FinishedCell(NamedTuple):
    """A cell whose run has ended."""

    cell: str
    run_dir: Path
    folder: Path  # OUT/seed<N>: the runs of the earlier cells are beside it, the data in data/
    seed: int

    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl: a row an iteration, and a row an evaluation (eval/...)."""
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    def curve(self, metric: str) -> list[float]:
        """The values of ``metric`` over the run."""
        return [row[metric] for row in self.rows() if row.get(metric) is not None]


class Results:
    """What was measured: cell -> quantity -> a value a seed."""

    def __init__(self, seeds: Sequence[int], measured: Mapping[str, Sequence[Measured]]):
        self.seeds, self.measured = list(seeds), {cell: list(found) for cell, found in measured.items()}

    def of(self, cell: str, quantity: str) -> list[Any]:
        """A value for each seed. Raises ConfigError for a name that the benchmark does not measure."""
        if cell not in self.measured:
            raise ConfigError(f"benchmark: {cell}: no such cell; {nearest(cell, [*self.measured])}")
        first = self.measured[cell][0]
        if quantity not in first:
            raise ConfigError(f"benchmark: {cell}: {quantity} is not measured; {nearest(quantity, [*first])}")
        return [found[quantity] for found in self.measured[cell]]

    def mean(self, cell: str, quantity: str) -> float:
        """Over the seeds."""
        return statistics.fmean(self.of(cell, quantity))

    def spread(self, cell: str, quantity: str) -> float:
        """The standard deviation over the seeds (n - 1); NaN of one seed, or where a value is not finite."""
        values = self.of(cell, quantity)
        usable = len(values) > 1 and all(map(math.isfinite, values))
        return statistics.stdev(values) if usable else math.nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A published result in miniature."""

    name: str  # of its file, and of its folder in configs/benchmarks/
    title: str  # one line
    after: str  # the papers, repositories
    about: str  # a paragraph of the README: the task, the models, what is measured, how settings were chosen
    cells: tuple[Cell, ...]  # in order: a cell may start from an earlier one of its seed
    data: Callable[[Path, int], None]  # (folder, seed): writes the data that the configs read into this folder
    measure: Callable[[FinishedCell], Measured]
    signature: tuple[SignatureLine, ...]
    shown: tuple[str, ...]  # the quantities of the table, which are numbers
    plot: Callable[[Any, "Results"], None] | None = None  # draws into a matplotlib Figure; None: dots of ``shown``
    quick: bool = False  # the short twin, with a weaker signature, that the tests run
