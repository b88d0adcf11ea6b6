"""Named variants of GRPO and PPO, each a choice of fields, against NumPy loops and published numbers: CISPO,
REINFORCE++, RLOO with the KL in the score, VAPO."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxrlhf.algorithms import grpo, on_policy, ppo
from jaxrlhf.algorithms.grpo import GRPOConfig
from jaxrlhf.algorithms.ppo import PPOConfig
from jaxrlhf.types import Batch, Trees
from tests.support.fake import FAKE, PROMPT, Case, make_case, prompts_of

SIZE = 3  # of a group
PUBLISHED = json.loads((Path(__file__).parents[1] / "golden" / "masked.json").read_text())["whiten_ragged"]


def prepared(case: Case, cfg: GRPOConfig | PPOConfig, size: int = SIZE) -> tuple[Any, dict[str, float]]:
    """The experience, and metrics as numbers."""
    batch = Batch(prompts=prompts_of(len(case.mask) // size), sequences=case.sequences())
    algorithm = grpo.ALGORITHM if isinstance(cfg, GRPOConfig) else ppo.ALGORITHM
    experience, means = algorithm.prepare(FAKE, case.state(cfg.kl_coef), batch, cfg)
    return experience, {name: float(mean.value()) for name, mean in means.items()}


def policy_loss(case: Case, cfg: GRPOConfig | PPOConfig, experience: Any) -> tuple[Any, dict, np.ndarray]:
    """(the policy's Mean, metrics, its total's gradient [B, S] in each log-prob)."""
    loss = (grpo.ALGORITHM if isinstance(cfg, GRPOConfig) else ppo.ALGORITHM).loss

    def total(params):
        losses, metrics = loss(FAKE, Trees(params, case.slow()), experience, cfg)
        return losses["policy"].total, (losses["policy"], metrics)

    gradient, (mean, metrics) = jax.grad(total, has_aux=True)(case.params())
    return mean, metrics, np.asarray(gradient["policy"]["logprobs"])


def moved(case: Case) -> Case:
    """The policy has moved since it sampled."""
    later = make_case(11)
    return replace(case, policy=np.where(case.mask, case.sampled + later.policy - later.reference, 0))


# ---- the KL elsewhere than in the loss, whitening over the iteration ------------------------------------------------


def kl_of(case: Case, cfg: GRPOConfig, row: int, t: int) -> float:
    log_ratio = float(case.sampled[row, t]) - float(case.reference[row, t])
    return {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": np.exp(-log_ratio) - 1 + log_ratio}[cfg.kl_estimator]


def advantages_by_loop(case: Case, cfg: GRPOConfig) -> np.ndarray:
    """[B, S], in float64, a token at a time."""
    found, rows = np.zeros(case.mask.shape), [int(row) for row in np.flatnonzero(case.mask.any(1))]
    tokens = {row: [int(t) for t in np.flatnonzero(case.mask[row])] for row in rows}
    marks = {row: float(case.scores[row]) for row in rows}
    if cfg.kl_in == "score":
        marks = {row: marks[row] - cfg.kl_coef * sum(kl_of(case, cfg, row, t) for t in tokens[row]) for row in rows}
    for row in rows:
        group = [other for other in rows if other // SIZE == row // SIZE]
        others = [marks[other] for other in group if other != row]
        mean = np.mean([marks[other] for other in group])
        baseline = {"none": 0.0, "mean": mean, "leave_one_out": np.mean(others)}[cfg.advantages]
        for t in tokens[row]:
            later = sum(kl_of(case, cfg, row, after) for after in tokens[row] if after >= t)
            found[row, t] = marks[row] - baseline - (cfg.kl_coef * later if cfg.kl_in == "rewards" else 0.0)
    if cfg.whiten_advantages != "no":
        kept = found[case.mask]
        found[case.mask] = (kept - kept.mean()) / kept.std(ddof=int(cfg.whiten_advantages == "unbiased"))
    return found


PLACES = {
    "reinforce++": GRPOConfig(advantages="none", kl_in="rewards", kl_estimator="k1", whiten_advantages="unbiased"),
    "reinforce++, k2": GRPOConfig(advantages="none", kl_in="rewards", kl_estimator="k2", whiten_advantages="biased"),
    "reinforce++ baseline": GRPOConfig(advantages="mean", kl_estimator="k2", whiten_advantages="unbiased"),
    "rloo": GRPOConfig(advantages="leave_one_out", kl_in="score", kl_estimator="k1", kl_coef=0.3),
    "rewards, not whitened": GRPOConfig(advantages="leave_one_out", kl_in="rewards", kl_estimator="k3", kl_coef=0.7),
}


@pytest.mark.parametrize("name", PLACES)
def test_advantages_are_a_numpy_loop(name):
    case, cfg = make_case(), PLACES[name]
    experience, metrics = prepared(case, cfg)
    np.testing.assert_allclose(np.asarray(experience.advantages), advantages_by_loop(case, cfg), atol=1e-5)
    np.testing.assert_array_equal(experience.responses.scores, case.scores)  # raw
    assert ("group/zero_variance" in metrics) == (cfg.advantages != "none")
    in_loss = cfg.kl_in == "loss"
    assert (experience.ref_logprobs is not None) == in_loss, "the KL counts once"
    assert ("loss/kl" in policy_loss(case, cfg, experience)[1]) == in_loss


@pytest.mark.parametrize("junk", [np.nan, np.inf, -1e30])
@pytest.mark.parametrize("name", PLACES)
def test_what_is_outside_the_responses_never_counts(name, junk):
    clean, dirty, cfg = make_case(), make_case(junk=junk), PLACES[name]
    (experience, metrics), (dirtied, dirty_metrics) = prepared(clean, cfg), prepared(dirty, cfg)
    np.testing.assert_array_equal(np.asarray(dirtied.advantages), np.asarray(experience.advantages))
    assert dirty_metrics == metrics and np.isfinite(policy_loss(dirty, cfg, dirtied)[2]).all()


def test_reinforce_plus_plus_published():
    """verl's number for each response, on all its tokens: scores without a baseline, whitened over the iteration."""
    lengths, scores = PUBLISHED["lengths"], PUBLISHED["scores"]
    case = make_case()
    mask = np.arange(case.mask.shape[1]) - PROMPT < np.array(lengths)[:, None]
    mask[:, :PROMPT] = False
    case = replace(case, mask=mask, scores=np.array(scores, np.float32))
    cfg = GRPOConfig(advantages="none", kl_coef=0.0, whiten_advantages="unbiased")
    found = np.asarray(prepared(case, cfg, size=1)[0].advantages)
    np.testing.assert_allclose(found, np.where(mask, np.array(PUBLISHED["unbiased"])[:, None], 0), atol=1e-6)


