"""SimPO and ORPO, preferences without a reference: numbers by hand, NumPy loops, gradients, padding, training."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithms import orpo, simpo
from jaxrlhf.algorithms.orpo import ORPOConfig
from jaxrlhf.algorithms.simpo import SimPOConfig
from jaxrlhf.ops.losses import log_odds
from jaxrlhf.types import Batch, Preferences, TrainState, Trees
from tests.algorithms.test_dpo import COLUMNS, FAKE, side
from tests.support import tiny

ALGORITHM = {SimPOConfig: simpo.ALGORITHM, ORPOConfig: orpo.ALGORITHM}
CONFIGS = {
    "simpo": SimPOConfig(),
    "simpo, smoothed": SimPOConfig(beta=2.5, target_margin=0.3, label_smoothing=0.1),
    "orpo": ORPOConfig(),
    "orpo, strong": ORPOConfig(odds_coef=1.5),
}


def compute(cfg: Any, table: np.ndarray, lengths: np.ndarray, margin=None, real=None):
    """(mean loss, metrics, gradient in each log-prob) of pairs whose log-probs are ``table`` f[2, rows, COLUMNS]."""
    rows = table.shape[1]
    ids = np.arange(2 * rows).reshape(2, rows)
    real = np.ones(rows, bool) if real is None else real
    chosen, rejected = (side(ids[at], lengths[at], real) for at in (0, 1))
    pairs = Preferences(chosen, rejected, None if margin is None else jnp.array(margin, jnp.float32))
    params = {"policy": {"table": jnp.array(table.reshape(-1, COLUMNS), jnp.float32)}}
    state = TrainState(jnp.int32(0), jnp.int32(0), params, {}, {}, {})
    algorithm = ALGORITHM[type(cfg)]
    experience, _ = algorithm.prepare(FAKE, state, Batch(preferences=pairs), cfg)

    def total(params):
        losses, metrics = algorithm.loss(FAKE, Trees(params, {}), experience, cfg)
        return losses["policy"].total, (losses["policy"], metrics)

    gradient, (mean, metrics) = jax.grad(total, has_aux=True)(params)
    numbers = {name: float(one.value()) for name, one in metrics.items()}
    return float(mean.value()), numbers, np.asarray(gradient["policy"]["table"]).reshape(table.shape)


def random_pairs(seed: int = 0, rows: int = 6, junk: float = np.nan):
    """(log-probs [2, rows, COLUMNS], junk outside the responses; lengths [2, rows]; the response tokens)."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, COLUMNS, (2, rows))
    columns = np.arange(COLUMNS)
    mask = (columns > 0) & (columns <= lengths[..., None])
    return np.where(mask, -rng.exponential(1.0, mask.shape) - 0.01, junk), lengths, mask


def by_hand(cfg: Any, chosen: list[float], rejected: list[float], margin: float = 0.0) -> float:
    """The loss of one pair from the log-probs of its tokens, in float64."""
    one, other = np.mean(chosen), np.mean(rejected)
    if isinstance(cfg, SimPOConfig):
        d = cfg.beta * (one - other) - cfg.target_margin - margin
        return (1 - cfg.label_smoothing) * np.log1p(np.exp(-d)) + cfg.label_smoothing * np.log1p(np.exp(d))
    odds = lambda mean: np.exp(mean) / (1 - np.exp(mean))
    return -one + cfg.odds_coef * np.log1p(np.exp(-(np.log(odds(one) / odds(other)) - margin)))


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_simpo_by_hand():
    """Mean log-probs -1 and -1.5: 2 * 0.5 - 1 = 0, so ln 2; with a margin of the data of 1 more, ln(1 + e)."""
    table, lengths = np.array([[[0, -0.5, -1.5, 9]], [[0, -1.5, 9, 9]]]), np.array([[2], [1]])
    loss, numbers, gradient = compute(SimPOConfig(), table, lengths)
    assert loss == pytest.approx(np.log(2), rel=1e-6)
    assert numbers["implicit_reward/chosen"] == pytest.approx(-2) and numbers["logprobs/chosen"] == pytest.approx(-2)
    assert numbers["implicit_reward/margin"] == pytest.approx(1) and numbers["implicit_reward/accuracy"] == 1
    # -beta * sigmoid(0) over the tokens of each side
    np.testing.assert_allclose(gradient, [[[0, -0.5, -0.5, 0]], [[0, 1, 0, 0]]], atol=1e-6)
    assert compute(SimPOConfig(), table, lengths, margin=[1.0])[0] == pytest.approx(np.log(1 + np.e), rel=1e-6)


