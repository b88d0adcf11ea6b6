"""Attention kernels against ours: splash through the Pallas interpreter, and what cuDNN is told, computed by XLA."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import sharding
from jaxrlhf.models.attention import kernels
from jaxrlhf.models.attention.kernels import (
    Hardware,
    blocks,
    choose_kernel,
    hardware_of,
    passed_over,
    tree,
    within_groups,
    within_rows,
)
from jaxrlhf.models.attention.products import head_axis, match_heads
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.decoding import Cache, decode_layout, decode_step, prefill
from jaxrlhf.models.heads import lm_logits
from jaxrlhf.models.transformer import Runtime, forward
from jaxrlhf.sharding import MeshConfig
from tests.support import tiny

CPU, TPU = Hardware(), Hardware("tpu")
A100, H100, V100 = Hardware("gpu", 8.0), Hardware("gpu", 9.0), Hardware("gpu", 7.0)
WIDTH = 16  # features of a head
BF16, F32 = jnp.bfloat16, jnp.float32


class Case(NamedTuple):
    """One call of attention."""

    heads: int
    kv_heads: int
    size: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


CASES = {
    "plain": Case(2, 2, 130),  # padded to a block of twice the lanes
    "one kv head": Case(4, 1, 37),  # shorter than a block
    "wide window": Case(2, 1, 600, window=290),  # several blocks, some of which no query sees
    "all": Case(4, 2, 530, window=140, softcap=1.5),
    "sinks": Case(4, 2, 150, window=20, sinks=True),
}


def segments(size: int) -> np.ndarray:
    """Left padding, right padding, packed documents with padding behind them, a row of padding alone."""
    ids = np.zeros((4, size), np.int32)
    ids[0, size // 3 :] = 1
    ids[1, : size // 2] = 1
    ids[2, : size - 5] = 1 + np.arange(size - 5) * 4 // size
    return ids


def inputs(case: Case, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shape = lambda heads: (4, case.size, heads, WIDTH)
    query, key, value = (
        jnp.array(rng.normal(size=shape(heads)), dtype) for heads in (case.heads, case.kv_heads, case.kv_heads)
    )
    sinks = [jnp.array(2 * rng.normal(size=case.heads), jnp.float32)] if case.sinks else []
    return jnp.array(segments(case.size)), query, key, value, *sinks


def placed(ids, query, key, value, *sinks):
    """The same on the current mesh."""
    put = lambda x, name: sharding.constrain(x, "batch", "seq", head_axis(name, x.shape[2]), None)
    own = [sharding.constrain(x, head_axis("heads", x.shape[0])) for x in sinks]
    return (
        sharding.constrain(ids, "batch", "seq"),
        put(query, "heads"),
        put(key, "kv_heads"),
        put(value, "kv_heads"),
        *own,
    )


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=tiny.FAST)
def both_ways(case: Case, attend_by, ids, *given):
    """What real tokens gather, and the gradients of a loss of it: of queries, keys, values, and sinks."""

    def loss(*given):
        out = attend_by(case, ids)(*given)
        real = jnp.where((ids > 0)[:, :, None, None], out, 0).astype(jnp.float32)
        weights = jnp.cos(jnp.arange(real.size)).reshape(real.shape)
        return (real * weights).sum() + (real**2).sum(), (real, jnp.isfinite(out).all())

    (_, (out, finite)), gradients = jax.value_and_grad(loss, tuple(range(len(given))), has_aux=True)(*given)
    return out, gradients, finite


def by_kernel(kernel, case: Case, ids):
    return within_rows(kernel, ids, case.window, scale=0.3, softcap=case.softcap, interpret=True)


def by_library(case: Case, ids):
    """The call that cuDNN gets, of another implementation."""
    local = functools.partial(kernels.library_rows, scale=0.3, implementation="xla")
    return lambda query, key, value: kernels.per_device(local, query, key, value, kernels.row_mask(ids, case.window))


XLA, SPLASH = functools.partial(by_kernel, "xla"), functools.partial(by_kernel, "splash")


def compare(case: Case, attend_by, dtype, atol: float):
    """``atol``: also relative to the largest gradient."""
    arguments = inputs(case, dtype)
    out, gradients, finite = both_ways(case, attend_by, *arguments)
    expected, expected_gradients, _ = both_ways(case, XLA, *arguments)
    assert finite and np.isfinite(np.concatenate([np.ravel(g) for g in gradients]).astype(np.float32)).all()
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(out, expected, rtol=0, atol=atol)
    for found, wanted in zip(gradients, expected_gradients):
        found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
        assert np.abs(wanted).max() > 0.5
        np.testing.assert_allclose(found, wanted, rtol=0, atol=atol * max(1, np.abs(wanted).max()))


def often(cases, *names: str) -> list:
    """The names of ``cases``: these for every change, the others nightly."""
    return [pytest.param(name, marks=[] if name in names else pytest.mark.nightly) for name in cases]


@pytest.mark.parametrize("name", often(CASES, "all", "sinks"))
def test_splash_computes_what_we_do(name):
    compare(CASES[name], SPLASH, jnp.float32, 1e-4)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["all", "sinks"])
def test_splash_in_bfloat16(name):
    """The kernel's scores are float32 as ours; queries are scaled before their product, in bfloat16 (8 bits)."""
    compare(CASES[name], SPLASH, jnp.bfloat16, 0.02)


