"""The programs of a case, compiled, run and timed, phase by phase."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax import monitoring

from jaxrlhf.benchmarks.case import Case
from jaxrlhf.benchmarks.reward import Words
from jaxrlhf.benchmarks.rows import random_batch
from jaxrlhf.hosts import heap
from jaxrlhf.rewards.graders import find_graders
from jaxrlhf.run.build import Run
from jaxrlhf.run.initial_state import abstract_state, initial_state
from jaxrlhf.run.programs import compile_program, compile_programs
from jaxrlhf.run.scoring import scored
from jaxrlhf.run.transfer import fetch_all, put
from jaxrlhf.sharding import current, for_programs
from jaxrlhf.step import make_rollout
from jaxrlhf.types import Batch, TrainState, given

WARM_UP = 2  # iterations that are not timed
COMPILED = "backend_compile_duration"  # how the name of a compilation's event ends


class TimedRun(NamedTuple):
    """Seconds of each timed iteration, phase by phase, and the last iteration's rows (NumPy)."""

    seconds: dict[str, list[float]]  # iteration, rollout, score, update, idle; those that there are
    compile_seconds: float  # of the iteration's programs
    recompilations: int  # during the timed iterations
    batch: Batch  # with the responses


class Iterations:
    """A case that runs: ``step`` is one iteration, its phases timed."""

    def __init__(self, case: Case):
        self.case, drawn = case, case.drawn
        self.run = Run(**vars(drawn), tokenizer=Words(), graders=find_graders(drawn.cfg.rewards))
        self.steps = 0
        self.vocab = min(found.vocab_size for found in drawn.configs.values())
        with current(drawn.mesh):
            started = time.perf_counter()
            self.programs = compile_programs(drawn, self.shapes(), case.shapes)
            self.compile_seconds = time.perf_counter() - started
            if "iteration" in self.programs and drawn.algorithm.online:
                rollout = make_rollout(drawn.recipe)
                alone = compile_program(rollout, drawn.mesh, self.shapes(), case.shapes, rows=True, donate=False)
                self.programs["rollout"] = alone
            self.state = for_programs(initial_state(self.run), drawn.mesh)
        heap.fill_holes()

    def shapes(self) -> TrainState:
        return abstract_state(self.case.drawn)

    def step(self) -> tuple[dict[str, float], Batch]:
        """(seconds of each phase, the rows with the responses, on the devices) of one iteration."""
        case = self.case
        host = random_batch(case.shapes, self.vocab, case.prompt, case.lengths, case.drawn.cfg.seed, self.steps)
        self.steps += 1
        with current(case.drawn.mesh):
            return self.parts(host) if "learn" in self.programs else self.one_program(host)

    def one_program(self, host: Batch) -> tuple[dict[str, float], Batch]:
        """Rollout and update lie in one program: the rollout is timed alone before it, the update is what is left."""
        seconds = {}
        if "rollout" in self.programs:
            batch = put(self.run.mesh, host)
            _, seconds["rollout"] = clocked(lambda: self.programs["rollout"].run(self.state, batch))
        started = time.perf_counter()
        batch = put(self.run.mesh, host)
        (self.state, metrics, sequences), program = clocked(lambda: self.programs["iteration"].run(self.state, batch))
        jax.device_get(metrics)
        seconds["iteration"] = time.perf_counter() - started
        seconds["update"] = program - seconds.get("rollout", 0.0)
        seconds["idle"] = seconds["iteration"] - program
        return seconds, batch if sequences is None else batch.replace(sequences=sequences)

    def parts(self, host: Batch) -> tuple[dict[str, float], Batch]:
        """The host scores after the rollout; what is read meanwhile, and is not done by then, the update waits for."""
        seconds, records = {}, [{} for _ in range(len(given(host.prompts, "batch.prompts").tokens))]
        started = time.perf_counter()
        batch = put(self.run.mesh, host)
        sequences, seconds["rollout"] = clocked(lambda: self.programs["rollout"].run(self.state, batch))
        begun = time.perf_counter()
        sequences, rows, _ = scored(self.run, self.programs, self.state, batch.replace(sequences=sequences), records)
        seconds["score"] = time.perf_counter() - begun
        (self.state, metrics), seconds["update"] = clocked(lambda: self.programs["learn"].run(self.state, rows))
        jax.device_get(metrics)
        seconds["iteration"] = time.perf_counter() - started
        seconds["idle"] = seconds["iteration"] - seconds["rollout"] - seconds["score"] - seconds["update"]
        return seconds, batch.replace(sequences=sequences)


def clocked(function: Callable[[], Any]) -> tuple[Any, float]:
    """(what it returns, seconds until that is there)."""
    started = time.perf_counter()
    result = jax.block_until_ready(function())
    return result, time.perf_counter() - started


def run(several: Sequence[Iterations], steps: int) -> list[TimedRun]:
    """Warm up, and time ``steps`` iterations of each, which take turns: what slows the machine slows them all."""
    for one in several:
        for _ in range(WARM_UP):
            one.step()
    with compilations() as compiled:
        rounds = [[one.step() for one in several] for _ in range(steps)]
    timed = []
    for one, rows in zip(several, zip(*rounds, strict=True), strict=True):
        seconds = {name: [found[name] for found, _ in rows] for name in rows[0][0]}
        with current(one.case.drawn.mesh):
            batch = fetch_all(rows[-1][1])
        timed.append(TimedRun(seconds, one.compile_seconds, len(compiled), batch))
    return timed


def trace(one: Iterations, folder: str) -> None:
    """One more iteration, traced into ``folder``."""
    with jax.profiler.trace(folder, create_perfetto_trace=True):
        one.step()


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The events of programs that are compiled while it is open."""
    found: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith(COMPILED):
            found.append(event)

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        monitoring.unregister_event_duration_listener(listen)
