"""Dense relatives of Llama: layers without positions, queries scaled by position, positions of two kinds of layers; and
layers that differ in their heads, read keys and values of others, and have embeddings of their own.

tests/parity has the numbers of transformers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models.config import LayerType, ModelConfig, resolve
from jaxrlhf.models.decoding import decode_layout
from jaxrlhf.models.rope import RopeScaling, query_scale
from jaxrlhf.models.slot_decoding import blank_caches, read_columns
from jaxrlhf.models.transformer import Runtime, forward, rotation
from tests.models.test_transformer import NOPE, OSS, UNEVEN, weights
from tests.support import tiny
from tests.support.learning import gain_by_grpo

YARN = RopeScaling("yarn", 2.0, original_max_positions=4, query_beta=0.5)
SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_layers": 4, "num_kv_heads": 2, "mlp_size": 24}


def test_queries_are_scaled_by_the_original_contexts_before_them():
    """1 + 0.5 ln(1 + floor(position / 4)); None where nothing is scaled."""
    found = query_scale(jnp.array([[0, 3, 4, 11]]), YARN, 12)
    assert found is not None
    expected = [1, 1, 1 + 0.5 * np.log(2), 1 + 0.5 * np.log(3)]
    np.testing.assert_allclose(found[0, :, 0, 0], expected, rtol=1e-6)
    assert query_scale(jnp.zeros((1, 1), jnp.int32), dataclasses.replace(YARN, query_beta=0.0), 4) is None


def turned(cfg: ModelConfig, kind: LayerType, positions, query, key):
    """(query, key) with positions in them."""
    rotary = rotation(cfg, kind, positions, 6)
    return rotary(query, True), rotary(key, False)


def test_what_each_kind_of_layers_does_with_positions():
    """Layers without any leave queries and keys as they are; local ones keep their size and turn by their own base,
    where yarn makes those of global ones longer; queries alone are scaled."""
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, 6, 4, 8)), jnp.float32) for _ in range(2))
    positions = jnp.arange(6)[None]
    length = lambda x: np.linalg.norm(np.asarray(x), axis=-1)
    kinds: tuple[LayerType, ...] = ("global", "nope")
    for kind in kinds:
        found = turned(NOPE, kind, positions, query, key)
        same = [bool((after == before).all()) for after, before in zip(found, (query, key))]
        assert same == [kind == "nope"] * 2
    plain = RopeScaling("yarn", 2.0, original_max_positions=4)
    two = resolve(
        ModelConfig("olmo3", num_layers=4, num_heads=4, hidden_size=32, sliding_window=3, local_rope_theta=50.0)
    )
    two = dataclasses.replace(two, rope_scaling=plain)
    sizes: dict[LayerType, float] = {"local": 1.0, "global": 0.1 * np.log(2) + 1}
    for kind, size in sizes.items():
        for after, before in zip(turned(two, kind, positions, query, key), (query, key)):
            np.testing.assert_allclose(length(after), size * length(before), rtol=1e-5)
    scaled = dataclasses.replace(NOPE, rope_scaling=YARN)
    longer = [length(x) for x in turned(scaled, "global", positions, query, key)]
    np.testing.assert_allclose(
        longer[0][0, 5] / longer[0][0, 3], (1 + 0.5 * np.log(2)) * length(query)[0, 5] / length(query)[0, 3], rtol=1e-5
    )
    np.testing.assert_allclose(longer[1][0, 5] / longer[1][0, 3], length(key)[0, 5] / length(key)[0, 3], rtol=1e-5)


@pytest.mark.parametrize("cfg", [NOPE, OSS, UNEVEN], ids=lambda cfg: cfg.family)
def test_slots_read_what_whole_rows_say(cfg):
    """Prompts of two slots in pieces, each slot at its own position."""
    lengths, size = np.array([10, 7]), 4
    tokens = np.random.default_rng(2).integers(0, 101, (2, 12)).astype(np.int32)
    own = jax.tree.map(jnp.asarray, weights(cfg))
    params = decode_layout(own, cfg, "lm", Runtime(), 2)
    read = tiny.program(
        lambda tokens, at, count, caches: read_columns(params, cfg, tokens, at, count, caches, Runtime())
    )
    whole = tiny.program(lambda tokens: forward(own, cfg, tokens, jnp.ones_like(tokens), Runtime()))(tokens)
    caches = blank_caches(cfg, 1, 2, 12, jnp.float32)
    at = np.zeros(2, np.int32)
    while (at < lengths).any():
        count = np.clip(lengths - at, 0, size).astype(np.int32)
        given = np.stack([np.where(np.arange(size) < n, row[i : i + size], 0) for row, i, n in zip(tokens, at, count)])
        hidden, caches = read(given, at, count, caches)
        for slot, (first, n) in enumerate(zip(at, count)):
            np.testing.assert_allclose(hidden[slot, :n], whole[slot, first : first + n], atol=1e-4)
        at += count
    assert np.abs(whole).max() > 1


def test_grpo_learns():
    """A layer without positions beside scaled queries."""
    sizes: dict[str, Any] = SMALL | {"num_layers": 2, "layer_types": ("nope", "global")}
    assert gain_by_grpo(resolve(ModelConfig(family="smollm3", rope_scaling=YARN, **sizes))) > 0.5
