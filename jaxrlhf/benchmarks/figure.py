"""Figures in one style: how they look, how they are saved, and the plain one of a benchmark."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.benchmarks.record import Results

STYLE = {"svg.fonttype": "none", "svg.hashsalt": "jaxrlhf", "font.size": 8, "axes.titlesize": 9}
PANEL = (2.4, 2.5)  # inches


def need_matplotlib() -> None:
    """Raises ImportError, in one line, where figures can't be drawn."""
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError("benchmark: matplotlib is not installed; expected: pip install 'jaxrlhf[figures]'") from None


def tidy(axes: Any) -> None:
    """A thin grid, and no frame above and at the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw(plot: Callable[[Any], None], to: Sequence[Path], source: str = "", size: tuple[float, float] = PANEL) -> None:
    """What ``plot`` draws into a Figure, saved as each of the files ``to``; ``source`` goes into their metadata."""
    from matplotlib import rc_context  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    with rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=size, layout="constrained")
        plot(figure)
        for path in to:
            svg = path.suffix == ".svg"
            figure.savefig(
                path, metadata={"Date": None} | ({"Source": source} if source else {}) if svg else None, dpi=150
            )
            if svg:
                path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))


def color_of(results: Results, cell: str) -> str:
    """The same in every panel."""
    return f"C{[*results.measured].index(cell)}"


def plot_all_dots(figure: Any, results: Results, quantities: Sequence[str]) -> None:
    """A panel for each quantity."""
    grid = figure.subplots(1, len(quantities), squeeze=False)
    for axes, quantity in zip(grid[0], quantities, strict=True):
        plot_dots(axes, results, quantity)


def plot_dots(axes: Any, results: Results, quantity: str) -> None:
    """A dot for each seed of each cell, and a line at their mean."""
    cells = [cell for cell, found in results.measured.items() if quantity in found[0]]
    for place, cell in enumerate(cells):
        values, color = results.of(cell, quantity), color_of(results, cell)
        axes.plot([place] * len(values), values, "o", color=color, markersize=4.5, markeredgecolor="white")
        axes.hlines(results.mean(cell, quantity), place - 0.25, place + 0.25, color=color, linewidth=1.4)
    axes.set_xticks(range(len(cells)), cells, rotation=30, ha="right")
    axes.set(title=quantity.replace("_", " "))
    axes.margins(y=0.1)
    tidy(axes)


def plot_curves(axes: Any, results: Results, x: str | None, y: str, cells: Sequence[str] = ()) -> None:
    """The curves ``y`` over the curves ``x`` (None: over their number), a line for each seed: of all cells that have
    them, or of those among ``cells``."""
    for cell, found in results.measured.items():
        if y not in found[0] or (cells and cell not in cells):
            continue
        lines = results.of(cell, y)
        for at, line in enumerate(lines):
            places = results.of(cell, x)[at] if x else range(len(line))
            label = {"label": cell} if at == 0 else {}
            axes.plot(places, line, color=color_of(results, cell), linewidth=1.0, alpha=0.8, **label)
    tidy(axes)


def legend_beside(axes: Any) -> None:
    """At the right of the axes, where no line is below it."""
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=6, frameon=False)