@pytest.mark.parametrize("name", often(("plain", "one kv head", "wide window"), "wide window"))
def test_what_cudnn_is_told(name):
    compare(CASES[name], by_library, jnp.float32, 1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2)])
def test_cudnn_gets_the_call(monkeypatch, shape):
    """Lowered for a GPU that is not here, forward and backward: even rows, the mask as a bias, causal. JAX asks for the
    library's version and the GPU's generation while it traces."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    case = Case(4, 2, 37)

    def gradients(ids, query, key, value):
        loss = lambda q, k, v: by_kernel("cudnn", case, ids)(q, k, v).astype(jnp.float32).sum()
        return jax.grad(loss, (0, 1, 2))(query, key, value)

    split = shape[2]
    with jax.set_mesh(sharding.make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])):
        arguments = placed(*inputs(case, jnp.bfloat16))
        text = jax.jit(gradients).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__cudnn$fmha" in line]
    forward, backward = (next(line for line in calls if f"Softmax{end}(" in line) for end in ("", "Backward"))
    taken = [f"tensor<{4 // split}x38x{heads // split}x{WIDTH}xbf16>" for heads in (4, 2, 2)]
    assert f"({', '.join([*taken, f'tensor<{4 // split}x1x38x38xbf16>'])}) ->" in forward
    for call in (forward, backward):
        config = call.replace("\\22", "")
        assert "mask_type: CAUSAL" in config and "fmha_scale: 0.3" in config


def test_padding_is_never_attended():
    """Whatever stands there, forward and backward."""
    case = CASES["all"]
    ids, query, key, value = inputs(case)
    padding = (ids == 0)[:, :, None, None]
    other = lambda x: jnp.where(padding, 100.0, x)
    out, gradients, _ = both_ways(case, SPLASH, ids, query, key, value)
    changed, changed_gradients, finite = both_ways(case, SPLASH, ids, other(query), other(key), other(value))
    assert finite
    np.testing.assert_array_equal(changed, out)
    for found, wanted in zip(changed_gradients, gradients):
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(jnp.where(padding, found, 0), 0)


@pytest.mark.parametrize(
    "size, block, padded",
    [
        (1, 128, 128),
        (128, 128, 128),
        (129, 256, 256),
        (512, 512, 512),
        (513, 384, 768),
        (1024, 512, 1024),
        (1100, 384, 1152),
    ],
)
def test_blocks(size, block, padded):
    assert blocks(size) == (block, padded)


# ---- groups: a prompt and the responses that branch from it ---------------------------------------------------------


class Group(NamedTuple):
    """One call of attention: three groups, their prompts left-padded, one to a single token."""

    copies: int
    prompt: int
    room: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


GROUPS = {
    "one response": Group(1, 50, 30),
    "plain": Group(4, 20, 23),  # one block
    "capped": Group(4, 140, 150, softcap=1.5),  # two blocks: responses begin inside them, and the last is padded
    "narrow window": Group(3, 10, 15, window=12),  # a response outgrows it: it loses sight of the prompt
    "wide window": Group(3, 300, 90, window=100),
    "sinks": Group(3, 10, 15, window=12, sinks=True),
}


def group_arguments(case: Group, dtype=F32):
    """(readable, [query, key, value and sinks, where there are any], which columns are real)."""
    size, rng = case.prompt + case.copies * case.room, np.random.default_rng(0)
    arguments = [jnp.array(rng.normal(size=(3, size, heads, WIDTH)), dtype) for heads in (4, 2, 2)]
    arguments += [jnp.array(2 * rng.normal(size=4), F32)] if case.sinks else []
    readable = jnp.arange(case.prompt) >= jnp.array([[0], [case.prompt // 3], [case.prompt - 1]])
    real = jnp.pad(readable, ((0, 0), (0, size - case.prompt)), constant_values=True)[:, :, None, None]
    return readable, arguments, real


def compare_groups(case: Group, attend_by, dtype=F32, atol: float = 1e-4):
    """``attend_by``: (case, readable) to Attend, whatever stands in the padding; ``atol``: also of the largest."""
    readable, arguments, real = group_arguments(case, dtype)
    weights = jnp.array(np.random.default_rng(1).normal(size=arguments[0].shape), F32)

    @functools.partial(jax.jit, static_argnums=0, compiler_options=tiny.FAST)
    def gradients(attend_by, *arguments):
        def loss(*arguments):
            out = jnp.where(real, attend_by(case, readable)(*arguments), 0).astype(F32)
            return (out * weights).sum() + (out**2).sum(), out

        (_, out), gradients = jax.value_and_grad(loss, tuple(range(len(arguments))), has_aux=True)(*arguments)
        return out, *gradients

    wanted = gradients(functools.partial(groups_by, "xla"), *arguments)
    changed = (jnp.where(real, x, 9.0) if x.ndim > 1 else x for x in arguments)
    for found in (gradients(attend_by, *arguments), gradients(attend_by, *changed)):
        for mine, theirs in zip(found, wanted):
            mine, theirs = (np.asarray(x, np.float32) for x in (mine, theirs))
            assert np.abs(theirs).max() > 0.5
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=atol * max(1, np.abs(theirs).max()))


def groups_by(kernel, case: Group, readable):
    return within_groups(kernel, readable, case.copies, case.room, case.window, None, 0.3, case.softcap, interpret=True)


def groups_by_library(case: Group, readable):
    """The calls that cuDNN gets, of another implementation."""
    how = {"copies": case.copies, "window": case.window, "scale": 0.3, "implementation": "xla"}
    return lambda query, key, value: kernels.library_groups(query, key, value, readable, **how)


@pytest.mark.parametrize("name", often(GROUPS, "sinks"))
def test_splash_computes_groups_as_we_do(name):
    compare_groups(GROUPS[name], functools.partial(groups_by, "splash"))


@pytest.mark.parametrize("name", often(("plain", "narrow window", "wide window"), "narrow window"))
def test_what_cudnn_is_told_of_groups(name):
    compare_groups(GROUPS[name], groups_by_library)


@pytest.mark.parametrize(
    ("prompt", "copies", "room", "window"), [(5, 3, 4, None), (5, 3, 4, 3), (1, 2, 6, None), (7, 1, 3, 4)]
)
def test_the_mask_of_a_group(prompt, copies, room, window):
    """Pair by pair; what pads the row to a block reads at least itself, so that its softmax is finite."""
    size, padded = prompt + copies * room, 128
    mask = tree(size, padded, prompt, copies, window)
    found = np.concatenate([mask[start : start + 32, :] for start in range(0, padded, 32)])

    def branch(column: int) -> int:
        return -1 if column < prompt else (column - prompt) // room

    def place(column: int) -> int:
        return column - max(branch(column), 0) * room

    for q in range(size):
        for k in range(size):
            reads = branch(k) in (-1, branch(q)) and 0 <= place(q) - place(k) < (window or padded)
            assert found[q, k] == reads, (q, k)
    assert found.diagonal().all() and not found[:size, size:].any()


def test_the_mask_of_a_long_group_is_no_square():
    """16 responses of 1024 columns to a prompt of as many: numbers a query in place of 3e8 pairs, and of 34 x 34 blocks
    those alone are visited in which something is read."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as infos

    size = 1024 + 16 * 1024
    block, padded = blocks(size)
    mask = masks.MultiHeadMask([tree(size, padded, 1024, 16, None)] * 2)
    info, function = infos.process_mask(mask, (block, block), head_shards=1, q_seq_shards=1)
    assert function is not None and info.partial_mask_blocks is None
    assert info.q_sequence is not None and info.block_mask is not None
    assert info.q_sequence.nbytes == 4 * padded
    assert block == 512 and (info.block_mask > 0).sum() == 3 + 16 * (2 * 2 + 3)
    assert info.block_mask.shape == (1, 34, 4)  # steps of the grid: the prompt's two blocks and a response's two


