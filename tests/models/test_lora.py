"""Adapters against arithmetic by hand, against the base with the adapter off, and against merged weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models import lora
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.decoding import decode_layout
from jaxrlhf.models.int8 import Int8
from jaxrlhf.models.linear import LORA_A, LORA_B, linear
from jaxrlhf.models.lora import Based, LoraConfig
from jaxrlhf.models.nets import make_nets
from jaxrlhf.models.parameters import Leaf
from jaxrlhf.models.transformer import Runtime, forward
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.types import Ask, Trees
from tests.support import tiny

RNG = np.random.default_rng(7)
LORA = LoraConfig(rank=2, alpha=6.0)  # counts 3 times
BASES = {"policy": Based("base", LORA), "reference": Based("base", None), "value": Based("base", LORA)}
RUNTIME = Runtime()
MODEL = dataclasses.replace(tiny.MODEL, num_layers=2)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@functools.cache
def trees() -> Trees:
    """A policy with a B that does something, and its base."""
    return Trees(
        {"policy": tiny.adapter(MODEL, "lm", LORA, 1)}, {"base": tiny.parameters(MODEL, "lm", 0), "reference": {}}
    )


def states(params, runtime: Runtime = RUNTIME):
    tokens = np.random.default_rng(3).integers(0, 64, (3, 9)).astype(np.int32)
    run = lambda params: forward(params, MODEL, jnp.asarray(tokens), jnp.ones_like(tokens), runtime)
    return np.asarray(tiny.program(run)(params))


# ---- one map --------------------------------------------------------------------------------------------------------


def test_one_map_by_hand():
    """x (1, 2), W the identity, A (1, 1), B (1, -1): x A = 3, so y = (1, 2) + (3, -3) + bias. Of the loss y . (1, 10)
    the gradients are x^T (g B^T) = -9 x of A, and 3 g of B."""
    params = {"kernel": jnp.eye(2), "bias": jnp.array([0.5, 0.25])}
    x, g = jnp.array([[[1.0, 2.0]]]), jnp.array([1.0, 10.0])

    def loss(a, b):
        both = params | {LORA_A: a, LORA_B: b}
        y = linear(both, x, "bsd,dm->bsm", ("embed", "mlp"), ("batch", "seq", "mlp"))
        return (y * g).sum(), y

    grads, y = jax.grad(loss, (0, 1), has_aux=True)(jnp.array([[1.0], [1.0]]), jnp.array([[1.0, -1.0]]))
    assert y.tolist() == [[[4.5, -0.75]]]
    assert grads[0].tolist() == [[-9.0], [-18.0]] and grads[1].tolist() == [[3.0, 30.0]]


@pytest.mark.parametrize(
    ("equation", "axes", "out", "x", "a", "b"),
    [
        ("bsd,dhk->bshk", "embed heads head_dim", "batch seq heads head_dim", (2, 3, 8), (8, 2), (2, 4, 5)),
        ("bshk,hkd->bsd", "heads head_dim embed", "batch seq hidden", (2, 3, 4, 5), (4, 5, 2), (2, 8)),
        ("bsd,dm->bsm", "embed mlp", "batch seq mlp", (2, 3, 8), (8, 2), (2, 6)),
        ("bsm,md->bsd", "mlp embed", "batch seq hidden", (2, 3, 6), (6, 2), (2, 8)),
    ],
)
def test_each_kind_of_map_is_that_of_the_merged_kernel(equation, axes, out, x, a, b):
    """Output, and the gradients of x, A and B, against those that JAX derives of W + A B by einsum."""
    x, a, b, kernel = (jnp.asarray(normal(*shape)) for shape in (x, a, b, (*a[:-1], *b[1:])))
    weight = jnp.asarray(normal(*np.einsum(equation, x, kernel).shape))
    axes, out = tuple(axes.split()), tuple(out.split())
    apart = lambda x, a, b: linear({"kernel": kernel, LORA_A: a, LORA_B: b}, x, equation, axes, out)
    whole = lambda x, a, b: jnp.einsum(equation, x, kernel + jnp.tensordot(a, b, 1))
    total = lambda map_of: jax.value_and_grad(lambda *given: (map_of(*given) * weight).sum(), (0, 1, 2))
    for ours, theirs in zip(
        jax.tree.leaves(total(apart)(x, a, b)), jax.tree.leaves(total(whole)(x, a, b)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


# ---- a model --------------------------------------------------------------------------------------------------------


def test_leaves_by_hand():
    """Hidden 16, 4 heads of 4, 2 key-value heads, mlp 32, rank 2: in a layer 2 (16 + 16) of query and of out,
    2 (16 + 8) of key and of value, 2 (16 + 32) of gate, up and down."""
    table = lora.adapter_table(MODEL, LORA)
    count = lambda table: sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(table, is_leaf=is_leaf))
    assert count(table) == 2 * (2 * 64 + 2 * 48 + 3 * 96)
    assert count(lora.own_table(MODEL, "scalar", LORA)) == 2 * (2 * 64 + 2 * 48 + 3 * 96) + 17
    few = lora.adapter_table(MODEL, dataclasses.replace(LORA, targets=("value", "query")))
    assert few.keys() == {"layers"} and list(few["layers"]["attention"]) == ["query", "value"]
    assert table["layers"]["attention"]["out"] == {
        LORA_A: Leaf((2, 4, 4, 2), ("layers", "heads", "head_dim", "rank"), 1 / np.sqrt(48), "uniform"),
        LORA_B: Leaf((2, 2, 16), ("layers", "rank", "embed"), "zeros"),
    }


def is_leaf(x) -> bool:
    return isinstance(x, Leaf)


def test_a_new_adapter_changes_nothing():
    """Bit for bit: B is 0. A is uniform within 1 / sqrt(inputs), or normal with deviation 1 / rank."""
    wide = dataclasses.replace(LORA, rank=16)
    new = lora.init_adapter(MODEL, wide, jax.random.key(0))
    base = trees().slow["base"]
    assert (states(lora.assemble(base, new, wide.scale)) == states(base)).all()
    a = np.asarray(new["layers"]["mlp"]["down"][LORA_A])
    assert 0.99 / np.sqrt(32) < np.abs(a).max() <= 1 / np.sqrt(32) and abs(a.std() * np.sqrt(3 * 32) - 1) < 0.05
    gaussian = lora.init_adapter(MODEL, dataclasses.replace(wide, init="gaussian"), jax.random.key(0))
    assert abs(np.asarray(gaussian["layers"]["mlp"]["down"][LORA_A]).std() * 16 - 1) < 0.1


def test_scales():
    assert LORA.scale == 3.0 and dataclasses.replace(LORA, rank=4, rslora=True).scale == 3.0


@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=pytest.mark.nightly), "full"])
def test_merged_weights_compute_the_same(remat):
    found = lora.params_of("policy", trees(), BASES)
    y = states(found, Runtime(remat=remat))
    np.testing.assert_allclose(states(lora.merged(found)), y, rtol=1e-5, atol=1e-5)
    assert np.abs(y - states(trees().slow["base"])).max() > 0.1


def test_the_reference_is_the_base():
    """The very arrays: it takes no memory. A role of its own head has no language-model head under it."""
    found = lora.params_of("reference", trees(), BASES)
    assert all(
        one is two for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(trees().slow["base"]), strict=True)
    )
    untied = resolve(dataclasses.replace(MODEL, tie_embeddings=False))
    own = tiny.adapter(untied, "scalar", LORA, 2)
    value = lora.assemble(tiny.parameters(untied, "lm", 0), own, 1.0)
    assert value["head"].keys() == {"kernel", "bias"} and value["head"]["kernel"].shape == (16, 1)


def test_what_was_sampled_has_the_same_log_probs():
    """Decoding reads merged weights, a forward pass adds the product: 1e-4."""
    sampling = Sampling(1.0, eos_ids=(1, 2))
    nets = make_nets(
        dict.fromkeys(("policy", "reference"), MODEL),
        Runtime(),
        sampling,
        tiny.sampler_of(MODEL, sampling, 8, 2, bases=BASES),
        bases=BASES,
    )
    seed, ask = jnp.int32(5), Ask("policy", "token_stats")
    sequences = tiny.program(lambda trees: nets.sample("policy", trees, tiny.prompts(4), seed, seed))(trees())
    stats, other = tiny.program(lambda trees, rows: nets.read(trees, rows, ask, Ask("reference", "token_stats")))(
        trees(), sequences
    )
    mask = np.asarray(sequences.response_mask)
    np.testing.assert_allclose(np.asarray(stats.logprobs)[mask], np.asarray(sequences.logprobs)[mask], atol=1e-4)
    assert np.abs(np.asarray(other.logprobs)[mask] - np.asarray(sequences.logprobs)[mask]).max() > 0.05


def test_decoding_in_8_bits_quantises_merged_kernels():
    found = lora.params_of("policy", trees(), BASES)
    runtime = Runtime(int8=("weights",))
    laid = decode_layout(found, MODEL, "lm", runtime, 4)
    kernel = lora.merged(found)["layers"]["attention"]["query"]["kernel"][1]
    query = laid["layers"][1]["attention"]["query"]
    assert isinstance(query["kernel"], Int8) and query.keys() == {"kernel"}
    np.testing.assert_allclose(tiny.wide(query["kernel"]), kernel, atol=np.asarray(query["kernel"].scale).max())


def test_a_base_in_bfloat16_has_its_adapter_added_in_float32():
    """Merged weights are float32: in bfloat16 a small A B would be rounded away."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trees().slow["base"])
    found = lora.params_of("policy", trees()._replace(slow={"base": half}), BASES)
    kernel = lora.merged(found)["layers"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == jnp.float32
    np.testing.assert_allclose(states(lora.merged(found)), states(found), rtol=1e-5, atol=1e-5)


def test_nothing_is_differentiated_for_the_base():
    """FLOPs of a gradient: without those of kernels there are two products a map in place of three."""
    tokens = jnp.ones((4, 32), jnp.int32)
    cfg = dataclasses.replace(MODEL, hidden_size=64, mlp_size=128, head_dim=16)
    base, own = tiny.parameters(cfg, "lm", 0), tiny.adapter(cfg, "lm", LORA, 1)
    total = lambda params: (forward(params, cfg, tokens, tokens, Runtime()) ** 2).sum()
    flops = lambda gradient, *given: jax.jit(gradient).lower(*given).compile().cost_analysis()["flops"]  # type: ignore[index]
    adapted = flops(lambda own, base: jax.grad(lambda own: total(lora.assemble(base, own, 1.0)))(own), own, base)
    assert adapted < 0.8 * flops(jax.grad(total), base)


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ("qeury",)}, "adapter.targets: qeury: a llama has no such map; nearest: query"),
        ({"targets": ("head",)}, "adapter.targets: head: a llama has no such map; choices: all-linear, query, key"),
        ({"rank": 17}, "adapter.rank: 17: more than hidden_size; expected at most 16; nearest: 16"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(ValueError) as caught:
        lora.adapter_table(MODEL, dataclasses.replace(LORA, **change))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_model_without_a_gate_or_without_text():
    gpt = resolve(ModelConfig(family="gpt2", vocab_size=64, hidden_size=16, num_layers=1, num_heads=4))
    with pytest.raises(ValueError, match=r"adapter\.targets: gate: a gpt2 has no such map"):
        lora.targets_of(gpt, LoraConfig(targets=("gate",)))
    assert lora.targets_of(gpt, LoraConfig()) == ("query", "key", "value", "out", "up", "down")
