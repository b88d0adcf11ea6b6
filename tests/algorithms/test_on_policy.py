"""The sampler's probabilities corrected for the trainer's: weights by hand, each algorithm's first gradient."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import grpo, on_policy, ppo
from jaxrlhf.algorithms.grpo import GRPOConfig
from jaxrlhf.algorithms.ppo import PPOConfig
from jaxrlhf.types import Batch, Sequences, Trees
from tests.support import tiny
from tests.support.fake import FAKE, Case, make_case, prompts_of

AnyConfig = PPOConfig | GRPOConfig


def corrected(advantages, old, sampled, mask, cap, **how: Any) -> tuple[np.ndarray, dict[str, float]]:
    """correct_for_sampler of arrays that are given as lists, with metrics as numbers."""
    cfg = GRPOConfig(sampler_ratio_cap=cap, **how)
    mask = jnp.array(mask)
    sequences = Sequences(jnp.zeros(mask.shape, jnp.int32), jnp.ones_like(mask), mask, logprobs=jnp.array(sampled))
    found, means = on_policy.correct_for_sampler(jnp.array(advantages), jnp.array(old), sequences, cfg)
    return np.asarray(found), {name: float(mean.value()) for name, mean in means.items()}


# ---- the weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", [0.0, np.nan, np.inf, -np.inf, -1e30])
def test_weights_by_hand(junk):
    """Probabilities 1/2, 1/4, 3/4 and 1/2 of the trainer where the sampler had 1/4, 1/2, 1/4 and 1/2: 2, 0.5, 3, 1."""
    mask = [[False, True, True], [True, True, False]]
    old = np.log([[1, 1 / 2, 1 / 4], [3 / 4, 1 / 2, 1]], dtype=np.float32)
    sampled = np.log([[1, 1 / 4, 1 / 2], [1 / 4, 1 / 2, 1]], dtype=np.float32)
    advantages = np.array([[0, 1, -2], [-1, 0.5, 0]], np.float32)
    old[0, 0] = sampled[1, 2] = junk  # outside the response
    found, metrics = corrected(advantages, old, sampled, mask, 2.5)
    np.testing.assert_allclose(found, [[0, 2, -1], [-2.5, 0.5, 0]], rtol=1e-6)
    assert metrics == pytest.approx({"policy/sampler_ratio": 6.5 / 4, "policy/sampler_ratio_capped": 1 / 4})
    found, metrics = corrected(advantages, old, sampled, mask, 0.75)
    np.testing.assert_allclose(found, [[0, 0.75, -1], [-0.75, 0.375, 0]], rtol=1e-6)
    assert metrics == pytest.approx({"policy/sampler_ratio": 6.5 / 4, "policy/sampler_ratio_capped": 3 / 4})


def test_a_runaway_ratio_stays_finite():
    old, sampled = [[-100.0, -0.5, -np.inf]], [[-0.5, -100.0, -1.0]]
    found, metrics = corrected([[1.0, 1.0, 1.0]], old, sampled, [[True, True, True]], 1e30)
    np.testing.assert_allclose(found, [[np.exp(-20), np.exp(20), np.exp(-20)]], rtol=1e-5)
    assert np.isfinite(metrics["policy/sampler_ratio"]) and metrics["policy/sampler_ratio_capped"] == 0
    found, metrics = corrected([[1.0, 1.0, 1.0]], old, sampled, [[True, True, True]], 2.0)
    np.testing.assert_allclose(found, [[np.exp(-20), 2, np.exp(-20)]], rtol=1e-5)
    assert metrics["policy/sampler_ratio_capped"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("how", "weights", "share"),
    [
        # products 1 and 3/2, means 1 and sqrt(3/2), of ratios (2, 1/2) and (3, 1/2); an empty row; 2/3 alone
        ({"sampler_ratio": "sequence"}, [[1, 1], [1.25, 1.25], [0, 0], [2 / 3, 0]], 2 / 5),
        ({"sampler_ratio": "sequence-mean"}, [[1, 1], [1.5**0.5, 1.5**0.5], [0, 0], [2 / 3, 0]], 0.0),
        ({"sampler_ratio": "sequence", "sampler_ratio_above": "drop"}, [[1, 1], [0, 0], [0, 0], [2 / 3, 0]], 2 / 5),
        (
            {"sampler_ratio": "sequence", "sampler_ratio_above": "drop", "sampler_ratio_floor": 0.75},
            [[1, 1], [0, 0], [0, 0], [0, 0]],
            3 / 5,
        ),
        ({"sampler_ratio_above": "drop"}, [[0, 0.5], [0, 0.5], [0, 0], [2 / 3, 0]], 2 / 5),
        ({"sampler_ratio_above": "drop", "sampler_ratio_floor": 0.6}, [[0, 0], [0, 0], [0, 0], [2 / 3, 0]], 4 / 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("junk", [0.0, np.nan, np.inf])
def test_weights_of_whole_sequences_and_those_that_are_dropped(how, weights, share, junk):
    """A cap of 5/4 over ratios of tokens (2, 1/2), (3, 1/2), none, (2/3)."""
    mask = np.array([[True, True], [True, True], [False, False], [True, False]])
    ratios = np.array([[2, 0.5], [3, 0.5], [1, 1], [2 / 3, 1]], np.float32)
    old = np.where(mask, np.log(ratios), junk).astype(np.float32)
    advantages = np.where(mask, [[1, -2], [3, 4], [0, 0], [-5, 0]], 0).astype(np.float32)
    found, metrics = corrected(advantages, old, np.zeros((4, 2), np.float32), mask, 1.25, **how)
    np.testing.assert_allclose(found, advantages * np.array(weights), rtol=1e-6)
    name = "dropped" if how.get("sampler_ratio_above") else "capped"
    assert metrics[f"policy/sampler_ratio_{name}"] == pytest.approx(share)
    kind = {"sequence": [1, 1, 1.5, 1.5, 2 / 3], "sequence-mean": [1, 1, 1.5**0.5, 1.5**0.5, 2 / 3]}
    ratio = kind.get(how.get("sampler_ratio"), ratios[mask])
    assert metrics["policy/sampler_ratio"] == pytest.approx(float(np.mean(ratio)), rel=1e-6)


def test_dropped_sequences_leave_the_gradient_of_those_that_both_find_likely():
    """Two-token responses listed: with weights of whole sequences and no cap in reach, the sampler's expectation of
    the gradient is the trainer's; token by token it is not."""
    rng = np.random.default_rng(0)
    table = lambda: (lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True))(rng.normal(0, 0.7, (3, 2)))
    trainer, sampler = table(), table()  # row 0: the first token; rows 1 and 2: after token 0 and 1
    responses = [(a, b) for a in (0, 1) for b in (0, 1)]
    gains = np.array([1.0, -0.5, 2.0, 0.3])
    log = lambda p: np.array([[np.log(p[0, a]), np.log(p[1 + a, b])] for a, b in responses], np.float32)
    chance = lambda p: np.array([p[0, a] * p[1 + a, b] for a, b in responses])

    def slopes(weights):  # of the logits of row 0
        return sum(weights[i] * (np.eye(2)[a] - trainer[0]) for i, (a, _) in enumerate(responses))

    def expected(**how):
        advantages = np.repeat(gains[:, None], 2, 1).astype(np.float32)
        weighted, _ = corrected(advantages, log(trainer), log(sampler), np.ones((4, 2), bool), 1e6, **how)
        return slopes(chance(sampler) * weighted[:, 0])

    wanted = slopes(chance(trainer) * gains)
    np.testing.assert_allclose(expected(sampler_ratio="sequence"), wanted, atol=1e-6)
    assert np.abs(expected() - wanted).max() > 0.01


