"""Weights of 8 and 4 bits under adapters: against the published table and a NumPy loop; products, gradients and memory
against those of the weights that they stand for."""

import contextlib
import dataclasses
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models import lora, quantized
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.decoding import decode_layout
from jaxrlhf.models.int8 import Int8
from jaxrlhf.models.linear import linear
from jaxrlhf.models.lora import Based, LoraConfig
from jaxrlhf.models.nets import make_nets
from jaxrlhf.models.parameters import Leaf, parameter_table
from jaxrlhf.models.quantized import NF4, Nf4, Quantization, bytes_each, pack, packed_tree, unpacked
from jaxrlhf.models.transformer import Runtime, forward
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.sharding import MeshConfig, make_mesh
from jaxrlhf.types import Ask, Trees
from tests.support import tiny


@pytest.fixture
def mesh_8():
    return make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices())


RNG = np.random.default_rng(11)
LORA = LoraConfig(rank=2, alpha=6.0)
MODEL = dataclasses.replace(tiny.MODEL, num_layers=2)
TABLE = parameter_table(MODEL, "lm")
# kernel, its axes, and the axis of its blocks
MAPS = {
    "query": ((2, 128, 3, 8), ("layers", "embed", "heads", "head_dim"), 1),
    "out": ((2, 3, 96, 20), ("layers", "heads", "head_dim", "embed"), 2),
    "up": ((2, 64, 24), ("layers", "embed", "mlp"), 1),
    "down": ((2, 192, 20), ("layers", "mlp", "embed"), 1),
}


def leaf_of(name: str) -> Leaf:
    return Leaf(MAPS[name][0], MAPS[name][1], 1.0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_the_table_is_that_of_the_paper():
    """Appendix E: quantiles of the normal distribution on both sides of 0, over the largest; the offset is the mean of
    1 - 1/30 and 1 - 1/32."""
    offset, quantile = (1 - 1 / 30 + 1 - 1 / 32) / 2, statistics.NormalDist().inv_cdf
    upper = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    lower = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    np.testing.assert_allclose(NF4, np.sort([*lower, 0.0, *upper]) / max(upper), atol=1e-6)
    assert len(NF4) == 16 and NF4[7] == 0.0


def loop_nf4(x: np.ndarray, axis: int, block: int) -> np.ndarray:
    """What the codes of ``x`` stand for, one block at a time."""
    found = np.empty_like(x)
    rows, out = np.moveaxis(x, axis, -1), np.moveaxis(found, axis, -1)
    for index in np.ndindex(rows.shape[:-1]):
        for start in range(0, rows.shape[-1], block):
            part = rows[index][start : start + block]
            largest = np.abs(part).max()
            for at, value in enumerate(part):
                nearest = min(NF4, key=lambda one: abs(value / (largest or 1) - one))
                out[index][start + at] = np.float32(nearest) * largest
    return found


@pytest.mark.parametrize("name", ["out", "down"])
def test_nf4_is_that_of_a_loop(name):
    """Of a block of zeros, of one that is large, and of blocks of 48, the largest even divisor of 96 below 64."""
    shape, _, axis = MAPS[name]
    x = normal(*shape) * 10.0 ** RNG.integers(-3, 3, (1, 1, *shape[2:-1], shape[-1]))
    x[0, 0] = 0.0
    packed = jax.jit(lambda x: pack(x, leaf_of(name), "nf4"))(x)
    assert isinstance(packed, Nf4) and packed.codes.dtype == jnp.uint8 and packed.scales.dtype == jnp.float32
    block = quantized.block_of(shape[axis])
    assert block == {"out": 48, "down": 64}[name]
    assert packed.codes.shape[axis] == shape[axis] // 2 and packed.scales.shape[axis] == shape[axis] // block
    np.testing.assert_allclose(unpacked(packed, jnp.float32), loop_nf4(x, axis, block), rtol=1e-6, atol=0)


def test_two_codes_a_byte_by_hand():
    """A block of 4 whose largest is 2: shares -1, 0.05, 0.9, 1 are codes 0, 8, 15, 15, the first in the high bits."""
    x = jnp.array([[[-2.0], [0.1], [1.8], [2.0]]])
    packed = pack(x, Leaf((1, 4, 1), ("layers", "mlp", "embed"), 1.0), "nf4")
    assert isinstance(packed, Nf4)
    assert packed.codes.ravel().tolist() == [0x08, 0xFF] and packed.scales.ravel().tolist() == [2.0]
    np.testing.assert_allclose(np.ravel(unpacked(packed, jnp.float32)), [-2, 2 * NF4[8], 2, 2])


def test_int8_has_a_scale_for_each_output():
    for name, (shape, _, _) in MAPS.items():
        x, ins = normal(*shape), (1, 2) if name == "out" else (1,)
        packed = pack(jnp.asarray(x), leaf_of(name), "int8")
        scale = np.abs(x).max(ins, keepdims=True) / 127
        assert isinstance(packed, Int8) and packed.scale.shape == scale.shape
        np.testing.assert_allclose(unpacked(packed, jnp.float32), np.round(x / scale) * scale, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "low", "high", "share"), [("int8", 0.006, 0.012, 0.2505), ("nf4", 0.085, 0.1, 0.1407)]
)
def test_error_and_bytes_of_normal_weights(kind, low, high, share):
    """Relative RMS, and bytes over those of float32: 1 + 4 / 2048 and 0.5 + 4 / 64 of 4 bytes."""
    leaf = Leaf((1, 2048, 32), ("layers", "embed", "mlp"), 1.0)
    x = normal(*leaf.shape)
    packed = jax.jit(lambda x: pack(x, leaf, kind))(x)
    error = np.sqrt(((np.asarray(unpacked(packed, jnp.float32)) - x) ** 2).mean() / (x**2).mean())
    assert low < error < high
    ratio = sum(part.nbytes for part in packed) / x.nbytes
    assert ratio == bytes_each(leaf, kind) / 4 and abs(ratio - share) < 1e-4


