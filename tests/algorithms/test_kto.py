"""KTO against a plain NumPy loop and hand-worked numbers, its baseline, and labels that a policy learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithms import kto
from jaxrlhf.algorithms.kto import KTOConfig
from jaxrlhf.optim import OptimizerConfig
from jaxrlhf.sharding import MeshConfig, make_mesh
from jaxrlhf.types import Batch, Sequences, TokenStats, TrainState, Trees, Unpaired
from tests.support import fake, tiny

COLUMNS = 4  # the first is prompt


# A policy whose log-probs are rows of a table, found by the sequence's first token.
FAKE = fake.answering(token_stats=lambda params, rows: TokenStats(*[params["table"][rows.tokens[:, 0]]] * 2))  # type: ignore[arg-type]
CONFIGS = {
    "default": KTOConfig(),
    "beta": KTOConfig(beta=0.5),
    "weights": KTOConfig(desirable_weight=1.5, undesirable_weight=0.25),
}


def rows_of(ids, lengths, real) -> Sequences:
    """Row i has the log-probs table[ids[i]], of which its response is the ``lengths[i]`` after the first column."""
    tokens = jnp.broadcast_to(jnp.array(ids, jnp.int32)[:, None], (len(ids), COLUMNS))
    columns, real = np.arange(COLUMNS), np.asarray(real)[:, None]
    valid = (columns <= np.array(lengths)[:, None]) & real
    return Sequences(tokens, jnp.array(valid), jnp.array(valid & (columns > 0)))


class Case:
    """Random rows: log-probs of policy and reference of the responses (0) and of others' responses (1), f64[2, rows,
    COLUMNS], NaN outside the responses."""

    def __init__(self, seed: int = 0, rows: int = 6, shift: float = 0.5):
        rng = np.random.default_rng(seed)
        self.rows, self.real = rows, np.ones(rows, bool)
        self.good = np.arange(rows) % 3 > 0
        self.lengths = rng.integers(1, COLUMNS, (2, rows))
        self.mask = (np.arange(COLUMNS) > 0) & (np.arange(COLUMNS) <= self.lengths[..., None])
        self.reference = np.where(self.mask, rng.normal(-2, 1, self.mask.shape), np.nan)
        self.policy = np.where(self.mask, self.reference + rng.normal(shift, 2, self.mask.shape), np.nan)

    def compute(self, cfg: KTOConfig):
        """(mean loss, metrics as numbers, gradient of the total in the policy's log-probs [2, rows, COLUMNS])."""
        ids = np.arange(2 * self.rows).reshape(2, self.rows)
        own, others = (rows_of(ids[at], self.lengths[at], self.real) for at in (0, 1))
        table = lambda x: {"table": jnp.array(x.reshape(-1, COLUMNS), jnp.float32)}
        params, slow = {"policy": table(self.policy)}, {"reference": table(self.reference)}
        batch = Batch(unpaired=Unpaired(own, jnp.array(self.good), others))

        def total(params):
            state = TrainState(jnp.int32(0), jnp.int32(0), params, slow, {}, {})
            experience, prepared = kto.prepare(FAKE, state, batch, cfg)
            assert experience.rows.mismatched is None
            losses, means = kto.loss(FAKE, Trees(params, slow), jax.lax.stop_gradient(experience), cfg)
            return losses["policy"].total, (losses, prepared | means)

        gradient, (losses, means) = jax.grad(total, has_aux=True)(params)
        numbers = {name: float(mean.value()) for name, mean in means.items()}
        return (
            float(losses["policy"].value()),
            numbers,
            np.asarray(gradient["policy"]["table"]).reshape(self.mask.shape),
        )


def by_loop(case: Case, cfg: KTOConfig) -> dict[str, float]:
    """In float64, a row at a time."""
    total = lambda x, at, row: sum(x[at, row, t] for t in range(COLUMNS) if case.mask[at, row, t])
    ratio = lambda at, row: total(case.policy, at, row) - total(case.reference, at, row)
    baseline = max(0.0, float(np.mean([ratio(1, row) for row in range(case.rows)])))
    losses, right, kinds = [], [], {True: [], False: []}
    for row, good in enumerate(case.good.tolist()):
        r = ratio(0, row)
        value = 1 / (1 + np.exp(-cfg.beta * (r - baseline if good else baseline - r)))
        losses.append((cfg.desirable_weight if good else cfg.undesirable_weight) * (1 - value))
        right.append((r > baseline) == good)
        kinds[good].append((cfg.beta * r, total(case.policy, 0, row)))
    named = {True: "desirable", False: "undesirable"}
    found = {"kl/baseline": baseline, "loss/policy": np.mean(losses), "implicit_reward/accuracy": np.mean(right)}
    for good, name in named.items():
        rewards, logprobs = zip(*kinds[good])
        found |= {f"implicit_reward/{name}": np.mean(rewards), f"logprobs/{name}": np.mean(logprobs)}
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize(("seed", "shift"), [(0, 0.5), (1, -0.5)])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_is_a_numpy_loop(name, seed, shift):
    """The gradient reaches responses only, and none of those that the baseline is taken from."""
    case = Case(seed, shift=shift)
    loss, metrics, gradient = case.compute(CONFIGS[name])
    assert metrics == pytest.approx(by_loop(case, CONFIGS[name]), rel=1e-5, abs=1e-6)
    assert loss == metrics["loss/policy"]
    assert np.isfinite(gradient).all() and ((gradient[0] != 0) == case.mask[0]).all() and (gradient[1] == 0).all()


def worked(good, ratios, others) -> Case:
    """Rows whose responses are one token, of these log-ratios; the reference says -1."""
    case = Case(rows=len(good))
    case.good, case.lengths = np.array(good), np.ones((2, len(good)), int)
    case.mask = np.zeros((2, len(good), COLUMNS), bool)
    case.mask[..., 1] = True
    case.reference = np.where(case.mask, -1.0, np.nan)
    case.policy = np.where(case.mask, np.array([ratios, others])[..., None] - 1.0, np.nan)
    return case


def test_hand_worked():
    """beta 0.5, z = (1 + 3) / 2 = 2. Good: 1 - sigmoid(0.5 (4 - 2)) = 1 - 0.731059 = 0.268941. Bad: 1 - sigmoid(0.5
    (2 - 0)) = 0.268941. With weights 1 and 2: (0.268941 + 0.537883) / 2 = 0.403412. The gradient in the good log-prob:
    -0.5 * 0.731059 * 0.268941 = -0.098306; in the bad one twice as much, upwards."""
    loss, metrics, gradient = worked([True, False], [4, 0], [1, 3]).compute(KTOConfig(0.5, 1.0, 2.0))
    assert metrics["kl/baseline"] == pytest.approx(2)
    assert loss == pytest.approx(0.403412, abs=1e-6)
    assert metrics["implicit_reward/desirable"] == pytest.approx(2) and metrics["implicit_reward/undesirable"] == 0
    assert metrics["implicit_reward/accuracy"] == 1
    assert gradient[0, :, 1] == pytest.approx([-0.098306, 0.196612], abs=1e-6)


def test_a_negative_baseline_is_zero():
    """Good: 1 - sigmoid(0.1 * 1) = 0.475021, though the others' mean is -2."""
    loss, metrics, _ = worked([True, True], [1, 1], [-1, -3]).compute(KTOConfig())
    assert metrics["kl/baseline"] == 0 and loss == pytest.approx(0.475021, abs=1e-6)


def test_a_policy_that_is_the_reference():
    """The loss is half of each weight and the gradient beta / 4, up for the good and down for the bad."""
    case = worked([True, False, True], [0, 0, 0], [0, 0, 0])
    loss, metrics, gradient = case.compute(KTOConfig(beta=0.2))
    assert loss == 0.5 and metrics["implicit_reward/accuracy"] == 0.5  # ties
    assert gradient[0, :, 1] == pytest.approx([-0.05, 0.05, -0.05])


@pytest.mark.nightly  # by day: all algorithms, in test_properties
def test_padding_rows_count_for_nothing():
    case, padded = Case(rows=5), Case(rows=5)
    loss, metrics, gradient = case.compute(CONFIGS["weights"])
    fill = lambda x: np.concatenate([x, np.full((2, 2, COLUMNS), 7.0)], axis=1)
    padded.policy, padded.reference, padded.rows = fill(case.policy), fill(case.reference), 7
    padded.lengths = np.concatenate([case.lengths, [[2, 3], [1, 1]]], axis=1)
    padded.mask = np.concatenate([case.mask, np.zeros((2, 2, COLUMNS), bool)], axis=1)
    padded.real, padded.good = np.arange(7) < 5, np.append(case.good, [True, False])
    again = padded.compute(CONFIGS["weights"])
    assert again[0] == pytest.approx(loss, rel=1e-6) and again[1] == pytest.approx(metrics, rel=1e-6)
    np.testing.assert_array_equal(again[2][:, :5], gradient)
    assert (again[2][:, 5:] == 0).all()


# ---- in the step ----------------------------------------------------------------------------------------------------


def test_the_record():
    assert kto.ALGORITHM.batch(KTOConfig()) == ("unpaired",)
    assert kto.ALGORITHM.roles(KTOConfig()) == ({"policy": "lm"}, {"reference": "lm"})
    assert not kto.ALGORITHM.online


def apart(made: tiny.Tiny) -> TrainState:
    """A policy that is not its reference: on the whole it finds more likely what it answers."""
    return made.state.replace(slow={"reference": tiny.parameters(tiny.MODEL, "lm", 5)})


@pytest.fixture(scope="module")
def alone():
    made = tiny.build("kto", KTOConfig(), batch=Batch(unpaired=tiny.unpaired()))
    return tiny.program(steps.make_iteration(made.recipe))(apart(made), made.batch)


def is_same(found, expected) -> None:
    (state, metrics, _), (state_alone, metrics_alone, _) = found, expected
    close = lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-6)
    jax.tree.map(close, state.params["policy"], state_alone.params["policy"])
    for name, value in metrics_alone.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.nightly
def test_a_mesh_changes_nothing(alone):
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        made = tiny.build("kto", KTOConfig(), batch=Batch(unpaired=tiny.unpaired()), num_micro=2)
        is_same(tiny.program(steps.make_iteration(made.recipe))(apart(made), made.batch), alone)
    assert float(alone[1]["kl/baseline"]) > 0.01, "no baseline, no test"


@pytest.mark.nightly  # by day: losses by a NumPy loop, above
def test_a_policy_learns_the_labels():
    made = tiny.build(
        "kto",
        KTOConfig(beta=0.5),
        batch=Batch(unpaired=tiny.unpaired()),
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
    iteration, state, found = tiny.program(steps.make_iteration(made.recipe)), made.state, []
    for _ in range(30):
        state, metrics, responses = iteration(state, made.batch)
        assert responses is None
        found.append({name: float(value) for name, value in metrics.items()})
    assert [found[0][name] for name in ("loss/policy", "kl/baseline")] == pytest.approx([0.5, 0], abs=1e-5)
    assert found[-1]["implicit_reward/desirable"] > 0.5 > -0.5 > found[-1]["implicit_reward/undesirable"]
    assert found[-1]["loss/policy"] < 0.35
    assert tiny.equal_trees(state.slow, made.state.slow)
