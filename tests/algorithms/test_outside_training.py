"""Algorithms written outside the package, against its records alone: they are found by name and train."""

from typing import Any

import jax
import numpy as np

from jaxrlhf.step import make_iteration
from jaxrlhf.types import Batch, Metrics, TrainState
from tests.algorithms.outside import kto_shaped, moving_reference
from tests.support import tiny

WHERE = "tests.algorithms.outside"


def trained(name: str, cfg: Any, batch: Batch, iterations: int = 2) -> tuple[list[TrainState], list[Metrics]]:
    """(the states, from the first on; the metrics of each iteration) of the algorithm in module ``name``."""
    run = tiny.build(f"{WHERE}.{name}:ALGORITHM", cfg, batch=batch)
    step, states, metrics = tiny.program(make_iteration(run.recipe)), [run.state], []
    for _ in range(iterations):
        state, numbers, sequences = step(states[-1], run.batch)
        assert sequences is None
        states.append(state)
        metrics.append(numbers)
    return states, metrics


def test_a_kto_shaped_algorithm_tells_good_responses_from_bad():
    states, (first, second) = trained("kto_shaped", kto_shaped.Config(beta=0.5), Batch(unpaired=tiny.unpaired()))
    assert second["loss/policy"] < first["loss/policy"]
    assert second["ratio/good"] - second["ratio/bad"] > first["ratio/good"] - first["ratio/bad"]
    assert tiny.equal_trees(states[0].slow, states[2].slow)
    assert not tiny.equal_trees(states[0].params, states[2].params)


def test_a_slow_role_follows_the_policy():
    """As a NumPy loop has it. In the first iteration the two are equal, so that there is no KL."""
    cfg = moving_reference.Config(polyak=0.25)
    states, (first, second) = trained("moving_reference", cfg, Batch(sequences=tiny.sequences()))
    assert second["loss/policy"] < first["loss/policy"]
    assert np.isclose(first["kl/reference"], 0, atol=1e-6) and second["kl/reference"] > 1e-6
    expected = jax.tree.map(lambda x: np.asarray(x, np.float64), states[0].slow["reference"])
    for state in states[1:]:
        expected = jax.tree.map(lambda new, old: 0.25 * np.asarray(new) + 0.75 * old, state.params["policy"], expected)
        pairs = zip(jax.tree.leaves(state.slow["reference"]), jax.tree.leaves(expected), strict=True)
        for found, wanted in pairs:
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert not tiny.equal_trees(states[1].slow, states[2].slow)