# ---- over devices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "heads, kv_heads, shape",
    [  # split; kv heads repeated to be split; whole
        pytest.param(4, 2, (2, 1, 2), marks=pytest.mark.nightly),
        (4, 1, (1, 2, 2)),
        pytest.param(3, 3, (1, 2, 2), marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize("attend_by", [SPLASH, by_library], ids=["splash", "library"])
def test_each_device_attends_to_its_own(heads, kv_heads, shape, attend_by):
    case = Case(heads, kv_heads, 130, window=60, sinks=attend_by is SPLASH)
    alone = both_ways(case, XLA, *inputs(case))

    def repeated(case, ids):
        attend = attend_by(case, ids)
        match = lambda x: match_heads(x, heads)
        return lambda query, key, value, *sinks: attend(query, match(key), match(value), *sinks)

    with jax.set_mesh(sharding.make_mesh(MeshConfig(*shape), jax.devices()[:4])):
        out, gradients, _ = both_ways(case, repeated, *placed(*inputs(case)))
        assert out.sharding.spec[2] == (None if heads == 3 else "tensor")
    np.testing.assert_allclose(out, alone[0], atol=1e-4)
    for found, wanted in zip(gradients, alone[1]):
        np.testing.assert_allclose(found, wanted, atol=1e-4 * max(1, np.abs(wanted).max()))


# ---- whole models ---------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_kv_heads": 2, "mlp_size": 32}
LLAMA = resolve(ModelConfig(**SMALL, num_layers=1))
GEMMA3 = resolve(
    ModelConfig(
        family="gemma3_text",
        **SMALL,
        num_layers=3,
        sliding_window=4,
        layer_types=("local", "global", "local"),
        local_rope_theta=50.0,
        attention_softcap=2.0,
    )
)
SINKS = resolve(ModelConfig(family="gpt_oss", **SMALL, num_layers=2, sliding_window=4, num_experts=3))
INTERPRETED = Runtime(attention="splash", hardware=TPU, interpret=True)


@pytest.mark.nightly  # by day: a model by splash over devices, below
@pytest.mark.parametrize(
    ("cfg", "remat"),
    [(LLAMA, "none"), (SINKS, "dots"), (GEMMA3, "full"), (GEMMA3, "dots")],
)
def test_a_model_and_its_gradients_by_splash(cfg, remat):
    params = tiny.parameters(cfg, "lm", 0)
    rng = np.random.default_rng(0)
    ids = jnp.array(segments(20))
    tokens = jnp.array(rng.integers(0, 64, ids.shape), jnp.int32)

    @functools.partial(jax.jit, static_argnums=1, compiler_options=tiny.FAST)
    def gradients(params, runtime):
        def loss(params):
            hidden = forward(params, cfg, tokens, ids, runtime)
            return (jnp.where(ids[..., None] > 0, hidden, 0) ** 3).sum()

        return jax.value_and_grad(loss)(params)

    found, wanted = gradients(params, INTERPRETED._replace(remat=remat)), gradients(params, Runtime())
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * np.abs(y).max()), found, wanted)


