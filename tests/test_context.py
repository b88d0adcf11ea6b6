"""Rows whose columns are split over the mesh axis ``context``: losses, gradients and runs are those of one device."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithms.dpo import DPOConfig
from jaxrlhf.algorithms.sft import SFTConfig
from jaxrlhf.models.attention.context import column_order, in_order, spread, within_split_rows
from jaxrlhf.models.attention.kernels import within_rows
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.context import SplitRows
from jaxrlhf.models.nets import make_nets, no_sampling
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.run.transfer import put
from jaxrlhf.sharding import MeshConfig, constrain, current, make_mesh
from jaxrlhf.types import Ask, Batch, Sequences, Trees
from tests.models.test_kernels import Case
from tests.support import tiny

NIGHTLY = functools.partial(pytest.param, marks=pytest.mark.nightly)
ALONE = MeshConfig(1)


def mesh_of(cfg: MeshConfig):
    return make_mesh(cfg, jax.devices()[: cfg.data * cfg.fsdp * cfg.tensor * cfg.expert * cfg.context])


# ---- the order of columns -------------------------------------------------------------------------------------------


def test_a_device_has_an_early_and_a_late_chunk():
    assert column_order(16, 4).tolist() == [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
    read = np.tril(np.ones((16, 16)))[column_order(16, 4)].reshape(4, -1).sum(1)  # products of each device
    assert np.unique(read).tolist() == [34]


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_columns_go_there_and_back(devices):
    size = 6 * devices
    x = jnp.arange(2 * size * 3).reshape(2, size, 3)
    there = spread(x, devices)
    np.testing.assert_array_equal(there, x[:, column_order(size, devices)])
    np.testing.assert_array_equal(in_order(there, devices), x)
    split = SplitRows(size - 3, devices)
    assert split.padded == size
    np.testing.assert_array_equal(split.in_order(split.spread(x[:, : size - 3, 0])), x[:, : size - 3, 0])


# ---- attention ------------------------------------------------------------------------------------------------------


PLAIN, ALL = Case(2, 2, 256), Case(4, 2, 1160, window=140, softcap=1.5)
SINKS = Case(4, 2, 600, window=140, sinks=True)


def attention_inputs(rows: Case):
    """Segments, which are left padding, and packed documents with padding behind them; queries, keys, values; sinks."""
    rng = np.random.default_rng(0)
    make = lambda heads: rng.normal(size=(2, rows.size, heads, 16)).astype(np.float32)
    ids = np.zeros((2, rows.size), np.int32)
    ids[0, rows.size // 3 :] = 1
    ids[1, :-5] = 1 + np.arange(rows.size - 5) * 3 // rows.size
    sinks = (2 * rng.normal(size=rows.heads)).astype(np.float32) if rows.sinks else None
    return ids, make(rows.heads), make(rows.kv_heads), make(rows.kv_heads), sinks


def whole(x):
    """[B, S, H, K] whole on every device, but for rows."""
    return constrain(x, "batch", None, None, None)


def gathered_and_gradients(attend, ids, query, key, value, sinks, order=None):
    """What real tokens gather and the gradients of a loss of it, in order."""
    back = np.arange(ids.shape[1]) if order is None else np.argsort(order)
    real = jnp.asarray((ids > 0)[:, :, None, None])
    weights = jnp.cos(jnp.arange(query.size)).reshape(query.shape)

    def mix(x, name):
        return x if order is None else constrain(whole(x)[:, order], "batch", "seq", name, None)

    def loss(given):
        query, key, value, sinks = given
        sinks = sinks if sinks is None or order is None else constrain(sinks, "heads")
        out = attend(mix(query, "heads"), mix(key, "kv_heads"), mix(value, "kv_heads"), sinks)
        out = jnp.where(real, whole(out)[:, back], 0)
        return (out * weights).sum() + (out**2).sum(), out

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    (_, out), gradients = tiny.program(value_and_grad)((query, key, value, sinks))
    return jax.tree.map(np.asarray, (out, gradients))


@functools.cache
def attention_alone(rows: Case):
    ids, *given = attention_inputs(rows)
    attend = within_rows("xla", jnp.asarray(ids), rows.window, 0.3, rows.softcap)
    return gathered_and_gradients(attend, ids, *given)


@pytest.mark.parametrize(
    ("rows", "kernel", "mesh", "again"),
    [
        (SINKS, "splash", MeshConfig(1, context=2, tensor=2), True),
        NIGHTLY(SINKS, "xla", MeshConfig(1, context=2, tensor=2), True),
        NIGHTLY(ALL, "splash", MeshConfig(1, context=2, tensor=2), True),
        NIGHTLY(ALL, "splash", MeshConfig(1, context=4), False),
        NIGHTLY(PLAIN, "splash", MeshConfig(1, context=8), True),
        (PLAIN, "xla", MeshConfig(1, context=4), True),
        NIGHTLY(ALL, "xla", MeshConfig(1, context=2), False),
    ],
)
def test_attention_is_that_of_one_device(rows, kernel, mesh, again):
    """Splash through the Pallas interpreter, in blocks that divide neither chunks nor rows."""
    expected = attention_alone(rows)
    ids, query, key, value, sinks = attention_inputs(rows)
    with current(mesh_of(mesh)):
        where, query, key, value = tiny.put((ids, query, key, value))
        sinks = None if sinks is None else jnp.asarray(sinks)
        attend = within_split_rows(kernel, where, rows.window, 0.3, rows.softcap, interpret=True, gather_again=again)
        found = gathered_and_gradients(attend, ids, query, key, value, sinks, column_order(rows.size, mesh.context))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(other).max() > 0.5
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * max(1, np.abs(other).max()))


# ---- networks -------------------------------------------------------------------------------------------------------

# 23 columns, which two chunks a device do not divide; tensor = 2 does not divide the one kv head of the second
MODEL = dataclasses.replace(tiny.MODEL, num_layers=2)
WINDOWS = resolve(
    ModelConfig("gemma2", 50, 16, 2, num_heads=4, num_kv_heads=1, mlp_size=32, sliding_window=7, attention_softcap=5.0)
)
EXPERTS = resolve(ModelConfig("qwen3_moe", 64, 16, 2, mlp_size=8, num_experts=4, experts_per_token=2))
SINKING = resolve(
    ModelConfig(
        "gpt_oss", 64, 16, 2, 4, 2, head_dim=4, mlp_size=8, num_experts=4, experts_per_token=2, sliding_window=7
    )
)
READING: dict[str, Any] = {"layer_types": ("local", "global") * 2, "sliding_window": 7, "shared_kv_layers": 2}
UNEVEN = resolve(
    ModelConfig("gemma4_text", 64, 16, 4, 4, 2, head_dim=4, mlp_size=8, global_head_dim=8, per_layer_size=8, **READING)
)
SHAPED = Sampling(0.7, top_k=5, min_new_tokens=2, eos_ids=(1, 2))
ASKS = Ask("policy", "token_stats"), Ask("value", "values"), Ask("value", "scores"), Ask("value", "rewards")


def rows_of(kind: str) -> Sequences:
    """Left-padded prompts with responses behind them, of which every two share one; or packed documents."""
    if kind == "responses":
        return tiny.sequences(4, 5, 18)
    if kind == "shared":
        rows = tiny.sequences(4, 5, 18)
        same = lambda x: tiny.put(
            np.concatenate([np.repeat(np.asarray(x)[::2, :5], 2, axis=0), np.asarray(x)[:, 5:]], 1)
        )
        return rows.replace(tokens=same(rows.tokens), valid=same(rows.valid), copies=2)
    rows = tiny.sequences(4, 5, 18)
    ids = np.zeros((4, 23), np.int32)
    ids[:, :20] = 1 + (np.arange(20) + np.arange(4)[:, None]) * 3 // 24
    mask = np.pad((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0), ((0, 0), (1, 0)))
    ids, valid, mask = tiny.put((ids, ids > 0, mask))
    return rows.replace(valid=valid, response_mask=mask, segment_ids=ids, response_start=1, ended=None)


def answers_and_gradients(model: ModelConfig, kind: str, mesh: MeshConfig, stored: int | None, runtime: Runtime):
    """Answers at response tokens, and the gradients of a loss of all of them."""
    with current(mesh_of(mesh)), pytest.MonkeyPatch.context() as patched:
        if stored is not None:
            patched.setattr("jaxrlhf.models.nets.stored_logits", lambda platform: stored)
        nets = make_nets({"policy": model, "value": model}, runtime, SHAPED, no_sampling)
        params = {"policy": tiny.parameters(model, "lm", 0), "value": tiny.parameters(model, "scalar", 1)}
        rows = rows_of(kind)
        weights = tiny.put(np.cos(np.arange(rows.tokens.size)).reshape(rows.tokens.shape).astype(np.float32))

        def loss(params):
            stats, values, scores, rewards = nets.read(Trees(params, {}), rows, *ASKS)
            kept = [jnp.where(rows.response_mask, x, 0) for x in (stats.logprobs, stats.entropy, values, rewards)]
            return sum((x * weights).sum() for x in kept) + (scores**2).sum(), (*kept, scores)

        (_, answers), gradients = tiny.program(jax.value_and_grad(loss, has_aux=True))(params)
        return jax.tree.map(np.asarray, (answers, gradients))


@functools.cache
def alone(model: ModelConfig, kind: str):
    return answers_and_gradients(model, kind, ALONE, None, Runtime())


@pytest.mark.parametrize(
    ("model", "kind", "mesh", "stored", "remat"),
    [
        (WINDOWS, "shared", MeshConfig(1, tensor=2, context=2), None, "none"),
        (MODEL, "packed", MeshConfig(1, fsdp=2, context=4), 100, "full"),  # logits in chunks
        NIGHTLY(WINDOWS, "packed", MeshConfig(1, context=4), None, "dots"),
        NIGHTLY(WINDOWS, "responses", MeshConfig(1, fsdp=2, tensor=2, context=2), 100, "none"),
        NIGHTLY(MODEL, "responses", MeshConfig(1, context=8), None, "none"),
        NIGHTLY(MODEL, "shared", MeshConfig(2, context=2), 100, "dots"),
        NIGHTLY(EXPERTS, "responses", MeshConfig(1, fsdp=2, context=2, expert=2), None, "none"),
        NIGHTLY(SINKING, "responses", MeshConfig(1, fsdp=2, tensor=2, context=2), None, "none"),
        NIGHTLY(EXPERTS, "packed", MeshConfig(1, fsdp=2, context=4), 100, "full"),
        NIGHTLY(UNEVEN, "packed", MeshConfig(1, fsdp=2, context=4), 100, "full"),  # embeddings of layers are exchanged
        NIGHTLY(UNEVEN, "shared", MeshConfig(1, tensor=2, context=2), None, "none"),
    ],
)
def test_answers_and_gradients_are_those_of_one_device(model, kind, mesh, stored, remat):
    """Also where a token and the state before it are on two devices, at the border of chunks."""
    expected = alone(model, kind)
    found = answers_and_gradients(model, kind, mesh, stored, Runtime(remat=remat))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * max(1.0, np.abs(other).max()))
    assert all(np.abs(x).max() > 0.1 for x in expected[0])


# ---- whole iterations; those of grpo are in test_mesh.py -----------------------------------------------------------

SMOOTH = dataclasses.replace(tiny.ADAM, eps=1e-2)  # else a gradient of rounding alone moves a weight as any other
RUNS: dict[str, tuple[str, Any, dict]] = {
    "sft": ("sft", SFTConfig(), {"num_micro": 2}),
    "dpo": ("dpo", DPOConfig(), {}),
}


@functools.cache
def iterated(which: str, mesh: MeshConfig) -> tuple[list[dict[str, float]], Any]:
    """Metrics of two iterations, and the policy behind them."""
    name, cfg, options = RUNS[which]
    with current(made := mesh_of(mesh)):
        batch = Batch(sequences=tiny.sequences(8, 5, 18), preferences=tiny.preferences(8, 5, 18))
        run = tiny.build(name, cfg, batch=batch, optimizer=SMOOTH, **options)
        step, state, batch = tiny.program(steps.make_iteration(run.recipe)), run.state, put(made, run.batch)
        found = []
        for _ in range(2):
            state, metrics, _ = step(state, batch)
            found.append({name: float(value) for name, value in metrics.items()})
        return found, jax.tree.map(np.asarray, state.params["policy"])


@pytest.mark.parametrize(
    ("which", "mesh"),
    [
        ("sft", MeshConfig(1, fsdp=2, context=4)),
        ("dpo", MeshConfig(1, tensor=2, context=2)),
        NIGHTLY("sft", MeshConfig(1, fsdp=2, tensor=2, context=2)),
        NIGHTLY("dpo", MeshConfig(1, fsdp=2, context=4)),
    ],
)
def test_iterations_are_those_of_one_device(which, mesh):
    (expected, before), (found, after) = iterated(which, ALONE), iterated(which, mesh)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-4, err_msg=name)
    assert expected[0] != expected[1]
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


# ---- memory ---------------------------------------------------------------------------------------------------------


def temporaries(mesh: MeshConfig, columns: int) -> int:
    """Bytes of a device that an update of two rows of so many columns needs beside its arguments."""
    with current(made := mesh_of(mesh)):
        batch = Batch(sequences=tiny.sequences(2, 1, columns - 1))
        run = tiny.build("sft", SFTConfig(), batch=batch, remat="full")
        program = tiny.program(steps.make_iteration(run.recipe)).lower(run.state, put(made, run.batch)).compile()
        memory = program.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes


@pytest.mark.parametrize("context", [4, NIGHTLY(2), NIGHTLY(8)])
def test_an_update_of_a_long_row_takes_less_memory_by_the_size_of_the_axis(context):
    """Nothing of a row's length but its tokens, and keys and values of one layer, is whole on a device."""
    whole, split = temporaries(ALONE, 4096), temporaries(MeshConfig(1, context=context), 4096)
    assert 0.95 * context < whole / split < 1.05 * context, (whole, split)
