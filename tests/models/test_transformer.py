"""The decoder: positions, masks, packing, padding, meshes, remat, number formats. tests/parity has real numbers."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import sharding
from jaxrlhf.models.attention.kernels import Hardware
from jaxrlhf.models.attention.products import (
    attention,
    bias_of,
    branches,
    by_head,
    causal_mask,
    merge_copies,
    split_copies,
    within_window,
)
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.cpu import SHALLOW
from jaxrlhf.models.heads import IMPOSSIBLE, lm_logits
from jaxrlhf.models.parameters import Leaf, init, padded_vocab, parameter_table, weight_spec
from jaxrlhf.models.rope import RopeScaling, cos_sin, rope_frequencies, rope_magnitude, rotate
from jaxrlhf.models.transformer import Runtime, forward, forward_responses, positions_of, scans
from jaxrlhf.sharding import MeshConfig
from jaxrlhf.types import Head
from tests.models.test_kernels import equations
from tests.support import compiler, tiny

BASE = resolve(ModelConfig(vocab_size=101, hidden_size=32, mlp_size=48, max_positions=32))
LLAMA = dataclasses.replace(BASE, num_kv_heads=2, head_dim=16, rope_theta=100.0)
GPT2 = dataclasses.replace(BASE, family="gpt2", attention_bias=True, mlp_bias=True)
OLMO2 = resolve(dataclasses.replace(BASE, family="olmo2", num_kv_heads=2))
WINDOWS: dict[str, Any] = {"num_layers": 3, "sliding_window": 4, "layer_types": ("local", "global", "local")}
GEMMA3 = resolve(dataclasses.replace(BASE, family="gemma3_text", num_kv_heads=1, local_rope_theta=50.0, **WINDOWS))
CAPPED = dataclasses.replace(GEMMA3, attention_softcap=2.0)
NET = resolve(  # gated delta nets around a gated attention
    dataclasses.replace(
        BASE,
        family="qwen3_5_text",
        num_layers=3,
        layer_types=("linear", "global", "linear"),
        num_kv_heads=2,
        rotary_fraction=0.5,
        linear_value_heads=8,
        linear_value_dim=12,
        norm_eps=1e-2,
    )
)
# a layer without positions between rotated ones, queries that are scaled by position
NOPE = resolve(
    dataclasses.replace(
        BASE,
        family="smollm3",
        num_layers=3,
        layer_types=("global", "nope", "global"),
        num_kv_heads=2,
        rope_theta=100.0,
        rope_scaling=RopeScaling("yarn", 2.0, original_max_positions=3, query_beta=0.5),
    )
)
OSS = resolve(  # sinks, biases, experts
    dataclasses.replace(
        BASE,
        family="gpt_oss",
        num_kv_heads=2,
        head_dim=16,
        attention_bias=True,
        mlp_bias=True,
        num_experts=4,
        rope_scaling=RopeScaling("yarn", 4.0, original_max_positions=3, truncate=False),
        **WINDOWS,
    )
)
# the last two layers read keys and values, all have embeddings of their own; global ones have other heads
UNEVEN = resolve(
    dataclasses.replace(
        BASE,
        family="gemma4_text",
        num_layers=6,
        layer_types=("local", "global") * 3,
        num_kv_heads=2,
        head_dim=8,
        global_head_dim=12,
        global_kv_heads=1,
        keys_are_values=True,
        shared_kv_layers=2,
        wide_shared_mlp=True,
        per_layer_size=8,
        sliding_window=4,
        rope_theta=100.0,
        local_rope_theta=50.0,
        rotary_fraction=0.5,
        norm_eps=1e-2,  # products of queries and keys are not divided: rounding grows with each layer
    )
)
SIZE = 12  # columns
FLOAT32 = Runtime()


@functools.cache
def weights(cfg):
    """The deviations of init, but for larger embeddings (logits of size 1) and norms and biases that do something."""
    rng = np.random.default_rng(0)

    def one(path, leaf):
        deviation = {"embedding": 0.3, "kernel": leaf.init, "taps": leaf.init}.get(path[-1].key, 0.1)
        return ((leaf.init == "ones") + deviation * rng.normal(size=leaf.shape)).astype(np.float32)

    table = parameter_table(cfg, "lm")
    return jax.tree_util.tree_map_with_path(one, table, is_leaf=lambda x: isinstance(x, Leaf))


def placed(cfg):
    """The same weights on the current mesh."""
    table = parameter_table(cfg, "lm")
    put = lambda leaf, x: jax.device_put(x, weight_spec(leaf))
    return jax.tree.map(put, table, weights(cfg), is_leaf=lambda x: isinstance(x, Leaf))


@functools.partial(jax.jit, static_argnums=(1, 4))
def logits_of(params, cfg, tokens, segments, runtime=FLOAT32):
    return lm_logits(params, cfg, forward(params, cfg, tokens, segments, runtime))


def rows(count, seed=0):
    return np.random.default_rng(seed).integers(0, 101, (count, SIZE))


# ---- positions and masks --------------------------------------------------------------------------------------------


def test_positions():
    segments = jnp.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 2, 2, 2, 3]])
    positions = np.asarray(positions_of(segments))
    assert positions[0, 2:].tolist() == [0, 1, 2, 3]
    assert positions[1, :3].tolist() == [0, 1, 2]
    assert positions[2].tolist() == [0, 1, 0, 1, 2, 0]


def test_causal_mask():
    mask = np.asarray(causal_mask(jnp.array([[0, 1, 1, 2]])))[0, 0]
    assert mask.tolist() == [
        [False, False, False, False],
        [False, True, False, False],
        [False, True, True, False],
        [False, False, False, True],
    ]


def test_a_window_is_of_so_many_tokens():
    """Itself and the two before it, in each segment; columns of queries may begin anywhere."""
    mask = causal_mask(jnp.array([[0, 1, 1, 1, 1, 2, 2]]))
    seen = np.asarray(within_window(mask, jnp.arange(7), 3))[0, 0]
    for s in range(7):
        for t in range(7):
            assert seen[s, t] == (mask[0, 0, s, t] and s - t < 3)
    assert seen.sum() == 1 + 2 + 3 + 3 + 1 + 2
    np.testing.assert_array_equal(within_window(mask[:, :, 5:6], jnp.array([5]), 3)[0, 0, 0], seen[5])


def frequency(i, dim, theta, scaling):
    """The law of one frequency, written as the definition has it."""
    plain = theta ** (-2 * i / dim)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "longrope":
        return plain / scaling.short_factor[i]
    turns = scaling.original_max_positions * plain / (2 * math.pi)  # over the original context
    if scaling.kind == "yarn":
        place = lambda turns: dim * math.log(scaling.original_max_positions / (2 * math.pi * turns), theta) / 2
        first, last = place(scaling.beta_fast), place(scaling.beta_slow)
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        slow = min(max((i - max(first, 0)) / (min(last, dim - 1) - max(first, 0)), 0), 1)
        return (1 - slow) * plain + slow * plain / scaling.factor
    if turns < scaling.low_freq_factor:
        return plain / scaling.factor
    if turns > scaling.high_freq_factor:
        return plain
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - share) * plain / scaling.factor + share * plain


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RopeScaling("linear", 4.0),
        RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
        RopeScaling("yarn", 4.0, original_max_positions=512, beta_fast=8.0),
        RopeScaling("yarn", 4.0, original_max_positions=512, beta_fast=8.0, truncate=False),
        RopeScaling("longrope", short_factor=tuple(np.linspace(1, 2, 8)), long_factor=(1.0,) * 8),
    ],
)
def test_rope_frequencies(scaling):
    expected = [frequency(i, 16, 10000.0, scaling) for i in range(8)]
    np.testing.assert_allclose(rope_frequencies(16, 10000.0, scaling), expected, rtol=1e-5)


def test_proportional_frequencies_are_those_of_a_whole_head():
    """5 of 8 features are rotated, which makes 2 pairs of 4: the others stand still."""
    found = rope_frequencies(5, 100.0, RopeScaling("proportional", 2.0), 8)
    np.testing.assert_allclose(found, [0.5, 0.5 * 100 ** (-2 / 8), 0, 0], rtol=1e-6)


def test_yarn_spares_fast_frequencies_and_divides_slow_ones():
    scaling = RopeScaling("yarn", 4.0, original_max_positions=512, beta_fast=8.0)
    ratio = np.asarray(rope_frequencies(16, 10000.0, None) / rope_frequencies(16, 10000.0, scaling))
    turns = 512 * np.asarray(rope_frequencies(16, 10000.0, None)) / (2 * math.pi)
    np.testing.assert_allclose(ratio[turns > 8], 1, rtol=1e-5)
    np.testing.assert_allclose(ratio[-4:], 4, rtol=1e-5)
    assert (np.diff(ratio) >= -1e-5).all() and ((ratio > 1.1) & (ratio < 3.9)).any()


def test_rope_magnitude():
    """Worked by hand from the papers' formulas."""
    yarn, longrope = RopeScaling("yarn", math.e**2), RopeScaling("longrope", 16.0, original_max_positions=256)
    assert rope_magnitude(None) == rope_magnitude(RopeScaling("linear", 4.0)) == 1
    assert math.isclose(rope_magnitude(yarn), 1.2)
    assert math.isclose(rope_magnitude(longrope), math.sqrt(1.5))  # log 16 / log 256 is a half
    assert rope_magnitude(dataclasses.replace(yarn, attention_factor=0.7)) == 0.7
    assert rope_magnitude(RopeScaling("longrope", 0.5)) == 1


