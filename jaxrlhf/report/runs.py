"""What a run directory says of its run, finished or not, on a disk or in a bucket."""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from jaxrlhf.config.yaml_text import flat, read_yaml
from jaxrlhf.errors import show
from jaxrlhf.evaluate.kept import FOLDER
from jaxrlhf.log.rows import read_rows
from jaxrlhf.log.run_dir import is_local, is_locked


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """One run directory as it is now."""

    name: str  # short, and unlike that of the other runs of the page
    path: str
    state: str  # "running", "finished", "stopped", "unfinished" (running or stopped: a bucket can't tell)
    step: int  # of the newest row
    iterations: int | None  # None: epochs that are not counted yet
    config: dict[str, Any]  # as it was resolved: "algorithm.kl_coef": 0.1
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    histograms: list[dict[str, Any]]
    phases: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]  # what `jaxrlhf evaluate` kept

    @functools.cached_property
    def columns(self) -> dict[str, list[tuple[int, list[float]]]]:
        """Metric -> (step, [number]) of the rows that hold it."""
        found: dict[str, list[tuple[int, list[float]]]] = {}
        for row in self.metrics:
            for name, value in row.items():
                if isinstance(value, (int, float)):
                    found.setdefault(name, []).append((row["step"], [value]))
        return found

    @property
    def algorithm(self) -> str:
        return str(self.config.get("algorithm.name"))


def read_runs(paths: Sequence[str]) -> list[RunRecord]:
    """The runs, in their order. A run that is named twice is read once."""
    paths = list(dict.fromkeys(path.rstrip("/") for path in paths))
    return [read_run(path, name) for path, name in zip(paths, short_names(paths), strict=True)]


def read_run(path: str, name: str) -> RunRecord:
    """Raises ValueError, in one line, where config.yaml holds no config."""
    file = epath.Path(path) / "config.yaml"
    config = read_yaml(file.read_bytes(), str(file), mapping=False)
    if not isinstance(config, dict):
        raise ValueError(f"{file}: {show(config)}: expected the config that a run writes")
    metrics = read_rows(path, "metrics")
    step, iterations = max((row["step"] for row in metrics), default=0), config.get("iterations")
    if is_local(path) and is_locked(path):
        state = "running"
    elif iterations is not None and step >= iterations:
        state = "finished"
    else:
        state = "stopped" if is_local(path) else "unfinished"
    return RunRecord(
        name=name,
        path=path,
        state=state,
        step=step,
        iterations=iterations,
        config=flat(config),
        metrics=metrics,
        samples=read_rows(path, "samples"),
        histograms=read_rows(path, "histograms"),
        phases=read_rows(path, "phases"),
        evaluations=read_evaluations(path),
    )


def read_evaluations(run_dir: str) -> list[dict[str, Any]]:
    """The evaluations of a run that are whole, in the order in which they were written."""
    found = []
    for path in (epath.Path(run_dir) / FOLDER).glob("*.json"):
        try:
            kept = json.loads(path.read_text(), parse_constant=lambda _: None)
        except (OSError, ValueError):  # it is being written
            continue
        if isinstance(kept, dict) and isinstance(kept.get("step"), int):
            found.append(kept)
    return sorted(found, key=lambda kept: str(kept.get("written")))


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of each path, as many as make all of them different."""
    parts = [os.path.abspath(path).split("/") if is_local(path) else path.split("/") for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)
