"""Perfectible items: what a model solves now and then, and should always solve after training on it."""

import dataclasses
import json
import random
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from jaxrlhf.benchmarks.controls import coin, constant
from jaxrlhf.benchmarks.record import Benchmark, Cell, FinishedCell, Measured, Results
from jaxrlhf.benchmarks.signature import Above, Between, HigherThan, NoRise, Rise

SAMPLES = 40  # responses to an item, before and after
LOWEST, HIGHEST = 0.2, 0.8  # pass rates of an item before
FIRST = 8  # responses to each candidate: those that all solve it, or none, are not looked at any more
MOST = 24  # items


# ---- data -----------------------------------------------------------------------------------------------------------


def write_data(
    folder: Path, seed: int, numbers: tuple[int, int] = (10, 99), candidates: int = 1000, seen: bool = False
) -> None:
    """demonstrations.jsonl, and candidates.jsonl of other sums; ``seen``: they are demonstrated too."""
    low, high = numbers
    sums = [(a, b) for a in range(low, high + 1) for b in range(low, high + 1)]
    random.Random(seed).shuffle(sums)
    rows = [(f"{a}+{b}=", str(a + b)) for a, b in sums]
    write_rows(folder / "candidates.jsonl", [{"prompt": sum, "answer": answer} for sum, answer in rows[:candidates]])
    shown = rows if seen else rows[candidates:]
    write_rows(folder / "demonstrations.jsonl", [{"prompt": sum, "response": answer} for sum, answer in shown])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def choose_items(folder: Path, seed: int) -> None:
    """items/items.jsonl: the first 24 candidates (or a quarter of all, where that is less) that the supervised model
    solves in 20 to 80 % of 40 samples.

    Raises ValueError where there are not as many."""
    path = folder / "items" / "items.jsonl"
    if path.exists():
        return
    rows = read_rows(folder / "data" / "candidates.jsonl")
    count, run_dir = min(MOST, len(rows) // 4), folder / "sft"
    first = pass_rates(run_dir, rows, 0, FIRST)
    rows = [row for row, rate in zip(rows, first, strict=True) if 0.0 < rate < 1.0]
    rates = pass_rates(run_dir, rows, 1, SAMPLES)
    chosen = [row | {"before": rate} for row, rate in zip(rows, rates, strict=True) if LOWEST <= rate <= HIGHEST]
    if len(chosen) < count:
        raise ValueError(f"benchmark: perfectible: {len(chosen)} perfectible sums; expected {count} or more")
    path.parent.mkdir()
    write_rows(path.with_suffix(".new"), chosen[:count])
    path.with_suffix(".new").rename(path)


def pass_rates(run_dir: Path, rows: list[dict[str, Any]], seed: int, count: int = SAMPLES) -> list[float]:
    """The share of ``count`` responses that solve each item, sampled at temperature 1. ``seed``: of their noise."""
    from jaxrlhf import api

    written = api.sample(str(run_dir), [row["prompt"] for row in rows], n=count, max_new_tokens=5, seed=seed)
    return [statistics.fmean(solved(texts, [row] * count)) for texts, row in zip(written, rows, strict=True)]


# ---- rewards --------------------------------------------------------------------------------------------------------


def solved(responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """1 where the response is the answer."""
    return [float(text == record["answer"]) for text, record in zip(responses, records, strict=True)]


# ---- the benchmark --------------------------------------------------------------------------------------------------


def measure(done: FinishedCell) -> Measured:
    """Of the items: the mean of their pass rates, and the share of them that is solved in 95 % of the responses."""
    choose_items(done.folder, done.seed)
    rows = read_rows(done.folder / "items" / "items.jsonl")
    rates = pass_rates(done.run_dir, rows, 2)
    found: Measured = {
        "pass_rate": statistics.fmean(rates),
        "items_solved": statistics.fmean(rate >= 0.95 for rate in rates),
    }
    if rewards := done.curve("score/mean"):
        found["reward"] = rewards
    return found


def method(name: str, about: str, overrides: dict[str, Any] | None = None) -> Cell:
    """grpo.yaml, with one thing changed in a control."""
    return Cell(name, about, "grpo", overrides or {}, choose_items)


def plot(on: Any, results: Results) -> None:
    """The pass rate of each cell; and the reward of each step."""
    from jaxrlhf.benchmarks import figure

    left, right = on.subplots(1, 2)
    figure.plot_dots(left, results, "pass_rate")
    figure.plot_curves(right, results, None, "reward", ["grpo", "still"])
    right.set(title="items solved in a step", xlabel="step of GRPO")
    right.legend(frameon=False)


CELLS = (
    Cell("sft", "supervised, from random weights"),
    method("grpo", "GRPO from `sft` on the items, reward: 1 if solved"),
    method("constant", "control: the same with a constant reward", {"rewards.function": constant}),
    method("random", "control: the same with a random reward", {"rewards.function": coin}),
    method("still", "control: the same with learning rate 0", {"optimizer.default.learning_rate": 0.0}),
)

BENCHMARK = Benchmark(
    name="perfectible",
    title="Perfectible items: GRPO makes a model always solve what it solves now and then",
    after="the sanity test of [arXiv 2510.26788](https://arxiv.org/abs/2510.26788)",
    about=(
        "A transformer of two layers and 64 features learns, from random weights, to add two numbers of two digits "
        "(`37+45=`). Of 1000 sums that it has not seen, the first 24 are kept that it solves in 20 to 80 % of 40 "
        "samples. An algorithm that works should solve nearly all of them after training on them; one whose sampler "
        "and trainer disagree, or whose reward says nothing, does not. Measured on the same items, as in the paper: "
        "the mean pass rate of 40 fresh samples at temperature 1, and the share of items with a pass rate of 95 % or "
        "more. The settings were chosen on seeds 100 and 101, after a first setting had too few such items with "
        "seed 1."
    ),
    cells=CELLS,
    data=write_data,
    measure=measure,
    signature=(
        Between("sft", "pass_rate", 0.2, 0.8),
        Above("grpo", "pass_rate", 0.95),
        HigherThan("grpo", "sft", "pass_rate", 3.0),
        NoRise("constant", "sft", "pass_rate"),
        NoRise("random", "sft", "pass_rate", 0.02),
        NoRise("still", "sft", "pass_rate"),
    ),
    shown=("pass_rate", "items_solved"),
    plot=plot,
)

START = {
    "iterations": 36,
    "optimizer.default.learning_rate": 6e-3,
    "models.policy.architecture.num_layers": 1,
}
SHORT = {"iterations": 12, "batch.prompts_per_step": 8, "algorithm.num_minibatches": 2}

QUICK = dataclasses.replace(
    BENCHMARK,
    cells=(
        dataclasses.replace(CELLS[0], overrides=START),
        *(dataclasses.replace(cell, overrides={**cell.overrides, **SHORT}) for cell in CELLS[1:3]),
    ),
    data=partial(write_data, numbers=(1, 9), candidates=32, seen=True),
    signature=(
        Rise("grpo", "sft", "pass_rate", 0.3),
        NoRise("constant", "sft", "pass_rate"),
    ),
    quick=True,
)