def test_the_kl_in_the_rewards_is_ppo_without_a_value_model():
    """REINFORCE++ is PPO whose values are all 0, with lambda 1: the same advantages, by the code of GAE."""
    case, cfg = make_case(), PLACES["reinforce++"]
    case.values[:] = 0
    other = PPOConfig(kl_coef=cfg.kl_coef, gae_lambda=1.0, whiten_advantages="unbiased")
    ours, theirs = (np.asarray(prepared(case, one)[0].advantages) for one in (cfg, other))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


# ---- CISPO ----------------------------------------------------------------------------------------------------------

CISPO = {
    "grpo": GRPOConfig(objective="cispo", clip_range_low=1.0, clip_range_high=0.28, kl_coef=0.0),
    "grpo, sequence": GRPOConfig(
        objective="cispo", ratio="sequence", clip_range_low=0.1, clip_range_high=0.1, kl_coef=0.0
    ),
    "ppo": PPOConfig(objective="cispo", clip_range=1.0, clip_range_high=0.1),
}


@pytest.mark.parametrize("name", CISPO)
def test_cispo_is_a_numpy_loop(name):
    """The mean over tokens of -clip(ratio) * A * log p; its gradient is the same without log p, clipped or not."""
    case, cfg = make_case(), CISPO[name]
    experience, _ = prepared(case, cfg)
    case = moved(case)
    low, high = (1 - 1.0, 1.1) if name == "ppo" else (1 - cfg.clip_range_low, 1 + cfg.clip_range_high)
    advantages, old = np.asarray(experience.advantages, np.float64), np.asarray(experience.responses.logprobs)
    expected, slopes, clipped = 0.0, np.zeros(case.mask.shape), 0
    for row in range(len(case.mask)):
        chosen = np.flatnonzero(case.mask[row])
        drift = {t: float(case.policy[row, t]) - float(old[row, t]) for t in chosen}
        for t in chosen:
            ratio = np.exp(np.mean(list(drift.values())) if name == "grpo, sequence" else drift[t])
            weight = min(max(ratio, low), high)
            clipped += weight != ratio
            slopes[row, t] = -weight * advantages[row, t]
            expected += slopes[row, t] * case.policy[row, t]
    mean, metrics, gradient = policy_loss(case, cfg, experience)
    np.testing.assert_allclose(float(mean.value()), expected / case.mask.sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, slopes, atol=1e-6)
    assert 0 < clipped < case.mask.sum(), "a case that clips all or nothing tests no clip"
    np.testing.assert_allclose(float(metrics["policy/clip_fraction"].value()), clipped / case.mask.sum(), rtol=1e-6)


