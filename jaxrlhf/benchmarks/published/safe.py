"""Safe RLHF: what helps most is forbidden, and a multiplier finds how much of it is allowed."""

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.benchmarks.controls import coin, constant
from jaxrlhf.benchmarks.letters import write_letters
from jaxrlhf.benchmarks.record import Benchmark, Cell, FinishedCell, Measured, Results
from jaxrlhf.benchmarks.signature import Above, Below, Holds

HELPFUL, FORBIDDEN, NEUTRAL = "ab", "xy", "cdef"
LENGTH, LIMIT = 10, 5  # letters of a response; forbidden ones that are allowed on average
# what the first, the second, ... forbidden letter of a response helps; a helpful one helps 1
WORTH = (8.0, 7.2, 6.4, 5.6, 4.8, 4.0, 3.2, 2.4, 1.6, 0.8)
WEIGHTS = (0.01, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0)  # of shaping, as in the paper


# ---- the task -------------------------------------------------------------------------------------------------------


def count(text: str, letters: str) -> int:
    return sum(letter in letters for letter in text)


def helpful(responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """The reward: forbidden letters help most, each less than the one before."""
    return [count(text, HELPFUL) + sum(WORTH[: count(text, FORBIDDEN)]) for text in responses]


def forbidden(responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """The cost: forbidden letters above the limit."""
    return [float(count(text, FORBIDDEN) - LIMIT) for text in responses]


def write(rng: random.Random, share: float) -> str:
    """LENGTH letters, each forbidden with the probability ``share``."""
    return "".join(rng.choice(FORBIDDEN if rng.random() < share else HELPFUL + NEUTRAL) for _ in range(LENGTH))


def write_data(folder: Path, seed: int) -> None:
    """The letters' tokenizer; demonstrations with a share of 0.6 of forbidden letters; prompts; responses of any share,
    labelled safe where no more than LIMIT letters are forbidden, and held-out ones."""
    write_letters(HELPFUL + FORBIDDEN + NEUTRAL, folder)
    rng = random.Random(seed)
    start = lambda: {"prompt": rng.choice(NEUTRAL)}
    rows: dict[str, list[dict[str, Any]]] = {
        "demonstrations": [start() | {"response": write(rng, 0.6)} for _ in range(4000)],
        "prompts": [start() for _ in range(2048)],
    }
    for name, number in (("labelled", 4000), ("held_out_labelled", 1000)):
        found = [start() | {"response": write(rng, rng.random())} for _ in range(number)]
        rows[name] = [row | {"label": count(row["response"], FORBIDDEN) <= LIMIT} for row in found]
    for name, found in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


# ---- what is measured -----------------------------------------------------------------------------------------------


def measure(done: FinishedCell) -> Measured:
    """Of the cost model: how often its sign is the label. Of a policy: reward and cost of the last evaluation, by the
    functions of the task, and the multiplier and the cost over the run."""
    if done.cell == "sft":
        return {"loss": done.curve("loss/policy")[-1]}
    if done.cell == "cm":
        return {"sign_accuracy": done.curve("eval/cost/accuracy")[-1]}
    name = "score/count" if done.cell == "learned" else "score/cost"
    rewards, costs = done.curve("eval/gold/mean"), done.curve(f"eval/{name}")
    multipliers = done.curve("cost/multiplier")
    found: Measured = {"reward": rewards[-1], "cost": costs[-1], "multiplier": multipliers[-1]}
    found |= {"reward_gain": rewards[-1] - rewards[0], "cost_gain": costs[-1] - costs[0]}
    found |= {f"multiplier_{name}": max(multipliers) - multipliers[at] for name, at in (("rise", 0), ("fall", -1))}
    if done.cell == "ppo_lagrangian":
        found |= {"multiplier_curve": rounded(multipliers), "cost_curve": rounded(done.curve(name))}
    if done.cell == "learned":
        found["cost_by_model"] = done.curve("eval/cost/mean")[-1]
    return found


def rounded(curve: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in curve]


# ---- the benchmark --------------------------------------------------------------------------------------------------


def not_dominated(results: Results) -> tuple[bool, str]:
    """No fixed weight has at least the reward at no more than the cost, by the means over seeds."""
    point = lambda cell: (results.mean(cell, "reward"), results.mean(cell, "cost"))
    reward, cost = point("ppo_lagrangian")
    others = {cell: point(cell) for cell in results.measured if cell.startswith("weight_")}
    better = [cell for cell, (gain, paid) in others.items() if gain >= reward and paid <= cost]
    shown = {"ppo_lagrangian": (reward, cost)} | others
    return not better, ", ".join(f"{cell} {gain:.1f} at {paid:+.2f}" for cell, (gain, paid) in shown.items())


def plot(on: Any, results: Results) -> None:
    """Reward over cost at the end of each run; the multiplier and the cost over the run of PPO-Lagrangian."""
    from jaxrlhf.benchmarks import figure

    on.set_size_inches(8, 2.8)
    left, middle, right = on.subplots(1, 3)
    cells = ["ppo_lagrangian", *(cell for cell in results.measured if cell.startswith("weight_"))]
    for number, cell in enumerate(cells):
        label = cell.replace("weight_", "weight ").replace("ppo_lagrangian", "multiplier")
        places = results.of(cell, "cost"), results.of(cell, "reward")
        left.plot(
            *places, "*" if number == 0 else "o", color=f"C{number}", markersize=8 if number == 0 else 4, label=label
        )
    left.set(xlabel="cost", title="reward over cost, at the end")
    left.axvline(0, color="gray", linewidth=0.8, linestyle="--")
    left.legend(fontsize=6)
    figure.tidy(left)
    for axes, name in ((middle, "multiplier"), (right, "cost")):
        figure.plot_curves(axes, results, None, f"{name}_curve", ["ppo_lagrangian"])
        axes.set(title=name, xlabel="iteration")
    right.axhline(0, color="gray", linewidth=0.8, linestyle="--")


HERE = "jaxrlhf.benchmarks.published.safe"
STILL = {f"optimizer.{role}.learning_rate": 0.0 for role in ("policy", "value", "cost_value")}
FIXED = {"iterations": 60, "eval.every": 1000, "algorithm.multiplier_learning_rate": 0.0}


def control(name: str, about: str, overrides: dict[str, Any]) -> Cell:
    """ppo_lagrangian.yaml, shorter, with something changed."""
    return Cell(name, about, "ppo_lagrangian", {"iterations": 30, "eval.every": 1000} | overrides)


CELLS = (
    Cell("sft", "the policy: supervised, from random weights"),
    Cell("cm", "a cost model on 4,000 labels, safe or not"),
    Cell("ppo_lagrangian", "PPO with a multiplier, from `sft`"),
    *(
        Cell(
            f"weight_{w:g}",
            f"the same with the fixed weight {w:g}",
            "ppo_lagrangian",
            FIXED | {"algorithm.multiplier": w},
        )
        for w in WEIGHTS
    ),
    Cell(
        "learned",
        "PPO with a multiplier against the cost model",
        "ppo_lagrangian",
        {
            "models.cost": {"init_from": "runs/benchmarks/safe/cm"},
            "rewards.functions": {
                "help": {"function": f"{HERE}:helpful"},
                "count": {"function": f"{HERE}:forbidden", "weight": 0},
            },
        },
    ),
    control("constant", "control: a constant reward", {"rewards.functions.help.function": constant}),
    control("random", "control: a random reward", {"rewards.functions.help.function": coin}),
    control("still", "control: learning rate 0", STILL),
)

BENCHMARK = Benchmark(
    name="safe",
    title="Safe RLHF: a multiplier holds the expected cost at its limit; seven fixed weights miss it",
    after="Dai et al. 2023 ([arXiv 2310.12773](https://arxiv.org/abs/2310.12773))",
    about=(
        "A response is ten letters. `a` and `b` help: 1 each. `x` and `y` are forbidden, and help more: 8 for the "
        "first, 7.2 for the second, 6.4 for the third, and so on. The cost is the number of forbidden letters less "
        "5: 5 are allowed on average, and the best reward is then 37. The policy, a transformer of one layer and 32 "
        "features, has learned to write 6 of them. PPO-Lagrangian maximises the reward subject to an expected cost "
        "of at most 0, with a multiplier that starts at 1 (150 iterations); shaping subtracts the cost with a fixed "
        "weight: the same algorithm, whose multiplier does not learn (60 iterations). The weights are those of the "
        "paper. `reward` and `cost` are of 2,048 fresh responses after the last iteration, by the functions of the "
        "task. `learned` is the multiplier against the cost of `cm`, a model of labels (safe: at most 5 forbidden "
        "letters): `cost_by_model` is what it holds. It does so by responses unlike those of the labels, which the "
        "model takes for safe: look at its true `cost`. The labels are of one round; the paper labels the policy's "
        "own responses anew in each of three. The settings were chosen on seed 100. Seen there: with the multiplier "
        "of the paper, which moves its logarithm by the gradient, lambda leapt to its bound of 100 and then stalled "
        "near 0, so here the gradient moves lambda itself; with a multiplier learning rate of 0.2 the cost swung by "
        "0.4 at the end, with 0.05 lambda hardly fell; with a clipped value loss and a KL coefficient of 0.2 the "
        "reward stayed at 32. `learned` and the fixed weights were not run there. Seen on seed 0 before: fixed "
        "weights after 150 iterations, reward and cost of 44.2 and 4.0 (0.01), 44.1 and 3.9 (0.5), 43.6 and 3.0 (1),"
        " 42.0 and 1.9 (2)."
    ),
    cells=CELLS,
    data=write_data,
    measure=measure,
    signature=(
        Above("cm", "sign_accuracy", 0.95),
        Above("ppo_lagrangian", "multiplier_rise", 0.5),
        Above("ppo_lagrangian", "multiplier_fall", 0.05),
        Below("ppo_lagrangian", "cost", 0.05),
        Above("ppo_lagrangian", "reward", 35.0),
        Holds("the multiplier is not dominated by a fixed weight: as much reward at no more cost", not_dominated),
        Below("constant", "reward_gain", 0.5),
        Below("random", "reward_gain", 0.5),
        Below("still", "reward_gain", 0.01),
    ),
    shown=("sign_accuracy", "reward", "cost", "multiplier", "cost_by_model"),
    plot=plot,
)
SHORT = {"iterations": 40, "batch.prompts_per_step": 8, "eval.size": 128, "algorithm.multiplier_learning_rate": 0.2}
QUICK = dataclasses.replace(
    BENCHMARK,
    cells=(
        dataclasses.replace(CELLS[0], overrides={"iterations": 60}),
        *(
            dataclasses.replace(cell, overrides={**cell.overrides, **SHORT})
            for cell in CELLS
            if cell.name == "ppo_lagrangian"
        ),
    ),
    signature=(
        Above("ppo_lagrangian", "multiplier_rise", 0.5),
        Below("ppo_lagrangian", "cost_gain", -0.2),
    ),
    shown=("reward", "cost", "multiplier"),
    plot=None,
    quick=True,
)
