"""What `jaxrlhf evaluate` has kept of runs: a chart of win rates, and tables."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxrlhf.report import charts
from jaxrlhf.report.runs import RunRecord

SHOWN = 24  # win rates in the chart, the newest
ROWS = 200  # of a table, the newest
JUDGES = {"reward": "reward", "judge": "outside judge", "gold": "second reward"}
WIN_RATES = (
    "run",
    "step",
    "judge",
    "against",
    "win rate",
    "95%",
    "at equal lengths",
    "prompts",
    "first position",
    "orders agree",
    "no verdict",
    "options",
    "written",
)
PAIRS = ("run", "step", "pairs", "accuracy", "calibration error", "Brier score", "options", "written")
BENCH = ("run", "step", "file", "version", "part", "accuracy", "written")


def part(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """The part of the page, without charts and tables where no run was evaluated."""
    several = len(runs) > 1
    rows = [row for run in runs for row in win_rates(run)]
    shown = latest(rows)
    series = lambda row: row["run"] if several else charts.SPLITS[1]
    points = [{**row, "series": series(row), "who": who(row, shown, several)} for row in shown]
    chart = {"kind": "win_rates", "title": "win rates", "unit": "", "rows": points}
    chart["meaning"] = "share of prompts whose response is better than the other's, with its 95% interval; dashed: 50%"
    names = [name for name in WIN_RATES if several or name != "run"]
    chart["height"] = charts.LINE * len({row["who"] for row in points})
    tables = [table("win rates", names, [cells(row) for row in rows])]
    pairs = [row for run in runs for row in pair_rows(run)]
    tables.append(table("reward model on held-out pairs", [name for name in PAIRS if several or name != "run"], pairs))
    bench = [row for run in runs for row in bench_rows(run)]
    tables.append(table("RewardBench", [name for name in BENCH if several or name != "run"], bench))
    return {
        "name": "Evaluations",
        "open": True,
        "charts": [*([chart] if points else []), *reliability(runs)],
        "tables": [each for each in tables if each["rows"]],
    }


def win_rates(run: RunRecord) -> Iterator[dict[str, Any]]:
    """A row for each who compared, of each evaluation."""
    for kept in run.evaluations:
        for name, row in kept.get("win_rates", {}).items():
            numbers = {key: value for key, value in row.items() if key in NUMBERS and is_number(value)}
            judge = JUDGES.get(name) or f"{name}: {row.get('model', '')}"
            yield {
                "run": run.name,
                "step": kept["step"],
                "judge": judge,
                "against": str(row.get("against", "reference")),
                "options": options(kept),
                "written": str(kept.get("written", "")).replace("T", " "),
                **numbers,
            }


NUMBERS = ("rate", "low", "high", "length_controlled", "prompts", "first_position", "agreement", "unscorable")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def latest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the newest evaluation of each step, by each judge, against each opponent and under each options."""
    measured = [row for row in rows if {"rate", "low", "high"} <= row.keys()]
    newest = {tuple(row[key] for key in ("run", "step", "judge", "against", "options")): row for row in measured}
    return [*newest.values()][-SHOWN:]


def who(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], several: bool) -> str:
    """The label of a row of the chart: the less, the more it is like no other."""
    names = [name for name in ("run", "step", "judge") if several or name != "run"]
    for name in ("against", "options"):
        alike = [other for other in rows if all(other[key] == row[key] for key in names)]
        names += [name] if len({other[name] for other in alike}) > 1 else []
    said = {"step": f"step {row['step']}", "against": f"against {row['against']}"}
    return ", ".join(said.get(name) or str(row[name]) for name in names if row[name] != "")


def options(kept: Mapping[str, Any]) -> str:
    """How an evaluation differs from one without options; who judges is told apart."""
    given = {name: value for name, value in kept.get("options", {}).items() if name in ("beta", "gold", "sampling")}
    return " ".join(" ".join(value) if isinstance(value, list) else f"{name}={value}" for name, value in given.items())


def cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table, as text."""
    share = lambda name: f"{row[name]:.1%}" if name in row else None
    return {
        **{name: row[name] for name in ("run", "step", "judge", "against", "options", "written")},
        "win rate": share("rate"),
        "95%": f"{share('low')} to {share('high')}" if "low" in row and "high" in row else None,
        "at equal lengths": share("length_controlled"),
        "prompts": row.get("prompts"),
        "first position": share("first_position"),
        "orders agree": share("agreement"),
        "no verdict": share("unscorable"),
    }


def pair_rows(run: RunRecord) -> Iterator[dict[str, Any]]:
    """What a reward model got right, of each evaluation."""
    for kept in run.evaluations:
        if found := kept.get("reward_model"):
            number = lambda name, found=found: found[name] if is_number(found.get(name)) else None
            accuracy, error, brier = number("accuracy"), number("calibration_error"), number("brier")
            yield {
                "run": run.name,
                "step": kept["step"],
                "pairs": number("pairs"),
                "accuracy": None if accuracy is None else f"{accuracy:.1%}",
                "calibration error": error,
                "Brier score": brier,
                "options": options(kept),
                "written": str(kept.get("written", "")).replace("T", " "),
            }


def reliability(runs: Sequence[RunRecord]) -> Iterator[dict[str, Any]]:
    """A chart of the newest evaluation of each run that has a reward model: the bins of its pairs."""
    rows = []
    for run in runs:
        newest = [kept for kept in run.evaluations if kept.get("reward_model", {}).get("reliability")][-1:]
        for kept in newest:
            same = {"run": run.name, "split": charts.SPLITS[1], "step": kept["step"]}
            same["series"] = run.name if len(runs) > 1 else charts.SPLITS[1]
            bins = kept["reward_model"]["reliability"]
            rows += [{**same, "confidence": predicted, "accuracy": right} for predicted, right, _ in bins]
    if rows:
        meaning = "held-out pairs in ten bins of the predicted probability of the preference; dashed: calibrated"
        yield {"kind": "calibration", "title": "reliability", "unit": "", "meaning": meaning, "rows": rows}


def bench_rows(run: RunRecord) -> Iterator[dict[str, Any]]:
    """What a reward model got right of files of RewardBench: by section, where the file has them, else by subset."""
    for kept in run.evaluations:
        if found := kept.get("rewardbench"):
            parts = found.get("sections") or {name: row["accuracy"] for name, row in found["subsets"].items()}
            parts |= {"score": found["score"]} if is_number(found.get("score")) else {}
            for name, accuracy in reversed(parts.items()):
                yield {
                    "run": run.name,
                    "step": kept["step"],
                    "file": found["file"],
                    "version": found["version"],
                    "part": name,
                    "accuracy": f"{accuracy:.1%}",
                    "written": str(kept.get("written", "")).replace("T", " "),
                }


def table(title: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The newest ROWS rows, newest first, without the columns in which nothing is."""
    kept = [*reversed(rows)][:ROWS]
    shown = [name for name in columns if any(row[name] not in ("", None) for row in kept)]
    return {"title": title, "columns": shown, "rows": [[row[name] for name in shown] for row in kept]}
