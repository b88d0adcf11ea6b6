"""A student that learns from a teacher beside one that learns from the teacher's data, on the same budget: both exact,
on a process whose every response is listed.

The truth is a distribution over 40 responses. A teacher of two layers learns it by SFT. Students of one layer then make
the same number of updates of the same number of rows: by SFT on demonstrations, by distillation on the same
demonstrations, and by distillation on their own responses, which sees none.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithms.distill import DistillConfig
from jaxrlhf.algorithms.distill_data import DistillDataConfig
from jaxrlhf.algorithms.sft import SFTConfig
from jaxrlhf.benchmarks.enumerated import expected
from jaxrlhf.optim import OptimizerConfig
from jaxrlhf.types import Batch, Params, Prompts, Sequences
from tests.algorithms.test_distill import WRITER
from tests.support import enumerated, tiny

ROWS, TAUGHT, BUDGETS, SEEDS = 32, 400, (25, 50, 100), (0, 1, 2)
SHARPNESS = 1.5  # log-odds of the truth for each unit of enumerated.reward_of


class Distance(NamedTuple):
    """KL of a student, nats a response."""

    truth: float  # KL(student || truth)
    teacher: float  # KL(student || teacher)


class Contest:
    """One seed: the truth, its demonstrations, and a teacher that was trained on them."""

    def __init__(self, seed: int):
        self.rng, self.responses = np.random.default_rng(seed), enumerated.every_response()
        odds = SHARPNESS * np.asarray(enumerated.reward_of(self.responses), np.float64)
        self.truth = odds - np.log(np.exp(odds).sum())
        teacher = tiny.build("sft", SFTConfig(), model=WRITER, batch=Batch(), optimizer=OptimizerConfig(1e-2))
        state = teacher.state.replace(params={"policy": tiny.parameters(WRITER, "lm", 100 + seed)})
        self.teacher = self.trained(teacher, state, TAUGHT)[-1]
        self.exact = enumerated.Exact(teacher.recipe.nets)
        self.log_teacher = np.asarray(self.exact.log_p(self.teacher), np.float64)

    def demonstrations(self) -> Sequences:
        """ROWS responses of the truth."""
        which = self.rng.choice(len(self.truth), ROWS, p=np.exp(self.truth))
        return jax.tree.map(lambda x: x[which], self.responses)

    def trained(self, run: tiny.Tiny, state, *budgets: int) -> list[Params]:
        """The policy after so many updates each, with fresh demonstrations for each update."""
        step, found = tiny.program(steps.make_iteration(run.recipe)), []
        for number in range(1, budgets[-1] + 1):
            batch = run.batch.replace(sequences=self.demonstrations())
            state, *_ = step(state, batch)
            found += [state.params["policy"]] * (number in budgets)
        return found

    def student(self, name: str, cfg, seed: int) -> list[Distance]:
        """How far it is after each of BUDGETS updates."""
        tokens = jnp.tile(jnp.array([[2, 3]], jnp.int32), (ROWS, 1))
        batch = Batch(prompts=Prompts(tokens, jnp.ones((ROWS, 2), bool), jnp.arange(ROWS)))
        kind = {"model": enumerated.LETTERS, "room": enumerated.LONGEST, "eos_ids": (enumerated.LAST,)}
        run = tiny.build(name, cfg, batch=batch, teacher=WRITER, optimizer=OptimizerConfig(1e-2), **kind)
        slow = {"teacher": self.teacher} if "teacher" in run.state.slow else {}
        policy = tiny.parameters(enumerated.LETTERS, "lm", seed)
        state = run.state.replace(params={"policy": policy}, slow=slow, seed=jnp.int32(seed))
        exact, found = enumerated.Exact(run.recipe.nets), []
        for params in self.trained(run, state, *BUDGETS):
            log_p = np.asarray(exact.log_p(params), np.float64)[None]
            to = lambda other, log_p=log_p: expected(log_p, other[None], np.zeros_like(log_p)).kl
            found.append(Distance(to(self.truth), to(self.log_teacher)))
        return found


METHODS = {
    "sft": SFTConfig(),
    "distill_data": DistillDataConfig(),
    "distill": DistillConfig(),
}


@pytest.mark.nightly  # by day: a policy becomes its teacher, in test_distill.py
def test_a_student_of_a_teacher_is_nearer_to_the_truth_than_one_of_its_data():
    """Means over SEEDS. The table is in jaxrlhf/benchmarks/README.md."""
    table: dict[str, list[list[Distance]]] = {name: [] for name in METHODS}
    for seed in SEEDS:
        contest = Contest(seed)
        apart = float((np.exp(contest.log_teacher) * (contest.log_teacher - contest.truth)).sum())
        print(f"\nseed {seed}: KL(teacher || truth) {apart:.4f}")
        for name, cfg in METHODS.items():
            table[name].append(contest.student(name, cfg, seed))
    means = {name: np.mean(rows, axis=0) for name, rows in table.items()}  # [budgets, (truth, teacher)]
    for name, rows in means.items():
        shown = "  ".join(f"{budget}: {truth:.4f} {own:.4f}" for budget, (truth, own) in zip(BUDGETS, rows))
        spread = np.ptp([each[-1].truth for each in table[name]])
        print(f"{name:13} KL to the truth, to the teacher after updates  {shown}  (range of the last {spread:.4f})")
    last = {name: rows[-1, 0] for name, rows in means.items()}
    assert last["distill"] < last["sft"] and last["distill_data"] < last["sft"]
