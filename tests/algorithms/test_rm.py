"""The Bradley-Terry reward model against a plain NumPy loop, padding, and a preference that it can learn."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithms import rm
from jaxrlhf.algorithms.rm import RMConfig
from jaxrlhf.ops.ensembles import bootstrap_counts
from jaxrlhf.optim import OptimizerConfig
from jaxrlhf.types import Ask, Batch, Combine, Grader, Mean, Preferences, Sequences, Trees
from tests.support import fake, tiny

# A reward model that reads a sequence's score out of a table, by the sequence's first token.
FAKE = fake.answering(scores=lambda params, rows: params["table"][rows.tokens[:, 0]])


def side(ids, real=True) -> Sequences:
    """Sequences of which row i has the score table[ids[i]]; rows that are not ``real`` are padding."""
    tokens = jnp.broadcast_to(jnp.array(ids, jnp.int32)[:, None], (len(ids), 3))
    valid = jnp.broadcast_to(jnp.array(real), (len(ids),))[:, None] & jnp.ones((len(ids), 3), bool)
    return Sequences(tokens, valid, valid)


def draw(seed: int = 0, rows: int = 6):
    """(chosen scores, rejected scores, margins): the last pair is a tie."""
    rng = np.random.default_rng(seed)
    chosen, rejected, margin = rng.normal(0.3, 1.5, (3, rows)).astype(np.float32)
    rejected[-1] = chosen[-1]
    return chosen, rejected, margin


def loss_of(
    chosen, rejected, margin, cfg: RMConfig, real: Any = True
) -> tuple[dict[str, Mean], dict[str, Mean], np.ndarray]:
    """Losses, metrics, and the gradient of the total in the scores: rows of chosen, then of rejected."""
    rows = len(chosen)
    params = {"reward": {"table": jnp.concatenate([jnp.array(chosen), jnp.array(rejected)])}}
    pairs = Preferences(side(range(rows), real), side(range(rows, 2 * rows), real), margin)
    loss = lambda params: rm.loss(FAKE, Trees(params, {}), rm.RMExperience(pairs=pairs), cfg)
    gradient = jax.grad(lambda params: loss(params)[0]["reward"].total)(params)
    return *loss(params), np.asarray(gradient["reward"]["table"]).reshape(2, rows)


def by_loop(chosen, rejected, margin, cfg: RMConfig) -> dict[str, float]:
    """Means over pairs, in float64, one pair at a time."""
    rows = []
    for i in range(len(chosen)):
        good, bad = float(chosen[i]), float(rejected[i])
        gap = good - bad - (0.0 if margin is None else float(margin[i]))
        likelihood = -(1 - cfg.label_smoothing) * np.log(1 / (1 + np.exp(-gap)))
        likelihood -= cfg.label_smoothing * np.log(1 / (1 + np.exp(gap)))
        predicted = 1 / (1 + np.exp(bad - good))
        rows.append(
            {
                "total": likelihood + cfg.centering * (good + bad) ** 2,
                "loss/reward": likelihood,
                "reward/accuracy": 0.5 if good == bad else float(good > bad),
                "reward/margin": good - bad,
                "reward/confidence": max(predicted, 1 - predicted),
                "reward/brier": (1 - predicted) ** 2,
                "reward/chosen": good,
                "reward/rejected": bad,
            }
        )
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


CONFIGS = [RMConfig(), RMConfig(centering=0.1), RMConfig(label_smoothing=0.2), RMConfig(0.05, 0.1)]


@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("cfg", CONFIGS, ids=str)
def test_loss_is_a_numpy_loop(cfg, with_margin):
    chosen, rejected, margin = draw()
    margin = margin if with_margin else None
    losses, metrics, _ = loss_of(chosen, rejected, margin, cfg)
    expected = by_loop(chosen, rejected, margin, cfg)
    np.testing.assert_allclose(float(losses["reward"].value()), expected.pop("total"), rtol=1e-5)
    assert losses.keys() == {"reward"} and metrics.keys() == expected.keys()
    for name, number in expected.items():
        np.testing.assert_allclose(float(metrics[name].value()), number, rtol=1e-5, atol=1e-6, err_msg=name)


def test_by_hand():
    losses, metrics, gradient = loss_of(np.array([np.log(3.0)], np.float32), np.zeros(1, np.float32), None, RMConfig())
    np.testing.assert_allclose(float(losses["reward"].value()), np.log(4 / 3), rtol=1e-6)  # -log(3/4)
    np.testing.assert_allclose(float(metrics["reward/confidence"].value()), 0.75, rtol=1e-6)
    np.testing.assert_allclose(float(metrics["reward/brier"].value()), 0.0625, rtol=1e-5)
    np.testing.assert_allclose(gradient, [[-0.25], [0.25]], rtol=1e-6)  # chosen up, rejected down


def test_a_margin_asks_for_more():
    ask = lambda margin: loss_of(np.ones(1, np.float32), np.zeros(1, np.float32), margin, RMConfig())
    assert ask(np.ones(1, np.float32))[0]["reward"].value() > ask(None)[0]["reward"].value()
    np.testing.assert_allclose(ask(np.ones(1, np.float32))[0]["reward"].value(), np.log(2), rtol=1e-6)


def test_centering_pulls_scores_to_zero_together():
    """At a margin that is already met, only the centring term moves: both scores the same way."""
    far = np.full(1, 30.0, np.float32)
    *_, gradient = loss_of(far + 40, far, None, RMConfig(centering=0.01))
    np.testing.assert_allclose(gradient, [[0.01 * 2 * 100.0]] * 2, rtol=1e-4)


@pytest.mark.nightly  # by day: all algorithms, in test_properties
@pytest.mark.parametrize("cfg", CONFIGS, ids=str)
def test_padding_rows_count_for_nothing(cfg):
    chosen, rejected, margin = draw(1)
    losses, metrics, gradient = loss_of(chosen, rejected, margin, cfg)
    pad = lambda x, junk: np.concatenate([x, np.full(3, junk, np.float32)])
    padded = loss_of(pad(chosen, 50.0), pad(rejected, -70.0), pad(margin, 9.0), cfg, real=np.arange(9) < 6)
    assert padded[0]["reward"].count == 6
    np.testing.assert_allclose(padded[0]["reward"].total, losses["reward"].total, rtol=1e-6)
    for name, mean in metrics.items():
        np.testing.assert_allclose(padded[1][name].value(), mean.value(), rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(padded[2][:, :6], gradient, rtol=1e-6)
    assert not padded[2][:, 6:].any()


def test_nothing_but_padding_is_finite():
    losses, metrics, gradient = loss_of(*draw(2), RMConfig(0.1, 0.1), real=False)
    assert losses["reward"].value() == 0 and not gradient.any()
    assert all(mean.value() == 0 for mean in metrics.values())


def test_the_record():
    assert rm.ALGORITHM.roles(RMConfig()) == ({"reward": "scalar"}, {}) and not rm.ALGORITHM.online
    assert rm.ALGORITHM.batch(RMConfig()) == ("preferences",)


# ---- a real model ---------------------------------------------------------------------------------------------------

GOOD, BAD = 40, 41


def separable(rows: int = 16) -> Preferences:
    """Random sequences of ragged length: a chosen one holds the token GOOD somewhere, a rejected one BAD."""
    pair, rng = tiny.preferences(rows), np.random.default_rng(3)

    def plant(sequences: Sequences, token: int) -> Sequences:
        tokens, valid = np.array(sequences.tokens), np.asarray(sequences.valid)
        tokens = np.where((tokens == GOOD) | (tokens == BAD), 5, tokens)
        for row in range(rows):
            if valid[row].any():
                tokens[row, rng.choice(np.flatnonzero(valid[row]))] = token
        return dataclasses.replace(sequences, tokens=jnp.array(tokens))

    return Preferences(plant(pair.chosen, GOOD), plant(pair.rejected, BAD))


@pytest.fixture(scope="module")
def run():
    return tiny.build(
        "rm", RMConfig(), batch=Batch(preferences=separable()), optimizer=OptimizerConfig(learning_rate=1e-2)
    )


def test_a_separable_preference_is_learned(run):
    step = tiny.program(steps.make_iteration(run.recipe))
    state, losses, accuracies = run.state, [], []
    for _ in range(20):
        state, metrics, sequences = step(state, run.batch)
        losses.append(float(metrics["loss/reward"]))
        accuracies.append(float(metrics["reward/accuracy"]))
    print(f"\nloss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy {accuracies[0]:.2f} -> {accuracies[-1]:.2f}")
    assert sequences is None and state.step == 20
    assert losses[0] > 0.5 and losses[-1] < 0.1 and accuracies[0] < 0.9 and accuracies[-1] == 1


@pytest.mark.nightly  # by day: padding of all algorithms, in test_properties
@pytest.mark.parametrize(
    ("left", "right"), [(2, 1), *(pytest.param(*pad, marks=pytest.mark.nightly) for pad in ((0, 3), (3, 0)))]
)
def test_the_amount_of_padding_changes_nothing(run, left, right):
    """Columns of padding on either side, and whatever token they hold: same loss, same gradient."""
    pairs = run.batch.preferences

    def widen(sequences: Sequences) -> Sequences:
        pad = lambda x, value: jnp.pad(x, ((0, 0), (left, right)), constant_values=value)
        return dataclasses.replace(
            sequences,
            tokens=pad(sequences.tokens, 7),
            valid=pad(sequences.valid, False),
            response_mask=pad(sequences.response_mask, False),
            response_start=sequences.response_start + left,
        )

    def loss(params, pairs):
        experience, cfg = rm.RMExperience(pairs=pairs), RMConfig(centering=0.1)
        losses, metrics = rm.loss(run.recipe.nets, Trees(params, {}), experience, cfg)
        return losses["reward"].total, metrics

    gradient = tiny.program(jax.value_and_grad(loss, has_aux=True))
    wide = Preferences(widen(pairs.chosen), widen(pairs.rejected), pairs.margin)
    (expected, metrics), grads = gradient(run.state.params, pairs)
    (found, wide_metrics), wide_grads = gradient(run.state.params, wide)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), wide_metrics, metrics)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), wide_grads, grads)


def test_the_score_is_read_at_the_last_token(run):
    """A change of the last valid token changes that row's score; one after it changes nothing."""
    sequences = tiny.sequences(rows=4, seed=5)
    ask = Ask("reward", "scores")
    score = tiny.program(lambda tokens: run.recipe.nets.read(run.state.trees, sequences.replace(tokens=tokens), ask)[0])
    last = [int(np.flatnonzero(row)[-1]) for row in np.asarray(sequences.valid)]
    base = score(sequences.tokens)
    for row, column in enumerate(last):
        for offset, moves in ((0, True), (1, False)):
            if column + offset < sequences.tokens.shape[1]:
                other = score(sequences.tokens.at[row, column + offset].set(50))
                assert (other[row] != base[row]) == moves
                np.testing.assert_array_equal(np.delete(other, row), np.delete(base, row))


