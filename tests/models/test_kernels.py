"""Attention kernels against ours: splash through the Pallas interpreter, and what cuDNN is told, computed by XLA."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import sharding
from jaxrlhf.models import kernels
from jaxrlhf.models.attention import match_heads
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.kernels import Hardware, blocks, choose, hardware_of, passed_over, within_rows
from jaxrlhf.models.transformer import Runtime, decode_layout, decode_step, forward, prefill
from jaxrlhf.sharding import MeshConfig
from tests import tiny

CPU, TPU = Hardware(), Hardware("tpu")
A100, H100, V100 = Hardware("gpu", 8.0), Hardware("gpu", 9.0), Hardware("gpu", 7.0)
WIDTH = 16  # features of a head


class Case(NamedTuple):
    """One call of attention."""

    heads: int
    kv_heads: int
    size: int
    window: int | None = None
    softcap: float | None = None


CASES = {
    "plain": Case(2, 2, 130),  # padded to a block of twice the lanes
    "one kv head": Case(4, 1, 37),  # shorter than a block
    "wide window": Case(2, 1, 600, window=290),  # several blocks, some of which no query sees
    "all": Case(4, 2, 530, window=140, softcap=1.5),
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
    return query, key, value, jnp.array(segments(case.size))


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=tiny.FAST)
def both_ways(case: Case, attend_by, query, key, value, ids):
    """What real tokens gather, and the gradients of a loss of it."""

    def loss(query, key, value):
        out = attend_by(case, ids)(query, key, value)
        real = jnp.where((ids > 0)[:, :, None, None], out, 0).astype(jnp.float32)
        weights = jnp.cos(jnp.arange(real.size)).reshape(real.shape)
        return (real * weights).sum() + (real**2).sum(), (real, jnp.isfinite(out).all())

    (_, (out, finite)), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
    return out, gradients, finite


def by_kernel(kernel, case: Case, ids):
    return within_rows(kernel, ids, case.window, scale=0.3, softcap=case.softcap, interpret=True)


def by_library(case: Case, ids):
    """The call that cuDNN gets, of another implementation."""
    mask = kernels.row_mask(ids, case.window)
    return lambda *qkv: kernels.library_rows(*qkv, mask, scale=0.3, implementation="xla")


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


@pytest.mark.parametrize("name", CASES)
def test_splash_computes_what_we_do(name):
    compare(CASES[name], SPLASH, jnp.float32, 1e-4)


def test_splash_in_bfloat16():
    """The kernel's scores are float32 as ours; queries are scaled before their product, in bfloat16 (8 bits)."""
    compare(CASES["all"], SPLASH, jnp.bfloat16, 0.02)


@pytest.mark.parametrize("name", ["plain", "one kv head", "wide window"])
def test_what_cudnn_is_told(name):
    compare(CASES[name], by_library, jnp.float32, 1e-4)


def test_padding_is_never_attended():
    """Whatever stands there, forward and backward."""
    case = CASES["all"]
    query, key, value, ids = inputs(case)
    padding = (ids == 0)[:, :, None, None]
    other = lambda x: jnp.where(padding, 100.0, x)
    out, gradients, _ = both_ways(case, SPLASH, query, key, value, ids)
    changed, changed_gradients, finite = both_ways(case, SPLASH, other(query), other(key), other(value), ids)
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


# ---- over devices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "heads, kv_heads, shape",
    [(4, 2, (2, 1, 2)), (4, 1, (1, 2, 2)), (3, 3, (1, 2, 2))],  # split; kv heads repeated to be split; whole
)
@pytest.mark.parametrize("kind", ["splash", "library"])
def test_each_device_attends_to_its_own(heads, kv_heads, shape, kind):
    case = Case(heads, kv_heads, 130, window=60)
    attend_by = SPLASH
    if kind == "library":

        def attend_by(case, ids):
            local = functools.partial(kernels.library_rows, scale=0.3, implementation="xla")
            return lambda *qkv: kernels.per_device(local, *qkv, kernels.row_mask(ids, case.window))

    alone = both_ways(case, XLA, *inputs(case))

    def repeated(case, ids):
        attend = attend_by(case, ids)
        return lambda query, key, value: attend(query, match_heads(key, heads), match_heads(value, heads))

    with jax.set_mesh(sharding.make_mesh(MeshConfig(*shape), jax.devices()[:4])):
        put = lambda x, name: sharding.constrain(x, "batch", "seq", sharding_axis(name, x.shape[2]), None)
        query, key, value, ids = inputs(case)
        split = (
            put(query, "heads"),
            put(key, "kv_heads"),
            put(value, "kv_heads"),
            sharding.constrain(ids, "batch", "seq"),
        )
        out, gradients, _ = both_ways(case, repeated, *split)
        assert out.sharding.spec[2] == (None if heads == 3 else "tensor")
    np.testing.assert_allclose(out, alone[0], atol=1e-4)
    for found, wanted in zip(gradients, alone[1]):
        np.testing.assert_allclose(found, wanted, atol=1e-4 * max(1, np.abs(wanted).max()))


def sharding_axis(name: str, size: int) -> str | None:
    return None if size % 2 else name


# ---- whole models ---------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_kv_heads": 2, "mlp_size": 32}
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
INTERPRETED = Runtime(attention="splash", hardware=TPU, interpret=True)


@pytest.mark.parametrize(("cfg", "remat"), [(LLAMA, "none"), (GEMMA3, "full"), (GEMMA3, "dots")])
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


def test_prefill_by_splash_and_decoding():
    """The same caches and states of left-padded prompts, and the same next token's."""
    params = tiny.parameters(GEMMA3, "lm", 0)
    valid = jnp.arange(9) >= jnp.array([[0], [4], [8]])
    tokens = jnp.array(np.random.default_rng(1).integers(0, 64, (3, 9)), jnp.int32)

    @functools.partial(jax.jit, static_argnums=1, compiler_options=tiny.FAST)
    def read(params, runtime):
        params = decode_layout(params, GEMMA3, "lm", runtime)
        hidden, caches = prefill(params, GEMMA3, tokens, valid, 10, runtime)
        more = jnp.pad(valid, ((0, 0), (0, 1)), constant_values=True)
        after, _ = decode_step(params, GEMMA3, tokens[:, :1], jnp.int32(9), more, caches, runtime)
        keep = more[:, None, :, None]
        return hidden, after, jax.tree.map(lambda x: jnp.where(keep, x, 0), caches)

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), read(params, INTERPRETED), read(params, Runtime())
    )


# ---- which one ------------------------------------------------------------------------------------------------------

CAPPED = dataclasses.replace(LLAMA, attention_softcap=50.0)
WIDE = dataclasses.replace(LLAMA, head_dim=256)
ODD = dataclasses.replace(LLAMA, head_dim=20)
BF16, F32 = jnp.bfloat16, jnp.float32


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
        (H100, LLAMA, F32, "xla", "precision.compute is float32"),
        (H100, CAPPED, BF16, "xla", "attention_softcap is 50"),
        (V100, LLAMA, BF16, "xla", "compute capability 7"),
    ],
)
def test_auto(hardware, cfg, dtype, kernel, why):
    assert choose("auto", hardware, cfg, dtype) == kernel
    said = passed_over(hardware, cfg, dtype)
    assert said is None if why is None else why in str(said)
    assert choose("xla", hardware, cfg, dtype) == "xla"  # always there to be asked for


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
        choose(asked, hardware, cfg, BF16)
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
