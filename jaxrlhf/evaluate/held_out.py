"""Held-out evaluation, during a run and after it: the algorithm's own measure, and what the policy writes."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxrlhf.config.batch import rows_taken
from jaxrlhf.config.record import Config
from jaxrlhf.config.strict import suggest
from jaxrlhf.data.summary import Summary
from jaxrlhf.errors import ConfigError
from jaxrlhf.evaluate.against_reference import PolicyEvaluation, nothing
from jaxrlhf.hosts import processes
from jaxrlhf.run.build import Run
from jaxrlhf.run.feed import counts_of, held_out
from jaxrlhf.run.initial_state import abstract_state
from jaxrlhf.run.kept_programs import shared
from jaxrlhf.run.transfer import put
from jaxrlhf.step import make_measure
from jaxrlhf.types import Mean, TrainState


class Result(NamedTuple):
    """One evaluation."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]  # prompt, response, score, split


class HeldOut:
    """All that is evaluated of a run. ``judge``: whether the outside judge is asked too, where the config has one."""

    def __init__(self, ready: Run, judge: bool = True):
        offline, writes = not ready.algorithm.online, "policy" in ready.recipe.optimizers
        self.measure = Measure(ready) if offline else None
        self.policy = PolicyEvaluation(ready, judge) if writes and ready.cfg.data.eval_prompts else None

    def run(self, state: TrainState, between: Callable[[], None] = nothing) -> Result | None:
        """The metrics, and what the policy wrote. None without held-out data. ``between``: called before each batch."""
        metrics = self.measure.run(state, between) if self.measure else {}
        if self.policy is None:
            return Result(metrics | counts_of(self.summaries()), []) if metrics else None
        responses = self.policy.run(state, between)
        metrics |= self.policy.metrics(responses)
        return Result(metrics | counts_of(self.summaries()), responses.rows)

    def summaries(self) -> list[Summary]:
        """What became of the rows of each held-out source."""
        parts = [part.batches.summary for part in (self.measure, self.policy) if part]
        return [summary for summary in parts if summary]

    def names(self, state: TrainState) -> list[str]:
        """The metrics that ``run`` will give, of a state of arrays or of shapes; nothing is compiled."""
        measured = self.measure.names(state) if self.measure else []
        written = self.policy.names() if self.policy else []
        return [*measured, *written, *counts_of(self.summaries())]


def check_best(ready: Run, held_out: HeldOut) -> None:
    """Raises ConfigError where checkpoint.best is none of the metrics that an evaluation of the run will give."""
    best, environment = ready.cfg.checkpoint.best, ready.environment
    untried = environment is not None and environment.metric_names is None  # as in a dry run
    if best and not (untried and best.startswith("eval/environment/")):
        names = sorted(f"eval/{name}" for name in held_out.names(abstract_state(ready)))
        if best not in names:
            raise ConfigError(f"checkpoint.best: {best}: nothing that is evaluated; {suggest(best, names)}")


def describe_best(cfg: Config) -> list[str]:
    """What to say where no step but the last is both measured and saved, so that it is the best."""
    evaluated, saved, last = cfg.eval.every, cfg.checkpoint.every, cfg.iterations or 0
    if not cfg.checkpoint.best or not evaluated or math.lcm(evaluated, saved) < last or min(evaluated, saved) >= last:
        return []
    return [
        f"checkpoint.best: {cfg.checkpoint.best}: evaluations (eval.every: {evaluated}) and saves (checkpoint.every: "
        f"{saved}) meet at no step before the last, {last}, which will be the best; nearest: checkpoint.every="
        f"{evaluated}"
    ]


class Measure:
    """What an offline algorithm measures: its loss and its metrics on held-out data of the kind that it learns from."""

    def __init__(self, ready: Run):
        cfg, kind = ready.cfg, ready.resolved.kinds[0]
        rows = min(rows_taken(cfg, kind), cfg.eval.size)
        self.mesh = ready.mesh
        self.batches = held_out(ready, kind, cfg.eval.size, rows)
        self.whole = make_measure(ready.recipe)
        self.program = shared("measure", ready, lambda: processes.jit(self.whole))

    def run(self, state: TrainState, between: Callable[[], None] = nothing) -> dict[str, float]:
        """Means over all held-out batches; nothing where the config names no such data."""
        total: dict[str, Mean] = {}
        for host in self.batches:
            between()
            means = jax.device_get(self.program(state, put(self.mesh, host.batch)))
            total = {name: total[name] + mean if name in total else mean for name, mean in means.items()}
        return {name: float(mean.total) / max(float(mean.count), 1e-8) for name, mean in total.items()}

    def names(self, state: TrainState) -> list[str]:
        """The metrics that ``run`` will give, of a state of arrays or of shapes."""
        batches = [put(self.mesh, host.batch) for host in self.batches[:1]]
        return [name for batch in batches for name in jax.eval_shape(self.whole, state, batch)]
