"""Online DPO: its gradient is that of DPO on the pairs that a loop finds; ties, padding, unscorable responses."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithms import dpo, online_dpo
from jaxrlhf.algorithms.dpo import DPOConfig
from jaxrlhf.algorithms.online_dpo import OnlineDPOConfig
from jaxrlhf.types import Batch, Preferences, Trees
from tests.support import tiny
from tests.support.enumerated import run as enumerated_run
from tests.support.fake import FAKE, Case, make_case, prompts_of

SIZE = 3  # of a group: rows 0 to 2, of which the last has no response, and rows 3 to 5
CONFIGS = {
    "sigmoid": OnlineDPOConfig(),
    "smoothed": OnlineDPOConfig(beta=0.5, label_smoothing=0.1),
    "ipo": OnlineDPOConfig(objective="ipo", beta=0.3),
    "missing eos": OnlineDPOConfig(missing_eos_penalty=2.0),
}


def prepared(case: Case, cfg: OnlineDPOConfig, size: int = SIZE, **fields):
    """The experience, and metrics as numbers."""
    batch = Batch(prompts=prompts_of(len(case.mask) // size), sequences=case.sequences(**fields))
    experience, means = online_dpo.prepare(FAKE, case.state(0.0), batch, cfg)
    return experience, {name: float(mean.value()) for name, mean in means.items()}


def gradient(case: Case, cfg: OnlineDPOConfig, experience) -> np.ndarray:
    """[B, S]: the mean loss's slope in each log-prob."""

    def mean(params):
        return online_dpo.loss(FAKE, Trees(params, case.slow()), experience, cfg)[0]["policy"].value()

    return np.asarray(jax.grad(mean)(case.params())["policy"]["logprobs"])


def pairs_by_loop(case: Case, cfg: OnlineDPOConfig) -> list[tuple[int, int]]:
    """(best row, worst row) of each group whose marks differ."""
    marks, pairs = case.scores - np.where(case.ended, 0, cfg.missing_eos_penalty), []
    for start in range(0, len(marks), SIZE):
        rows = [row for row in range(start, start + SIZE) if case.mask[row].any() and not np.isnan(marks[row])]
        if rows and max(marks[rows]) > min(marks[rows]):
            pairs.append((max(rows, key=lambda row: marks[row]), min(rows, key=lambda row: marks[row])))
    return pairs


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_is_that_of_dpo_on_the_pairs_of_a_loop(name, seed):
    """And so is the loss that ``prepare`` reports, at the policy that sampled."""
    case, cfg = make_case(seed), CONFIGS[name]
    experience, metrics = prepared(case, cfg)
    found = gradient(case, cfg, experience)
    pairs = pairs_by_loop(case, cfg)
    assert len(pairs) == 2
    chosen, rejected = zip(*pairs)

    def loss_of(policy):
        """DPO's own code, given the rows of each pair by their numbers."""
        side = lambda rows: jax.tree.map(lambda x: x[jnp.array(rows)], case.sequences().replace(logprobs=None))
        total = lambda table, rows: jnp.where(case.mask, table, 0).sum(-1)[jnp.array(rows)]
        take = lambda table: (total(table, chosen), total(table, rejected))
        own = DPOConfig(cfg.beta, cfg.objective, cfg.label_smoothing)
        parts = dpo.DPOExperience(pairs=Preferences(side(chosen), side(rejected)), ref_logprobs=take(case.reference))
        rows = np.stack([chosen, rejected], 1).ravel()  # as the loss interleaves them
        params = {"policy": {"logprobs": policy[jnp.array(rows)], "entropy": jnp.zeros((len(rows), policy.shape[1]))}}
        return dpo.loss(FAKE, Trees(params, {}), parts, own)[0]["policy"].value()

    value, expected = jax.value_and_grad(loss_of)(jnp.array(case.policy))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["loss/policy"], value, rtol=1e-5)
    assert (found[list(chosen)][case.mask[list(chosen)]] < 0).all() or cfg.objective == "ipo"
    assert metrics["group/zero_variance"] == 0