def test_rotation_is_by_the_position_and_relative():
    """One pair (x_i, x_{i + K/2}) turns by position x frequency; products depend on the distance alone."""

    def turned(x, position, magnitude=1.0):
        by = cos_sin(jnp.array([[position]]), jnp.array([0.5, 0.1]), 10, magnitude)
        return rotate(jnp.reshape(jnp.asarray(x), (1, 1, 1, -1)), *by)[0, 0, 0]

    expected = [math.cos(1.5), -2 * math.sin(0.3), math.sin(1.5), 2 * math.cos(0.3)]
    np.testing.assert_allclose(turned([1.0, 0, 0, 2.0], 3), expected, atol=1e-6)
    wide = [1.0, 0, 0, 2.0, 5.0, 6.0]  # two features behind those that are rotated
    np.testing.assert_allclose(turned(wide, 3, 2.0), [*(2 * np.array(expected)), 5, 6], atol=1e-5)
    query, key = jax.random.normal(jax.random.key(0), (2, 4))
    product = lambda m, n: turned(query, m) @ turned(key, n)
    np.testing.assert_allclose(product(9, 4), product(5, 0), atol=1e-5)
    assert abs(product(9, 4) - product(9, 5)) > 1e-3


def test_grouped_attention_against_a_loop():
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(1, 5, heads, 3)).astype(np.float32) for heads in (4, 2, 2))
    mask = np.tril(np.ones((5, 5), bool))
    expected = np.zeros_like(query)
    for head in range(4):
        for s in range(5):
            scores = np.array([query[0, s, head] @ key[0, t, head // 2] / math.sqrt(3) for t in range(s + 1)])
            share = np.exp(scores) / np.exp(scores).sum()
            expected[0, s, head] = sum(share[t] * value[0, t, head // 2] for t in range(s + 1))
    for repeats in (1, 2):  # 2: as where a mesh does not divide the kv heads
        arguments = (
            query,
            key.repeat(repeats, axis=2),
            value.repeat(repeats, axis=2),
            bias_of(jnp.array(mask[None, None])),
        )
        np.testing.assert_allclose(jax.jit(attention)(*arguments), expected, atol=1e-5)


def test_scale_and_softcap_of_attention_against_a_loop():
    """Grouped, ungrouped, and one query over a cache."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(1, 5, heads, 3)).astype(np.float32) for heads in (4, 2, 2))
    mask = np.tril(np.ones((5, 5), bool))[None, None]
    expected = np.zeros_like(query)
    for head in range(4):
        for s in range(5):
            scores = np.array(
                [0.8 * math.tanh(1.5 * query[0, s, head] @ key[0, t, head // 2] / 0.8) for t in range(s + 1)]
            )
            share = np.exp(scores) / np.exp(scores).sum()
            expected[0, s, head] = sum(share[t] * value[0, t, head // 2] for t in range(s + 1))
    for repeats in (1, 2):
        keys, values = (jnp.array(x.repeat(repeats, axis=2)) for x in (key, value))
        found = attention(jnp.array(query), keys, values, bias_of(jnp.array(mask)), scale=1.5, softcap=0.8)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    keys, values = (by_head(jnp.array(x)) for x in (key, value))
    parts = [(keys[:, :, :3], values[:, :, :3], jnp.zeros((1, 1, 1, 3)))]  # read by all, and by one
    parts += [(keys[:, :, None, 3:], values[:, :, None, 3:], jnp.zeros((1, 1, 1, 2)))]
    last = merge_copies(branches(split_copies(jnp.array(query[:, 4:]), 2, 1), parts, scale=1.5, softcap=0.8))
    np.testing.assert_allclose(last, expected[:, 4:], atol=1e-5)


OFTEN = [("llama", 3, True)]  # of gated delta nets by day: a layer, in test_delta_net


@pytest.mark.parametrize(
    ("cfg", "copies", "scanned"),
    [
        pytest.param(cfg, copies, scanned, marks=[] if case in OFTEN else pytest.mark.nightly)
        for cfg in (LLAMA, GPT2, GEMMA3, NET, NOPE, OSS, UNEVEN)
        for copies in (1, 3)
        for scanned in (True, False)
        for case in [(cfg.family, copies, scanned)]
    ],
)
def test_a_prompt_read_once_for_its_responses(cfg, copies, scanned):
    """What rows of their own say, in states and in gradients; whatever stands in the padding. Unrolled, the last layer
    computes nothing of prompts but their keys, values and last column."""
    start, room, groups, runtime = 6, 5, 2, Runtime(scan_layers=scanned)
    rng = np.random.default_rng(3)
    valid = np.ones((groups * copies, start + room), bool)
    tokens = rng.integers(3, 100, valid.shape)
    for group, padding in enumerate((4, 0)):
        mine = slice(group * copies, (group + 1) * copies)
        valid[mine, :padding] = False
        tokens[mine, :start] = tokens[group * copies, :start]
    for row, length in enumerate(rng.integers(0, room + 1, len(valid))):
        valid[row, start + length :] = False
    wanted = valid[:, start - 1 :, None]
    # gradients of size 1. UNEVEN's would be up to 31, of which rounding takes 2.5e-4: that is how far rows of their own
    # are from themselves with their order reversed, or layers unrolled
    size = 32 if cfg is UNEVEN else 1
    weight = rng.normal(size=(*wanted.shape[:2], cfg.hidden_size)) * wanted / len(valid) / size

    def together(params):
        return forward_responses(params, cfg, jnp.array(tokens), jnp.array(valid), start, copies, runtime)

    def alone(params):
        return forward(params, cfg, jnp.array(tokens), jnp.array(valid, jnp.int32), Runtime())[:, start - 1 :]

    # the tolerance is made for the rounding of the default compiler, which the largest case comes near
    jit = functools.partial(jax.jit, compiler_options=compiler.DEFAULT if cfg is GEMMA3 and copies == 3 else None)
    both = []
    for states in (together, alone):

        def loss(params, states=states):
            found = jnp.where(wanted, states(params), 0)
            return (weight * found).sum(), found

        both.append(jit(jax.grad(loss, has_aux=True))(weights(cfg)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), *both)


# ---- whole rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [LLAMA, GPT2, GEMMA3, NET, NOPE, OSS, UNEVEN])
def test_padding_never_changes_logits(cfg):
    """Left, right, more or less of it, and whatever tokens stand there."""
    text = rows(1)[0, :7]
    params = weights(cfg)
    tokens, segments = np.zeros((8, SIZE), int), np.zeros((8, SIZE), int)
    for row in range(6):
        tokens[row, row : row + 7], segments[row, row : row + 7] = text, 1
    tokens[6:], segments[6:] = rows(2, seed=5), segments[2:4]  # other tokens in the padding
    tokens[6, 2:9], tokens[7, 3:10] = text, text
    logits = np.asarray(logits_of(params, cfg, jnp.array(tokens), jnp.array(segments)))
    alone = np.stack([logits[row][segments[row] > 0] for row in range(8)])
    assert np.abs(alone[..., :101]).max() > 1
    np.testing.assert_allclose(alone, alone[:1].repeat(8, 0), atol=1e-5)


@pytest.mark.parametrize("cfg", [LLAMA, GPT2, GEMMA3, NET, NOPE, OSS, UNEVEN])
def test_packed_documents_do_not_see_each_other(cfg):
    """Three documents in one row give the logits of three rows."""
    text, params = rows(1, seed=2)[0], weights(cfg)
    lengths, starts = [4, 6, 2], [0, 4, 10]
    tokens, segments = np.zeros((8, SIZE), int), np.zeros((8, SIZE), int)
    tokens[3], segments[3] = text, np.repeat([1, 2, 3], lengths)
    for row, (start, length) in enumerate(zip(starts, lengths)):
        tokens[row, :length], segments[row, :length] = text[start : start + length], 1
    logits = np.asarray(logits_of(params, cfg, jnp.array(tokens), jnp.array(segments)))
    separate = np.concatenate([logits[row, :length] for row, length in enumerate(lengths)])
    np.testing.assert_allclose(logits[3], separate, atol=1e-5)
    together = logits_of(params, cfg, jnp.array(tokens), jnp.array(np.minimum(segments, 1)))[3]
    assert np.abs(together[4:] - separate[4:])[:, :101].max() > 1e-2  # packing without segments would be seen


@pytest.mark.parametrize("cfg", [LLAMA, GPT2, GEMMA3, NET])
def test_the_future_is_not_seen(cfg):
    params, tokens = weights(cfg), np.tile(rows(1), (8, 1))
    for row in range(8):
        tokens[row, row + 1] = (tokens[row, row + 1] + 1) % 101
    logits = np.asarray(logits_of(params, cfg, jnp.array(tokens), jnp.ones((8, SIZE), int)))
    original = logits[7]  # the same as all others up to its column 7
    for row in range(7):
        np.testing.assert_array_equal(logits[row, : row + 1], original[: row + 1])
        assert np.abs(logits[row, row + 1 : 8] - original[row + 1 : 8]).max(-1).min() > 1e-3


def test_padding_of_the_vocabulary_cannot_be_sampled():
    logits = logits_of(weights(LLAMA), LLAMA, jnp.array(rows(8)), jnp.ones((8, SIZE), int))
    assert logits.shape[-1] == padded_vocab(LLAMA) == 128
    assert (logits[..., 101:] == IMPOSSIBLE).all() and (logits[..., :101] > -1e3).all()


# ---- meshes, remat, number formats ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cfg, shape",
    [
        pytest.param(LLAMA, (2, 2, 2), marks=pytest.mark.nightly),
        (dataclasses.replace(LLAMA, num_kv_heads=1, tie_embeddings=False), (1, 4, 2)),  # one kv head on two devices
        (dataclasses.replace(LLAMA, num_heads=9, num_kv_heads=3), (2, 2, 2)),  # SmolLM2: heads stay whole
        pytest.param(dataclasses.replace(LLAMA, vocab_size=50257), (1, 4, 2), marks=pytest.mark.nightly),
        pytest.param(GPT2, (2, 2, 2), marks=pytest.mark.nightly),
        (OLMO2, (2, 2, 2)),  # a norm over all heads, on two devices
        pytest.param(GEMMA3, (2, 2, 2), marks=pytest.mark.nightly),
        (NET, (2, 2, 2)),
        (NOPE, (2, 2, 2)),
        (OSS, (1, 2, 2, 1, 1, 2)),  # also over experts
        # kv heads are repeated; heads, and with them sinks, stay whole
        pytest.param(dataclasses.replace(OSS, num_kv_heads=1), (1, 2, 4), marks=pytest.mark.nightly),
        pytest.param(dataclasses.replace(OSS, num_heads=9, num_kv_heads=3), (1, 4, 2), marks=pytest.mark.nightly),
        (UNEVEN, (2, 2, 2)),  # each device looks up a part of the features of embeddings
        pytest.param(  # value heads are split, and the one key head is not
            dataclasses.replace(NET, linear_key_heads=1), (1, 4, 2), marks=pytest.mark.nightly
        ),
    ],
)
def test_mesh_equals_one_device(cfg, shape):
    tokens, segments = rows(8), np.arange(SIZE) >= np.arange(8)[:, None]
    expected = logits_of(weights(cfg), cfg, jnp.array(tokens), jnp.array(segments, int))
    with jax.set_mesh(sharding.make_mesh(MeshConfig(*shape), jax.devices()[:8])):
        put = lambda x: jax.device_put(x.astype(np.int32), sharding.spec("batch", "seq"))
        logits = logits_of(placed(cfg), cfg, put(tokens), put(segments))
        assert logits.sharding.spec == sharding.spec("batch", "seq", "vocab")
    np.testing.assert_allclose(np.asarray(logits)[segments], np.asarray(expected)[segments], atol=1e-5)


def test_init_does_not_depend_on_the_mesh():
    """Three of the leaves: a vocabulary and heads that ``tensor`` splits, and a head that it does not."""

    @jax.jit
    def draw(key):
        params = init(LLAMA, "scalar", key)
        return params["embed"]["tokens"], params["layers"]["attention"]["query"]["kernel"], params["head"]

    one = draw(jax.random.key(1))
    with jax.set_mesh(sharding.make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])):
        many = draw(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, many, one)
    kernel = np.asarray(one[1])
    np.testing.assert_allclose(kernel.std(), 1 / math.sqrt(32), rtol=0.05)
    assert not np.array_equal(kernel[0], kernel[1])


@pytest.mark.nightly  # by day: what is recomputed, below
@pytest.mark.parametrize("cfg", [LLAMA, CAPPED, UNEVEN])
def test_remat_gives_the_same_gradients(cfg):
    """Compiled without optimisation, which takes half the time."""
    tokens, segments = jnp.array(rows(2)), jnp.ones((2, SIZE), int)

    @functools.partial(jax.jit, static_argnums=1, compiler_options={"xla_backend_optimization_level": 0})
    def gradients(params, runtime):
        return jax.grad(lambda params: (forward(params, cfg, tokens, segments, runtime) ** 3).sum())(params)

    plain = gradients(weights(cfg), Runtime())
    learned = [x for path, x in jax.tree_util.tree_leaves_with_path(plain) if path[-1].key != "layer_scalar"]
    assert min(float(jnp.abs(x).max()) for x in learned) > 1e-3
    for runtime in (Runtime(remat="dots"), Runtime(remat="full", scan_layers=False)):
        other = gradients(weights(cfg), runtime)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * np.abs(y).max()), other, plain
        )


@pytest.mark.parametrize(
    ("scanned", "shape"),
    [
        (True, (1, 2, 1)),
        (False, (1, 1, 1)),
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in ((True, (1, 1, 1)), (False, (1, 2, 1)))),
    ],
)
def test_dots_recomputes_no_linear_map(shape, scanned):
    """Products in the program: of a layer's nine (seven linear maps and attention's two), the backward pass repeats all
    but the last, whose result no gradient needs; with dots attention's alone."""

    def products(remat: Any) -> int:
        runtime = Runtime(remat=remat, scan_layers=scanned)
        total = lambda params, tokens: (forward(params, LLAMA, tokens, jnp.ones_like(tokens), runtime) ** 3).sum()
        with sharding.current(sharding.make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])):
            arguments = tiny.parameters(LLAMA, "lm", 0), tiny.put(rows(2))
            return str(jax.make_jaxpr(jax.grad(total))(*arguments)).count("dot_general[")

    bodies = 1 if scanned else LLAMA.num_layers
    assert products("full") - products("none") == 8 * bodies
    assert products("dots") - products("none") == 2 * bodies


@pytest.mark.parametrize("cfg", [LLAMA, GPT2])
def test_bfloat16_deviates_by_its_rounding(cfg):
    """bfloat16 has 8 bits: activations in it move logits by 1% of their spread on average, and none by 10%."""
    tokens, segments = jnp.array(rows(8)), jnp.ones((8, SIZE), int)
    exact = np.asarray(logits_of(weights(cfg), cfg, tokens, segments))[..., :101]
    rough = logits_of(weights(cfg), cfg, tokens, segments, Runtime(compute=jnp.bfloat16))
    assert rough.dtype == jnp.float32  # of the sum over the hidden features
    error = np.abs(np.asarray(rough)[..., :101] - exact)
    assert 1e-3 < error.mean() / exact.std() < 0.01
    assert error.max() / exact.std() < 0.1


@pytest.mark.parametrize("tied", [True, False])
def test_logits_send_back_products_of_bfloat16(tied):
    """They are float32 and their gradient too; what is multiplied is not, and loses no more than its rounding."""
    cfg = dataclasses.replace(LLAMA, tie_embeddings=tied)
    hidden = jnp.array(np.random.default_rng(0).normal(size=(2, 5, cfg.hidden_size)), jnp.float32)
    params = {name: part for name, part in tiny.parameters(cfg, "lm", 0).items() if name in ("embed", "head")}
    total = lambda params, hidden: (jax.nn.logsumexp(lm_logits(params, cfg, hidden)[..., :90], -1) ** 2).sum()
    gradients = jax.grad(total, (0, 1))
    wanted = jax.tree.leaves(gradients(params, hidden))
    halved = hidden.astype(jnp.bfloat16)
    products = [
        eqn for eqn in equations(jax.make_jaxpr(gradients)(params, halved).jaxpr) if str(eqn.primitive) == "dot_general"
    ]
    assert len(products) == 3 and {x.aval.dtype for eqn in products for x in eqn.invars} == {jnp.dtype(jnp.bfloat16)}
    for mine, theirs in zip(jax.tree.leaves(gradients(params, halved)), wanted, strict=True):
        difference = np.asarray(mine, np.float32) - theirs
        assert np.linalg.norm(difference) <= 0.01 * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    "asked, platform, layers, scanned",
    [(None, "cpu", SHALLOW, False), (None, "cpu", SHALLOW + 1, True), (None, "tpu", 1, True), (None, "gpu", 1, True)]
    + [(asked, platform, 9, asked) for asked in (True, False) for platform in ("cpu", "tpu")],
)
def test_which_layers_share_one_compiled_body(asked, platform, layers, scanned):
    """Those of shallow models on CPUs do not, unless the run says so."""
    cfg = dataclasses.replace(LLAMA, num_layers=layers)
    runtime = Runtime(hardware=Hardware(platform), scan_layers=asked)
    assert scans(cfg, runtime) == scanned
    if platform == "cpu":
        params = jax.eval_shape(functools.partial(init, cfg, "lm"), jax.random.key(0))
        read = functools.partial(forward, cfg=cfg, runtime=runtime)
        program = jax.make_jaxpr(lambda p, t: read(p, tokens=t, segment_ids=t))(params, jnp.ones((1, SIZE), int))
        assert (program.jaxpr.pretty_print().count("scan") > 0) == scanned


def test_parameters_match_their_table():
    heads: list[Head] = ["lm", "scalar"]
    for cfg in (LLAMA, GPT2):
        for head in heads:
            params = jax.eval_shape(functools.partial(init, cfg, head, dtype=jnp.bfloat16), jax.random.key(0))
            is_leaf = lambda x: isinstance(x, Leaf)
            table = parameter_table(cfg, head)
            jax.tree.map(lambda leaf, x: np.testing.assert_equal(x.shape, leaf.shape), table, params, is_leaf=is_leaf)
            assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
