"""Products that a small model can't compute, and a calculator that it seldom calls until right answers are paid for."""

import dataclasses
import json
import random
import re
from functools import partial
from pathlib import Path
from typing import Any

from jaxrlhf.benchmarks.controls import constant
from jaxrlhf.benchmarks.published.perfectible import write_rows
from jaxrlhf.benchmarks.published.sort import none_changed
from jaxrlhf.benchmarks.record import Benchmark, Cell, FinishedCell, Measured, Results
from jaxrlhf.benchmarks.signature import Above, Below, Between, Holds, NoRise, Rise

CALLED = 0.2  # of the demonstrations call the tool
MISNAMED = 0.25  # of those call it by a wrong name first, are told so, and call it again
HELD_OUT, SAMPLES = 200, 2  # products, and conversations about each of them
PLACE = "runs/benchmarks/tools"
TOOL, WRONG_NAME = "calculator", "calc"


# ---- the tool of a control ------------------------------------------------------------------------------------------


def calculator(expression: str) -> float:
    """
    Computes an arithmetic expression. This one never does.

    Args:
        expression: Numbers and operators.

    Returns:
        Nothing: it raises an error.
    """
    raise RuntimeError("out of order")


# ---- data -----------------------------------------------------------------------------------------------------------


def call_of(expression: str, name: str = TOOL) -> str:
    """A call as the policy writes it."""
    call = {"name": name, "arguments": {"expression": expression}}
    return f"<tool_call>{json.dumps(call)}</tool_call>"


def write_words(folder: Path) -> None:
    """A tokenizer with a token for each digit, and for each word of a call, of an error and of a prompt."""
    from jaxrlhf.data.tokenizer import save_tokenizer, train_bpe

    calls = [re.sub("</?tool_call>", " ", call_of("*", name)) for name in (TOOL, WRONG_NAME)]
    tokenizer = train_bpe([*calls, ERROR, "error: RuntimeError: out of order", f"[{TOOL}]*="], 400)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    save_tokenizer(tokenizer, str(folder))


ERROR = f"error: no tool {WRONG_NAME}; choices: {TOOL}"  # what the environment says to a call of that name


def write_data(
    folder: Path,
    seed: int,
    numbers: tuple[int, int] = (100, 999),
    demonstrations: int = 8000,
    prompts: int = 2000,
    held_out: int = HELD_OUT,
) -> None:
    """The tokenizer; demonstrations that answer a product, or call the tool and then answer; and two sets of other
    products, prompts and held-out ones."""
    from jaxrlhf.rewards.calculator import calculator as works
    from jaxrlhf.rewards.tools import schema_of

    draw, found = random.Random(seed), {}
    low, high = numbers
    count = min(held_out + prompts + demonstrations, (high - low + 1) ** 2)
    while len(found) < count:
        found[draw.randint(low, high), draw.randint(low, high)] = None
    asked = [(f"{a}*{b}", str(a * b)) for a, b in found]
    ask = lambda pair: {"messages": [{"role": "user", "content": pair[0]}], "answer": pair[1]}
    write_words(folder / "words")
    write_rows(folder / "held_out.jsonl", [ask(pair) for pair in asked[:held_out]])
    write_rows(folder / "prompts.jsonl", [ask(pair) for pair in asked[held_out : held_out + prompts]])
    tools = [schema_of(TOOL, works)]
    shown = [{"messages": demonstrate(draw, *pair), "tools": tools} for pair in asked[held_out + prompts :]]
    write_rows(folder / "demonstrations.jsonl", shown)


def demonstrate(draw: random.Random, product: str, answer: str) -> list[dict[str, str]]:
    """A conversation that ends with the answer."""
    said = [{"role": "user", "content": product}]
    if draw.random() < CALLED:
        if draw.random() < MISNAMED:
            said += [{"role": "assistant", "content": call_of(product, WRONG_NAME)}, {"role": "tool", "content": ERROR}]
        said += [{"role": "assistant", "content": call_of(product)}, {"role": "tool", "content": answer}]
    return [*said, {"role": "assistant", "content": answer}]


# ---- the benchmark --------------------------------------------------------------------------------------------------


def measure(done: FinishedCell) -> Measured:
    """Of conversations about the held-out products, with the tool that the cell has: the share that calls it, the share
    of right answers, and of those that called and those that did not; calls that failed, of each conversation, and
    how many of the failed ones were told so; and both shares in each iteration."""
    from jaxrlhf.benchmarks import finished_run, reproduce

    broken = next(cell for cell in CELLS if cell.name == "broken")
    overrides = {
        **(broken.overrides if done.cell == "broken" else {}),
        "models.policy.init_from": f"{PLACE}/{done.cell}",
        "data.eval_prompts": {"path": f"{PLACE}/data/held_out.jsonl"},
        "eval.size": HELD_OUT,
    }
    cell = Cell("measured", "", "grpo", overrides)
    rows, numbers = finished_run.played(reproduce.config_of(BENCHMARK, cell, done.folder, done.seed), SAMPLES)
    found: Measured = {"called": numbers["environment/tool_used"], "right": numbers["score/mean"]}
    found["errors"] = numbers["environment/tool_errors"]
    found |= answered(rows)
    found["changed_tokens"] = max([numbers["turns/changed_tokens"], *done.curve("turns/changed_tokens")])
    for name, metric in (("curve", "environment/tool_used"), ("right_curve", "score/mean")):
        if curve := done.curve(metric):
            found[name] = [round(value, 4) for value in curve]
    return found


