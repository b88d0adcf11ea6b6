"""Draws configs/NAME/curves.svg from configs/NAME/curves.csv, for all folders that have one, in one style.

    python configs/figures.py                                     # draws all of them anew
    python configs/figures.py quickstart runs/seed0 runs/seed1    # writes the table of these runs first, and draws that

A table has a row for each iteration of a run (split: train) and each of its evaluations (split: held_out). Needs this
package and matplotlib: pip install -e '.[figures]'.
"""

import csv
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jaxrlhf.benchmarks import figure

CONFIGS = Path(__file__).parent
KEYS = ("algorithm", "seed", "split", "step")
LAST = 5  # iterations that the line of a single seed is the mean of


class Panel(NamedTuple):
    """One of the axes: a column of the table."""

    title: str
    metrics: tuple[str, ...]  # of metrics.jsonl; a run logs one of them


PANELS = {
    "pairs": Panel("pairs ranked correctly", ("reward/accuracy", "implicit_reward/accuracy")),
    "reward": Panel("reward", ("score/mean",)),
    "kl": Panel("KL, nats a response", ("kl/reference",)),
    "length": Panel("length, tokens", ("response/length_mean",)),
    "judge": Panel("positive, by the outside judge", ("judge/mean",)),
}


class Row(NamedTuple):
    """Numbers of one iteration, or of one evaluation."""

    algorithm: str
    seed: int
    split: str  # "train" or "held_out"
    step: int
    values: dict[str, float]  # by the keys of PANELS


DOTS: dict[str, Any] = {
    "marker": "o",
    "markersize": 4.5,
    "markeredgecolor": "white",
    "linestyle": ":",
    "linewidth": 0.8,
}
Point = tuple[int, float]  # (step, value)


# ---- the table ------------------------------------------------------------------------------------------------------


def read_run(run_dir: Path) -> list[Row]:
    """What a run directory says of the panels."""
    cfg = yaml.safe_load((run_dir / "config.yaml").read_text())
    name, seed, rows = cfg["algorithm"]["name"], cfg["seed"], []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        logged = json.loads(line)
        for split, prefix in (("train", ""), ("held_out", "eval/")):
            keys = [(key, f"{prefix}{metric}") for key, panel in PANELS.items() for metric in panel.metrics]
            if values := {key: logged[metric] for key, metric in keys if logged.get(metric) is not None}:
                rows.append(Row(name, seed, split, logged["step"], values))
    return rows


def read_table(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [
            Row(
                row["algorithm"],
                int(row["seed"]),
                row["split"],
                int(row["step"]),
                {key: float(row[key]) for key in PANELS if row.get(key)},
            )
            for row in csv.DictReader(file)
        ]


def write_table(path: Path, rows: Iterable[Row]) -> None:
    """The rows, with a column for each panel that one of them has."""
    rows = list(rows)
    columns = [key for key in PANELS if any(key in row.values for row in rows)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*KEYS, *columns])
        for row in rows:
            writer.writerow([*row[:4], *(f"{row.values[key]:.6g}" if key in row.values else "" for key in columns)])


# ---- the figure -----------------------------------------------------------------------------------------------------


def points(rows: Iterable[Row], key: str) -> list[Point]:
    """In the order of their steps."""
    return sorted((row.step, row.values[key]) for row in rows if key in row.values)


def mean_of_last(line: Sequence[Point], count: int = LAST) -> list[Point]:
    """Each value is the mean of it and of those before it, ``count`` in all or as many as there are."""
    values = [value for _, value in line]
    parts = [values[max(0, end - count) : end] for end in range(1, len(values) + 1)]
    return [(step, sum(part) / len(part)) for (step, _), part in zip(line, parts, strict=True)]


def over_seeds(lines: Sequence[Sequence[Point]]) -> list[tuple[int, float, float, float]]:
    """(step, mean, lowest, highest) of the steps that all lines have."""
    found = [dict(line) for line in lines]
    steps = sorted(set.intersection(*map(set, found)))
    at = lambda step: [line[step] for line in found]
    return [(step, sum(at(step)) / len(found), min(at(step)), max(at(step))) for step in steps]