@pytest.mark.parametrize("size", [9, 74, 2, 13])
def test_an_axis_without_blocks(size):
    with pytest.raises(ValueError, match=f"base_quantization: nf4: no even block of 4 to 64 weights divides {size}$"):
        quantized.block_of(size)


# ---- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize(
    ("name", "equation", "out"),
    [
        ("query", "bsd,dhk->bshk", "batch seq heads head_dim"),
        ("out", "bshk,hkd->bsd", "batch seq hidden"),
        ("down", "bsm,md->bsd", "batch seq hidden"),
    ],
)
def test_a_map_is_that_of_the_weights_that_it_stands_for(name, equation, out, kind):
    """The product, and the gradient of x; the kernel has none."""
    shape, axes, _ = MAPS[name]
    packed = pack(jnp.asarray(normal(*shape) / 10), leaf_of(name), kind)
    one = jax.tree.map(lambda x: x[0], packed)
    x = normal(2, 3, *(shape[1:3] if name == "out" else shape[1:2])) / 3
    weight = normal(*np.einsum(equation, x, unpacked(one, jnp.float32)).shape)
    run = lambda kernel, x: (linear({"kernel": kernel}, x, equation, axes[1:], tuple(out.split())) * weight).sum()
    ours = jax.jit(jax.value_and_grad(run, 1))(one, x)
    theirs = jax.jit(jax.value_and_grad(run, 1))(unpacked(one, jnp.float32), x)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5, atol=1e-6)


def packed_base(kind: Quantization):
    """The model's weights on the current mesh, packed in one program."""
    return tiny.program(lambda params: packed_tree(params, TABLE, kind))(tiny.parameters(MODEL, "lm", 0))


