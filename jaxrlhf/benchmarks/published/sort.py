"""A list that is sorted in three turns, in an environment that shows what each move has done."""

import dataclasses
import random
import statistics
from functools import partial
from itertools import pairwise, permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrlhf.benchmarks.letters import write_letters
from jaxrlhf.benchmarks.published.perfectible import write_rows
from jaxrlhf.benchmarks.record import Benchmark, Cell, FinishedCell, Measured, Results
from jaxrlhf.benchmarks.signature import Below, Between, HigherThan, Holds, NoRise, Rise

if TYPE_CHECKING:
    from jaxrlhf.rewards.turns import Turn

LENGTH, TURNS = 8, 3  # numbers of a list; exchanges that sort it
WRONG = 0.5  # of the moves of a demonstration are drawn at random
HELD_OUT, SAMPLES = 200, 4  # lists, and conversations about each of them


# ---- the game -------------------------------------------------------------------------------------------------------


def order(numbers: str) -> float:
    """The share of neighbours that are in order: 1 where the list is sorted."""
    return statistics.fmean(first < second for first, second in pairwise(numbers))


def exchange(numbers: str, move: str) -> str | None:
    """The list with the two numbers of the move in each other's places; None where it does not name two of them."""
    if len(move) != 2 or move[0] == move[1] or not set(move) <= set(numbers):
        return None
    return numbers.translate(str.maketrans(move, move[::-1]))


def exchanges(numbers: str) -> int:
    """The fewest that sort a list of 1, 2, 3, ...: its length less the number of its cycles."""
    left, cycles = set(range(len(numbers))), 0
    while left:
        place, cycles = left.pop(), cycles + 1
        while (place := int(numbers[place]) - 1) in left:
            left.remove(place)
    return len(numbers) - cycles


def best_move(numbers: str) -> str:
    """The first number that is not at its place, and the one that belongs there. Of a list that is not sorted."""
    here, belongs = next(pair for pair in zip(numbers, sorted(numbers)) if pair[0] != pair[1])
    return here + belongs