def test_no_cap_is_no_correction():
    found, metrics = corrected([[1.0, 2.0]], [[-1.0, -2.0]], [[-3.0, np.nan]], [[True, True]], None)
    np.testing.assert_array_equal(found, [[1, 2]])
    assert metrics == {}


def test_no_response_token_at_all():
    found, metrics = corrected([[0.0, 0.0]], [[np.nan, -1.0]], [[-1.0, np.nan]], [[False, False]], 2.0)
    assert not found.any() and set(metrics.values()) == {0.0}


def test_the_gradient_is_that_of_the_trainer_s_own_samples():
    """The expectation over the sampler's tokens, listed: a cap that none reaches leaves no bias, none at all leaves
    some."""
    logits = np.array([0.3, -0.5, 1.0, 0.1])
    advantages = np.array([1.0, -0.5, 0.2, 2.0])
    sampler, trainer = (np.exp(x) / np.exp(x).sum() for x in (logits + [0.4, 0.0, -0.6, 0.2], logits))
    gradients = np.eye(4) - trainer  # row a: of log p(a) in the logits
    wanted = (trainer * advantages) @ gradients

    def expected(cap):
        log = lambda p: np.log(p)[:, None].astype(np.float32)
        weighted, _ = corrected(advantages[:, None].astype(np.float32), log(trainer), log(sampler), [[True]] * 4, cap)
        return (sampler * weighted[:, 0]) @ gradients

    np.testing.assert_allclose(expected(10.0), wanted, atol=1e-6)
    assert np.abs(expected(None) - wanted).max() > 0.05


# ---- the algorithms -------------------------------------------------------------------------------------------------

RECOMPUTED: dict[str, AnyConfig] = {
    "ppo": PPOConfig(old_logprobs="recompute", entropy_coef=0.1),
    "ppo, not whitened": PPOConfig(old_logprobs="recompute", whiten_advantages="no"),
    "grpo": GRPOConfig(old_logprobs="recompute", kl_coef=0.0),
    "grpo, reference": GRPOConfig(old_logprobs="recompute", kl_estimator="k2", entropy_coef=0.1),
    "dr. grpo": GRPOConfig(
        old_logprobs="recompute", kl_coef=0.0, advantages="mean", aggregation="seq-mean-token-sum", dual_clip=3.0
    ),
    "gspo": GRPOConfig(old_logprobs="recompute", kl_coef=0.0, ratio="sequence", aggregation="seq-mean-token-mean"),
}
ALGORITHM = {PPOConfig: ppo.ALGORITHM, GRPOConfig: grpo.ALGORITHM}
CAP = 1.2