def test_at_the_policy_that_sampled_cispo_has_the_gradient_of_the_clipped_objective():
    case, cfg = make_case(), replace(CISPO["grpo"], old_logprobs="recompute")
    experience, _ = prepared(case, cfg)
    gradients = [policy_loss(case, one, experience)[2] for one in (cfg, replace(cfg, objective="clip"))]
    np.testing.assert_allclose(*gradients, rtol=1e-6)


# ---- VAPO -----------------------------------------------------------------------------------------------------------


def vapo_by_loop(case: Case, cfg: PPOConfig) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, returns), [B, S] in float64: two recursions over the tokens of each response."""
    advantages, returns = np.zeros(case.mask.shape), np.zeros(case.mask.shape)
    for row in range(len(case.mask)):
        chosen = np.flatnonzero(case.mask[row])
        length = len(chosen)
        policy = cfg.gae_lambda
        if cfg.gae_length_alpha is not None and length:
            policy = max(0.0, 1 - 1 / (cfg.gae_length_alpha * length))
        value = policy if cfg.gae_lambda_value is None else cfg.gae_lambda_value
        score = float(case.scores[row])
        score = score if cfg.score_clip is None else min(max(score, -cfg.score_clip), cfg.score_clip)
        for found, decay, plus in ((advantages, policy, False), (returns, value, True)):
            next_value = next_advantage = 0.0
            for t in reversed(chosen):
                reward = -cfg.kl_coef * (float(case.sampled[row, t]) - float(case.reference[row, t]))
                reward += score if t == chosen[-1] else 0.0
                delta = reward + cfg.gamma * next_value - case.values[row, t]
                next_advantage = delta + cfg.gamma * decay * next_advantage
                next_value = float(case.values[row, t])
                found[row, t] = next_advantage + (next_value if plus else 0.0)
    return advantages, returns


PIECES = {
    "decoupled": PPOConfig(gae_lambda_value=1.0, whiten_advantages="no"),
    "length": PPOConfig(gae_length_alpha=0.5, whiten_advantages="no", gamma=0.9),
    "both": PPOConfig(gae_length_alpha=0.4, gae_lambda_value=1.0, whiten_advantages="no", kl_coef=0.3),
    "clipped scores": PPOConfig(score_clip=0.4, whiten_advantages="no"),
}


@pytest.mark.parametrize("name", PIECES)
def test_vapo_s_returns_are_numpy_loops(name):
    case, cfg = make_case(), PIECES[name]
    experience, _ = prepared(case, cfg)
    advantages, returns = vapo_by_loop(case, cfg)
    np.testing.assert_allclose(np.asarray(experience.advantages), advantages, atol=1e-5)
    np.testing.assert_allclose(np.asarray(experience.returns), returns, atol=1e-5)
    assert np.abs(np.asarray(prepared(case, PPOConfig(whiten_advantages="no"))[0].returns) - returns).max() > 0.01


@pytest.mark.parametrize("coef", [0.1, 1.0])
def test_good_responses_are_made_likelier(coef):
    """PPO's loss plus coef times the mean -log p over tokens of responses with a score above 0."""
    case, cfg = make_case(), PPOConfig(positive_coef=coef, entropy_coef=0.1)
    good = case.mask & (case.scores > 0)[:, None]
    assert 0 < good.sum() < case.mask.sum()
    plain, _ = prepared(case, replace(cfg, positive_coef=0.0))
    experience, _ = prepared(case, cfg)
    case = moved(case)
    (base, _, slopes), (mean, metrics, found) = (policy_loss(case, cfg, rows) for rows in (plain, experience))
    nll = -case.policy[good].astype(np.float64).mean()
    np.testing.assert_allclose(float(mean.value()), float(base.value()) + coef * nll, rtol=1e-5)
    np.testing.assert_allclose(found - slopes, np.where(good, -coef * case.mask.sum() / good.sum(), 0), atol=1e-5)
    np.testing.assert_allclose(float(metrics["loss/positive"].value()), nll, rtol=1e-6)


