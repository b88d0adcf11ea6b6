"""Supervised fine-tuning: the masked likelihood against a loop, and rows packed or not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithms import sft
from jaxrlhf.algorithms.sft import SFTConfig
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.heads import lm_logits
from jaxrlhf.models.nets import segments
from jaxrlhf.models.transformer import Runtime, forward
from jaxrlhf.optim import OptimizerConfig
from jaxrlhf.types import Batch, Experience, Sequences, TokenStats, Trees
from tests.support import fake, tiny

WIDTH = 12


@pytest.fixture(scope="module")
def run():
    batch = Batch(sequences=packed())
    return tiny.build("sft", SFTConfig(), batch=batch, optimizer=OptimizerConfig(learning_rate=1e-2))


def documents() -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, response mask) of five documents of 3 to 8 tokens: a prompt of 1 or 2, then the response."""
    rng = np.random.default_rng(0)
    sizes = [(5, 2), (7, 1), (3, 1), (8, 2), (4, 1)]
    return [(rng.integers(3, 64, size), np.arange(size) >= prompt) for size, prompt in sizes]


def rows_of(layout: list[list[int]]) -> Sequences:
    """The documents, those of a row side by side; padding on the right."""
    found = documents()
    tokens, mask, ids = (np.zeros((len(layout), WIDTH), kind) for kind in (np.int32, bool, np.int32))
    for row, numbers in enumerate(layout):
        at = 0
        for place, number in enumerate(numbers, start=1):
            here = slice(at, at + len(found[number][0]))
            tokens[row, here], mask[row, here] = found[number]
            ids[row, here] = place
            at = here.stop
    packs = any(len(numbers) > 1 for numbers in layout)
    return Sequences(*map(jnp.array, (tokens, ids > 0, mask)), segment_ids=jnp.array(ids) if packs else None)


def packed() -> Sequences:
    return rows_of([[0, 1], [2, 3], [4]])


def test_loss_is_a_numpy_loop():
    rng = np.random.default_rng(1)
    mask = rng.random((4, 6)) < 0.5
    logprobs, entropy = (np.where(mask, rng.normal(-2, 1, mask.shape), np.nan).astype(np.float32) for _ in range(2))
    nets = fake.answering(token_stats=lambda params, rows: TokenStats(jnp.array(logprobs), jnp.array(entropy)))
    sequences = Sequences(jnp.zeros((4, 6), jnp.int32), jnp.ones((4, 6), bool), jnp.array(mask))
    losses, metrics = sft.loss(nets, Trees({"policy": None}, {}), Experience(responses=sequences), SFTConfig())
    tokens = list(zip(*np.nonzero(mask)))
    assert losses.keys() == {"policy"} and losses["policy"].count == len(tokens)
    expected = -sum(float(logprobs[where]) for where in tokens) / len(tokens)
    np.testing.assert_allclose(losses["policy"].value(), expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/policy"].value(), expected, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["policy/entropy"].value(), np.mean([entropy[where] for where in tokens]), rtol=1e-5
    )


@pytest.fixture(scope="module")
def learned_positions():
    """A model that adds positions to its embeddings; rotations of a whole document would not show."""
    shape = resolve(ModelConfig(family="gpt2", vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, mlp_size=32))
    return tiny.build("sft", SFTConfig(), model=shape)


def loss_and_gradient(run, sequences: Sequences):
    def loss(params):
        losses, _ = sft.loss(run.recipe.nets, Trees(params, {}), Experience(responses=sequences), SFTConfig())
        return losses["policy"].total, losses["policy"].count

    return tiny.program(jax.value_and_grad(loss, has_aux=True))(run.state.params)


def test_loss_of_a_real_model_is_the_likelihood_of_the_next_token(run):
    """From the model's own logits, one token at a time: column t - 1 predicts token t."""
    sequences = rows_of([[0], [1], [2], [3], [4]])

    def logits_of(params):
        hidden = forward(params, tiny.MODEL, sequences.tokens, segments(sequences), Runtime())
        return lm_logits(params, tiny.MODEL, hidden)

    logits = np.asarray(tiny.program(logits_of)(run.state.params["policy"]), np.float64)
    expected, count = 0.0, 0
    for row, column in zip(*np.nonzero(np.asarray(sequences.response_mask))):
        before = logits[row, column - 1]
        expected -= before[sequences.tokens[row, column]] - np.log(np.exp(before).sum())
        count += 1
    (total, found), _ = loss_and_gradient(run, sequences)
    assert found == count == 20
    np.testing.assert_allclose(total, expected, rtol=1e-5)


@pytest.mark.parametrize("layout", [[[0, 1], [2, 3], [4]], [[1, 0], [4, 3], [2]], [[2, 4, 0], [3], [1]]], ids=str)
def test_packing_changes_nothing(run, layout):
    """Documents in one row do not see each other, and each starts at position 0: same loss, same gradient."""
    (alone, count), gradient = loss_and_gradient(run, rows_of([[0], [1], [2], [3], [4]]))
    (together, packed_count), packed_gradient = loss_and_gradient(run, rows_of(layout))
    assert packed_count == count
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), packed_gradient, gradient)


def test_packing_changes_no_position(learned_positions):
    (alone, _), gradient = loss_and_gradient(learned_positions, rows_of([[0], [1], [2], [3], [4]]))
    (together, _), packed_gradient = loss_and_gradient(learned_positions, packed())
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), packed_gradient, gradient)


def test_without_segments_a_packed_row_would_differ(run):
    """The check above can fail: documents that do see each other have another loss."""
    (alone, _), _ = loss_and_gradient(run, packed())
    (mixed, _), _ = loss_and_gradient(run, dataclasses.replace(packed(), segment_ids=None))
    assert abs(float(alone) - float(mixed)) > 1e-3


def test_a_step_learns_the_responses(run):
    step = tiny.program(steps.make_iteration(run.recipe))
    state, losses = run.state, []
    for _ in range(30):
        state, metrics, sequences = step(state, run.batch)
        losses.append(float(metrics["loss/policy"]))
    print(f"\nloss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert sequences is None and sorted(state.params) == ["policy"]
    assert abs(losses[0] - np.log(64)) < 0.5 and losses[-1] < 1.0


def test_the_record():
    assert sft.ALGORITHM.roles(SFTConfig()) == ({"policy": "lm"}, {}) and not sft.ALGORITHM.online
    assert sft.ALGORITHM.batch(SFTConfig()) == ("sequences",)
