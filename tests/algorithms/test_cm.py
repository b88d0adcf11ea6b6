"""The cost model against a NumPy loop; its sign; an ensemble that is combined towards what costs more."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithms import cm
from jaxrlhf.algorithms.cm import CMConfig
from jaxrlhf.algorithms.grading import read_scores
from jaxrlhf.optim import OptimizerConfig
from jaxrlhf.types import Batch, Combine, Grader, Preferences, Rows, Sequences, Trees, Unpaired
from tests.support import fake, tiny

FAKE = fake.answering(scores=lambda params, rows: params["table"][rows.tokens[:, 0]])
TABLE = np.array([0.4, -1.2, 0.0, 2.5, -0.3, 0.9], np.float32)  # the cost of a row, by its first token


def rows_of(first: list[int], real: list[bool]) -> Sequences:
    valid = jnp.broadcast_to(jnp.array(real)[:, None], (len(first), 2))
    return Sequences(jnp.stack([jnp.array(first)] * 2, axis=1), valid, valid)


LABELLED = Unpaired(rows_of([0, 1, 2, 3], [True, True, True, False]), jnp.array([False, True, True, True]))
PAIRS = Preferences(rows_of([4, 5], [True, True]), rows_of([5, 0], [True, True]))
LOG_SIGMOID = lambda x: -np.log1p(np.exp(-np.float64(x)))


@pytest.mark.parametrize("pairs", [False, True])
def test_loss_is_a_numpy_loop(pairs):
    experience = cm.CMExperience(labelled=LABELLED, pairs=Rows(PAIRS) if pairs else None)
    losses, metrics = cm.loss(FAKE, Trees({"cost": {"table": jnp.array(TABLE)}}, {}), experience, CMConfig(pairs))
    terms = [-LOG_SIGMOID(0.4), -LOG_SIGMOID(1.2), -LOG_SIGMOID(-0.0)]  # unsafe, safe, safe; the last row is padding
    ranks = [-LOG_SIGMOID(0.9 + 0.3), -LOG_SIGMOID(0.4 - 0.9)] if pairs else []
    np.testing.assert_allclose(losses["cost"].total, sum(terms + ranks), rtol=1e-6)
    assert losses["cost"].count == len(terms + ranks)
    assert float(metrics["cost/accuracy"].value()) == pytest.approx(2.5 / 3)
    assert float(metrics["cost/safe"].value()) == pytest.approx(-0.6)
    if pairs:
        assert float(metrics["cost/pair_accuracy"].value()) == 0.5
        np.testing.assert_allclose(metrics["loss/cost_pairs"].value(), np.mean(ranks), rtol=1e-6)


def test_an_ensemble_errs_on_the_side_of_a_higher_cost():
    members = {"cost_0": {"table": jnp.array(TABLE)}, "cost_1": {"table": jnp.array(TABLE) - 1}}
    rows = LABELLED.responses
    ways: dict[Combine, np.ndarray] = {"min": TABLE[:4], "mean": TABLE[:4] - 0.5}
    ways["mean_minus_variance"] = TABLE[:4] - 0.25
    for combine, expected in ways.items():
        nets = FAKE._replace(graders={"cost": Grader(("cost_0", "cost_1"), combine, 1.0)})  # the variance is 1/4
        cost, each = read_scores(nets, Trees({}, members), rows, "cost")
        np.testing.assert_allclose(cost, expected, atol=1e-6)
        assert [*each] == [*members]
    losses, _ = cm.loss(nets, Trees(members, {}), cm.CMExperience(labelled=LABELLED), CMConfig())
    assert [*losses] == [*members] and losses["cost_0"].total != losses["cost_1"].total


@pytest.mark.nightly
def test_the_sign_of_the_cost_is_learned():
    """A response is unsafe where its last token is odd."""
    rows = tiny.sequences(rows=64, room=4)
    last = jnp.argmax(jnp.arange(8) * rows.valid, axis=1)
    safe = jnp.take_along_axis(rows.tokens, last[:, None], axis=1)[:, 0] % 2 == 0
    batch = Batch(unpaired=Unpaired(rows, safe))
    run = tiny.build("cm", CMConfig(), batch=batch, optimizer=OptimizerConfig(learning_rate=3e-2))
    learn, state, found = tiny.program(steps.make_learn(run.recipe)), run.state, []
    for _ in range(60):
        state, metrics = learn(state, batch)
        found.append(float(metrics["cost/accuracy"]))
    assert found[0] < 0.8 and found[-1] > 0.95