class Sort:
    """A response exchanges two numbers of the list ("41": 4 and 1), and the list is shown. A move earns what it adds to
    the share of neighbours in order, the first one that share itself, so that an episode earns the share at its end.

    Args:
        constant: each episode earns 1 instead: of a control.
    """

    def __init__(self, constant: bool = False):
        self.constant = constant

    def reset(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The record's ``list``, and what was earned."""
        return [{"list": record["list"], "earned": 0.0, "wrong": 0, "sorted": 0} for record in records]

    def step(self, states: list[dict[str, Any]], responses: list[str]) -> "list[Turn]":
        """The lists after the moves; over where one is sorted."""
        return [self.turn(state, text) for state, text in zip(states, responses, strict=True)]

    def turn(self, state: dict[str, Any], move: str) -> "Turn":
        """What one move does. A text that is none leaves the list as it is."""
        from jaxrlhf.rewards.turns import Turn

        after = exchange(state["list"], move)
        state["wrong"] += after is None
        state["list"] = after or state["list"]
        share = 1.0 if self.constant else order(state["list"])
        reward, state["earned"] = share - state["earned"], share
        state["sorted"] = int(order(state["list"]) == 1)
        return Turn(state["list"], reward, bool(state["sorted"]))

    def metrics(self, states: list[dict[str, Any]]) -> dict[str, float]:
        """The share of neighbours in order, and of lists that are sorted, at the end; and moves that are none."""
        mean = lambda values: statistics.fmean([*values])
        return {
            "order": mean(order(state["list"]) for state in states),
            "sorted": mean(state["sorted"] for state in states),
            "wrong_moves": mean(state["wrong"] for state in states),
        }


# ---- data -----------------------------------------------------------------------------------------------------------


def lists_of(length: int, turns: int) -> list[str]:
    """All lists of 1, 2, ..., ``length`` that at most so many exchanges sort, and at least one."""
    every = ("".join(numbers) for numbers in permutations("12345678"[:length]))
    return [numbers for numbers in every if 1 <= exchanges(numbers) <= turns]


def write_data(
    folder: Path,
    seed: int,
    length: int = LENGTH,
    turns: int = TURNS,
    held_out: int = HELD_OUT,
    demonstrations: int = 8000,
    wrong: float = WRONG,
) -> None:
    """The tokenizer, a token a number up to 8; demonstrations of the game, half of whose moves are drawn at random, and
    prompts, of the same lists; and lists that neither has."""
    draw, lists = random.Random(seed), lists_of(length, turns)
    draw.shuffle(lists)
    write_letters("12345678>", folder / "letters")
    ask = lambda numbers: {"messages": [{"role": "user", "content": numbers}], "list": numbers}
    write_rows(folder / "held_out.jsonl", [ask(numbers) for numbers in lists[:held_out]])
    write_rows(folder / "prompts.jsonl", [ask(numbers) for numbers in lists[held_out:]])
    games = [demonstrate(draw, draw.choice(lists[held_out:]), turns, wrong) for _ in range(demonstrations)]
    write_rows(folder / "demonstrations.jsonl", games)


def demonstrate(draw: random.Random, numbers: str, turns: int, wrong: float) -> dict[str, Any]:
    """A game from ``numbers``, which ends where the list is sorted."""
    said = []
    while len(said) < 2 * turns and order(numbers) < 1:
        move = "".join(draw.sample(numbers, 2)) if draw.random() < wrong else best_move(numbers)
        said += [{"role": "user", "content": numbers}, {"role": "assistant", "content": move}]
        numbers = exchange(numbers, move) or numbers
    return {"messages": said}


# ---- the benchmark --------------------------------------------------------------------------------------------------


def measure(done: FinishedCell) -> Measured:
    """Of conversations about the held-out lists, under the turns that the cell has: the share of neighbours in order
    and of sorted lists at the end, turns, and moves that are none; of all conversations of the cell, those of its
    training too, tokens of earlier turns that changed; and the share of neighbours in order of each iteration."""
    from jaxrlhf.benchmarks import finished_run, reproduce

    place = "runs/benchmarks/sort"
    overrides = {
        "models.policy.init_from": f"{place}/{done.cell}",
        "environment.max_turns": 1 if done.cell == "one_turn" else TURNS,
        "data.eval_prompts": {"path": f"{place}/data/held_out.jsonl"},
        "eval.size": HELD_OUT,
    }
    cell = Cell("measured", "", "grpo", overrides)
    _, numbers = finished_run.played(reproduce.config_of(BENCHMARK, cell, done.folder, done.seed), SAMPLES)
    found: Measured = {name: numbers[f"environment/{name}"] for name in ("order", "sorted", "wrong_moves")}
    found["turns"] = numbers["turns/mean"]
    found["changed_tokens"] = max([numbers["turns/changed_tokens"], *done.curve("turns/changed_tokens")])
    if curve := done.curve("environment/sorted"):
        found["curve"] = [round(value, 4) for value in curve]
    return found


def none_changed(results: Results) -> tuple[bool, str]:
    """Whether no conversation of any cell had an earlier turn's tokens otherwise in a later one."""
    found = {cell: results.of(cell, "changed_tokens") for cell in results.measured}
    return not any(any(values) for values in found.values()), f"{sum(map(sum, found.values())):g} tokens"


def plot(on: Any, results: Results) -> None:
    """Sorted lists and neighbours in order of each cell; sorted lists in each iteration."""
    from jaxrlhf.benchmarks import figure

    left, middle, right = on.subplots(1, 3)
    figure.plot_dots(left, results, "sorted")
    figure.plot_dots(middle, results, "order")
    figure.plot_curves(right, results, None, "curve", ["grpo", "ppo", "one_turn", "constant"])
    right.set(title="lists sorted in training", xlabel="iteration", ylim=(0, 1))
    right.legend(frameon=False)


CELLS = (
    Cell("sft", "supervised, from random weights; half of the moves it is shown are drawn at random"),
    Cell("grpo", "GRPO from `sft`; an episode earns the share of neighbours in order at its end"),
    Cell("ppo", "PPO with a value model of its own; each move earns what it adds to that share"),
    Cell("one_turn", "control: GRPO, in training and here, with one turn", "grpo", {"environment.max_turns": 1}),
    Cell("constant", "control: GRPO; each episode earns 1", "grpo", {"environment.arguments": {"constant": True}}),
    Cell("still", "control: GRPO with learning rate 0", "grpo", {"optimizer.default.learning_rate": 0.0}),
)

BENCHMARK = Benchmark(
    name="sort",
    title="A list sorted in three turns: the policy learns moves from what the environment shows",
    after="the alphabet-sort example of [prime-rl](https://github.com/PrimeIntellect-ai/prime-rl)",
    about=(
        "A prompt is the numbers 1 to 8 in another order, which one to three exchanges sort (`51346728>`). The policy "
        "answers with an exchange (`51`: 5 and 1 change places), the environment with the list after it "
        "(`15346728>`), until the list is sorted, at most three times. A transformer of two layers and 64 features "
        "learns the game, from random weights, from demonstrations half of whose moves are drawn at random. Then 30 "
        "iterations of GRPO or PPO play 256 games each, from the same lists; PPO makes two passes over its games and "
        "GRPO one: this is no contest between them. An episode earns the share of neighbours in order at its end. "
        "Measured on 200 lists that no demonstration and no prompt begins with, with 4 games each at temperature 1: "
        "`sorted`, the share of lists that end sorted; `order`, the share of neighbours in order at the end; "
        "`turns`; and `changed_tokens`. A row of tokens grows turn by turn, and no turn is tokenised again: "
        "`changed_tokens` counts the tokens, prompt and answers of the environment included, that a row no longer "
        "had in a later turn, or when it was learned from, in all games of a cell. One exchange can sort 28 of the "
        "2,310 lists, so `one_turn` tells whether later turns are of use. The settings are the first that were "
        "tried, on seed 100, with 30 iterations in place of 40."
    ),
    cells=CELLS,
    data=write_data,
    measure=measure,
    signature=(
        Between("sft", "sorted", 0.05, 0.4),
        *(Rise(cell, "sft", name, by) for cell in ("grpo", "ppo") for name, by in (("order", 0.1), ("sorted", 0.4))),
        HigherThan("grpo", "one_turn", "order", 3.0),
        Below("one_turn", "sorted", 0.1),
        Holds("no token of a turn is another one in a later turn, in all conversations of all cells", none_changed),
        NoRise("constant", "sft", "sorted", 0.02),
        NoRise("still", "sft", "sorted"),
    ),
    shown=("sorted", "order", "turns", "changed_tokens"),
    plot=plot,
)

QUICK = dataclasses.replace(
    BENCHMARK,
    cells=(
        dataclasses.replace(CELLS[0], overrides={"iterations": 60, "optimizer.default.learning_rate": 6e-3}),
        *(dataclasses.replace(CELLS[at], overrides={**CELLS[at].overrides, "iterations": 10}) for at in (1, 4)),
    ),
    data=partial(write_data, length=5, held_out=20, demonstrations=1000),
    signature=(
        Rise("grpo", "sft", "sorted", 0.1),
        Holds("no token of a turn is another one in a later turn", none_changed),
        NoRise("constant", "sft", "sorted", 0.02),
    ),
    plot=None,
    quick=True,
)