def test_without_a_good_response_there_is_nothing_to_repeat():
    case, cfg = make_case(), PPOConfig(positive_coef=0.1)
    case.scores[:] = -1.0
    experience, _ = prepared(case, cfg)
    assert not np.asarray(experience.positive).any()
    assert policy_loss(case, cfg, experience)[1]["loss/positive"].value() == 0


@pytest.mark.parametrize(("high", "dual"), [(0.28, None), (0.28, 1.1), (None, 1.1)])
def test_ppo_s_bounds_are_those_of_grpo(high, dual):
    """On the same advantages, the clip of each side and the dual clip."""
    case = make_case()
    ours = PPOConfig(clip_range=0.1, clip_range_high=high, dual_clip=dual)
    theirs = GRPOConfig(clip_range_low=0.1, clip_range_high=high or 0.1, dual_clip=dual, kl_coef=0.0)
    experience, _ = prepared(case, ours)
    same = grpo.GRPOExperience(responses=experience.responses, advantages=experience.advantages, ref_logprobs=None)
    case = moved(case)
    (mean, metrics, slopes), (other, other_metrics, other_slopes) = (
        policy_loss(case, ours, experience),
        policy_loss(case, theirs, same),
    )
    np.testing.assert_allclose([mean.total, mean.count], [other.total, other.count], rtol=1e-6)
    np.testing.assert_allclose(slopes, other_slopes, rtol=1e-6)
    clipped = metrics["policy/clip_fraction"].value()
    assert 0 < clipped == other_metrics["policy/clip_fraction"].value()


# ---- fields that would do nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"sampler_ratio": "sequence"}, "sampler_ratio: sequence: sampler_ratio_cap is null"),
        ({"sampler_ratio_above": "drop"}, "sampler_ratio_above: drop: sampler_ratio_cap is null"),
        ({"sampler_ratio_floor": 0.5}, "sampler_ratio_floor: 0.5: expected null, or sampler_ratio_above drop"),
        (
            {"sampler_ratio_floor": 3.0, "sampler_ratio_cap": 2.0, "sampler_ratio_above": "drop"},
            "sampler_ratio_floor: 3.0: expected null, or sampler_ratio_above drop and a higher sampler_ratio_cap",
        ),
        ({"objective": "cispo", "dual_clip": 3.0}, "dual_clip: 3.0: cispo clips every ratio"),
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [PPOConfig, GRPOConfig])
def test_a_field_that_would_do_nothing_is_refused(config, fields, line):
    (problem,) = on_policy.problems(config(old_logprobs="recompute", **fields))
    assert problem.startswith(line)
    assert not [*on_policy.problems(config(old_logprobs="recompute"))]


def test_on_a_mean_of_sequences_a_dropped_one_still_counts_in_the_denominator():
    """Two sequences of one advantage, one dropped: half the loss, not all of it."""
    case = make_case()
    cfg = GRPOConfig(
        old_logprobs="recompute",
        kl_coef=0.0,
        aggregation="seq-mean-token-mean",
        sampler_ratio_cap=1.0 + 1e-3,
        sampler_ratio="sequence",
        sampler_ratio_above="drop",
    )
    experience, metrics = prepared(case, cfg)
    ratios = np.array([np.exp((case.policy - case.sampled)[row][case.mask[row]].sum()) for row in range(6)])
    kept = (ratios <= cfg.sampler_ratio_cap)[:, None] & case.mask
    assert 0 < kept.any(1).sum() < case.mask.any(1).sum()
    np.testing.assert_array_equal(np.asarray(experience.advantages) != 0, kept)
    assert metrics["policy/sampler_ratio_dropped"] == pytest.approx(1 - kept.sum() / case.mask.sum())
    assert policy_loss(case, cfg, experience)[0].count == case.mask.any(1).sum()
