"""Schedules against hand numbers; what is clipped, decayed and in which dtype it is kept."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.optim import WINDOW, OptimizerConfig, is_matrix, make_optimizer, make_schedule, notice_spike
from tests.support.tiny import parameters

RATE = 0.1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # steps:                  0     1      2     3      4     6       8     12
        ({}, [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]),
        ({"warmup_steps": 4}, [0.0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1]),
        ({"schedule": "linear"}, [0.1, 0.0875, 0.075, 0.0625, 0.05, 0.025, 0.0, 0.0]),
        ({"schedule": "linear", "final_fraction": 0.5}, [0.1, 0.09375, 0.0875, 0.08125, 0.075, 0.0625, 0.05, 0.05]),
        ({"schedule": "linear", "warmup_steps": 4}, [0.0, 0.025, 0.05, 0.075, 0.1, 0.05, 0.0, 0.0]),
        ({"schedule": "cosine"}, [0.1, 0.096194, 0.0853553, 0.0691342, 0.05, 0.0146447, 0.0, 0.0]),
        (
            {"schedule": "cosine", "warmup_steps": 4, "final_fraction": 0.2},
            [0.0, 0.025, 0.05, 0.075, 0.1, 0.06, 0.02, 0.02],
        ),
    ],
)
def test_schedules(options, expected):
    schedule: Any = make_schedule(OptimizerConfig(learning_rate=RATE, **options), total_steps=8)
    found = [float(schedule(step)) for step in (0, 1, 2, 3, 4, 6, 8, 12)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_warmup_longer_than_the_run_stays_finite():
    schedule: Any = make_schedule(
        OptimizerConfig(learning_rate=RATE, schedule="cosine", warmup_steps=10), total_steps=5
    )
    assert all(np.isfinite(float(schedule(step))) for step in range(20))
    np.testing.assert_allclose(float(schedule(5)), 0.05, atol=1e-6)


def updates(cfg: OptimizerConfig, params, grads, steps: int = 1) -> tuple[Any, Any]:
    """The last of ``steps`` updates by a constant gradient, and the state after it."""
    optimizer = make_optimizer(cfg, total_steps=8)
    state = optimizer.init(params)
    for _ in range(steps):
        update, state = optimizer.update(grads, state, params, norm=optax.tree.norm(grads))
    return update, state


def test_adam_by_hand():
    cfg = OptimizerConfig(learning_rate=RATE, b1=0.9, b2=0.99, eps=1e-8, clip_norm=None)
    params, grads = {"kernel": jnp.zeros(2)}, {"kernel": jnp.array([3.0, -0.5])}
    update, _ = updates(cfg, params, grads, steps=3)
    np.testing.assert_allclose(
        update["kernel"], [-0.1, 0.1], rtol=1e-5
    )  # a constant gradient: the sign, whatever its size
    optimizer = make_optimizer(cfg, 8)
    state = optimizer.init(params)
    _, state = optimizer.update(grads, state, params, norm=None)
    update: Any = optimizer.update({"kernel": jnp.array([-1.0, 0.0])}, state, params, norm=None)[0]
    first = (0.9 * 0.1 * 3.0 + 0.1 * -1.0) / (1 - 0.9**2)
    second = (0.99 * 0.01 * 9.0 + 0.01 * 1.0) / (1 - 0.99**2)
    np.testing.assert_allclose(update["kernel"][0], -RATE * first / np.sqrt(second), rtol=1e-5)


def test_weight_decay_takes_kernels_and_embeddings_only():
    cfg = OptimizerConfig(learning_rate=RATE, weight_decay=0.5)
    shape = resolve(
        ModelConfig(family="gpt2", vocab_size=64, hidden_size=8, num_layers=1, num_heads=2, max_positions=8)
    )
    params = parameters(shape, "scalar", 0)
    decayed = is_matrix(params)
    attention = decayed["layers"]["attention"]
    assert attention["query"] == {"kernel": True, "bias": False} and attention["norm"] == {
        "scale": False,
        "bias": False,
    }
    assert decayed["embed"] == {"tokens": {"embedding": True}, "positions": {"embedding": True}}
    assert decayed["final_norm"] == {"scale": False, "bias": False} and decayed["head"] == {
        "kernel": True,
        "bias": False,
    }
    params = {"up": {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}, "norm": {"scale": jnp.array([2.0])}}
    update, _ = updates(
        cfg, params, {"up": {"kernel": jnp.zeros(1), "bias": jnp.zeros(1)}, "norm": {"scale": jnp.zeros(1)}}
    )
    np.testing.assert_allclose(update["up"]["kernel"], [-RATE * 0.5 * 2.0], rtol=1e-6)  # decoupled: not through Adam
    assert update["up"]["bias"] == 0 and update["norm"]["scale"] == 0


@pytest.mark.parametrize(("clip_norm", "scale"), [(None, 1.0), (1.0, 0.2), (10.0, 1.0)])
def test_clip_is_by_the_norm_over_all_leaves(clip_norm, scale):
    grads = {"kernel": jnp.array([3.0]), "bias": jnp.array([-4.0])}
    cfg = OptimizerConfig(clip_norm=clip_norm, b1=0.9)
    _, state = updates(cfg, {"kernel": jnp.zeros(1), "bias": jnp.zeros(1)}, grads)
    moment = optax.tree.get(state, "mu")  # 0.1 of the gradient that came through the clip
    np.testing.assert_allclose([moment["kernel"][0], moment["bias"][0]], [0.3 * scale, -0.4 * scale], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_moment_is_kept_in_the_dtype_asked_for(dtype):
    params = {"kernel": jnp.ones(2)}
    _, state = updates(OptimizerConfig(dtype=dtype), params, params)
    assert optax.tree.get(state, "mu")["kernel"].dtype == jnp.dtype(dtype)
    assert optax.tree.get(state, "nu")["kernel"].dtype == jnp.float32


def test_a_spike_is_one_of_the_last_updates_by_hand():
    """Against NumPy, update by update: nothing before half a window, then what is above mean + 3 deviations."""
    random, sigmas, seen = np.random.default_rng(0), 3.0, []
    optimizer = make_optimizer(OptimizerConfig(spike_sigmas=sigmas), 8)
    state, notice = optimizer.init({"kernel": jnp.zeros(1)}), jax.jit(notice_spike, static_argnums=3)
    for update in range(WINDOW + 40):
        pair = random.normal(size=2).astype(np.float32) + (8 if update in (10, WINDOW // 2, WINDOW + 20) else 0)
        counts = update % 7 != 5
        if update == 30:
            pair[1] = np.nan
        spike, state = notice(state, pair[0], pair[1], sigmas, counts)
        last = np.array(seen[-WINDOW:])
        expected = len(last) >= WINDOW // 2 and (pair > last.mean(axis=0) + sigmas * last.std(axis=0, ddof=1)).any()
        assert bool(spike) == bool(expected and counts), update
        if counts and np.isfinite(pair).all():
            seen.append(pair)
    np.testing.assert_array_equal(optax.tree.get(state, "recent"), np.array(seen[-WINDOW:]).T)


def test_without_spike_sigmas_nothing_is_kept_of_updates():
    state = make_optimizer(OptimizerConfig(), 8).init({"kernel": jnp.zeros(1)})
    assert optax.tree.get(state, "recent", None) is None