def answered(rows: list[dict[str, Any]]) -> Measured:
    """Of conversations as samples.jsonl has them: right answers of those that called, and of those that did not (0
    where there are none); calls of a wrong name that were answered, and those of them that were not told an error."""
    called = [row for row in rows if "<tool_call>" in row["turns"][0]["text"]]
    own = [row for row in rows if row not in called]
    share = lambda part: sum(row["score"] == 1 for row in part) / max(len(part), 1)
    misnamed = [
        answer["text"]
        for row in rows
        for said, answer in zip(row["turns"], row["turns"][1:])
        if said["by"] == "policy" and f'"name": "{WRONG_NAME}"' in said["text"]
    ]
    silent = sum(not text.lstrip().startswith(ERROR) for text in misnamed)
    return {
        "right_with_tool": share(called),
        "right_alone": share(own),
        "misnamed": float(len(misnamed)),
        "not_told": float(silent),
    }


def told(results: Results) -> tuple[bool, str]:
    """Whether the supervised policy calls by a wrong name now and then, and every such call of all cells got its
    error."""
    count = lambda name: int(sum(sum(results.of(cell, name)) for cell in results.measured))
    held = all(results.of("sft", "misnamed")) and not count("not_told")
    return held, f"{count('misnamed')} such calls, {count('not_told')} without"


def plot(on: Any, results: Results) -> None:
    """Calls and right answers of each cell; calls in each iteration."""
    from jaxrlhf.benchmarks import figure

    left, middle, right = on.subplots(1, 3)
    figure.plot_dots(left, results, "called")
    figure.plot_dots(middle, results, "right")
    figure.plot_curves(right, results, None, "curve", ["grpo", "broken", "constant"])
    right.set(title="called, in training", xlabel="iteration", ylim=(0, 1))
    right.legend(frameon=False)


CELLS = (
    Cell("sft", "supervised, from random weights; a fifth of its demonstrations call the tool"),
    Cell("grpo", "GRPO from `sft`; the right answer earns 1"),
    Cell(
        "broken",
        "control: GRPO with a calculator that answers each call with an error",
        "grpo",
        {"environment.arguments.tools": [f"{__name__}:{calculator.__name__}"]},
    ),
    Cell(
        "constant",
        "control: GRPO, 2 iterations; each answer earns 1",
        "grpo",
        {"environment.arguments.grader": constant, "iterations": 2},
    ),
    Cell(
        "still",
        "control: GRPO with learning rate 0, 2 iterations",
        "grpo",
        {"optimizer.default.learning_rate": 0.0, "iterations": 2},
    ),
)

BENCHMARK = Benchmark(
    name="tools",
    title="A calculator that is seldom called: the policy learns to call it once right answers are paid for",
    after=(
        "ReTool ([arXiv 2504.11536](https://arxiv.org/abs/2504.11536)), whose responses come to run code nearly always"
    ),
    about=(
        "A prompt is a product of two numbers of three digits, behind the name of the tool that the chat template "
        "writes (`[calculator]371*482=`). A transformer of two layers and 64 features, from random weights, is too "
        "small to compute it. A fifth of its 8,000 demonstrations call the calculator, a Python function with a JSON "
        'schema (`<tool_call>{"name": "calculator", "arguments": {"expression": "371*482"}}</tool_call>`), are shown '
        "the result and answer; the others answer at once. A quarter of the calls have a wrong name (`calc`) first, "
        "are told so (`error: no tool calc; choices: calculator`), and are made again. Then 10 iterations of GRPO pay "
        "1 for the right answer to 16 other products x 16 conversations of at most three turns. Measured on 200 "
        "products that neither has seen, with 2 conversations each at temperature 1: `called`, the share of "
        "conversations with a call; `right`, the share that ends with the right answer; the same of those that begin "
        "with a call, and of those that do not (0 where there are none); and `errors`, calls that failed, of a "
        "conversation. With `broken`, whose tool always fails, it is measured with that tool. The controls `constant` "
        "and `still` have 2 iterations. The settings are the first that were tried, on seed 100, with 10 iterations "
        "in place of 25."
    ),
    cells=CELLS,
    data=write_data,
    measure=measure,
    signature=(
        Between("sft", "called", 0.1, 0.3),
        Below("sft", "right_alone", 0.02),
        Above("grpo", "called", 0.9),
        Rise("grpo", "sft", "right", 0.4),
        NoRise("broken", "sft", "called", 0.05),
        NoRise("constant", "sft", "called", 0.05),
        NoRise("still", "sft", "called"),
        Holds("every call by a wrong name is told so, and sft makes some", told),
        Holds("no token of a turn is another one in a later turn, in all conversations of all cells", none_changed),
    ),
    shown=("called", "right", "right_with_tool", "right_alone", "errors"),
    plot=plot,
)

QUICK = dataclasses.replace(
    BENCHMARK,
    cells=(
        dataclasses.replace(CELLS[0], overrides={"iterations": 80, "optimizer.default.learning_rate": 6e-3}),
        *(dataclasses.replace(CELLS[at], overrides={**CELLS[at].overrides, "iterations": 6}) for at in (1, 2)),
    ),
    data=partial(write_data, numbers=(10, 99), demonstrations=2000, prompts=200, held_out=20),
    signature=(
        Rise("grpo", "sft", "called", 0.1),
        NoRise("broken", "sft", "called", 0.1),
        Holds("every call by a wrong name is told so, and sft makes some", told),
    ),
    plot=None,
    quick=True,
)