@functools.cache
def trees(kind: Quantization) -> Trees:
    base = packed_base(kind)
    return Trees({"policy": tiny.adapter(MODEL, "lm", LORA, 1)}, {"base": base, "reference": {}})


def wide_trees(kind: Quantization) -> Trees:
    return trees(kind)._replace(
        slow={"base": lora.merged_at_once(trees(kind).slow["base"], {}, 1.0, jnp.float32), "reference": {}}
    )


BASES = {"policy": Based("base", LORA, "nf4"), "reference": Based("base", None, "nf4")}


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_log_probs_and_adapters_gradients_are_those_of_the_weights(kind):
    """Forward to 1e-6 of its size, gradients to 1e-5, of a float model with the weights that the bits stand for; the
    layers alone are packed."""
    tokens = jnp.asarray(RNG.integers(0, 64, (3, 9)).astype(np.int32))

    def loss(own, trees):
        params = lora.params_of("policy", trees._replace(params={"policy": own}), BASES)
        states = forward(params, MODEL, tokens, jnp.ones_like(tokens), Runtime())
        return (states**3).sum(), states

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    ours, states = gradient(trees(kind).params["policy"], trees(kind))
    theirs, expected = gradient(trees(kind).params["policy"], wide_trees(kind))
    np.testing.assert_allclose(states, expected, atol=1e-6 * np.abs(expected).max() * 4)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())
    base = trees(kind).slow["base"]
    packed = jax.tree.leaves(base["layers"], is_leaf=lambda x: isinstance(x, quantized.PACKED))
    assert sum(isinstance(x, quantized.PACKED) for x in packed) == 7
    assert base["embed"]["tokens"]["embedding"].dtype == jnp.float32


@pytest.mark.parametrize("merge", [True, False])
def test_what_was_sampled_has_the_same_log_probs(merge):
    """Decoding reads merged weights, or the 4 bits with A and B beside them: 1e-4 of the forward pass."""
    sampling, runtime = Sampling(1.0, eos_ids=(1, 2)), Runtime(merge_adapter=merge)
    sample = tiny.sampler_of(MODEL, sampling, 8, 2, bases=BASES, runtime=runtime)
    nets = make_nets({"policy": MODEL}, runtime, sampling, sample, bases=BASES)
    seed, ask = jnp.int32(5), Ask("policy", "token_stats")
    sequences = tiny.program(lambda trees: nets.sample("policy", trees, tiny.prompts(4), seed, seed))(trees("nf4"))
    (stats,) = tiny.program(lambda trees, rows: nets.read(trees, rows, ask))(trees("nf4"), sequences)
    mask = np.asarray(sequences.response_mask)
    np.testing.assert_allclose(np.asarray(stats.logprobs)[mask], np.asarray(sequences.logprobs)[mask], atol=1e-4)


def test_what_decoding_reads():
    """Merged kernels, or those that there are; in 8 bits, quantised anew."""
    found = lora.params_of("policy", trees("nf4"), BASES)

    def query(**how):
        lay = lambda found: decode_layout(found, MODEL, "lm", Runtime(**how), 64)["layers"][1]["attention"]["query"]
        return tiny.program(lay)(found)

    kernel = lora.merged_at_once(found, {}, 1.0, jnp.float32)["layers"]["attention"]["query"]["kernel"][1]
    np.testing.assert_allclose(query()["kernel"], kernel, atol=1e-6)
    assert isinstance(query(int8=("weights",))["kernel"], Int8)
    beside = query(merge_adapter=False)
    assert isinstance(beside["kernel"], Nf4) and beside.keys() == {"kernel", "lora_a", "lora_b"}


