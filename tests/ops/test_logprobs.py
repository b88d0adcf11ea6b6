"""Log-probabilities and entropies against a float64 loop, and the one shift by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.ops import logprobs as ops
from tests.support.tiny import program

ROWS, COLUMNS, WIDTH, VOCAB = 3, 7, 5, 11


def by_loop(logits, tokens):
    """The definition, in float64, one token at a time."""
    logprob, entropy = np.zeros(tokens.shape), np.zeros(tokens.shape)
    for where in np.ndindex(tokens.shape):
        row = logits[where].astype(np.float64)
        log_p = row - row.max() - np.log(sum(np.exp(x - row.max()) for x in row))
        logprob[where] = log_p[tokens[where]]
        entropy[where] = -sum(np.exp(x) * x for x in log_p if np.exp(x) > 0)
    return logprob, entropy


def draw(seed: int = 0, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(ROWS, COLUMNS, VOCAB)) * scale).astype(np.float32)
    return logits, rng.integers(0, VOCAB, (ROWS, COLUMNS)).astype(np.int32)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_token_logprobs_is_a_numpy_loop(scale):
    logits, tokens = draw(1, scale)
    found = ops.token_logprobs(jnp.array(logits), jnp.array(tokens))
    logprob, entropy = by_loop(logits, tokens)
    np.testing.assert_allclose(found.logprobs, logprob, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-5, atol=1e-5)


def test_token_logprobs_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [1.0, 2.0, 1.0]]))
    found = ops.token_logprobs(logits, jnp.array([0, 1]))
    np.testing.assert_allclose(found.logprobs, [np.log(0.5), np.log(0.5)], atol=1e-6)
    np.testing.assert_allclose(found.entropy, [1.5 * np.log(2), 1.5 * np.log(2)], atol=1e-6)


def test_impossible_tokens_take_no_mass():
    """Padded vocabulary rows have logit -1e30: p log p of them is 0, in the value and in the gradient."""
    logits = jnp.array([[0.0, 0.0, -1e30, -1e30]])
    stats = lambda x: ops.token_logprobs(x, jnp.array([1]))
    np.testing.assert_allclose(
        [stats(logits).logprobs[0], stats(logits).entropy[0]], [-np.log(2), np.log(2)], atol=1e-6
    )
    gradient = jax.grad(lambda x: stats(x).logprobs.sum() + stats(x).entropy.sum())(logits)
    np.testing.assert_allclose(gradient, [[-0.5, 0.5, 0.0, 0.0]], atol=1e-6)


def test_half_precision_logits_are_summed_in_float32():
    logits, tokens = draw(2)
    found = ops.token_logprobs(jnp.array(logits, jnp.bfloat16), jnp.array(tokens))
    rounded = np.asarray(jnp.array(logits, jnp.bfloat16).astype(jnp.float32))
    assert found.logprobs.dtype == found.entropy.dtype == jnp.float32
    np.testing.assert_allclose(found.logprobs, by_loop(rounded, tokens)[0], rtol=1e-5, atol=1e-5)


def test_gradient_is_one_hot_less_softmax():
    logits, tokens = draw(3)
    gradient = jax.grad(lambda x: ops.token_logprobs(x, jnp.array(tokens)).logprobs.sum())(jnp.array(logits))
    np.testing.assert_allclose(gradient, np.eye(VOCAB)[tokens] - jax.nn.softmax(logits), atol=1e-6)


def test_action_values_are_a_numpy_loop():
    values, tokens = draw(5, 30.0)
    found = ops.action_values(jnp.array(values), jnp.array(tokens))
    for where in np.ndindex(tokens.shape):
        row = values[where].astype(np.float64)
        expected = row[tokens[where]], row.max(), row.max() + np.log(np.exp(row - row.max()).sum())
        got = found.chosen[where], found.largest[where], found.logsumexp[where]
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    softmax = jax.grad(lambda x: ops.action_values(x, jnp.array(tokens)).logsumexp.sum())(jnp.array(values))
    np.testing.assert_allclose(softmax, jax.nn.softmax(values), atol=1e-6)


def chunked(hidden, kernel, tokens, stored=2**24):
    """Logits that also depend on the column, so that a chunk which is told the wrong columns shows."""
    logits_of = lambda states, columns: states @ kernel + 0.1 * columns[:, None] * jnp.arange(VOCAB)
    return ops.in_chunks(ops.token_logprobs, hidden, tokens, logits_of, VOCAB, stored)


@pytest.mark.parametrize("stored", [1, 2 * ROWS * VOCAB, 3 * ROWS * VOCAB])  # 7 columns: 7 chunks of 1, 4 of 2, 3 of 3
def test_chunks_change_nothing(stored):
    rng = np.random.default_rng(4)
    hidden, kernel = rng.normal(size=(ROWS, COLUMNS, WIDTH)), rng.normal(size=(WIDTH, VOCAB))
    args = [jnp.array(x, jnp.float32) for x in (hidden, kernel)] + [jnp.array(draw()[1])]

    def total(hidden, kernel, tokens, *stored):
        stats = chunked(hidden, kernel, tokens, *stored)
        weights = jnp.arange(stats.logprobs.size, dtype=jnp.float32).reshape(stats.logprobs.shape)
        return (weights * (stats.logprobs + 0.3 * stats.entropy)).sum()

    both = lambda *stored: program(lambda *args: (chunked(*args, *stored), jax.grad(total, (0, 1))(*args, *stored)))(
        *args
    )
    whole, whole_gradient = both()
    parts, parts_gradient = both(stored)
    np.testing.assert_allclose(parts.logprobs, whole.logprobs, atol=1e-6)
    np.testing.assert_allclose(parts.entropy, whole.entropy, atol=1e-6)
    for found, expected in zip(parts_gradient, whole_gradient):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    expected = by_loop(hidden @ kernel + 0.1 * np.arange(COLUMNS)[:, None] * np.arange(VOCAB), np.asarray(args[2]))
    np.testing.assert_allclose(parts.logprobs, expected[0], rtol=1e-4, atol=1e-5)


def test_all_logits_are_never_stored():
    hidden, kernel, tokens = jnp.ones((ROWS, COLUMNS, WIDTH)), jnp.ones((WIDTH, VOCAB)), jnp.array(draw()[1])
    everything = (f"{ROWS}x{COLUMNS}x{VOCAB}xf32", f"{COLUMNS}x{ROWS}x1x{VOCAB}xf32")
    total = lambda h, *stored: chunked(h, kernel, tokens, *stored).logprobs.sum()
    gradient = lambda *stored: jax.jit(jax.grad(lambda h: total(h, *stored))).lower(hidden).as_text()
    assert any(shape in gradient() for shape in everything)
    assert not any(shape in gradient(1) for shape in everything)


def test_a_gpu_stores_more_of_them():
    assert ops.stored_logits("gpu") > ops.stored_logits("tpu") == ops.stored_logits("cpu") == ops.STORED_LOGITS
