"""DPO against a plain NumPy loop, its gradient where the answer is known, and preferences that a policy learns."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithms import dpo
from jaxrlhf.algorithms.dpo import DPOConfig
from jaxrlhf.optim import OptimizerConfig
from jaxrlhf.sharding import MeshConfig, make_mesh
from jaxrlhf.types import Batch, Preferences, Sequences, TokenStats, TrainState, Trees
from tests.support import fake, tiny

COLUMNS = 4  # the first is prompt


# A policy whose log-probs are rows of a table, found by the sequence's first token.
FAKE = fake.answering(token_stats=lambda params, rows: TokenStats(*[params["table"][rows.tokens[:, 0]]] * 2))  # type: ignore[arg-type]
CONFIGS = {
    "sigmoid": DPOConfig(),
    "beta": DPOConfig(beta=0.5),
    "smoothing": DPOConfig(label_smoothing=0.1),
    "ipo": DPOConfig(objective="ipo"),
}


def side(ids, lengths, real) -> Sequences:
    """Row i has the log-probs table[ids[i]], of which its response is the ``lengths[i]`` after the first column."""
    tokens = jnp.broadcast_to(jnp.array(ids, jnp.int32)[:, None], (len(ids), COLUMNS))
    columns, real = np.arange(COLUMNS), np.asarray(real)[:, None]
    valid = (columns <= np.array(lengths)[:, None]) & real
    return Sequences(tokens, jnp.array(valid), jnp.array(valid & (columns > 0)))


class Case:
    """Random pairs: log-probs of policy and reference, f64[2, rows, COLUMNS], junk outside the responses."""

    def __init__(self, seed: int = 0, rows: int = 6, junk: float = np.nan, margin: bool = False):
        rng = np.random.default_rng(seed)
        self.rows, self.real = rows, np.ones(rows, bool)
        self.lengths = rng.integers(1, COLUMNS, (2, rows))
        columns = np.arange(COLUMNS)
        self.mask = (columns > 0) & (columns <= self.lengths[..., None])
        self.reference = np.where(self.mask, rng.normal(-2, 1, self.mask.shape), junk)
        self.policy = np.where(self.mask, self.reference + rng.normal(0, 2, self.mask.shape), junk)
        self.margin = rng.normal(size=rows).astype(np.float32) if margin else None

    def trees(self) -> tuple[dict, dict]:
        table = lambda x: {"table": jnp.array(x.reshape(-1, COLUMNS), jnp.float32)}
        return {"policy": table(self.policy)}, {"reference": table(self.reference)}

    def experience(self) -> dpo.DPOExperience:
        rows = self.rows
        ids = np.arange(2 * rows).reshape(2, rows)
        chosen, rejected = (side(ids[at], self.lengths[at], self.real) for at in (0, 1))
        pairs = Preferences(chosen, rejected, None if self.margin is None else jnp.array(self.margin))
        params, slow = self.trees()
        state = TrainState(jnp.int32(0), jnp.int32(0), params, slow, {}, {})
        return dpo.prepare(FAKE, state, Batch(preferences=pairs), CONFIGS["sigmoid"])[0]

    def compute(self, cfg: DPOConfig):
        """(mean loss, metrics as numbers, gradient of the total in the policy's log-probs [2, rows, COLUMNS])."""
        (params, slow), experience = self.trees(), self.experience()
        loss = lambda params: dpo.loss(FAKE, Trees(params, slow), experience, cfg)
        losses, means = loss(params)
        gradient = jax.grad(lambda params: loss(params)[0]["policy"].total)(params)["policy"]["table"]
        numbers = {name: float(mean.value()) for name, mean in means.items()}
        return float(losses["policy"].value()), numbers, np.asarray(gradient).reshape(self.mask.shape)


def by_loop(case: Case, cfg: DPOConfig) -> dict[str, float]:
    """Means over pairs, in float64, a pair at a time."""
    rows = []
    for row in range(case.rows):
        sums = lambda x: [sum(x[at, row, t] for t in range(COLUMNS) if case.mask[at, row, t]) for at in (0, 1)]  # noqa: B023
        ours, theirs = sums(case.policy), sums(case.reference)
        chosen, rejected = (cfg.beta * (a - b) for a, b in zip(ours, theirs))
        margin = 0.0 if case.margin is None else float(case.margin[row])
        d = chosen - rejected - margin
        if cfg.objective == "sigmoid":
            e = cfg.label_smoothing
            loss = (1 - e) * np.log1p(np.exp(-d)) + e * np.log1p(np.exp(d))
        else:
            loss = (d / cfg.beta - 1 / (2 * cfg.beta)) ** 2
        rows.append([loss, chosen, rejected, chosen - rejected, float(chosen > rejected), *ours])
    names = ["loss/policy", *(f"implicit_reward/{name}" for name in ("chosen", "rejected", "margin", "accuracy"))]
    return dict(zip([*names, "logprobs/chosen", "logprobs/rejected"], np.mean(rows, axis=0).tolist()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("margin", [False, True])
def test_loss_is_a_numpy_loop(name, seed, margin):
    """What is outside the responses is NaN, and reaches neither numbers nor gradient."""
    case = Case(seed, margin=margin)
    loss, metrics, gradient = case.compute(CONFIGS[name])
    expected = by_loop(case, CONFIGS[name])
    assert metrics == {key: pytest.approx(value, rel=1e-5, abs=1e-5) for key, value in expected.items()}
    assert loss == metrics["loss/policy"]
    assert np.isfinite(gradient).all() and ((gradient != 0) == case.mask).all()


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [(DPOConfig(), 0.671268), (DPOConfig(label_smoothing=0.1), 0.676268), (DPOConfig(objective="ipo"), 22.5)],
)
def test_numbers_of_another_library(cfg, expected):
    """Two pairs whose responses have these log-probs; the numbers are those of OpenRLHF's DPOLoss."""
    case = Case(rows=2)
    case.lengths = np.ones((2, 2), int)
    case.mask = np.zeros((2, 2, COLUMNS), bool)
    case.mask[..., 1] = True
    case.policy, case.reference = np.zeros(case.mask.shape), np.zeros(case.mask.shape)
    case.policy[..., 1] = [[-10, -12], [-14, -11]]
    case.reference[..., 1] = [[-11, -12], [-13, -12]]
    loss, metrics, _ = case.compute(cfg)
    assert loss == pytest.approx(expected, abs=1e-5)
    assert metrics["implicit_reward/chosen"] == pytest.approx(0.05)  # 0.1 and 0
    assert metrics["implicit_reward/rejected"] == pytest.approx(0.0)  # -0.1 and 0.1


def test_a_policy_that_is_the_reference():
    """The loss is log 2 and pulls the two sides apart by beta / 2 a token."""
    case = Case()
    case.policy = case.reference
    loss, metrics, gradient = case.compute(DPOConfig(beta=0.3))
    assert loss == pytest.approx(np.log(2), abs=1e-6) and metrics["implicit_reward/margin"] == 0
    assert metrics["implicit_reward/accuracy"] == 0.5  # ties
    np.testing.assert_allclose(gradient, np.where(case.mask, [[[-0.15]], [[0.15]]], 0), atol=1e-6)


@pytest.mark.nightly  # by day: all algorithms, in test_properties
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_pairs_count_for_nothing(name):
    case, cfg = Case(rows=5), CONFIGS[name]
    loss, metrics, gradient = case.compute(cfg)
    padded = Case(rows=5)
    fill = lambda x: np.concatenate([x, np.full((2, 2, COLUMNS), 7.0)], axis=1)
    padded.policy, padded.reference, padded.rows = fill(case.policy), fill(case.reference), 7
    padded.lengths = np.concatenate([case.lengths, [[2, 3], [1, 1]]], axis=1)
    padded.mask = np.concatenate([case.mask, np.zeros((2, 2, COLUMNS), bool)], axis=1)
    padded.real = np.arange(7) < 5
    again = padded.compute(cfg)
    assert again[0] == pytest.approx(loss, rel=1e-6) and again[1] == pytest.approx(metrics, rel=1e-6)
    np.testing.assert_array_equal(again[2][:, :5], gradient)
    assert (again[2][:, 5:] == 0).all()


def test_the_optimum_under_a_reward_is_a_stationary_point():
    """Preferences drawn as Bradley-Terry has it, p(i over j) = sigmoid(r_i - r_j), summed over all pairs: no gradient
    at pi ~ reference * exp(r / beta), and one anywhere else (Rafailov et al. 2023, section 4)."""
    rng = np.random.default_rng(0)
    beta, rewards, reference = 0.5, rng.normal(size=4), jax.nn.log_softmax(jnp.array(rng.normal(size=4)))
    pairs = [*itertools.permutations(range(4), 2)]

    def expected_loss(logits):
        table = jnp.zeros((4, COLUMNS)).at[:, 1].set(jax.nn.log_softmax(logits))
        total = 0.0
        for chosen, rejected in pairs:
            preferred, other = (side([one], [1], [True]) for one in (chosen, rejected))
            known = (reference[chosen][None], reference[rejected][None])
            experience = dpo.DPOExperience(pairs=Preferences(preferred, other), ref_logprobs=known)
            losses, _ = dpo.loss(FAKE, Trees({"policy": {"table": table}}, {}), experience, DPOConfig(beta=beta))
            total += jax.nn.sigmoid(rewards[chosen] - rewards[rejected]) * losses["policy"].total
        return total

    program = tiny.program(jax.value_and_grad(expected_loss))
    (lowest, none), (loss, some) = program(reference + rewards / beta), program(reference)
    np.testing.assert_allclose(none, 0, atol=1e-5)
    assert np.abs(some).max() > 0.05 and lowest < loss


def test_long_responses_are_summed_in_float32():
    """600 tokens of bfloat16 log-probs: a bfloat16 sum would stop at 256."""
    tokens = jnp.zeros((1, 601), jnp.int32)
    one = Sequences(tokens, jnp.ones(tokens.shape, bool), jnp.arange(601)[None] > 0)
    tree = {"table": jnp.full((1, 601), -1.0, jnp.bfloat16)}
    state = TrainState(jnp.int32(0), jnp.int32(0), {"policy": tree}, {"reference": tree}, {}, {})
    experience, _ = dpo.prepare(FAKE, state, Batch(preferences=Preferences(one, one)), DPOConfig())
    _, metrics = dpo.loss(FAKE, state.trees, experience, DPOConfig())
    assert metrics["logprobs/chosen"].value() == -600 and metrics["implicit_reward/chosen"].value() == 0


# ---- in the step ----------------------------------------------------------------------------------------------------


def test_the_record():
    assert dpo.ALGORITHM.batch(DPOConfig()) == ("preferences",)
    assert dpo.ALGORITHM.roles(DPOConfig()) == ({"policy": "lm"}, {"reference": "lm"})
    assert not dpo.ALGORITHM.online


def gradients(made: tiny.Tiny):
    """(gradient, metrics as numbers) of the pairs in ``made``, from a policy that is not its reference."""
    apart = made.state.replace(params={"policy": tiny.parameters(tiny.MODEL, "lm", 5)})

    def learn(state, batch):
        experience, _ = dpo.prepare(made.recipe.nets, state, batch, made.recipe.cfg)
        return steps.gradients(made.recipe, state, experience)[:2]

    grads, means = jax.tree.map(np.asarray, tiny.program(learn)(apart, made.batch))
    return grads["policy"], {name: float(mean.value()) for name, mean in means.items()}


@pytest.fixture(scope="module")
def alone():
    return gradients(tiny.build("dpo", DPOConfig()))


def is_same(found, expected) -> None:
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[0])) > 0.01, "no gradient, no test"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found[0], expected[0])
    assert found[1] == pytest.approx(expected[1], rel=1e-5, abs=1e-5)


