"""Kernels split over fsdp: gathered for a pass and again for the next, kept by none. test_transformer has the maths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import sharding
from jaxrlhf.models import linear
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.heads import gathered_head, lm_logits
from jaxrlhf.models.transformer import Runtime, forward
from jaxrlhf.ops.logprobs import in_chunks, token_logprobs
from jaxrlhf.plan import hlo
from jaxrlhf.run import state as states
from jaxrlhf.sharding import MeshConfig, current, make_mesh, row_layout
from tests.support import tiny

ROWS, COLUMNS, WIDTH = 8, 8, 128
LAYER = 4 * WIDTH**2 + 3 * WIDTH * 4 * WIDTH  # elements of the seven kernels
SHARED = [MeshConfig(1, 8, 1), MeshConfig(2, 4, 1, decode=2)]


def model(layers: int) -> ModelConfig:
    return resolve(
        ModelConfig(vocab_size=64, hidden_size=WIDTH, num_layers=layers, num_heads=4, mlp_size=4 * WIDTH, head_dim=32)
    )


def gradients(cfg: ModelConfig, runtime: Runtime):
    """(params, tokens, segment_ids) -> gradients of a sum of all states."""
    total = lambda params, tokens, segment_ids: (forward(params, cfg, tokens, segment_ids, runtime) ** 3).sum()
    return jax.grad(total)


@functools.cache
def compiled(mesh_cfg: MeshConfig, remat, layers: int) -> jax.stages.Compiled:
    mesh, cfg = make_mesh(mesh_cfg, jax.devices()[:8]), model(layers)
    rows = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.int32, sharding=row_layout(mesh, 2))
    with current(mesh):
        params = states.abstract_params(cfg, "lm", jnp.float32, mesh)
        return jax.jit(gradients(cfg, Runtime(remat=remat))).lower(params, rows, rows).compile()


@pytest.mark.parametrize(
    ("mesh", "remat"),
    [
        pytest.param(mesh, remat, id=f"{name}-{remat}", marks=[] if (number, turn) == (1, 1) else pytest.mark.nightly)
        for number, (mesh, name) in enumerate(zip(SHARED, ["fsdp", "data, fsdp, decode"], strict=True))
        for turn, remat in enumerate(["none", "full", "dots"])
    ],
)
def test_a_layer_adds_its_part_of_the_weights_and_gathers_twice(mesh, remat):
    """Bytes of a device that four more layers add, and gathers of kernels: one forward and one backward each."""
    few, many = (compiled(mesh, remat, layers) for layers in (2, 6))
    memory = [one.memory_analysis() for one in (few, many)]
    assert memory[0] is not None and memory[1] is not None
    added = (memory[1].temp_size_in_bytes - memory[0].temp_size_in_bytes) / 4
    assert added < 4 * LAYER, "of float32: kept whole, it would add more"
    for program, layers in ((few, 2), (many, 6)):
        entry, computations = hlo.parse(program.as_text() or "")
        runs, _ = hlo.executions(entry, computations)
        every = [(runs[name], line) for name, lines in computations.items() for line in lines]
        sizes = [(count, hlo.transferred(line)) for count, line in every if hlo.kind_of(line) == "all-gather"]
        gathered = sum(count for count, size in sizes if size >= 4 * WIDTH**2)
        assert gathered == 2 * 7 * layers


@pytest.mark.nightly  # by day: gradients in steps, below
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_gradients_are_those_of_kernels_that_are_kept(remat, monkeypatch):
    cfg, mesh = model(2), make_mesh(SHARED[0], jax.devices()[:8])
    rng = np.random.default_rng(0)
    tokens, segments = rng.integers(0, 64, (ROWS, COLUMNS), np.int32), np.ones((ROWS, COLUMNS), np.int32)
    with current(mesh):
        params, rows = tiny.parameters(cfg, "lm", 0), tiny.put((tokens, segments))
        found = tiny.program(gradients(cfg, Runtime(remat=remat)))(params, *rows)
        monkeypatch.setattr(linear, "split_over", lambda *_: 1)
        kept = tiny.program(gradients(cfg, Runtime()))(params, *rows)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(kept), strict=True):
        assert np.abs(theirs).max() > 1e-3
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.nightly  # by day: what a layer gathers, above
def test_gradients_in_steps_are_those_of_one(monkeypatch):
    """Within decode groups first, then over fsdp; the program says so twice for each of seven kernels."""
    cfg, mesh = model(2), make_mesh(SHARED[1], jax.devices()[:8])
    rng = np.random.default_rng(0)
    tokens, segments = rng.integers(0, 64, (ROWS, COLUMNS), np.int32), np.ones((ROWS, COLUMNS), np.int32)

    def found(steps: bool):
        monkeypatch.setattr(sharding, "in_steps", lambda _: steps)
        with current(mesh):
            arguments = tiny.parameters(cfg, "lm", 0), *tiny.put((tokens, segments))
            function = gradients(cfg, Runtime())
            return tiny.program(function)(*arguments), str(jax.make_jaxpr(function)(*arguments)).count("reshard")

    (one, few), (two, many) = found(False), found(True)
    assert many >= few + 2 * 7
    for ours, theirs in zip(jax.tree.leaves(two), jax.tree.leaves(one), strict=True):
        assert np.abs(theirs).max() > 1e-3
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


def test_on_devices_that_share_no_weights_nothing_is_computed_twice():
    """No checkpoint: the layers' seven products of the program forward, fourteen backward, and attention's."""
    cfg, rows = model(2), jnp.ones((ROWS, COLUMNS), jnp.int32)

    def text(mesh_cfg: MeshConfig) -> str:
        mesh = make_mesh(mesh_cfg, jax.devices()[: mesh_cfg.data * mesh_cfg.fsdp])
        with current(mesh):
            params = states.abstract_params(cfg, "lm", jnp.float32, mesh)
            return str(jax.make_jaxpr(gradients(cfg, Runtime()))(params, *tiny.put((np.asarray(rows),) * 2)))

    products = {
        name: text(cfg).count("dot_general") for name, cfg in (("one", MeshConfig(1)), ("copies", MeshConfig(8)))
    }
    assert products == {"one": 3 * (7 + 2), "copies": 3 * (7 + 2)}
    assert "remat" not in text(MeshConfig(1)) + text(MeshConfig(8))
    assert "remat" in text(SHARED[0])


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_of_the_head_is_summed_once(tied):
    """However many chunks of logits add to it; and it is that of one device."""
    vocab, chunks = 256, 4
    shape = ModelConfig(vocab_size=vocab, hidden_size=WIDTH, num_layers=1, num_heads=4, tie_embeddings=tied)
    cfg, rng = resolve(shape), np.random.default_rng(0)
    states = rng.normal(size=(ROWS, COLUMNS, WIDTH)).astype(np.float32)
    tokens = rng.integers(0, vocab, (ROWS, COLUMNS), np.int32)

    def compiled(mesh_cfg: MeshConfig):
        mesh = make_mesh(mesh_cfg, jax.devices()[: mesh_cfg.data * mesh_cfg.fsdp * mesh_cfg.tensor])
        stored = ROWS * COLUMNS * vocab // mesh.size // chunks

        def total(params, states, tokens):
            head = gathered_head(params, jnp.float32)
            logits_of = lambda states, _: lm_logits(head, cfg, states)
            return in_chunks(token_logprobs, states, tokens, logits_of, vocab, stored).logprobs.sum()

        with current(mesh):
            every = tiny.parameters(cfg, "lm", 0)
            params = {name: every[name] for name in (("embed",) if tied else ("head",))}
            arguments = params, *tiny.put((states, tokens))
            program = jax.jit(jax.grad(total), compiler_options=tiny.FAST).lower(*arguments).compile()
            return program, jax.device_get(program(*arguments))

    _, wanted = compiled(MeshConfig(1))
    program, found = compiled(MeshConfig(2, 2, 2, decode=2))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    entry, computations = hlo.parse(program.as_text() or "")
    runs, _ = hlo.executions(entry, computations)
    sums = [
        runs[name]
        for name, lines in computations.items()
        for line in lines
        if hlo.kind_of(line) in ("all-reduce", "reduce-scatter") and hlo.transferred(line) >= 4 * vocab * WIDTH // 2
    ]
    assert max(runs.values()) >= chunks and sums and set(sums) == {1}


EQUATIONS = {
    "bsd,dhk->bshk": ((2, 3, 4), (4, 5, 2), ("embed", "heads", "head_dim")),
    "bshk,hkd->bsd": ((2, 3, 5, 2), (5, 2, 4), ("heads", "head_dim", "embed")),
    "bsd,dm->bsm": ((2, 3, 4), (4, 6), ("embed", "mlp")),
    "bsd,vd->bsv": ((2, 3, 4), (6, 4), ("vocab", "embed")),
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_gradients_of_a_product_are_those_that_jax_derives(equation):
    """And nothing is transposed on the way but the kernel's gradient, where the kernel begins with what is made."""
    (x_shape, kernel_shape, axes), rng = EQUATIONS[equation], np.random.default_rng(0)
    x, kernel = rng.normal(size=x_shape).astype(np.float32), rng.normal(size=kernel_shape).astype(np.float32)
    weight = rng.normal(size=jnp.einsum(equation, x, kernel).shape).astype(np.float32)
    out_axes = ("batch", "seq", "hidden", None)[: weight.ndim]
    ours = lambda x, kernel: (weight * linear.linear({"kernel": kernel}, x, equation, axes, out_axes)).sum()
    theirs = lambda x, kernel: (weight * jnp.einsum(equation, x, kernel)).sum()
    found, expected = (jax.grad(total, argnums=(0, 1))(x, kernel) for total in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    program = str(jax.make_jaxpr(jax.grad(ours, argnums=1))(x, kernel))
    logits = equation == "bsd,vd->bsv"
    assert program.count("transpose") == program.count("f32[6,4] = transpose") == logits
    assert "transpose" in str(jax.make_jaxpr(jax.grad(theirs, argnums=1))(x, kernel)) or logits