@pytest.mark.nightly  # by day: a model by splash, above
def test_prefill_by_splash_and_decoding():
    """The same caches and states of left-padded prompts, and the same next token's."""
    params = tiny.parameters(GEMMA3, "lm", 0)
    valid = jnp.arange(9) >= jnp.array([[0], [4], [8]])
    tokens = jnp.array(np.random.default_rng(1).integers(0, 64, (3, 9)), jnp.int32)

    @functools.partial(jax.jit, static_argnums=1, compiler_options=tiny.FAST)
    def read(params, runtime):
        params = decode_layout(params, GEMMA3, "lm", runtime, 2)
        hidden, caches = prefill(params, GEMMA3, tokens, valid, 2, 1, runtime)
        after, _ = decode_step(params, GEMMA3, tokens[:, :2], jnp.int32(0), valid[:, None], caches, runtime)
        keep = lambda x: jnp.where(valid[:, None, :, None], x, 0)
        kept = [(keep(x.prompt_key), keep(x.prompt_value)) for x in caches if isinstance(x, Cache)]
        return hidden, after, kept

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), read(params, INTERPRETED), read(params, Runtime())
    )


@pytest.mark.nightly  # by day: a kernel over devices, above
@pytest.mark.parametrize("style", ("mesh", "pmap"))
def test_a_model_by_splash_over_devices(style):
    """A mesh whose fsdp has a decode group, in the layout of decoding; and pmap, which brings its own shard_map."""
    params, ids = tiny.parameters(LLAMA, "lm", 0), segments(20)
    tokens = np.random.default_rng(0).integers(0, 64, ids.shape).astype(np.int32)
    read = lambda params, tokens, ids: forward(params, LLAMA, tokens, ids, INTERPRETED)
    wanted = forward(params, LLAMA, jnp.array(tokens), jnp.array(ids), Runtime())
    if style == "pmap":
        found = jax.pmap(read, sharding.DEVICES, in_axes=(None, 0, 0))(params, tokens[:, None], ids[:, None])[:, 0]
    else:
        mesh = sharding.make_mesh(MeshConfig(1, 4, 1, decode=2), jax.devices()[:4])
        with jax.set_mesh(mesh), sharding.decoding():
            put = lambda x: sharding.constrain(jnp.array(x), "batch", "seq")
            found = jax.jit(read)(tiny.parameters(LLAMA, "lm", 0), put(tokens), put(ids))
    real = ids > 0
    np.testing.assert_allclose(np.asarray(found)[real], np.asarray(wanted)[real], atol=1e-4)