def test_orpo_by_hand():
    """A token of probability 1/2 against one of 1/4: odds 1 and 1/3, so -log sigmoid(log 3) = log(4/3)."""
    table, lengths = np.log([[[1, 0.5, 1, 1]], [[1, 0.25, 1, 1]]]), np.array([[1], [1]])
    loss, numbers, gradient = compute(ORPOConfig(odds_coef=0.5), table, lengths)
    assert loss == pytest.approx(np.log(2) + 0.5 * np.log(4 / 3), rel=1e-6)
    assert numbers["loss/nll"] == pytest.approx(np.log(2))
    assert numbers["loss/odds_ratio"] == pytest.approx(np.log(4 / 3))
    assert numbers["implicit_reward/margin"] == pytest.approx(np.log(3), rel=1e-6)
    # d log odds / d log p = 1 / (1 - p): 2 and 4/3; sigmoid(-log 3) = 1/4
    np.testing.assert_allclose(gradient[:, 0, 1], [-1 - 0.5 * 0.25 * 2, 0.5 * 0.25 * 4 / 3], rtol=1e-5)


@pytest.mark.parametrize(("cfg", "first"), [(SimPOConfig(), np.log(1 + np.e)), (ORPOConfig(), 1 + 0.1 * np.log(2))])
def test_the_first_loss_of_sides_that_are_as_likely(cfg, first):
    """SimPO: log(1 + exp(target_margin)); ORPO: the likelihood's loss, here 1 nat, and odds_coef * ln 2."""
    table, lengths = np.full((2, 3, COLUMNS), -1.0), np.array([[1, 2, 3], [3, 1, 2]])
    loss, numbers, _ = compute(cfg, table, lengths)
    assert loss == pytest.approx(first, rel=1e-6) and numbers["implicit_reward/accuracy"] == 0.5


def test_log_odds():
    p = np.array([1e-5, 0.1, 0.5, 0.9, 0.999])
    np.testing.assert_allclose(log_odds(jnp.log(jnp.array(p))), np.log(p / (1 - p)), rtol=1e-4)
    slope = jax.vmap(jax.grad(log_odds))(jnp.array([0.0, -1e-9, -1e4]))
    assert np.isfinite(slope).all() and np.isfinite(log_odds(jnp.array([0.0, -1e4]))).all()


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_is_a_numpy_loop(name, margin):
    cfg, (table, lengths, mask) = CONFIGS[name], random_pairs()
    margins = np.random.default_rng(5).normal(size=table.shape[1]) if margin else np.zeros(table.shape[1])
    loss, numbers, gradient = compute(cfg, table, lengths, margins if margin else None)
    tokens = lambda at, row: table[at, row][mask[at, row]].tolist()
    pairs = [(tokens(0, row), tokens(1, row), float(margins[row])) for row in range(table.shape[1])]
    assert loss == pytest.approx(np.mean([by_hand(cfg, *pair) for pair in pairs]), rel=1e-5)
    assert numbers["logprobs/rejected"] == pytest.approx(np.mean([sum(pair[1]) for pair in pairs]), rel=1e-5)
    np.testing.assert_array_equal(gradient != 0, mask)
    for row, (chosen, rejected, more) in enumerate(pairs):  # slopes by differences, the same for each token of a side
        base, step = by_hand(cfg, chosen, rejected, more), 1e-5
        slopes = (
            (by_hand(cfg, [chosen[0] + step, *chosen[1:]], rejected, more) - base) / step,
            (by_hand(cfg, chosen, [rejected[0] + step, *rejected[1:]], more) - base) / step,
        )
        for at in (0, 1):
            np.testing.assert_allclose(gradient[at, row][mask[at, row]], slopes[at], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -1e30])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_outside_the_responses_and_padding_pairs_never_count(name, junk):
    cfg, (table, lengths, _) = CONFIGS[name], random_pairs(junk=0.0)
    found = compute(cfg, table, lengths)
    wide = np.concatenate([random_pairs(junk=junk)[0], np.full((2, 2, COLUMNS), junk)], 1)
    padded = compute(cfg, wide, np.pad(lengths, ((0, 0), (0, 2)), constant_values=2), real=np.arange(8) < 6)
    assert padded[0] == pytest.approx(found[0], rel=1e-6) and padded[1] == pytest.approx(found[1], rel=1e-6)
    np.testing.assert_allclose(padded[2][:, :6], found[2], rtol=1e-6)
    assert not padded[2][:, 6:].any()


# ---- a real model ---------------------------------------------------------------------------------------------------


def test_the_records():
    for algorithm in ALGORITHM.values():
        cfg = algorithm.config()
        assert algorithm.roles(cfg) == ({"policy": "lm"}, {}) and algorithm.batch(cfg) == ("preferences",)
        assert not algorithm.online and algorithm.updates(cfg) == (1, 1, None)


@pytest.mark.nightly  # by day: dpo, in test_dpo
@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_preferences_are_learned(name):
    cfg = {"simpo": SimPOConfig(), "orpo": ORPOConfig(odds_coef=2.0)}[name]
    optimizer = tiny.ADAM.__class__(learning_rate=1e-2)
    run = tiny.build(name, cfg, batch=Batch(preferences=tiny.preferences()), optimizer=optimizer)
    step, state, losses = tiny.program(steps.make_iteration(run.recipe)), run.state, []
    for _ in range(60):
        state, metrics, _ = step(state, run.batch)
        losses.append(float(metrics["loss/policy"]))
    assert losses[-1] < 0.8 * losses[0] and metrics["implicit_reward/accuracy"] > 0.9
