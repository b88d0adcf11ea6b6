"""What the page says of its runs: rows of every chart, samples, before and after, configs. All of it is JSON."""

import dataclasses
import difflib
import math
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

from jaxrlhf.errors import counted
from jaxrlhf.log.alarms import Alarms, AlarmsConfig
from jaxrlhf.log.metric_names import HELD_OUT, find_metric
from jaxrlhf.report import charts, evaluations, layout
from jaxrlhf.report.runs import RunRecord

POINTS = 400  # of a curve
SAMPLES = 2000  # of a run, the newest
PAIRS = 200  # prompts whose responses are compared
WORDS = re.compile(r"\s+|\w+|[^\w\s]")
PHASES = {"time/iteration": "step", "time/rewards": "reward functions", "time/environment": "environment"}
PHASES[HELD_OUT + "time/evaluation"] = "evaluation"

Row = dict[str, Any]


def content_of(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """The page's JSON."""
    series = [run.name for run in runs] if len(runs) > 1 else [*charts.SPLITS]
    parts = [part(name, metrics, runs) for name, metrics in layout.arrange(written(runs)).items()]
    compared = {"name": "Overview", "open": True, "charts": [*overview(runs)]}
    return {
        "title": ", ".join(run.name for run in runs),
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "series": [{"name": name, "colour": charts.COLOURS[n % len(charts.COLOURS)]} for n, name in enumerate(series)],
        "runs": [
            {name: getattr(run, name) for name in ("name", "path", "algorithm", "state", "step", "iterations")}
            for run in runs
        ],
        "specifications": charts.specifications(tuple(series)),
        "parts": [each for each in (compared, evaluations.part(runs), *parts) if each["charts"] or each.get("tables")],
        "alarms": [alarm for run in runs for alarm in alarms(run)],
        "glance": glance(runs),
        "samples": samples(runs),
        "pairs": [pair for run in runs for pair in before_and_after(run)],
        "config": config_rows(runs),
    }


def written(runs: Sequence[RunRecord]) -> set[str]:
    """The metrics that some run has."""
    return {name for run in runs for name in run.columns} - {"step", "time"}


# ---- charts ---------------------------------------------------------------------------------------------------------


def values(run: RunRecord, *names: str) -> list[tuple[int, list[float]]]:
    """(step, a number for each name) of the rows that hold finite numbers of all of them."""
    if len(names) == 1:
        return run.columns.get(names[0], [])
    whole = [row for row in run.metrics if all(isinstance(row.get(name), (int, float)) for name in names)]
    return [(row["step"], [row[name] for name in names]) for row in whole]


def thinned(rows: list[tuple[int, list[float]]]) -> list[tuple[int, list[float]]]:
    """At most POINTS of the rows, with the first and the last: of every stretch the lowest and the highest, so that no
    spike is lost."""
    if len(rows) <= POINTS:
        return rows
    size = math.ceil((len(rows) - 2) / (POINTS // 2 - 1))
    kept = [rows[0]]
    for start in range(1, len(rows) - 1, size):
        ends = [pick(rows[start : min(start + size, len(rows) - 1)], key=lambda row: row[1][0]) for pick in (min, max)]
        kept += sorted(ends[: 1 + (ends[0] is not ends[1])])
    return [*kept, rows[-1]]


def split_rows(runs: Sequence[RunRecord], **columns: str) -> list[Row]:
    """A row for each step at which a run has all of the metrics: its columns hold them, in training and held out."""
    found = []
    for run in runs:
        for split, prefix in zip(charts.SPLITS, ("", HELD_OUT)):
            labels = {"run": run.name, "split": split, "series": run.name if len(runs) > 1 else split}
            for step, numbers in thinned(values(run, *(prefix + name for name in columns.values()))):
                found.append({"step": step, **{key: short(n) for key, n in zip(columns, numbers)}, **labels})
    return found


def packed(content: dict[str, Any]) -> dict[str, Any]:
    """The content with the rows of charts by columns, a block for each run and split: a fifth of the size."""
    parts = [
        part | {"charts": [chart | {"rows": blocks(chart["rows"])} for chart in part["charts"]]}
        for part in content["parts"]
    ]
    return content | {"parts": parts}


def blocks(rows: list[Row]) -> list[dict[str, Any]]:
    """[{"same": what all rows of the block have, "columns": the numbers of each}]."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        same = {key: value for key, value in row.items() if isinstance(value, (str, bool))}
        block = found.setdefault((*same.values(), *row), {"same": same, "columns": {}})
        for key in row.keys() - same.keys():
            block["columns"].setdefault(key, []).append(row[key])
    return list(found.values())


def short(number: float) -> float:
    """Six digits: more can't be seen, and take room."""
    return float(f"{number:.6g}")


def part(name: str, metrics: Sequence[str], runs: Sequence[RunRecord]) -> dict[str, Any]:
    """One part of the page: a chart a metric."""
    found = [chart for metric in metrics if (chart := metric_chart(metric, runs))["rows"]]
    return {"name": name, "open": name not in layout.CLOSED, "charts": found}


def metric_chart(metric: str, runs: Sequence[RunRecord]) -> dict[str, Any]:
    row = find_metric(metric)
    unit, meaning = (row.unit, row.meaning) if row else ("-", "")
    kind = "share" if unit in layout.FULL_RANGE else "curve"
    return chart_of(kind, metric, "" if unit == "-" else unit, meaning, split_rows(runs, value=metric))


def chart_of(kind: str, title: str, unit: str, meaning: str, rows: list[Row]) -> dict[str, Any]:
    return {"kind": kind, "title": title, "unit": unit, "meaning": meaning, "rows": rows}


def overview(runs: Sequence[RunRecord]) -> Iterator[dict[str, Any]]:
    """Charts of more than one metric, where there are rows for them."""
    kinds = (
        chart_of(
            "frontier",
            "score against KL",
            "",
            "score/mean over kl/reference; large dots: held out",
            split_rows(runs, kl="kl/reference", score="score/mean"),
        ),
        chart_of(
            "histogram",
            "scores of held-out responses",
            "",
            "filled: the last evaluation; dashed: the first",
            [row for run in runs for row in histogram_rows(run, len(runs) > 1)],
        ),
        chart_of(
            "calibration",
            "calibration of the reward model",
            "",
            "predicted probability of the preference, share right; dashed: calibrated; large dots: held out",
            split_rows(runs, confidence="reward/confidence", accuracy="reward/accuracy"),
        ),
        chart_of("phases", "time by phase", "s", "in all iterations", [row for run in runs for row in phases(run)]),
    )
    return (chart for chart in kinds if chart["rows"])


def histogram_rows(run: RunRecord, several: bool) -> Iterator[Row]:
    """Bins of the first and of the last evaluation."""
    rows = [row for row in run.histograms if row.get("name") == "score"]
    for row in dict.fromkeys((0, len(rows) - 1)) if rows else ():
        edges, counts, last = rows[row]["edges"], rows[row]["counts"], row == len(rows) - 1
        labels = {"run": run.name, "step": rows[row]["step"], "last": last}
        labels["series"] = run.name if several else charts.SPLITS[1]
        for low, high, count in zip(edges, edges[1:], counts):
            yield {**labels, "low": low, "high": high, "responses": count, "density": density(count, low, high, counts)}
        if not last:
            yield {**labels, "low": edges[-1], "high": edges[-1], "responses": 0, "density": 0.0}


def density(count: int, low: float, high: float, counts: Sequence[int]) -> float:
    return short(count / max(sum(counts), 1) / max(high - low, 1e-9))


def phases(run: RunRecord) -> Iterator[Row]:
    """Seconds in all that went into each phase."""
    total = {name: sum(numbers[0] for _, numbers in values(run, metric)) for metric, name in PHASES.items()}
    total["step"] -= total["reward functions"] + total["environment"]
    for row in run.phases:
        total[row["phase"]] = total.get(row["phase"], 0.0) + row["seconds"]
    for name, seconds in total.items():
        if seconds > 0:
            yield {"run": run.name, "phase": name, "seconds": short(seconds)}


# ---- tables ---------------------------------------------------------------------------------------------------------

SHOWN = (
    "score/mean",
    "kl/reference",
    "judge/mean",
    "gold/mean",
    "win_rate/reward",
    "win_rate/judge",
    "reward/accuracy",
)
SHOWN += (
    "implicit_reward/accuracy",
    "cost/violations",
    "teacher/divergence",
    "kl/teacher",
    "loss/policy",
    "loss/q",
    "response/length_mean",
    "return/mean",
)


def alarms(run: RunRecord) -> list[dict[str, Any]]:
    """Those that the run told, by the thresholds of its config; of a run without them, by the defaults."""
    names = [field.name for field in dataclasses.fields(AlarmsConfig)]
    given = {name: run.config[key] for name in names if (key := f"alarms.{name}") in run.config}
    watch = Alarms(AlarmsConfig(**given))
    found = [alarm for row in run.metrics for alarm in watch.see(row["step"], row)]
    shown = [{**alarm._asdict(), "run": run.name, "alarm": alarm.name} for alarm in found]
    return [row | {"metrics": [name.removeprefix(HELD_OUT) for name in row["metrics"]]} for row in shown]


def glance(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The first and the last number of what matters most, held out where it is, of every run."""
    found = []
    for metric in SHOWN:
        cells = []
        for run in runs:
            held = values(run, HELD_OUT + metric)
            online = metric.startswith("loss/") and values(run, "score/mean")  # whose loss says nothing
            rows = held or ([] if online else values(run, metric))
            ends = [short(numbers[0]) for _, numbers in (rows[:1] + rows[-1:])]
            cells.append({"first": ends[0], "last": ends[-1], "held_out": bool(held)} if rows else None)
        row = find_metric(metric)
        if any(cells):
            found.append({"metric": metric, "meaning": row.meaning if row else "", "cells": cells})
    return found


def samples(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Columns and rows of the table, newest first; a note where not all are in it."""
    rows, notes, graders = [], [], set()
    for run in runs:
        kept = run.samples[-SAMPLES:]
        if len(kept) < len(run.samples):
            notes.append(f"{run.name}: the newest {counted(len(kept), 'sample')} of {len(run.samples):,}")
        for row in reversed(kept):
            rows.append({"run": run.name, **{name: row[name] for name in row if name != "time"}})
            graders |= {name for name in row if name.startswith("score/")}
    columns = ["run", "step", "split", "prompt", "response", "score", *sorted(graders)]
    present = [name for name in columns if any(row.get(name) is not None for row in rows)]
    return {"columns": present, "rows": rows, "notes": notes}


def before_and_after(run: RunRecord) -> list[dict[str, Any]]:
    """The prompts that were answered at the first and at the last step that has samples of their kind: both responses,
    in pieces that say what changed."""
    held = [row for row in run.samples if row.get("split") == "eval"]
    steps = sorted({row["step"] for row in held})
    if len(steps) < 2:
        return []
    first = {row["prompt"]: row for row in held if row["step"] == steps[0]}
    last = [row for row in held if row["step"] == steps[-1] and row["prompt"] in first]
    return [pair_of(run.name, first[row["prompt"]], row) for row in last[:PAIRS]]


def pair_of(run: str, before: Row, after: Row) -> dict[str, Any]:
    left, right = (WORDS.findall(row["response"]) for row in (before, after))
    pieces: dict[str, list[tuple[bool, str]]] = {"before": [], "after": []}
    for kind, a, b, c, d in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        for side, words in (("before", left[a:b]), ("after", right[c:d])):
            if words:
                pieces[side].append((kind != "equal", "".join(words)))
    steps = {"step_before": before["step"], "step_after": after["step"]}
    scores = {"score_before": before.get("score"), "score_after": after.get("score")}
    return {"run": run, "prompt": after["prompt"], **pieces, **steps, **scores}


def config_rows(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Every key with its value in each run; whether they differ."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    found = []
    for key in keys:
        cells = [run.config.get(key) for run in runs]
        found.append({"key": key, "values": cells, "differs": any(cell != cells[0] for cell in cells)})
    return found
