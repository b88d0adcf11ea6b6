"""Schedules against hand numbers; what is clipped, decayed and in which dtype it is kept."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.lora import LoraConfig, own_table
from jaxrlhf.models.matrices import layer_matrices
from jaxrlhf.models.parameters import parameter_table
from jaxrlhf.ops.newton_schulz import MatrixAxes
from jaxrlhf.optim import WINDOW, OptimizerConfig, is_matrix, learning_rate, make_optimizer, make_schedule, notice_spike
from jaxrlhf.run.checkpoint import Checkpoints, restore
from jaxrlhf.sharding import MeshConfig, concrete, make_mesh
from jaxrlhf.types import TrainState
from tests.support import tiny
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
    notice: Any = jax.jit(notice_spike, static_argnums=3)
    state = optimizer.init({"kernel": jnp.zeros(1)})
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
    assert notice._cache_size() == 1, "the state comes out as it went in, also in whether its type is weak"


def test_without_spike_sigmas_nothing_is_kept_of_updates():
    state = make_optimizer(OptimizerConfig(), 8).init({"kernel": jnp.zeros(1)})
    assert optax.tree.get(state, "recent", None) is None


# ---- Muon -----------------------------------------------------------------------------------------------------------

ATTENTION = {
    **{f"layers.attention.{name}.kernel": MatrixAxes(1, 1) for name in ("query", "key", "value")},
    "layers.attention.out.kernel": MatrixAxes(1, 2),
}
DENSE = {f"layers.mlp.{name}.kernel": MatrixAxes(1, 1) for name in ("gate", "up", "down")}
EXPERTS = {f"layers.mlp.experts.{name}.kernel": MatrixAxes(2, 1) for name in ("gate", "up", "down")}
DELTA = {
    **{f"layers.delta.delta_{name}.kernel": MatrixAxes(1, 1) for name in ("query", "key", "value", "gate")},
    **{f"layers.delta.delta_{name}.kernel": MatrixAxes(1, 1) for name in ("decay", "beta")},
    "layers.delta.delta_out.kernel": MatrixAxes(1, 2),
}
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_heads": 2, "mlp_size": 32}
HYBRID = ModelConfig(
    "qwen3_5_text",
    num_layers=2,
    layer_types=("linear", "global"),
    linear_key_heads=2,
    linear_value_heads=4,
    linear_key_dim=8,
    linear_value_dim=8,
    **SIZES,
)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (ModelConfig("llama", num_layers=2, **SIZES), ATTENTION | DENSE),
        (
            ModelConfig("qwen3_moe", num_layers=2, num_experts=4, experts_per_token=2, **SIZES),
            ATTENTION | EXPERTS | {"layers.mlp.router.kernel": MatrixAxes(1, 1)},
        ),
        (HYBRID, ATTENTION | DENSE | DELTA),
    ],
    ids=["llama", "qwen3_moe", "qwen3_5"],
)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_muon_takes_the_matrices_of_the_layers(shape, expected, head):
    """Not embeddings, the head, norms, biases, convolutions, nor the rates of a delta net."""
    found = layer_matrices(parameter_table(resolve(shape), head))
    assert {".".join(path): axes for path, axes in found.items()} == expected


def test_muon_takes_nothing_of_an_adapter_or_of_a_head():
    shape = resolve(HYBRID)
    assert not layer_matrices(own_table(shape, "scalar", LoraConfig(rank=2)))
    assert not layer_matrices(parameter_table(shape, "bare"))


MUON = OptimizerConfig(name="muon", learning_rate=RATE, clip_norm=None, newton_schulz_steps=4)
PATH = ("layers", "up", "kernel")


def pair(kernel, scale) -> dict:
    """One stacked kernel, and a norm beside it."""
    return {"layers": {"up": {"kernel": kernel}}, "norm": {"scale": scale}}


def orthogonal(x: np.ndarray, steps: int) -> np.ndarray:
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_muon_by_a_numpy_loop():
    """Two layers of 3 x 5, three updates by other gradients: momentum, Nesterov, size, weight decay, schedule; Adam of
    the norm beside it, at the same rate."""
    random, decay = np.random.default_rng(0), 0.5
    cfg = dataclasses.replace(MUON, weight_decay=decay, momentum=0.8, schedule="linear")
    optimizer = make_optimizer(cfg, 8, {PATH: MatrixAxes(1, 1)})
    params: Any = pair(jnp.asarray(random.normal(size=(2, 3, 5)), jnp.float32), jnp.ones(4))
    state, summed = optimizer.init(params), np.zeros((2, 3, 5))
    for step in range(3):
        grads = pair(jnp.asarray(random.normal(size=(2, 3, 5)), jnp.float32), jnp.full(4, 2.0))
        update: Any
        update, state = optimizer.update(grads, state, params, norm=None)
        gradient = np.asarray(grads["layers"]["up"]["kernel"], np.float64)
        summed = 0.8 * summed + gradient
        made = np.stack([orthogonal(matrix, 4) for matrix in gradient + 0.8 * summed])
        rate = RATE * (1 - step / 8)
        expected = -rate * (0.2 * np.sqrt(5) * made + decay * np.asarray(params["layers"]["up"]["kernel"]))
        np.testing.assert_allclose(update["layers"]["up"]["kernel"], expected, atol=1e-5)
        np.testing.assert_allclose(update["norm"]["scale"], -rate, rtol=1e-4)
        params = optax.apply_updates(params, update)


def test_muon_is_that_of_optax_without_momentum():
    """With momentum they differ by the correction of optax for its first steps. The tree is a model's."""
    shape = resolve(dataclasses.replace(HYBRID, num_experts=0))
    params, matrices = parameters(shape, "lm", 0), layer_matrices(parameter_table(shape, "lm"))

    def numbers(path, x):
        if (axes := matrices.get(tuple(part.key for part in path))) is None:
            return None
        ins = axes.stack + axes.inputs
        return optax.contrib.MuonDimensionNumbers(tuple(range(axes.stack, ins)), tuple(range(ins, x.ndim)))

    cfg = dataclasses.replace(MUON, momentum=0.0, newton_schulz_steps=5)
    theirs = optax.contrib.muon(
        RATE,
        beta=0.0,
        nesterov=False,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=jax.tree_util.tree_map_with_path(numbers, params),
    )
    adam = optax.adamw(RATE, weight_decay=0.0)
    ours, grads = make_optimizer(cfg, 8, matrices), jax.tree.map(lambda x: x + 0.01, params)
    found, _ = jax.jit(ours.update)(grads, ours.init(params), params, norm=jnp.float32(1))
    expected, _ = jax.jit(theirs.update)(grads, theirs.init(params), params)
    rest, _ = jax.jit(adam.update)(grads, adam.init(params), params)

    def check(path, ours, theirs, rest):
        taken = tuple(part.key for part in path) in matrices  # their Adam is Nesterov's
        np.testing.assert_allclose(ours, theirs if taken else rest, atol=1e-5, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, found, expected, rest)
    sizes = [float(jnp.sqrt((found["layers"]["mlp"][name]["kernel"] ** 2).mean())) for name in ("gate", "down")]
    np.testing.assert_allclose(sizes, 0.2 * RATE, rtol=0.3)  # in learning rates, whatever the shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_muon_keeps_one_moment_of_a_matrix(dtype):
    params = pair(jnp.ones((2, 3, 5)), jnp.ones(4))
    state = make_optimizer(dataclasses.replace(MUON, dtype=dtype), 8, {PATH: MatrixAxes(1, 1)}).init(params)
    assert sorted((x.dtype.name, x.shape) for x in jax.tree.leaves(state) if x.ndim) == sorted(
        [(dtype, (2, 3, 5)), (dtype, (4,)), ("float32", (4,))]
    )


