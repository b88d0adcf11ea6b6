"""What a reproduced benchmark leaves: a table and verdicts on the terminal, results.json, a figure and a README.md."""

import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxrlhf.benchmarks import figure
from jaxrlhf.benchmarks.machine import describe
from jaxrlhf.benchmarks.record import Benchmark, Results
from jaxrlhf.benchmarks.reproduce import Done, configs_folder
from jaxrlhf.benchmarks.signature import Verdict, listed

LARGEST_FIGURE, LARGEST_RESULTS = 100_000, 30_000  # bytes of what is published


def print_results(benchmark: Benchmark, results: Results, found: Sequence[Verdict]) -> None:
    """The table of all seeds, and the signature."""
    console = Console(soft_wrap=True)
    table = Table("cell", *(quantity.replace("_", " ") for quantity in benchmark.shown), title=heading(results))
    for row in rows(benchmark, results):
        table.add_row(row[0], *row[2:])
    console.print(table)
    for verdict in found:
        mark = "[green]held[/green]  " if verdict.held else "[red]missed[/red]"
        console.print(mark, end=" ")
        console.print(f"{verdict.line}: {verdict.numbers}", markup=False, highlight=False)


def heading(results: Results) -> str:
    several = len(results.seeds) > 1
    return f"seed{'s' if several else ''} {', '.join(map(str, results.seeds))}" + ("; their mean" if several else "")


def rows(benchmark: Benchmark, results: Results) -> list[list[str]]:
    """Name, what it is, and each shown quantity with every seed: "0.71, 0.74, 0.69; 0.71"."""
    found = []
    for cell in benchmark.cells:
        columns = []
        for quantity in benchmark.shown:
            known = quantity in results.measured[cell.name][0]
            values = results.of(cell.name, quantity) if known else []
            mean = f"; {statistics.fmean(values):.3g}" if len(values) > 1 else ""
            columns.append(listed(values) + mean)
        found.append([cell.name, cell.about, *columns])
    return found


# ---- files ----------------------------------------------------------------------------------------------------------


def write_results(benchmark: Benchmark, done: Done, found: Sequence[Verdict], out: Path, command: str) -> None:
    """results.json, NAME.svg, NAME.png and README.md in ``out``, beside copies of the configs that the page names."""
    here = describe() | {"minutes": round(sum(map(sum, done.seconds.values())) / 60, 1), "command": command}
    tree = {
        "benchmark": benchmark.name,
        **here,
        "seeds": done.results.seeds,
        "measured": rounded(done.results.measured),
        "signature": [verdict._asdict() for verdict in found],
        "seconds": rounded(done.seconds),
        "compiled": done.compiled,
    }
    (out / "results.json").write_text(json.dumps(tree, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    plot = benchmark.plot or (lambda on, results: figure.plot_all_dots(on, results, benchmark.shown))
    size = (figure.PANEL[0] * max(len(benchmark.shown), 2), figure.PANEL[1])
    figures = [out / f"{benchmark.name}.svg", out / f"{benchmark.name}.png"]
    figure.draw(lambda on: plot(on, done.results), figures, size=size)
    (out / "README.md").write_text(page(benchmark, done, found, here))
    for path in configs_folder(benchmark).glob("*.yaml"):
        shutil.copyfile(path, out / path.name)


def rounded(value: Any) -> Any:
    """``value`` with four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def page(benchmark: Benchmark, done: Done, found: Sequence[Verdict], here: dict[str, Any]) -> str:
    """README.md."""
    results, missed = done.results, [verdict for verdict in found if not verdict.held]
    files = sorted({cell.config or cell.name for cell in benchmark.cells})
    shown = [quantity.replace("_", " ") for quantity in benchmark.shown]
    compiled = {cell: counts for cell, counts in done.compiled.items() if sum(counts[1:])}
    lines = [
        f"# {benchmark.title}",
        "",
        f"After {benchmark.after}.",
        "",
        benchmark.about,
        "",
        "```bash",
        here["command"],
        "```",
        "",
        f"This page is generated. {here['date']}, {here['cpu']}, {here['cores']} cores, {here['platform']}, jax "
        f"{here['jax']}, commit {here['commit'] or 'unknown'}, {here['minutes']:g} minutes for seeds "
        f"{', '.join(map(str, results.seeds))}. Configs: {', '.join(f'[{name}.yaml]({name}.yaml)' for name in files)}.",
        "",
        *table(["cell", "what it is", *(f"{name}, each seed; mean" for name in shown)], rows(benchmark, results)),
        "",
        f"![{', '.join(shown)} of each cell]({benchmark.name}.svg)",
        "",
        "## Signature",
        "",
        *table(["line", "", "numbers"], [[one.line, "held" if one.held else "missed", one.numbers] for one in found]),
        "",
        "## Not reproduced",
        "",
        *([f"- {one.line}: {one.numbers}" for one in missed] or ["Every line of the signature held."]),
        *(["", f"Programs compiled again by later seeds: {compiled}."] if compiled else []),
    ]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in markdown."""
    return [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in (head, ["---"] * len(head), *body)]


def publish(benchmark: Benchmark, out: Path) -> list[Path]:
    """Copies README.md, results.json and the SVG beside the benchmark's configs: where they are.

    Raises ValueError where one of them is too large for that."""
    names, to = {"README.md": None, "results.json": LARGEST_RESULTS, f"{benchmark.name}.svg": LARGEST_FIGURE}, []
    for name, most in names.items():
        size = (out / name).stat().st_size
        if most is not None and size > most:
            raise ValueError(f"--publish: {out / name}: {size:,} bytes; expected at most {most:,}")
    for name in names:
        to.append(configs_folder(benchmark) / name)
        shutil.copyfile(out / name, to[-1])
    return to
