"""Reversing a text: sloppy demonstrations, and the 20 steps of GRPO that correct what was learned from them."""

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

HELD_OUT = 256  # prompts
SAMPLES = 4  # responses to each of them
WRONG = 0.2  # of the letters of a demonstration are drawn anew


# ---- data -----------------------------------------------------------------------------------------------------------


def write_data(folder: Path, seed: int, letters: str = "abcdefghij", length: int = 6, rows: int = 8000) -> None:
    """demonstrations.jsonl, whose letters are wrong now and then; prompts.jsonl and held_out.jsonl, of which only
    rewards and measures see the answer. A word is either held out, or in the other two."""
    rng, words = random.Random(seed), {}
    while len(words) < min(rows, len(letters) ** length):
        words["".join(rng.choices(letters, k=length))] = None
    sloppy = lambda letter: rng.choice(letters) if rng.random() < WRONG else letter
    prompts = [{"prompt": f"{word}>", "answer": word[::-1]} for word in words]
    held_out = min(HELD_OUT, len(prompts) // 4)
    rest = prompts[held_out:]
    shown = [{"prompt": row["prompt"], "response": "".join(map(sloppy, row["answer"]))} for row in rest]
    for name, found in {"demonstrations": shown, "prompts": rest, "held_out": prompts[:held_out]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


# ---- rewards --------------------------------------------------------------------------------------------------------


def similarity(responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """The share of letters at their right places, of the longer of response and answer: 1 where they are equal."""
    return [alike(text, record["answer"]) for text, record in zip(responses, records, strict=True)]


def alike(text: str, answer: str) -> float:
    return sum(a == b for a, b in zip(text, answer)) / max(len(text), len(answer))


# ---- the benchmark --------------------------------------------------------------------------------------------------


def measure(done: FinishedCell) -> Measured:
    """Of the policy's responses to the held-out prompts, sampled at temperature 1."""
    from jaxrlhf import api

    rows = [json.loads(line) for line in (done.folder / "data" / "held_out.jsonl").read_text().splitlines()]
    prompts, answers = [row["prompt"] for row in rows], [row["answer"] for row in rows]
    written = api.sample(str(done.run_dir), prompts, n=SAMPLES, max_new_tokens=len(answers[0]) + 2)
    pairs = [(text, answer) for texts, answer in zip(written, answers, strict=True) for text in texts]
    found: Measured = {
        "exact_match": statistics.fmean(text == answer for text, answer in pairs),
        "similarity": statistics.fmean(alike(text, answer) for text, answer in pairs),
    }
    if rewards := done.curve("score/mean"):
        found["reward"] = rewards
    return found


def plot(on: Any, results: Results) -> None:
    """Exact matches of each cell; and the reward of each step."""
    from jaxrlhf.benchmarks import figure

    left, right = on.subplots(1, 2)
    figure.plot_dots(left, results, "exact_match")
    figure.plot_curves(right, results, None, "reward", ["grpo", "still"])
    right.set(title="similarity of a step's responses", xlabel="step of GRPO")
    right.legend(frameon=False)


CELLS = (
    Cell("sft", "supervised, from random weights"),
    Cell("grpo", "GRPO from `sft`, reward: similarity"),
    Cell("constant", "control: the same with a constant reward", "grpo", {"rewards.function": constant}),
    Cell("random", "control: the same with a random reward", "grpo", {"rewards.function": coin}),
    Cell("still", "control: the same with learning rate 0", "grpo", {"optimizer.default.learning_rate": 0.0}),
)

BENCHMARK = Benchmark(
    name="reverse",
    title="Reversing a text: 20 steps of GRPO correct what sloppy demonstrations taught",
    after="the reverse-text example of prime-rl",
    about=(
        "The prompt is six letters of ten (`abcabd>`), the answer the same letters in reverse. A transformer of two "
        "layers and 64 features learns, from random weights, from 7,744 demonstrations in which one letter of five is "
        "drawn at random: what it writes is as sloppy. Then GRPO runs 20 steps of 8 prompts x 16 responses, rewarded "
        "by the share of letters at their right places. Measured on 256 held-out prompts with 4 responses each, at "
        "temperature 1: exact matches, and similarity, which is the reward. The settings were chosen on seeds 100 "
        "and 101."
    ),
    cells=CELLS,
    data=write_data,
    measure=measure,
    signature=(
        Between("sft", "exact_match", 0.2, 0.5),
        Above("grpo", "exact_match", 0.7),
        HigherThan("grpo", "sft", "exact_match", 3.0),
        NoRise("constant", "sft", "exact_match"),
        NoRise("random", "sft", "exact_match", 0.02),
        NoRise("still", "sft", "exact_match"),
    ),
    shown=("exact_match", "similarity"),
    plot=plot,
)

QUICK = dataclasses.replace(
    BENCHMARK,
    cells=(
        dataclasses.replace(CELLS[0], overrides={"iterations": 60, "optimizer.default.learning_rate": 6e-3}),
        dataclasses.replace(CELLS[1], overrides={"iterations": 10}),
    ),
    data=partial(write_data, letters="abcdef", length=3, rows=216),
    signature=(Rise("grpo", "sft", "similarity", 0.03),),
    quick=True,
)
