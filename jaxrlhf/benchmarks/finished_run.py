"""A finished run, read for what a benchmark measures: its state, and what its reward models say of rows."""

import operator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrlhf.algorithms.grading import members_of
from jaxrlhf.config.load import load
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.evaluate.against_reference import PolicyEvaluation
from jaxrlhf.run import checkpoint
from jaxrlhf.run.build import Run, build
from jaxrlhf.run.initial_state import abstract_state, initial_state
from jaxrlhf.run.kept_programs import shared
from jaxrlhf.run.saved_run import find_step
from jaxrlhf.run.transfer import put
from jaxrlhf.sharding import current
from jaxrlhf.types import Ask, Sequences, TrainState

ROWS = 256  # that are scored at a time


def opened(run_dir: Path) -> tuple[Run, TrainState]:
    """(the run made ready, its last state); use them under ``sharding.current(ready.mesh)``."""
    ready = build(resolve_config(load(run_dir / "config.yaml")), keep=False)
    with current(ready.mesh):
        return ready, checkpoint.restore(str(run_dir), find_step(str(run_dir)), abstract_state(ready))


def member_scores(run_dir: Path, rows: Any) -> np.ndarray:
    """f32[members, rows]: what each reward model of a run gives to each of ``rows``, Sequences of NumPy arrays."""
    ready, state = opened(run_dir)
    asks = [Ask(role, "scores") for role in members_of(ready.recipe.nets)]
    read = lambda trees, part: ready.recipe.nets.read(trees, part, *asks)
    found = []
    with current(ready.mesh):
        for at in range(0, len(rows.tokens), ROWS):
            part: Sequences = put(ready.mesh, jax.tree.map(operator.itemgetter(slice(at, at + ROWS)), rows))
            program = shared("member scores", ready, lambda: jax.jit(read), part)
            found.append(jax.device_get(program(state.trees, part)))
    return np.concatenate(found, axis=1)


def played(cfg: Config, samples: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The conversations of the policy that ``cfg`` starts from, in its environment, ``samples`` about each held-out
    prompt, as rows of samples.jsonl; and what is measured of them."""
    ready = build(resolve_config(cfg), keep=False)
    with current(ready.mesh):
        policy = PolicyEvaluation(ready, judge=False, samples=samples)
        found = policy.run(initial_state(ready))
        return found.rows, policy.metrics(found)
