"""The signature of a benchmark: named inequalities over what was measured with all seeds, each held or missed."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol


class Verdict(NamedTuple):
    """What became of one line of a signature."""

    line: str
    held: bool
    numbers: str  # what it was decided by


class SignatureLine(Protocol):
    """One line of a signature: a function of record.Results. A number that is NaN never holds."""

    def __call__(self, results: Any) -> Verdict: ...


def verdicts(lines: Sequence[SignatureLine], results: Any) -> list[Verdict]:
    """Each line of a signature, held or missed by what was measured."""
    return [line(results) for line in lines]


def listed(values: Sequence[float]) -> str:
    """ "0.71, 0.74, 0.69": a value a seed."""
    return ", ".join(f"{value:.3g}" for value in values)


def rises_of(results: Any, cell: str, start: str, quantity: str) -> list[float]:
    """How much higher ``cell`` is than ``start``, each seed."""
    pairs = zip(results.of(cell, quantity), results.of(start, quantity), strict=True)
    return [after - before for after, before in pairs]


class Above(NamedTuple):
    """``quantity`` of ``cell`` is more than ``bound`` with every seed."""

    cell: str
    quantity: str
    bound: float

    def __call__(self, results: Any) -> Verdict:
        values = results.of(self.cell, self.quantity)
        line = f"{self.cell}: {self.quantity} above {self.bound:g} with every seed"
        return Verdict(line, all(value > self.bound for value in values), listed(values))


class Below(NamedTuple):
    """``quantity`` of ``cell`` is less than ``bound`` with every seed."""

    cell: str
    quantity: str
    bound: float

    def __call__(self, results: Any) -> Verdict:
        values = results.of(self.cell, self.quantity)
        line = f"{self.cell}: {self.quantity} below {self.bound:g} with every seed"
        return Verdict(line, all(value < self.bound for value in values), listed(values))


class Between(NamedTuple):
    """``quantity`` of ``cell`` is from ``low`` to ``high`` with every seed."""

    cell: str
    quantity: str
    low: float
    high: float

    def __call__(self, results: Any) -> Verdict:
        values = results.of(self.cell, self.quantity)
        line = f"{self.cell}: {self.quantity} from {self.low:g} to {self.high:g} with every seed"
        return Verdict(line, all(self.low <= value <= self.high for value in values), listed(values))


class HigherThan(NamedTuple):
    """The mean over the seeds of ``quantity`` is higher in ``cell`` than in ``other`` by more than ``sigmas`` standard
    deviations of a seed: the root of the sum of both cells' variances (n - 1). Of one seed there is none: missed."""

    cell: str
    other: str
    quantity: str
    sigmas: float = 3.0

    def __call__(self, results: Any) -> Verdict:
        gain = results.mean(self.cell, self.quantity) - results.mean(self.other, self.quantity)
        sigma = math.hypot(*(results.spread(cell, self.quantity) for cell in (self.cell, self.other)))
        line = f"{self.cell} more than {self.sigmas:g} sigma above {self.other} in {self.quantity}"
        ratio = gain / sigma if sigma else math.copysign(math.inf, gain) if gain else 0.0
        return Verdict(line, ratio > self.sigmas, f"{gain:+.3g}, sigma {sigma:.3g}: {ratio:.1f} sigma")


class Rise(NamedTuple):
    """With every seed ``quantity`` of ``cell`` is higher than that of ``start`` by more than ``by``."""

    cell: str
    start: str
    quantity: str
    by: float = 0.0

    def __call__(self, results: Any) -> Verdict:
        rises = rises_of(results, self.cell, self.start, self.quantity)
        line = f"{self.cell} rises above {self.start} in {self.quantity} by more than {self.by:g} with every seed"
        return Verdict(line, all(rise > self.by for rise in rises), listed(rises))


class Fall(NamedTuple):
    """With every seed ``quantity`` of ``cell`` is lower than that of ``start`` by more than ``by``."""

    cell: str
    start: str
    quantity: str
    by: float = 0.0

    def __call__(self, results: Any) -> Verdict:
        rises = rises_of(results, self.cell, self.start, self.quantity)
        line = f"{self.cell} falls below {self.start} in {self.quantity} by more than {self.by:g} with every seed"
        return Verdict(line, all(rise < -self.by for rise in rises), listed(rises))


class NoRise(NamedTuple):
    """A control: with no seed is ``quantity`` of ``cell`` higher than that of ``start`` by more than ``within``."""

    cell: str
    start: str
    quantity: str
    within: float = 0.0

    def __call__(self, results: Any) -> Verdict:
        rises = rises_of(results, self.cell, self.start, self.quantity)
        allowed = f" by more than {self.within:g}" if self.within else ""
        line = f"control {self.cell} does not rise above {self.start} in {self.quantity}{allowed}, with any seed"
        return Verdict(line, all(rise <= self.within for rise in rises), listed(rises))


class Holds(NamedTuple):
    """Any other statement: ``test`` of the results gives (whether it holds, the numbers that say so)."""

    line: str
    test: Callable[[Any], tuple[bool, str]]

    def __call__(self, results: Any) -> Verdict:
        held, numbers = self.test(results)
        return Verdict(self.line, bool(held), numbers)