def test_the_first_loss_is_ln_2():
    case = make_case()
    case.policy = case.reference.copy()
    _, metrics = prepared(case, OnlineDPOConfig())
    assert metrics["loss/policy"] == pytest.approx(np.log(2), rel=1e-6)
    assert metrics["implicit_reward/accuracy"] == 0.5 and metrics["kl/reference"] == 0


def test_by_hand():
    """beta 0.1; the best response is 10 nats above the reference, the worst 0: d = 1, slope -0.1 * sigmoid(-1)."""
    case = make_case()
    case.policy, case.reference = np.zeros_like(case.policy), np.zeros_like(case.reference)
    case.scores = np.array([2, 1, 9, 5, 5, 5], np.float32)  # row 2 is empty, and the second group all equal
    case.policy[0, np.flatnonzero(case.mask[0])[0]] = 10.0
    experience, metrics = prepared(case, OnlineDPOConfig())
    slope = 0.1 / (1 + np.e)
    np.testing.assert_allclose(experience.slopes, [-slope, slope, 0, 0, 0, 0], rtol=1e-5)
    assert metrics["loss/policy"] == pytest.approx(np.log1p(np.exp(-1)), rel=1e-5)
    assert metrics["group/zero_variance"] == 0.5 and metrics["implicit_reward/margin"] == pytest.approx(1)
    np.testing.assert_allclose(gradient(case, OnlineDPOConfig(), experience)[0][case.mask[0]], -slope, rtol=1e-5)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -1e30])
def test_what_is_outside_the_responses_never_counts(junk):
    cfg, clean, dirty = CONFIGS["missing eos"], make_case(), make_case(junk=junk)
    dirty.scores[2] = junk  # of the row without a response
    (experience, metrics), (dirtied, dirty_metrics) = prepared(clean, cfg), prepared(dirty, cfg)
    np.testing.assert_array_equal(dirtied.slopes, experience.slopes)
    assert dirty_metrics == metrics
    np.testing.assert_array_equal(gradient(dirty, cfg, dirtied), gradient(clean, cfg, experience))


def test_a_response_without_a_score_is_in_no_pair():
    case = make_case()
    scores = np.array([1.0, 0.0, 3.0, np.nan, 0.5, 2.0], np.float32)
    experience, metrics = prepared(case, OnlineDPOConfig(), scores=jnp.array(scores))
    case.scores = scores
    assert pairs_by_loop(case, OnlineDPOConfig()) == [(0, 1), (5, 4)]
    np.testing.assert_array_equal(np.sign(experience.slopes), [-1, 1, 0, 0, 1, -1])
    assert metrics["score/unscorable"] == 1


def test_where_no_pair_is_found_nothing_is_learned():
    case = make_case()
    case.scores[:] = 1.0
    experience, metrics = prepared(case, OnlineDPOConfig())
    assert not np.asarray(experience.slopes).any() and metrics["loss/policy"] == 0
    losses, _ = online_dpo.loss(FAKE, Trees(case.params(), case.slow()), experience, OnlineDPOConfig())
    assert losses["policy"].count == 0
    differ, scores = online_dpo.informative(
        FAKE, case.state(0.0), Batch(prompts=prompts_of(2), sequences=case.sequences()), OnlineDPOConfig()
    )
    assert not differ.any() and (np.asarray(scores) == 1).all()


def test_the_record():
    record, cfg = online_dpo.ALGORITHM, OnlineDPOConfig()
    assert record.roles(cfg) == ({"policy": "lm"}, {"reward": "scalar", "reference": "lm"})
    assert record.online and record.updates(cfg) == (1, 1, None) and record.min_samples(cfg) == 2


@pytest.mark.nightly  # by day: the gradient, above
def test_expected_reward_rises():
    """On a policy whose responses can all be listed."""
    run, exact = enumerated_run("online_dpo", replace(OnlineDPOConfig(), beta=0.1), samples_per_prompt=8)
    step, state = tiny.program(steps.make_iteration(run.recipe)), run.state
    for _ in range(60):
        state, *_ = step(state, run.batch)
    (before, _), (after, _) = (exact(one.params["policy"], run.state.params["policy"]) for one in (run.state, state))
    assert after > before + 0.5 * (exact.rewards.max() - before)