@pytest.mark.nightly
def test_a_mesh_changes_nothing(alone):
    """What the reference says, two micro-batches and their gradient, on (2, 2, 2)."""
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        is_same(gradients(tiny.build("dpo", DPOConfig(), num_micro=2)), alone)


@pytest.mark.nightly  # by day: padding of all algorithms, in test_properties
def test_the_amount_of_padding_changes_nothing(alone):
    """Columns of padding on either side, and whatever token they hold."""
    made = tiny.build("dpo", DPOConfig())
    pad = lambda x, value: jnp.pad(x, ((0, 0), (3, 2)), constant_values=value)

    def widen(sequences: Sequences) -> Sequences:
        arrays = {name: pad(getattr(sequences, name), False) for name in ("valid", "response_mask")}
        start = sequences.response_start + 3
        return dataclasses.replace(sequences, tokens=pad(sequences.tokens, 7), response_start=start, **arrays)

    pairs = made.batch.preferences
    wide = Preferences(widen(pairs.chosen), widen(pairs.rejected), pairs.margin)
    is_same(gradients(made._replace(batch=Batch(preferences=wide))), alone)


@pytest.mark.nightly  # by day: what its optimum is, above
def test_a_policy_learns_the_preferences():
    made = tiny.build(
        "dpo",
        DPOConfig(beta=0.5),
        batch=Batch(preferences=tiny.preferences().replace(margin=None)),  # type: ignore[attr-defined]
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
    iteration, state, found = tiny.program(steps.make_iteration(made.recipe)), made.state, []
    for _ in range(30):
        state, metrics, responses = iteration(state, made.batch)
        assert responses is None
        found.append({name: float(value) for name, value in metrics.items()})
    assert found[0]["loss/policy"] == pytest.approx(np.log(2), abs=1e-5)
    assert found[-1]["implicit_reward/accuracy"] > 0.9
    assert found[-1]["loss/policy"] < 0.3
    assert tiny.equal_trees(state.slow, made.state.slow)