def prepare(case: Case, cfg: AnyConfig) -> tuple[Any, dict[str, float]]:
    """The experience, and metrics as numbers; GRPO's groups are of three."""
    batch = Batch(prompts=prompts_of(2), sequences=case.sequences())
    experience, means = ALGORITHM[type(cfg)].prepare(FAKE, case.state(0.05), batch, cfg)
    return experience, {name: float(mean.value()) for name, mean in means.items()}


def policy_gradient(case: Case, cfg: AnyConfig, experience: Any) -> np.ndarray:
    """[B, S]: of the policy's total in each token's log-prob, at the policy that sampled."""
    loss = ALGORITHM[type(cfg)].loss
    total = lambda params: loss(FAKE, Trees(params, case.slow()), experience, cfg)[0]["policy"].total
    return np.asarray(jax.grad(total)(case.params())["policy"]["logprobs"])


@pytest.mark.parametrize("name", RECOMPUTED)
def test_equal_probabilities_change_nothing(name):
    case = make_case()
    case.sampled = case.policy.copy()
    plain, cfg = RECOMPUTED[name], replace(RECOMPUTED[name], sampler_ratio_cap=CAP)
    (experience, metrics), (weighted, more) = prepare(case, plain), prepare(case, cfg)
    assert tiny.equal_trees(weighted, experience)
    assert more == metrics | {"policy/sampler_ratio": 1.0, "policy/sampler_ratio_capped": 0.0}
    np.testing.assert_array_equal(policy_gradient(case, cfg, weighted), policy_gradient(case, plain, experience))


@pytest.mark.parametrize("name", RECOMPUTED)
def test_advantages_are_weighted_and_nothing_else(name):
    case = make_case()
    plain, cfg = RECOMPUTED[name], replace(RECOMPUTED[name], sampler_ratio_cap=CAP)
    (experience, metrics), (weighted, more) = prepare(case, plain), prepare(case, cfg)
    advantages = np.asarray(experience.advantages)
    ratio = case.sampler_ratio()
    np.testing.assert_allclose(weighted.advantages, advantages * np.minimum(ratio, CAP), rtol=1e-5)
    assert not np.asarray(weighted.advantages)[~case.mask].any()
    assert tiny.equal_trees(weighted.replace(advantages=experience.advantages), experience)
    assert 0 < (ratio > CAP)[case.mask].mean() < 1, "a case that caps all or nothing tests no cap"
    added = {"policy/sampler_ratio": ratio[case.mask].mean(), "policy/sampler_ratio_capped": 0.0}
    added["policy/sampler_ratio_capped"] = (ratio > CAP)[case.mask].mean()
    assert more == pytest.approx(metrics | added, rel=1e-5)


@pytest.mark.parametrize("name", RECOMPUTED)
def test_the_first_gradient_is_weighted_token_by_token(name):
    """-w * A of each response token's log-prob, shared out as the aggregation says; the KL's own stays as it is."""
    case, plain = make_case(), RECOMPUTED[name]
    cfg = replace(plain, sampler_ratio_cap=CAP)
    experience, _ = prepare(case, plain)
    expected = np.zeros(case.mask.shape)
    for row, column in zip(*np.nonzero(case.mask)):
        ratio = np.exp(float(case.policy[row, column]) - float(case.sampled[row, column]))
        gradient = -min(ratio, CAP) * float(np.asarray(experience.advantages)[row, column])
        if isinstance(cfg, GRPOConfig):
            gradient += cfg.kl_coef * (float(case.policy[row, column]) - float(case.reference[row, column]))  # k2
            gradient /= case.mask[row].sum() if cfg.aggregation == "seq-mean-token-mean" else 1
        expected[row, column] = gradient
    if isinstance(cfg, GRPOConfig) and cfg.ratio == "sequence":  # every token moves the ratio of all of its response
        sums = expected.sum(1, keepdims=True) / np.maximum(case.mask.sum(1, keepdims=True), 1)
        expected = np.where(case.mask, sums, 0)
    found = policy_gradient(case, cfg, prepare(case, cfg)[0])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert np.abs(found - policy_gradient(case, plain, experience)).max() > 0.01


@pytest.mark.parametrize("junk", [np.nan, np.inf, -1e30])
@pytest.mark.parametrize("name", RECOMPUTED)
def test_what_is_outside_the_responses_never_counts(name, junk):
    cfg = replace(RECOMPUTED[name], sampler_ratio_cap=CAP)
    clean, dirty = make_case(), make_case(junk=junk)
    (experience, metrics), (dirtied, dirty_metrics) = prepare(clean, cfg), prepare(dirty, cfg)
    np.testing.assert_array_equal(np.asarray(dirtied.advantages), np.asarray(experience.advantages))
    assert dirty_metrics == metrics
    found = policy_gradient(dirty, cfg, dirtied)
    np.testing.assert_array_equal(found, policy_gradient(clean, cfg, experience))
    assert np.isfinite(found).all()
