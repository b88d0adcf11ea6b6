"""A reward model's scores of the SFT policy's samples: mean 0 and standard deviation 1, by its head alone."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import rm
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.run import build, feed, normalize
from jaxrlhf.run.checkpoint import restore
from jaxrlhf.run.initial_state import abstract_state
from jaxrlhf.types import TrainState
from tests.support import runs

SIZE = 200  # rm: algorithm.normalize_samples


@pytest.mark.parametrize(("mean", "std"), [(2.5, 0.3), (-40.0, 7.0), (0.0, 1.0)])
def test_the_fold_is_exact(mean, std):
    """(x k + b - mean) / std, as numpy has it in double precision."""
    rng = np.random.default_rng(0)
    hidden, kernel, bias = rng.normal(size=(50, 16)), rng.normal(size=(16, 1)), rng.normal(size=1)
    head = rm.fold({"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}, mean, std)
    found = hidden @ np.asarray(head["kernel"], np.float64) + np.asarray(head["bias"], np.float64)
    np.testing.assert_allclose(
        found, (hidden @ kernel + bias - mean) / std, rtol=1e-5, atol=1e-5 * abs(mean / std) + 1e-6
    )


def test_the_fold_keeps_the_dtype_and_survives_equal_scores():
    head = {"kernel": jnp.ones((4, 1), jnp.bfloat16), "bias": jnp.ones(1, jnp.bfloat16)}
    found = jax.jit(rm.fold)(head, 1.0, 0.0)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"bfloat16"}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found)) and found["bias"] == 0


@pytest.fixture(scope="module")
def trained(root) -> tuple[build.Run, TrainState]:
    """The reward model at the end of its run."""
    (done,) = runs.whole(root)
    assert done.code == 0, done.errors
    ready = build.build(resolve_config(runs.config("rm", root, root / "whole")), jax.devices()[:1])
    with jax.set_mesh(ready.mesh):
        return ready, restore(root / "whole" / "rm", 4, abstract_state(ready))


def scores(trained: tuple[build.Run, TrainState], seed: int, size: int = SIZE) -> np.ndarray:
    ready, state = trained
    with jax.set_mesh(ready.mesh):
        found, _ = normalize.score_policy_samples(
            ready, dataclasses.replace(state, seed=jnp.int32(seed)), ["reward"], size
        )
        return found["reward"]


def test_the_samples_that_it_was_normalised_on_have_mean_0_and_std_1(trained):
    """The same seed samples the same responses again, whatever the reward model."""
    found = scores(trained, 0)
    assert found.shape == (SIZE,)
    np.testing.assert_allclose(found.mean(), 0, atol=1e-4)
    np.testing.assert_allclose(found.std(ddof=1), 1, atol=1e-4)


def test_fresh_samples_have_them_too(trained):
    """Up to chance: 4 standard errors of a difference of means (and of standard deviations) of 200 numbers."""
    found = scores(trained, 12345)
    assert not np.allclose(found, scores(trained, 0), atol=1e-2)
    assert abs(found.mean()) < 4 * np.sqrt(2 / SIZE)
    assert abs(found.std(ddof=1) - 1) < 4 * np.sqrt(2 / (2 * SIZE))


def test_a_size_that_fills_no_batch(trained):
    """16 prompts a batch: of the last one only what is real counts."""
    np.testing.assert_allclose(scores(trained, 0, 21), scores(trained, 0)[:21], atol=1e-5)


def test_more_samples_than_prompts(trained, monkeypatch):
    """Three to each of 5 prompts, of which 13 are taken: the first of every prompt, then the second, and so on."""
    ready, state = trained
    few, asked = feed.training_prompts, []
    monkeypatch.setattr(
        feed, "training_prompts", lambda ready, size, rows=16: asked.append(rows) or few(ready, 5, rows)
    )
    with jax.set_mesh(ready.mesh):
        scored, prompts = normalize.score_policy_samples(ready, state, ["reward"], 13)
    found = scored["reward"]
    assert found.shape == (13,) and prompts == 5 and len(np.unique(found)) > 10
    assert asked == [16, 16 // 3]  # so many prompts at a time that their responses are no more than a batch


def test_what_it_says(root, trained):
    (done,) = runs.whole(root)
    (line,) = (line for line in done.outputs[0].splitlines() if line.startswith("reward model:"))
    found = re.fullmatch(
        r"reward model: scores of 200 samples of the policy had mean (\S+), std (\S+); now 0 and 1", line
    )
    assert found
    mean, std = map(float, found.groups())
    assert abs(mean) > 0.01 or abs(std - 1) > 0.01  # it had something to do


def test_only_the_head_changes(trained):
    ready, state = trained
    with jax.set_mesh(ready.mesh):
        found = normalize.finish(ready, state, say=lambda text: None)
    for role in ("trunk", "head"):
        pick = lambda tree, role=role: {k: v for k, v in tree["reward"].items() if (k == "head") == (role == "head")}
        pairs = zip(jax.tree.leaves(pick(found.params)), jax.tree.leaves(pick(state.params)), strict=True)
        # it is normalised already: once more changes rounding
        assert all(np.array_equal(a, b) if role == "trunk" else np.allclose(a, b, atol=1e-4) for a, b in pairs)
    assert found.opt_state is state.opt_state and found.step == state.step


@pytest.mark.parametrize("name", ["rm", "sft"])
def test_nothing_happens_unless_it_is_asked_for(root, tmp_path: Path, name):
    runs.whole(root)
    more = ["algorithm.normalize_samples=0"] if name == "rm" else []
    ready = build.build(resolve_config(runs.config(name, root, tmp_path, *more)), jax.devices()[:1])
    state = object()
    assert normalize.finish(ready, state, say=pytest.fail) is state  # type: ignore[arg-type]