# ---- an ensemble ----------------------------------------------------------------------------------------------------


def ensemble_loss(cfg: RMConfig, combine: Combine = "mean", tables: Any = None):
    """Losses and metrics of two members, and the gradient of the sum of totals in each member's scores."""
    members, rows = ("reward_0", "reward_1"), 6
    found = [draw(seed) for seed in (0, 1)] if tables is None else tables
    params = {
        role: {"table": jnp.concatenate([jnp.array(chosen), jnp.array(rejected)])}
        for role, (chosen, rejected, _) in zip(members, found)
    }
    pairs = Preferences(side(range(rows)), side(range(rows, 2 * rows)))
    nets = FAKE._replace(graders={"reward": Grader(members, combine, 0.5)})
    loss = lambda params: rm.loss(nets, Trees(params, {}), rm.RMExperience(pairs=pairs), cfg)
    total = lambda params: sum(mean.total for mean in loss(params)[0].values())
    return *loss(params), jax.grad(total)(params), [(chosen, rejected) for chosen, rejected, _ in found]


@pytest.mark.parametrize("cfg", CONFIGS, ids=str)
def test_each_member_of_an_ensemble_learns_as_if_alone(cfg):
    losses, metrics, gradient, scores = ensemble_loss(cfg)
    for role, (chosen, rejected) in zip(losses, scores, strict=True):
        alone, _, slope = loss_of(chosen, rejected, None, cfg)
        np.testing.assert_allclose(losses[role].value(), alone["reward"].value(), rtol=1e-6)
        np.testing.assert_allclose(np.asarray(gradient[role]["table"]).reshape(2, -1), slope, rtol=1e-6)
    expected = np.mean([by_loop(*pair, None, cfg)["loss/reward"] for pair in scores])
    np.testing.assert_allclose(metrics["loss/reward"].value(), expected, rtol=1e-5)


