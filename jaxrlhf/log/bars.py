"""Published numbers that a run is held against: a bar is a metric, a bound, and whose number it is."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxrlhf.errors import nearest, show
from jaxrlhf.log.metric_names import HELD_OUT, METRICS, find_metric


@dataclasses.dataclass(frozen=True, kw_only=True)
class BarConfig:
    """One published number."""

    metric: str  # of metrics.jsonl: eval/score/mean
    at_least: float | None = None  # the bar holds where the metric is no lower
    at_most: float | None = None  # and no higher
    step: int | None = None  # the evaluation that counts; null: the last one
    best: bool = False  # in place of step: the best evaluation of the run counts
    source: str  # whose number it is, and where it was published


class BarResult(NamedTuple):
    """What a run reached. ``value`` and ``step``: None where it has no such row yet."""

    name: str
    bar: BarConfig
    value: float | None
    step: int | None

    @property
    def held(self) -> bool:
        low, high = bounds(self.bar)
        return self.value is not None and low <= self.value <= high

    def __str__(self) -> str:
        where = f"bar {self.name}: {self.bar.metric}"
        if self.value is None:
            when = "" if self.bar.step is None else f" at step {self.bar.step}"
            return f"{where}: not measured{when}; expected {expected(self.bar)}: missed ({self.bar.source})"
        reached = f"{self.value:.4g} at step {self.step}"
        verdict = "holds" if self.held else "missed"
        return f"{where}: {reached}; expected {expected(self.bar)}: {verdict} ({self.bar.source})"


def bounds(bar: BarConfig) -> tuple[float, float]:
    """The interval in which the metric lies where the bar holds."""
    low = float("-inf") if bar.at_least is None else bar.at_least
    return low, float("inf") if bar.at_most is None else bar.at_most


def expected(bar: BarConfig) -> str:
    """ "at least 0.8, at most 0.82"."""
    limits = {"at least": bar.at_least, "at most": bar.at_most}
    return ", ".join(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)


def results(bars: Mapping[str, BarConfig], rows: Iterable[Mapping[str, Any]]) -> list[BarResult]:
    """What ``rows``, those of metrics.jsonl, say of each bar. Of a step that was written twice the later row counts."""
    rows = list(rows)
    return [result(name, bar, rows) for name, bar in bars.items()]


def result(name: str, bar: BarConfig, rows: list[Mapping[str, Any]]) -> BarResult:
    found = {row["step"]: row[bar.metric] for row in rows if isinstance(row.get(bar.metric), (int, float))}
    if bar.best:  # the highest where the bar bounds from below
        step = (max if bar.at_least is not None else min)(found, key=found.__getitem__, default=None)
    elif bar.step is not None:
        step = bar.step if bar.step in found else None
    else:
        step = max(found, default=None)
    return BarResult(name, bar, None if step is None else float(found[step]), step)


def bar_problems(bars: Mapping[str, BarConfig]) -> Iterator[str]:
    """What is wrong with the bars of a config, a line each."""
    for name, bar in bars.items():
        where, (low, high) = f"bars.{name}", bounds(bar)
        if bar.at_least is None and bar.at_most is None:
            yield f"{where}: neither at_least nor at_most is given; expected one of them"
        elif low > high:
            yield f"{where}.at_least: {show(low)}: above at_most {show(high)}; nearest: {show(high)}"
        if bar.best and bar.step is not None:
            yield f"{where}.best: true: step {bar.step} is given too; expected one of them"
        if find_metric(bar.metric) is None:
            names = [f"{prefix}{row.name}" for prefix in ("", HELD_OUT) for row in METRICS]
            yield f"{where}.metric: {bar.metric}: no metric; {nearest(bar.metric, names, 'see configs/README.md')}"
