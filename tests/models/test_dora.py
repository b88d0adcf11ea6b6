"""Magnitudes that learn apart from directions: against NumPy in float64, merged weights, and a base that stays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models import dora, lora
from jaxrlhf.models.decoding import decode_layout
from jaxrlhf.models.linear import DORA_SCALE, LORA_A, LORA_B, MAGNITUDE, linear, scale_outputs
from jaxrlhf.models.lora import Based, LoraConfig
from jaxrlhf.models.nets import make_nets
from jaxrlhf.models.parameters import Leaf, parameter_table
from jaxrlhf.models.quantized import PACKED, pack, packed_tree, unpacked
from jaxrlhf.models.transformer import Runtime, forward
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.sharding import MeshConfig, make_mesh
from jaxrlhf.types import Ask, Trees
from tests.models import test_quantized
from tests.support import tiny

DORA = LoraConfig(rank=2, alpha=6.0, dora=True)  # A B counts 3 times
MODEL = dataclasses.replace(tiny.MODEL, num_layers=2)
TABLE = parameter_table(MODEL, "lm")
TOKENS = np.random.default_rng(3).integers(0, 64, (3, 9)).astype(np.int32)
# (equation, axes of the kernel, of the result, shapes of x, A and B)
MAPS = {
    "query": ("bsd,dhk->bshk", "embed heads head_dim", "batch seq heads head_dim", (2, 3, 8), (8, 2), (2, 4, 5)),
    "out": ("bshk,hkd->bsd", "heads head_dim embed", "batch seq hidden", (2, 3, 4, 5), (4, 5, 2), (2, 8)),
    "up": ("bsd,dm->bsm", "embed mlp", "batch seq mlp", (2, 3, 8), (8, 2), (2, 6)),
}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def direct(kernel, a, b) -> tuple[np.ndarray, np.ndarray]:
    """||W|| and ||W + A B|| in float64."""
    kernel, a, b = (np.asarray(x, np.float64) for x in (kernel, a, b))
    ins = tuple(range(a.ndim - 1))
    norm = lambda x: np.sqrt((x**2).sum(ins))
    return norm(kernel), norm(kernel + np.tensordot(a, b, 1))


# ---- one map --------------------------------------------------------------------------------------------------------


def test_one_map_by_hand():
    """W = diag(3, 4), A = (1, 1), B = (1, 0): W + A B = ((4, 0), (1, 4)), whose columns have norms sqrt(17) and 4. The
    magnitudes are 3 + 1 and 4 - 2."""
    own = {LORA_A: jnp.ones((1, 2, 1)), LORA_B: jnp.array([[[1.0, 0.0]]]), MAGNITUDE: jnp.array([[1.0, -2.0]])}
    found = dora.with_scales({"up": {"kernel": jnp.diag(jnp.array([3.0, 4.0]))[None]} | own})["up"]
    np.testing.assert_allclose(found[DORA_SCALE], [[4 / np.sqrt(17), 2 / 4]], rtol=1e-6)
    one = {name: x[0] for name, x in found.items()} | {"bias": jnp.array([10.0, 20.0])}
    y = linear(one, jnp.array([[[1.0, 2.0]]]), "bsd,dm->bsm", ("embed", "mlp"), ("batch", "seq", "mlp"))
    np.testing.assert_allclose(y, [[[6 * 4 / np.sqrt(17) + 10, 8 / 2 + 20]]], rtol=1e-6)  # the bias is not scaled


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 30.0])
@pytest.mark.parametrize("name", MAPS)
def test_norms_are_the_direct_ones(name, size):
    """To 1e-5, of an A B far below, about, and far above W."""
    *_, a, b = MAPS[name]
    kernel, a, b = normal(0, *a[:-1], *b[1:]), normal(1, *a), normal(2, *b) * np.float32(size)
    ours = dora.both_norms(jnp.asarray(kernel), jnp.asarray(a), jnp.asarray(b))
    for one, other in zip(ours, direct(kernel, a, b), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_norms_of_many_inputs():
    """2048 of them at rank 16, A B about as large as W: 1e-5 still."""
    kernel, a, b = normal(0, 2048, 40) / 45, normal(1, 2048, 16) / 45, normal(2, 16, 40) / 4
    for one, other in zip(dora.both_norms(*map(jnp.asarray, (kernel, a, b))), direct(kernel, a, b), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_what_cancels_stays_finite():
    """Columns where A B is -W, all but a little of it, and where W and A B are 0: the scale is that of rounding at
    most, and 1 where there is nothing."""
    a, b = normal(0, 64, 1), np.array([[1.0, 1.0, 0.0]], np.float32)
    kernel = -a * np.array([1.0, 1.0 + 1e-6, 0.0], np.float32)
    own = {LORA_A: a[None], LORA_B: b[None], MAGNITUDE: np.full((1, 3), 0.5, np.float32)}
    scale = np.asarray(
        dora.with_scales({"up": jax.tree.map(jnp.asarray, {"kernel": kernel[None]} | own)})["up"][DORA_SCALE]
    )
    assert np.isfinite(scale).all() and np.abs(scale).max() < 2 / np.sqrt(dora.RESOLUTION) and scale[0, 2] == 1


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_norms_of_a_quantised_kernel_are_those_of_its_numbers(kind):
    leaf = Leaf((2, 4, 8, 6), ("layers", "heads", "head_dim", "embed"), 1.0)
    packed = jax.jit(lambda x: pack(x, leaf, kind))(normal(0, *leaf.shape))
    wide = np.asarray(unpacked(packed, jnp.float32))
    assert np.abs(wide - normal(0, *leaf.shape)).max() > 1e-3
    own = {LORA_A: normal(1, 2, 4, 8, 2), LORA_B: normal(2, 2, 2, 6), MAGNITUDE: normal(3, 2, 6)}
    scale = dora.with_scale(jax.tree.map(jnp.asarray, own) | {"kernel": packed})[DORA_SCALE]
    np.testing.assert_allclose(
        dora.base_norms(packed, 2), [direct(x, own[LORA_A][0], own[LORA_B][0])[0] for x in wide], rtol=1e-5
    )
    for layer in range(2):
        norm, both = direct(wide[layer], own[LORA_A][layer], own[LORA_B][layer])
        np.testing.assert_allclose(scale[layer], (norm + own[MAGNITUDE][layer]) / both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["query", "out", pytest.param("up", marks=pytest.mark.nightly)])
def test_gradients_are_those_of_a_constant_norm(name):
    """Output and the gradients of x, A, B and the magnitude, against JAX's own of x (W + A B) m / c by einsum, where c
    is a number (section 4.3); with the norm differentiated they would differ."""
    equation, axes, out, *shapes = MAPS[name]
    x, a, b = (jnp.asarray(normal(seed, *shape)) for seed, shape in enumerate(shapes))
    kernel, change = jnp.asarray(normal(5, *a.shape[:-1], *b.shape[1:])), jnp.asarray(normal(6, *b.shape[1:]) / 3)
    weight = jnp.asarray(normal(7, *np.einsum(equation, x, kernel).shape))
    norm, fixed = (jnp.asarray(x, jnp.float32) for x in direct(kernel, a, b))

    def ours(x, a, b, change):
        stacked = {"kernel": kernel, LORA_A: a, LORA_B: b, MAGNITUDE: change}
        one = dora.with_scales({"map": {name: value[None] for name, value in stacked.items()}})["map"]
        one = {name: value[0] for name, value in one.items()}
        return (linear(one, x, equation, tuple(axes.split()), tuple(out.split())) * weight).sum()

    def theirs(x, a, b, change):
        return (jnp.einsum(equation, x, (kernel + jnp.tensordot(a, b, 1)) * (norm + change) / fixed) * weight).sum()

    run = lambda loss: jax.tree.leaves(jax.value_and_grad(loss, (0, 1, 2, 3))(x, a, b, change))
    for one, other in zip(run(ours), run(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_outputs_are_kept_in_their_own_format():
    """In bfloat16 a scale near 1 counts in full, and its gradient is summed in float32."""
    y, scale = jnp.full((1, 300, 2), 1.5, jnp.bfloat16), jnp.array([1.0, 1.01])
    made, back = jax.vjp(scale_outputs, y, scale)
    assert made.dtype == jnp.bfloat16 and made[0, 0].tolist() == [1.5, 1.515625]
    dy, dscale = back(jnp.ones_like(y))
    assert dy.dtype == jnp.bfloat16 and dscale.tolist() == [450.0, 450.0]


# ---- a model --------------------------------------------------------------------------------------------------------


@functools.cache
def trees(kind=None) -> Trees:
    """A policy whose A, B and magnitudes do something, on its base."""
    base = tiny.program(lambda params: packed_tree(params, TABLE, kind))(tiny.parameters(MODEL, "lm", 0))
    return Trees({"policy": tiny.adapter(MODEL, "lm", DORA, 1)}, {"base": base, "reference": {}})


def bases(kind=None) -> dict:
    return {"policy": Based("base", DORA, kind), "reference": Based("base", None, kind)}


def states(params, runtime: Runtime):
    return forward(params, MODEL, jnp.asarray(TOKENS), jnp.ones_like(TOKENS), runtime)


def assembled_states(given: Trees, kind=None, runtime: Runtime | None = None):
    run = lambda given: states(lora.params_of("policy", given, bases(kind)), runtime or Runtime())
    return np.asarray(tiny.program(run)(given))


def test_leaves_by_hand():
    """One for each output: hidden 16, 4 heads of 4, 2 key-value heads, mlp 32, in 2 layers."""
    plain, own = (lora.adapter_table(MODEL, dataclasses.replace(DORA, dora=on)) for on in (False, True))
    count = lambda table: sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(table, is_leaf=is_leaf))
    assert count(own) - count(plain) == 2 * (16 + 8 + 8 + 16 + 32 + 32 + 16)
    assert own["layers"]["attention"]["key"][MAGNITUDE] == Leaf((2, 2, 4), ("layers", "kv_heads", "head_dim"), "zeros")
    assert own["layers"]["attention"]["out"][MAGNITUDE] == Leaf((2, 16), ("layers", "embed"), "zeros")


def is_leaf(x) -> bool:
    return isinstance(x, Leaf)


@pytest.mark.parametrize("kind", [None, pytest.param("nf4", marks=pytest.mark.nightly)])
def test_a_new_adapter_changes_nothing(kind):
    """Bit for bit: B and the change of m are 0, and m / c is 1."""
    own = {"policy": lora.init_adapter(MODEL, DORA, jax.random.key(0))}
    given = trees(kind)._replace(params=own)
    alone = tiny.program(lambda base: states(base, Runtime()))(given.slow["base"])
    assert (assembled_states(given, kind) == np.asarray(alone)).all()


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_model_is_that_of_merged_weights(remat):
    """Whose columns have the magnitudes ||W|| + the learned change."""
    found = assembled_states(trees(), runtime=Runtime(remat=remat))
    whole = lora.merged_at_once(trees().slow["base"], trees().params["policy"], DORA.scale, jnp.float32)
    np.testing.assert_allclose(np.asarray(states(whole, Runtime())), found, rtol=1e-5, atol=1e-5)
    plain = {"policy": without_magnitudes(trees().params["policy"])}
    assert np.abs(found - assembled_states(trees()._replace(params=plain))).max() > 0.1
    for stack, name in (("attention", "query"), ("attention", "out"), ("mlp", "down")):
        own, axes = trees().params["policy"]["layers"][stack][name], (1, 2) if name == "out" else (1,)
        base = trees().slow["base"]["layers"][stack][name]["kernel"]
        norm = lambda kernel, axes=axes: np.sqrt((np.asarray(kernel, np.float64) ** 2).sum(axes))
        kernel = whole["layers"][stack][name]["kernel"]
        np.testing.assert_allclose(norm(kernel), np.abs(norm(base) + np.asarray(own[MAGNITUDE])), rtol=1e-5)


def without_magnitudes(own):
    return {name: without_magnitudes(x) if isinstance(x, dict) else x for name, x in own.items() if name != MAGNITUDE}


@pytest.mark.parametrize(
    ("kind", "merge"),
    [
        (None, True),
        ("int8", False),
        *(pytest.param("nf4", merge, marks=pytest.mark.nightly) for merge in (True, False)),
    ],
)
def test_what_was_sampled_has_the_same_log_probs(kind, merge):
    """Decoding reads merged weights, or quantised ones with A, B and the scale beside them: 1e-4 of a forward pass."""
    sampling, runtime = Sampling(1.0, eos_ids=(1, 2)), Runtime(merge_adapter=merge)
    sample = tiny.sampler_of(MODEL, sampling, 8, 2, bases=bases(kind), runtime=runtime)
    nets = make_nets(dict.fromkeys(("policy", "reference"), MODEL), runtime, sampling, sample, bases=bases(kind))
    seed, asks = jnp.int32(5), (Ask("policy", "token_stats"), Ask("reference", "token_stats"))
    sequences = tiny.program(lambda trees: nets.sample("policy", trees, tiny.prompts(4), seed, seed))(trees(kind))
    stats, other = tiny.program(lambda trees, rows: nets.read(trees, rows, *asks))(trees(kind), sequences)
    mask = np.asarray(sequences.response_mask)
    np.testing.assert_allclose(np.asarray(stats.logprobs)[mask], np.asarray(sequences.logprobs)[mask], atol=1e-4)
    assert np.abs(np.asarray(other.logprobs)[mask] - np.asarray(sequences.logprobs)[mask]).max() > 0.05


def test_what_decoding_reads():
    """Merged kernels; or quantised ones, with A and B beside them, and a scale that is computed once."""

    def query(kind, **how):
        lay = lambda given: decode_layout(
            lora.params_of("policy", given, bases(kind)), MODEL, "lm", Runtime(**how, compute=jnp.bfloat16), 64
        )["layers"][1]["attention"]["query"]
        return tiny.program(lay)(trees(kind))

    assert query(None).keys() == {"kernel"}
    beside = query("int8", merge_adapter=False)
    assert isinstance(beside["kernel"], PACKED) and beside.keys() == {"kernel", LORA_A, LORA_B, DORA_SCALE}
    assert beside[DORA_SCALE].shape == (4, 4) and beside[DORA_SCALE].dtype == jnp.float32


@pytest.mark.nightly  # by day: one map, above
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_is_the_weights_that_its_bits_stand_for(kind):
    """Forward and gradients to 1e-5 of a float model with these weights."""
    base = trees(kind).slow["base"]
    wide = jax.jit(lambda base: jax.tree.map(lambda x: unpacked(x, jnp.float32), base, is_leaf=is_packed))(base)
    theirs = trees(kind)._replace(slow={"base": wide, "reference": {}})

    @tiny.program
    def gradient(own, given):
        params_of = lambda own: lora.params_of("policy", given._replace(params={"policy": own}), bases())
        return jax.value_and_grad(lambda own: (states(params_of(own), Runtime()) ** 3).sum())(own)

    own = trees(kind).params["policy"]
    for one, other in zip(*(jax.tree.leaves(gradient(own, given)) for given in (trees(kind), theirs)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def is_packed(x) -> bool:
    return isinstance(x, PACKED)


@pytest.fixture(scope="module")
def mesh_8():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize("kind", [None, pytest.param("nf4", marks=pytest.mark.nightly)])
def test_on_eight_devices(kind, mesh_8):
    """fsdp and tensor split inputs and outputs: loss and gradients of one device, to 1e-5."""
    tokens = np.random.default_rng(3).integers(0, 64, (8, 7)).astype(np.int32)

    def run(own, trees, tokens):
        def loss(own):
            params = lora.params_of("policy", trees._replace(params={"policy": own}), bases(kind))
            return (forward(params, MODEL, tokens, jnp.ones_like(tokens), Runtime()) ** 3).sum()

        return jax.value_and_grad(loss)(own)

    pack = lambda: tiny.program(lambda params: packed_tree(params, TABLE, kind))(tiny.parameters(MODEL, "lm", 0))
    expected = tiny.program(run)(trees().params["policy"], Trees({}, {"base": pack()}), jnp.asarray(tokens))
    with jax.set_mesh(mesh_8):
        own, split = tiny.adapter(MODEL, "lm", DORA, 1), Trees({}, {"base": pack()})
        found = tiny.program(run)(own, split, tiny.put(tokens))
        change = found[1]["layers"]["mlp"]["up"][MAGNITUDE]
        assert change.sharding.shard_shape(change.shape) == (2, 16)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.nightly  # by day: of adapters without magnitudes, in test_quantized
@pytest.mark.parametrize("remat", ["none", "full"])
def test_weights_of_one_map_are_wide_at_a_time(remat, monkeypatch):
    """Temporaries of a gradient are less than two of the six layers, norms included."""
    monkeypatch.setattr(test_quantized, "LORA", DORA)
    assert test_quantized.temporaries("nf4", Runtime(remat=remat)) < 2