def test_on_eight_devices(mesh_8):
    """The same bits as on one, wherever fsdp cuts blocks of 16; log-probs and gradients to 1e-5."""
    tokens = np.random.default_rng(3).integers(0, 64, (8, 7)).astype(np.int32)

    def run(own, trees, tokens):
        def loss(own):
            params = lora.params_of("policy", trees._replace(params={"policy": own}), BASES)
            return (forward(params, MODEL, tokens, jnp.ones_like(tokens), Runtime()) ** 3).sum()

        return jax.value_and_grad(loss)(own)

    alone = Trees({}, {"base": packed_base("nf4")})
    expected = tiny.program(run)(tiny.adapter(MODEL, "lm", LORA, 1), alone, jnp.asarray(tokens))
    with jax.set_mesh(mesh_8):
        split = Trees({}, {"base": packed_base("nf4")})
        found = tiny.program(run)(tiny.adapter(MODEL, "lm", LORA, 1), split, tiny.put(tokens))
        layers = split.slow["base"]["layers"]
        assert layers["attention"]["query"]["kernel"].codes.sharding.shard_shape((2, 8, 4, 4)) == (2, 2, 2, 4)
        assert layers["attention"]["query"]["kernel"].scales.sharding.shard_shape((2, 1, 4, 4)) == (2, 1, 2, 4)
    assert tiny.equal_trees(split.slow, alone.slow)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", pytest.param("nf4", marks=pytest.mark.nightly)])  # by day: int8
@pytest.mark.parametrize("split", [False, True])
def test_weights_are_there_for_one_product_at_a_time(kind, split, mesh_8):
    """Of six maps in a row, the gradient of x takes less than three in float32, on one device and on each of eight; XLA
    alone would compute all of them first, and keep them."""
    size, maps = 128, [("embed", "mlp"), ("mlp", "embed")] * 3

    def total(x, kernels):
        for kernel, axes in zip(kernels, maps):
            made = ("batch", "seq", "mlp" if axes[1] == "mlp" else "hidden")
            x = linear({"kernel": kernel}, x, "bsd,de->bse", axes, made)
        return (x**2).sum()

    with jax.set_mesh(mesh_8) if split else contextlib.nullcontext():
        leaves = [Leaf((1, size, size), ("layers", *axes), 1.0) for axes in maps]
        packs = jax.jit(lambda: [pack(jnp.ones(leaf.shape), leaf, kind) for leaf in leaves])
        kernels = jax.tree.map(lambda x: x[0], packs())
        compiled = jax.jit(jax.grad(total)).lower(tiny.put(np.ones((8, 3, size), np.float32)), kernels).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 4 * size * size / (2 if split else 1)


WIDE = resolve(ModelConfig(vocab_size=64, hidden_size=64, num_layers=6, num_heads=4, num_kv_heads=4, mlp_size=256))


def temporaries(kind: Quantization, runtime: Runtime) -> float:
    """Bytes beside the arguments that a gradient of adapters takes, in float32 weights of one layer."""
    table = parameter_table(WIDE, "lm")
    base = jax.eval_shape(lambda: packed_tree(lora.draw_table(table, jax.random.key(0)), table, kind))
    own = jax.eval_shape(lambda: lora.init_adapter(WIDE, LORA, jax.random.key(0)))
    tokens = jnp.ones((1, 4), jnp.int32)
    total = lambda own, base: forward(lora.assemble(base, own, 1.0), WIDE, tokens, tokens, runtime).sum()
    memory = jax.jit(jax.grad(total)).lower(own, base).compile().memory_analysis()
    return memory.temp_size_in_bytes / (4 * (4 * 64 * 64 + 3 * 64 * 256))


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("nf4", Runtime()),
        *(
            pytest.param(kind, Runtime()._replace(remat=remat, scan_layers=scan), marks=pytest.mark.nightly)
            for kind, remat, scan in [
                ("int8", "none", True),
                ("nf4", "dots", True),
                ("nf4", "full", True),
                ("nf4", "none", False),
                ("int8", "none", False),
            ]
        ),
    ],
)  # by day: nf4 in a scan
def test_no_copy_of_all_layers_is_kept(kind, runtime):
    """Temporaries are less than two of the six layers, activations and gradients included."""
    assert temporaries(kind, runtime) < 2