def digest(path: Path) -> str:
    """What a figure says that it was drawn from."""
    return f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


def draw(rows: Sequence[Row], to: Path, source: str) -> None:
    """A panel for each column, a color for each algorithm; ``source`` goes into the file's metadata."""
    keys = [key for key in PANELS if any(key in row.values for row in rows)]
    names = list(dict.fromkeys(row.algorithm for row in rows))

    def plot(on: Any) -> None:
        grid = on.subplots(1, len(keys), squeeze=False)
        for axes, key in zip(grid[0], keys, strict=True):
            for number, name in enumerate(names):
                draw_algorithm(axes, [row for row in rows if row.algorithm == name], key, f"C{number}")
            axes.set(title=PANELS[key].title, xlabel="iteration")
            figure.tidy(axes)
        on.legend(handles=legend(rows, names), loc="outside lower center", ncols=8, frameon=False)

    width, height = figure.PANEL
    figure.draw(plot, [to], source, (width * len(keys), height))


def draw_algorithm(axes: Any, rows: Sequence[Row], key: str, color: str) -> None:
    """One algorithm in one panel: the mean of its seeds with a band from the lowest to the highest, or a single seed
    smoothed; and a dot for each evaluation of a seed, with a dotted line from one to the next."""
    train = [row for row in rows if row.split == "train"]
    lines = [points([row for row in train if row.seed == seed], key) for seed in sorted({row.seed for row in train})]
    lines = [line for line in lines if line]
    if len(lines) == 1:
        axes.plot(*zip(*mean_of_last(lines[0]), strict=True), color=color, linewidth=1.4)
    elif lines:
        steps, mean, lowest, highest = zip(*over_seeds(lines), strict=True)
        axes.fill_between(steps, lowest, highest, color=color, alpha=0.2, linewidth=0)
        axes.plot(steps, mean, color=color, linewidth=1.4)
    held_out = [row for row in rows if row.split == "held_out" and key in row.values]
    for seed in sorted({row.seed for row in held_out}):
        dots = points([row for row in held_out if row.seed == seed], key)
        axes.plot(*zip(*dots, strict=True), color=color, clip_on=False, **DOTS)


def legend(rows: Sequence[Row], names: Sequence[str]) -> list[Any]:
    """What colors, lines, bands and dots are."""
    from matplotlib.lines import Line2D  # pyright: ignore[reportMissingImports]
    from matplotlib.patches import Patch  # pyright: ignore[reportMissingImports]

    seeds = len({row.seed for row in rows if row.split == "train"})
    gray, several = "0.4" if len(names) > 1 else "C0", seeds > 1
    line = f"training batches, mean of {seeds} seeds" if several else f"training batches, mean of the last {LAST}"
    dot = "held-out data, never trained on" + (", a dotted line a seed" if several else "")
    colors = [Patch(color=f"C{number}", label=name) for number, name in enumerate(names) if len(names) > 1]
    band = [Patch(color=gray, alpha=0.2, linewidth=0, label="lowest to highest seed")] if several else []
    dots = Line2D([], [], color=gray, label=dot, **DOTS)
    return [*colors, Line2D([], [], color=gray, linewidth=1.4, label=line), *band, dots]


def main(arguments: Sequence[str]) -> None:
    """See the top of this file."""
    name, run_dirs = arguments[0] if arguments else "*", arguments[1:]
    if run_dirs:
        write_table(CONFIGS / name / "curves.csv", [row for run in run_dirs for row in read_run(Path(run))])
    tables = sorted(CONFIGS.glob(f"{name}/curves.csv"))
    if not tables:
        sys.exit(f"{name}: no configs/{name}/curves.csv; expected another folder, or runs behind it")
    for table in tables:
        draw(read_table(table), table.with_suffix(".svg"), digest(table))
        print(table.with_suffix(".svg").relative_to(CONFIGS.parent))


if __name__ == "__main__":
    main(sys.argv[1:])