def equations(jaxpr):
    """All of them, those of inner functions too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)
            elif hasattr(inner, "jaxpr"):
                yield from equations(inner.jaxpr)


@pytest.mark.parametrize("cfg", [LLAMA, GEMMA3])
def test_what_stays_float32_in_bfloat16(cfg):
    """The softmax, its soft-caps and the logits; and a decoded token reads the cache without repeating its kv heads."""
    runtime, room = Runtime(compute=BF16), 9
    params = tiny.parameters(cfg, "lm", 0)
    prompt, own = (jnp.zeros((3, cfg.num_kv_heads, *size, cfg.head_dim), BF16) for size in ((4,), (1, room)))

    def token(params, ids, valid, caches):
        params = decode_layout(params, cfg, "lm", runtime, 2)
        hidden, _ = decode_step(params, cfg, ids, jnp.int32(5), valid[:, None], caches, runtime)
        return lm_logits(params, cfg, hidden)

    def row(params, ids):
        return lm_logits(params, cfg, forward(params, cfg, ids, jnp.ones_like(ids), runtime))

    ids, valid = jnp.zeros((3, room), jnp.int32), jnp.ones((3, room), bool)
    decoding = jax.make_jaxpr(token)(
        params, ids[:, :1], valid[:, :4], [Cache(prompt, prompt, own, own)] * cfg.num_layers
    )
    for jaxpr in (decoding, jax.make_jaxpr(row)(params, ids)):
        exponents = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "exp"]
        assert exponents and {eqn.outvars[0].aval.dtype for eqn in exponents} == {jnp.dtype(F32)}
        scores = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
        assert scores[-1].outvars[0].aval.dtype == F32  # of the language model's head
        assert {v.aval.dtype for v in scores[-1].invars} == {jnp.dtype(BF16)}
        caps = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "tanh" and eqn.invars[0].aval.ndim == 6]
        assert {eqn.outvars[0].aval.dtype for eqn in caps} <= {jnp.dtype(F32)}
        assert bool(caps) == (cfg.attention_softcap is not None) or jaxpr is not decoding
    largest = max(out.aval.size for eqn in equations(decoding.jaxpr) for out in eqn.outvars if room in out.aval.shape)
    assert largest == own.size  # not times heads / kv heads


# ---- which one ------------------------------------------------------------------------------------------------------

CAPPED = dataclasses.replace(LLAMA, attention_softcap=50.0)
WIDE = dataclasses.replace(LLAMA, head_dim=256)
ODD = dataclasses.replace(LLAMA, head_dim=20)
APART = resolve(ModelConfig("gemma4_text", 64, 32, 2, head_dim=16, global_head_dim=512, sliding_window=4))


@pytest.mark.parametrize(
    "hardware, cfg, dtype, kernel, why",
    [
        (CPU, LLAMA, F32, "xla", None),
        (TPU, LLAMA, F32, "splash", None),
        (TPU, GEMMA3, BF16, "splash", None),
        (A100, LLAMA, BF16, "cudnn", None),
        (H100, WIDE, BF16, "cudnn", None),
        (A100, WIDE, BF16, "xla", "not cudnn, which takes multiples of 8 up to 128 features a head here"),
        (H100, ODD, BF16, "xla", "head_dim is 20"),
        (H100, APART, BF16, "xla", "global_head_dim is 512"),
        (TPU, APART, BF16, "splash", None),
        (H100, LLAMA, F32, "xla", "precision.compute is float32"),
        (H100, CAPPED, BF16, "xla", "attention_softcap is 50"),
        (V100, LLAMA, BF16, "xla", "compute capability 7"),
    ],
)
def test_auto(hardware, cfg, dtype, kernel, why):
    assert choose_kernel("auto", hardware, cfg, dtype) == kernel
    said = passed_over(hardware, cfg, dtype)
    assert said is None if why is None else why in str(said)
    assert choose_kernel("xla", hardware, cfg, dtype) == "xla"  # always there to be asked for


@pytest.mark.parametrize(
    "asked, hardware, cfg, line",
    [
        ("splash", CPU, LLAMA, "attention: splash: runs on TPUs, and the devices are of platform cpu; nearest: xla"),
        ("splash", H100, LLAMA, "attention: splash: .* platform gpu; nearest: cudnn"),
        ("cudnn", TPU, LLAMA, "attention: cudnn: runs on NVIDIA GPUs .*; nearest: splash"),
        ("cudnn", H100, CAPPED, "attention: cudnn: has no soft-caps, and attention_softcap is 50; nearest: xla"),
    ],
)
def test_a_kernel_that_cannot_be_had_is_refused(asked, hardware, cfg, line):
    with pytest.raises(ValueError, match=f"^{line}$"):
        choose_kernel(asked, hardware, cfg, BF16)
    runtime = Runtime(compute=BF16, attention=asked, hardware=hardware)
    with pytest.raises(ValueError, match=f"^{line}"):
        jax.eval_shape(lambda p: forward(p, cfg, jnp.zeros((1, 4), int), jnp.ones((1, 4), int), runtime), {})


def test_hardware_of_devices():
    class Device(NamedTuple):
        platform: str
        compute_capability: str

    assert hardware_of(jax.devices()[0]) == CPU
    assert hardware_of(Device("gpu", "9.0")) == H100
    assert hardware_of(Device("gpu", "gfx90a")) == Hardware("gpu", 0.0)  # ROCm, which has no cuDNN