def test_metrics_of_an_ensemble_are_of_the_combined_score():
    losses, metrics, _, scores = ensemble_loss(RMConfig(), "min")
    (chosen, rejected) = (np.minimum(scores[0][side], scores[1][side]) for side in (0, 1))
    expected = by_loop(chosen, rejected, None, RMConfig())
    for name in ("reward/accuracy", "reward/margin", "reward/brier", "reward/chosen"):
        np.testing.assert_allclose(metrics[name].value(), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    differences = [chosen - rejected for chosen, rejected in scores]
    np.testing.assert_allclose(metrics["reward/disagreement"].value(), np.std(differences, axis=0).mean(), rtol=1e-5)
    for role, pair in zip(losses, scores):
        alone = by_loop(*pair, None, RMConfig())["reward/accuracy"]
        np.testing.assert_allclose(metrics[f"reward/accuracy/{role}"].value(), alone)


def test_a_bootstrapped_member_counts_each_pair_as_often_as_it_drew_it():
    cfg = RMConfig(bootstrap=True, centering=0.1)
    losses, _, gradient, scores = ensemble_loss(cfg)
    pairs = Preferences(side(range(6)), side(range(6, 12)))
    for number, (role, (chosen, rejected)) in enumerate(zip(losses, scores)):
        counts = np.asarray(bootstrap_counts(rm.hash_of(pairs), number))
        each = [by_loop(chosen[[i]], rejected[[i]], None, cfg)["total"] for i in range(6)]
        assert losses[role].count == counts.sum() and 0 in counts
        np.testing.assert_allclose(losses[role].total, np.dot(counts, each), rtol=1e-5)
        slope = np.asarray(gradient[role]["table"]).reshape(2, -1)
        assert (np.abs(slope).sum(0) > 0).tolist() == (counts > 0).tolist()