def test_muon_is_clipped_before_its_momentum_and_tells_its_rate_and_spikes():
    cfg = dataclasses.replace(MUON, clip_norm=1.0, spike_sigmas=6.0, schedule="linear")
    optimizer = make_optimizer(cfg, 8, {PATH: MatrixAxes(1, 1)})
    params = pair(jnp.ones((2, 3, 5)), jnp.ones(4))
    state = optimizer.init(params)
    for step in range(3):
        assert float(learning_rate(make_schedule(cfg, 8), state)) == pytest.approx(RATE * (1 - step / 8))
        _, state = optimizer.update(params, state, params, norm=jnp.float32(4))
    (trace,) = (x for x in jax.tree.leaves(state) if x.shape == (2, 3, 5))
    np.testing.assert_allclose(trace, (1 + 0.95 + 0.95**2) / 4, rtol=1e-6)
    assert optax.tree.get(state, "recent").shape == (2, WINDOW)


def muon_updates(mesh: MeshConfig | None, steps: int, state: Any = None) -> tuple[Any, Any, Any]:
    """(parameters, state of the optimizer, shapes of both) after ``steps`` updates of a tiny mixture on ``mesh``, going
    on from ``state``; gradients are the parameters."""
    shape = resolve(ModelConfig("qwen3_moe", num_layers=3, num_experts=4, experts_per_token=2, **SIZES))
    optimizer = make_optimizer(MUON, 8, layer_matrices(parameter_table(shape, "lm")))
    with jax.set_mesh(here := make_mesh(mesh or MeshConfig(1), jax.devices()[: 8 if mesh else 1])):
        params = parameters(shape, "lm", 0)
        moments = jax.jit(optimizer.init)(params)
        described = concrete(jax.eval_shape(lambda: (params, moments)), here)
        params, moments = state or (params, moments)

        def update(params, moments):
            updates, moments = optimizer.update(params, moments, params, norm=jnp.float32(1))
            return optax.apply_updates(params, updates), moments

        program = tiny.program(update)
        for _ in range(steps):
            params, moments = program(params, moments)
    return params, moments, described


@pytest.mark.parametrize("mesh", [MeshConfig(1, 8), MeshConfig(1, 2, 2, expert=2)], ids=["fsdp", "all"])
def test_muon_on_a_mesh_is_that_of_one_device_and_goes_on_bitwise(mesh, tmp_path):
    """Moments are laid out as their parameters are, before and after updates, and come back from a checkpoint."""
    alone, _, _ = muon_updates(None, 4)
    params, moments, described = muon_updates(mesh, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5), params, alone)
    of = {(x.shape, x.sharding.spec) for x in jax.tree.leaves(params)}
    assert {(x.shape, x.sharding.spec) for x in jax.tree.leaves(moments) if x.ndim} <= of
    layouts = lambda tree: jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), tree)
    assert layouts((params, moments)) == layouts(described)
    half, then, _ = muon_updates(mesh, 2)
    saved = Checkpoints(tmp_path)
    wrapped = lambda params, moments: TrainState(jnp.int32(2), jnp.int32(0), {"p": params}, {}, {"p": moments}, {})
    saved.save(2, wrapped(half, then), {})
    saved.close()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wrapped(*described))
    found = restore(tmp_path, 2, abstract)
    again = muon_updates(mesh, 2, (found.params["p"], found.opt_state["p"]))[:2]
    assert tiny.equal_trees(again, (params, moments))
