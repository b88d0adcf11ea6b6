"""Sums behind a mark: what reinforcement learning of a checked answer changes first, and what it leaves."""

import dataclasses
import random
import re
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from jaxrlhf.benchmarks.controls import constant
from jaxrlhf.benchmarks.published.perfectible import read_rows, write_rows
from jaxrlhf.benchmarks.record import Benchmark, Cell, FinishedCell, Measured, Results
from jaxrlhf.benchmarks.signature import Between, Holds, NoRise, Rise

SAMPLES = 32  # responses to a held-out sum
HELD_OUT = 200  # sums that no demonstration and no prompt has
MARKED = 0.5  # share of the demonstrations whose answer has the mark
METHODS = ("grpo", "rloo", "dr_grpo", "ppo")


# ---- data -----------------------------------------------------------------------------------------------------------


def write_data(
    folder: Path,
    seed: int,
    numbers: tuple[int, int] = (10, 99),
    prompts: int = 1500,
    held_out: int = HELD_OUT,
    seen: bool = False,
) -> None:
    """demonstrations.jsonl, half of them with the mark; prompts.jsonl and held_out.jsonl of other sums. ``seen``: all
    sums are demonstrated, and the prompts are the held-out ones."""
    low, high = numbers
    sums = [(a, b) for a in range(low, high + 1) for b in range(low, high + 1)]
    draw = random.Random(seed)
    draw.shuffle(sums)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums]
    shown = [row | {"response": f"[{row['answer']}]" if draw.random() < MARKED else row["answer"]} for row in rows]
    for name, part in (
        ("held_out", rows[:held_out]),
        ("prompts", rows[:prompts] if seen else rows[held_out : held_out + prompts]),
        (
            "demonstrations",
            [
                {"prompt": row["prompt"], "response": row["response"]}
                for row in shown[0 if seen else held_out + prompts :]
            ],
        ),
    ):
        write_rows(folder / f"{name}.jsonl", part)


# ---- rewards --------------------------------------------------------------------------------------------------------


