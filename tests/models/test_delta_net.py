"""Gated delta nets: chunks of columns beside one token after the other, documents.

Padding, packing, shared prompts and meshes of whole models are in test_transformer, test_response_packing and
test_generate_parity; the numbers of transformers in tests/parity."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.decoding import decode_layout
from jaxrlhf.models.delta_net import rule
from jaxrlhf.models.delta_net.layer import delta_block, weighted, within_groups, within_rows
from jaxrlhf.models.response_packing import places
from jaxrlhf.models.slot_decoding import blank_caches, moved, read_columns, slot_of, widened, with_slot
from jaxrlhf.models.transformer import Runtime, forward, positions_of
from tests.models.test_transformer import NET, weights
from tests.support import tiny

ROWS, COLUMNS, HEADS, KEY, VALUE = 2, 150, 2, 8, 12  # three chunks
CUTS = [0, 40, 64, 65, 130], [0, 7, 128]  # where documents begin: inside chunks, and where one ends
TINY = resolve(
    ModelConfig(
        family="qwen3_5_text",
        vocab_size=64,
        hidden_size=16,
        num_heads=4,
        num_kv_heads=2,
        mlp_size=32,
        layer_types=("linear", "global"),
        linear_key_heads=2,
        linear_value_heads=4,
    )
)


@functools.cache
def streams() -> Any:
    """(queries, keys, values, decays, rates, index, the states that documents begin with) of random rows."""
    rng, index = np.random.default_rng(0), np.zeros((ROWS, COLUMNS), np.int32)
    for row, cuts in enumerate(CUTS):
        for first, end in zip(cuts, [*cuts[1:], COLUMNS]):
            index[row, first:end] = np.arange(end - first)
    wide = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    query, key = (np.array(rule.of_length_one(wide(ROWS, COLUMNS, HEADS, KEY))) for _ in range(2))
    decay = -0.3 * rng.exponential(size=(ROWS, COLUMNS, HEADS)).astype(np.float32)
    rate = rng.uniform(size=decay.shape).astype(np.float32)
    return query, key, wide(ROWS, COLUMNS, HEADS, VALUE), decay, rate, index, wide(ROWS, HEADS, KEY, VALUE)


def test_a_token_is_the_equation():
    """S = a S + b k (v - (a S)^T k)^T, o = S^T q, worked with NumPy."""
    query, key, value, decay, rate, _, state = streams()
    out, new = rule.step(state, *(jnp.asarray(x[:, 0]) for x in (query, key, value, decay, rate)))
    for row in range(ROWS):
        for head in range(HEADS):
            old = np.exp(decay[row, 0, head]) * state[row, head]
            k, v = key[row, 0, head], value[row, 0, head]
            expected = old + rate[row, 0, head] * np.outer(k, v - old.T @ k)
            np.testing.assert_allclose(new[row, head], expected, atol=1e-5)
            np.testing.assert_allclose(out[row, 0 + head], expected.T @ query[row, 0, head], atol=1e-5)


def by_tokens(query, key, value, decay, rate, index, start):
    """rule.scan_chunks, one token after the other."""
    begin = jnp.zeros((ROWS, HEADS, KEY, VALUE)) if start is None else start

    def one(state, token):
        *token, first = token
        out, state = rule.step(jnp.where((first == 0)[:, None, None, None], begin, state), *token)
        return state, out

    tokens = [jnp.moveaxis(jnp.asarray(x), 1, 0) for x in (query, key, value, decay, rate, index)]
    state, out = jax.lax.scan(one, begin, tokens)
    return jnp.moveaxis(out, 0, 1), state


@pytest.mark.parametrize("begins", ["with nothing", "with a state"])
def test_chunks_are_tokens_one_after_the_other(begins):
    """Outputs, states and all gradients, of several documents in a row that begin and end anywhere."""
    *parts, index, start = streams()
    start = start if begins == "with a state" else None
    weight = np.random.default_rng(1).normal(size=(ROWS, COLUMNS, HEADS, VALUE))

    def total(function, parts, start):
        out, state = function(*parts, index, start)
        return (out * weight).sum() + (state**2).sum(), (out, state)

    both = []
    for function in (rule.scan_chunks, by_tokens):
        program = tiny.program(jax.value_and_grad(functools.partial(total, function), (0, 1), has_aux=True))
        (_, made), gradients = program(parts, start)
        both.append((made, gradients))
    assert all(float(jnp.abs(x).max()) > 0.1 for x in jax.tree.leaves(both[1]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5 * np.abs(y).max()), *both)


def test_the_inverse_is_exact_where_powers_are_not():
    """Equal keys that are written whole: L is all ones below the diagonal, its powers reach 1e17, its inverse 1."""
    lower = np.tril(np.ones((64, 64), np.float32), -1)
    expected = np.eye(64) - np.eye(64, k=-1)
    np.testing.assert_array_equal(rule.inverse(jnp.array(lower)), expected)
    random = 0.5 * np.tril(np.random.default_rng(0).normal(size=(3, 16, 16)), -1).astype(np.float32)
    np.testing.assert_allclose(rule.inverse(jnp.array(random)) @ (np.eye(16) + random), [np.eye(16)] * 3, atol=1e-4)


def test_the_convolution_by_hand():
    """Two documents of 3 and 2 tokens, three taps: 1 for the token, 10 and 100 for those before it."""
    x = jnp.array([1.0, 2, 3, 4, 5]).reshape(1, 5, 1, 1)
    index = jnp.array([[0, 1, 2, 0, 1]])[..., None, None]
    taps = jnp.array([100.0, 10, 1]).reshape(1, 1, 3)
    assert weighted(x, taps, index, None).ravel().tolist() == [1, 12, 123, 4, 45]
    tail = jnp.array([8.0, 9]).reshape(1, 2, 1, 1)
    assert weighted(x, taps, index, tail).ravel().tolist() == [891, 912, 123, 894, 945]


# ---- documents, prompts and responses -------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_responses_begin_with_the_state_behind_their_prompt(gradients):
    """Outputs of one layer, and its gradients, of rows of their own, of groups that share a prompt, and packed ones; a
    prompt is shorter than the convolution, another has no padding, and what stands in padding changes nothing."""
    start, room, copies, width = 6, 5, 3, 11
    lengths, padding = np.array([[2, 0, 5], [4, 1, 3]]), np.array([4, 0])
    layer = jax.tree.map(lambda x: x[0], weights(NET)["layers"]["delta"])
    rng = np.random.default_rng(4)
    prompts, responses = rng.normal(size=(2, start, 32)), rng.normal(size=(2, copies, room, 32))
    weight = rng.normal(size=(2, copies, 1 + room, 32))
    real = np.arange(room) < lengths[..., None]
    wanted = np.concatenate([np.ones((2, copies, 1), bool), real], 2)[..., None]
    readable = jnp.array(np.arange(start) >= padding[:, None])
    where = places(jnp.array(real), width)

    def alone(x):
        rows = jnp.concatenate([jnp.repeat(x[0], copies, 0), x[1].reshape(-1, room, 32)], 1)
        segments = jnp.concatenate([jnp.repeat(readable, copies, 0), real.reshape(-1, room)], 1)
        return rows, within_rows(positions_of(segments.astype(jnp.int32))), lambda y: y.reshape(2, copies, -1, 32)

    def shared(x):
        unfold = lambda y: y[:, 1:].reshape(2, copies, room, 32)
        last = lambda y: jnp.broadcast_to(y[:, None, :1], (2, copies, 1, 32))
        together = jnp.concatenate([x[0], x[1].reshape(2, -1, 32)], 1)
        return together, within_groups(readable, copies, None), lambda y: jnp.concatenate([last(y), unfold(y)], 2)

    def packed(x):
        take = lambda x, at: jax.vmap(lambda row, at: row[at])(x, at)
        flat = jnp.minimum(where.owner, copies - 1) * room + where.index
        together = jnp.concatenate([x[0], take(x[1].reshape(2, -1, 32), flat)], 1)
        apart = lambda y: take(y[:, 1:], where.column.reshape(2, -1)).reshape(2, copies, room, 32)
        last = lambda y: jnp.broadcast_to(y[:, None, :1], (2, copies, 1, 32))
        return together, within_groups(readable, copies, where), lambda y: jnp.concatenate([last(y), apart(y)], 2)

    def total(way, layer, x):
        rows, recur, back = way(x)
        out = jnp.where(wanted, back(delta_block(layer, NET, rows, recur, start - 1)), 0)
        return (out * weight).sum(), out

    found = []
    for way in (alone, shared, packed):
        given = prompts if way is not packed else np.where(readable[..., None], prompts, 9.0)
        if not gradients:
            found.append((tiny.program(functools.partial(total, way))(layer, (given, responses))[1],))
            continue
        program = tiny.program(jax.value_and_grad(functools.partial(total, way), (0, 1), has_aux=True))
        (_, out), (of_weights, (of_prompts, of_responses)) = program(layer, (given, responses))
        assert not of_prompts[~readable].any()
        found.append((out, of_weights, of_prompts, of_responses))
    assert np.abs(found[0][0]).max() > 0.3
    for other in found[1:]:
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * max(1, np.abs(y).max())), other, found[0]
        )


# ---- slots ----------------------------------------------------------------------------------------------------------


def test_slots_say_what_whole_rows_do():
    """Chunks whose last columns hold no tokens, slots that wait, then a token at a time; what stood in a slot is
    forgotten, and a slot may move to other caches."""
    lengths, size, end = np.array([7, 3]), 4, 9
    tokens = np.random.default_rng(2).integers(0, 101, (2, 12)).astype(np.int32)
    own = jax.tree.map(jnp.asarray, weights(NET))
    params = decode_layout(own, NET, "lm", Runtime(), 2)
    columns = lambda tokens, start, count, caches: read_columns(params, NET, tokens, start, count, caches, Runtime())
    read = tiny.program(columns)
    whole = tiny.program(lambda tokens: forward(own, NET, tokens, jnp.ones_like(tokens), Runtime()))(tokens)
    caches = jax.tree.map(jnp.ones_like, blank_caches(NET, 1, 2, 12, jnp.float32))
    found = np.zeros(whole.shape, np.float32)
    at = np.zeros(2, np.int32)
    while (at < lengths).any():
        count = np.clip(lengths - at, 0, size).astype(np.int32)
        given = np.stack([np.where(np.arange(size) < n, row[i : i + size], 0) for row, i, n in zip(tokens, at, count)])
        hidden, caches = read(given, at, count, caches)
        for slot in range(2):
            found[slot, at[slot] : at[slot] + count[slot]] = hidden[slot, : count[slot]]
        at += count
    caches = with_slot(caches, slot_of(caches, jnp.array(1)), jnp.array(1))
    caches = moved(caches, blank_caches(NET, 2, 1, 12, jnp.float32), jnp.array([1, 0]))
    turned: Any = [x[::-1].copy() for x in (tokens, np.asarray(whole), found, at)]  # the slots have changed places
    tokens, whole, found, at = turned
    while (at < end).all():
        hidden, caches = read(np.take_along_axis(tokens, at[:, None], 1), at, np.ones(2, np.int32), caches)
        found[np.arange(2), at] = hidden[:, 0]
        at += 1
    for slot in range(2):
        assert np.abs(whole[slot]).max() > 1
        np.testing.assert_allclose(found[slot, : at[slot]], whole[slot, : at[slot]], atol=1e-4)


def test_states_do_not_grow():
    """Caches of more columns: keys and values do, what linear layers keep does not."""
    caches = blank_caches(NET, 2, 1, 8, jnp.float32)
    wider = widened(caches, 64)
    sizes = lambda caches: [sum(x.size for x in jax.tree.leaves(cache)) for cache in caches]
    linear, attention, last = sizes(caches)
    assert sizes(wider) == sizes(blank_caches(NET, 2, 1, 64, jnp.float32)) == [linear, 8 * attention, last]