def strict(responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """1 where the response is the answer in brackets."""
    return [float(text == f"[{record['answer']}]") for text, record in zip(responses, records, strict=True)]


def lenient(responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """1 where the only number of the response is the answer."""
    return [
        float(re.findall(r"\d+", text) == [record["answer"]]) for text, record in zip(responses, records, strict=True)
    ]


# ---- the benchmark --------------------------------------------------------------------------------------------------


def measure(done: FinishedCell) -> Measured:
    """Of the held-out sums: pass@1 and pass@16 (unbiased, of 32 samples), by both rewards; and ``curves``."""
    import numpy as np

    from jaxrlhf import api
    from jaxrlhf.ops.best_of import best_of

    rows = read_rows(done.folder / "data" / "held_out.jsonl")
    prompts = [row["prompt"] for row in rows]
    written = api.sample(str(done.run_dir), prompts, n=SAMPLES, max_new_tokens=6, seed=1)
    found: Measured = {}
    for name, reward in (("strict", strict), ("lenient", lenient)):
        right = np.array([reward(texts, [row] * SAMPLES) for texts, row in zip(written, rows, strict=True)])
        for k, each in zip((1, 16), best_of(right, right, (1, 16)), strict=True):
            found[f"{name}_at_{k}"] = float(each.mean())
    if done.cell in METHODS:
        found |= curves(done)
    return found


def curves(done: FinishedCell) -> Measured:
    """The rewards of each iteration; and the iteration in which half of the gap was closed, and half of the lenient
    reward's rise was there, each of means over five iterations."""
    right = {name: smooth(done.curve(f"score/{name}")) for name in ("strict", "lenient")}
    gap = [there - marked for there, marked in zip(right["lenient"], right["strict"], strict=True)]
    risen = [value - right["lenient"][0] for value in right["lenient"]]
    return {
        "strict": right["strict"],
        "lenient": right["lenient"],
        "half_of_gap": float(first(value <= gap[0] / 2 for value in gap)),
        "half_of_rise": float(first(value >= risen[-1] / 2 and value > 0 for value in risen)),
    }


def smooth(values: list[float], width: int = 5) -> list[float]:
    """Means of each value and up to ``width`` - 1 before it."""
    return [statistics.fmean(values[max(at - width + 1, 0) : at + 1]) for at in range(len(values))]


def first(signs: Any) -> float:
    """The place of the first that is true; infinite where none is."""
    return next((at for at, sign in enumerate(signs) if sign), float("inf"))


def method(name: str, about: str, config: str = "grpo", **overrides: Any) -> Cell:
    """A run from ``sft``. ``overrides``: the fields of its algorithm that differ from the file's."""
    return Cell(name, about, config, {f"algorithm.{key}": value for key, value in overrides.items()})


def sharpens(results: Results) -> tuple[bool, str]:
    """Whether pass@16 rises by less than pass@1, with every method and seed."""
    told, held = [], True
    for cell in METHODS:
        rises = [
            [after - before for after, before in zip(results.of(cell, name), results.of("sft", name), strict=True)]
            for name in ("strict_at_1", "strict_at_16")
        ]
        held &= all(many < one for one, many in zip(*rises, strict=True))
        told.append(f"{cell} {', '.join(f'{many:+.2f} of {one:+.2f}' for one, many in zip(*rises, strict=True))}")
    return held, "; ".join(told)


def format_first(results: Results) -> tuple[bool, str]:
    """Whether half of the gap between the two rewards is closed before half of the lenient one's rise is there."""
    told, held = [], True
    for cell in METHODS:
        pairs = [*zip(results.of(cell, "half_of_gap"), results.of(cell, "half_of_rise"), strict=True)]
        held &= all(gap < rise for gap, rise in pairs)
        told.append(f"{cell} {', '.join(f'{gap:g} and {rise:g}' for gap, rise in pairs)}")
    return held, "; ".join(told)


def plot(on: Any, results: Results) -> None:
    """pass@1 and pass@16 of each cell; both rewards of GRPO in each iteration."""
    from jaxrlhf.benchmarks import figure

    left, middle, right = on.subplots(1, 3)
    figure.plot_dots(left, results, "strict_at_1")
    figure.plot_dots(middle, results, "strict_at_16")
    for name, style in (("lenient", "--"), ("strict", "-")):
        for at, values in enumerate(results.of("grpo", name)):
            right.plot(values, style, color="C1", lw=1, label=None if at else name)
    right.set(title="GRPO: share that is right", xlabel="iteration", ylim=(0, 1))
    right.legend(frameon=False)
    figure.tidy(right)


CELLS = (
    Cell("sft", "supervised, from random weights; half of its answers have the mark"),
    method("grpo", "GRPO from `sft`; reward: 1 for the answer behind the mark"),
    method("rloo", "RLOO", advantages="leave_one_out", aggregation="seq-mean-token-sum"),
    method("dr_grpo", "Dr. GRPO", advantages="mean", aggregation="seq-mean-token-sum"),
    method("ppo", "PPO with a value model of its own", "ppo"),
    Cell("constant", "control: GRPO with a constant reward", "grpo", {"rewards.functions.strict.function": constant}),
    Cell("still", "control: GRPO with learning rate 0", "grpo", {"optimizer.default.learning_rate": 0.0}),
)

BENCHMARK = Benchmark(
    name="arithmetic",
    title="Sums behind a mark: reinforcement learning sharpens, and learns the format first",
    after=(
        "the GSM8K runs of [TRL](https://github.com/huggingface/trl) and "
        "[tt-metal](https://github.com/tenstorrent/tt-metal/pull/54390)"
    ),
    about=(
        "A transformer of two layers and 64 features learns, from random weights, to add two numbers of two digits "
        "(`37+45=`); half of its demonstrations write the answer behind a mark (`[82]`), half without (`82`). "
        "Reinforcement learning on 1,500 other sums pays for the answer behind the mark. Measured on 200 sums that "
        "neither has seen, of 32 samples each: pass@1 and pass@16, by the strict reward (with the mark) and the "
        "lenient one (without). What is published of word problems: pass@1 rises by far more than pass@16, and the "
        "format is learned before the sums are. PPO makes two passes over its samples and the others one: this is no "
        "contest between them. The settings are the first that were tried, on seed 100."
    ),
    cells=CELLS,
    data=write_data,
    measure=measure,
    signature=(
        Between("sft", "strict_at_1", 0.1, 0.5),
        *(Rise(cell, "sft", "strict_at_1", 0.2) for cell in METHODS),
        Holds("pass@16 rises by less than pass@1, with every method and seed", sharpens),
        Holds(
            "half of the gap to the lenient reward is closed before half of its rise, with every method and seed",
            format_first,
        ),
        NoRise("constant", "sft", "strict_at_1", 0.02),
        NoRise("still", "sft", "strict_at_1"),
    ),
    shown=("strict_at_1", "strict_at_16", "lenient_at_1"),
    plot=plot,
)

START = {
    "iterations": 36,
    "optimizer.default.learning_rate": 6e-3,
    "models.policy.architecture.num_layers": 1,
}
SHORT = {
    "iterations": 16,
    "batch.prompts_per_step": 8,
    "algorithm.num_minibatches": 2,
    "algorithm.num_epochs": 2,
    "optimizer.default.learning_rate": 7e-4,
}

QUICK = dataclasses.replace(
    BENCHMARK,
    cells=(
        dataclasses.replace(CELLS[0], overrides=START),
        *(dataclasses.replace(CELLS[at], overrides={**CELLS[at].overrides, **SHORT}) for at in (1, 5)),
    ),
    data=partial(write_data, numbers=(1, 9), prompts=10, held_out=10, seen=True),
    signature=(Rise("grpo", "sft", "strict_at_1", 0.3), NoRise("constant", "sft", "strict_at_1", 0.05)),
    plot=None,
    quick=True,
)
