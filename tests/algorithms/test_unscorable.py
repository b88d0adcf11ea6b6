"""Responses that the host's graders could not score (NaN): they count as rows that are not there, for GRPO and PPO
against the NumPy loops of their tests."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import grpo, ppo
from jaxrlhf.algorithms.grpo import GRPOConfig
from jaxrlhf.algorithms.ppo import PPOConfig
from jaxrlhf.types import Batch, Trees
from tests.algorithms import test_grpo, test_ppo
from tests.support import tiny
from tests.support.fake import FAKE, Case, make_case, prompts_of

AnyConfig = PPOConfig | GRPOConfig
LOST = [1, 4]  # rows: one of two responses of the first group (the third is empty), one of three of the second

CONFIGS: dict[str, AnyConfig] = {
    "ppo": PPOConfig(missing_eos_penalty=1.5),
    "ppo, rewards whitened": PPOConfig(whiten_rewards=True, whiten_advantages="biased", kl_coef=0.2),
    "ppo, capped": PPOConfig(old_logprobs="recompute", sampler_ratio_cap=1.2, whiten_advantages="no"),
    "grpo": GRPOConfig(entropy_coef=0.1),
    "grpo, mean": GRPOConfig(advantages="mean", aggregation="seq-mean-token-sum", missing_eos_penalty=1.5),
    "grpo, leave one out": GRPOConfig(advantages="leave_one_out", aggregation="seq-mean-token-mean", kl_coef=0.0),
    "grpo, capped": GRPOConfig(old_logprobs="recompute", sampler_ratio_cap=1.2),
}


def prepare(case: Case, cfg: AnyConfig, lost: list[int], grades=None) -> tuple[Any, dict[str, float]]:
    """The experience where the host gave the case's scores, and NaN for the rows that are lost."""
    scores = case.scores.copy()
    scores[lost] = np.nan
    sequences = case.sequences(scores=jnp.array(scores), grades=grades)
    batch = Batch(prompts=prompts_of(len(case.mask) // test_grpo.SIZE), sequences=sequences)
    module: Any = ppo if isinstance(cfg, PPOConfig) else grpo
    experience, means = module.prepare(FAKE, case.state(getattr(cfg, "kl_coef", 0.0)), batch, cfg)
    return experience, {name: float(mean.value()) for name, mean in means.items()}


def without(case: Case, lost: list[int]) -> Case:
    """The case whose lost rows have no response."""
    mask = case.mask.copy()
    mask[lost] = False
    return replace(case, mask=mask)


def gradients(case: Case, experience: Any, cfg: AnyConfig) -> tuple[dict, dict[str, float], dict[str, float]]:
    """(of all losses, each its total over its count; counts of the losses; metrics)."""
    module: Any = ppo if isinstance(cfg, PPOConfig) else grpo

    def total(params):
        losses, metrics = module.loss(FAKE, Trees(params, case.slow()), experience, cfg)
        return sum(mean.value() for mean in losses.values()), (losses, metrics)

    grads, (losses, metrics) = jax.grad(total, has_aux=True)(case.params())
    counts = {name: float(mean.count) for name, mean in losses.items()}
    return grads, counts, {name: float(mean.value()) for name, mean in metrics.items()}


@pytest.mark.parametrize(
    ("name", "lost"),
    [(name, LOST) for name in CONFIGS]
    + [(name, lost) for name in ("ppo", "grpo") for lost in ([3, 4, 5], [0, 1, 3, 4, 5])],
    ids=str,
)
def test_they_are_rows_that_are_not_there(name, lost):
    """Advantages and returns are the loop's over the other rows; losses, their counts, gradients and metrics are those
    of a batch without them, bit for bit."""
    case, cfg = make_case(), CONFIGS[name]
    experience, metrics = prepare(case, cfg, lost)
    left = without(case, lost)
    expected, expected_metrics = prepare(left, cfg, [])
    if left.mask.any(1).sum() > 1:  # the loops know no variance of one row
        if isinstance(cfg, PPOConfig):
            found = test_ppo.by_loop(left, cfg)
            np.testing.assert_allclose(np.asarray(experience.returns), found["returns"], atol=1e-5)
            np.testing.assert_allclose(np.asarray(experience.advantages), found["advantages"], atol=1e-5)
        elif min(left.mask.any(1).reshape(2, -1).sum(1)) > 1:
            advantages = test_grpo.advantages_by_loop(left, cfg)
            np.testing.assert_allclose(np.asarray(experience.advantages), advantages, atol=1e-5)
    assert not np.asarray(experience.advantages)[lost].any()
    assert metrics.pop("score/unscorable") == len(lost) and expected_metrics.pop("score/unscorable") == 0
    assert metrics.pop("response/tokens") == case.mask.sum()  # all were sampled
    assert expected_metrics.pop("response/tokens") == left.mask.sum()
    assert metrics == expected_metrics and all(np.isfinite([*metrics.values()]))
    (grads, *numbers), (wanted, *wanted_numbers) = gradients(case, experience, cfg), gradients(left, expected, cfg)
    assert numbers == wanted_numbers
    assert tiny.equal_trees(grads, wanted)
    assert not any(np.asarray(leaf)[lost].any() for leaf in jax.tree.leaves(grads))


def test_groups_by_hand():
    """Of the first group one response is left, which nothing is compared with; the second is a mean of two."""
    case, cfg = make_case(), GRPOConfig(advantages="mean")
    case.scores[:] = [1, 0, 9, 3, 100, 7]
    experience, metrics = prepare(case, cfg, LOST)
    rows = np.asarray(experience.advantages).max(1) + np.asarray(experience.advantages).min(1)
    np.testing.assert_allclose(rows, [0, 0, 0, -2, 0, 2])
    assert metrics["score/mean"] == pytest.approx(11 / 3) and metrics["response/count"] == 3
    assert metrics["group/zero_variance"] == 0.5  # a group of one
    _, metrics = prepare(case, cfg, [0, 1])
    assert metrics["group/zero_variance"] == 0  # a group of none is no group
    experience, metrics = prepare(case, cfg, [0, 1, 3, 4, 5])
    assert not np.asarray(experience.advantages).any() and metrics["score/unscorable"] == 5


def test_whitening_counts_the_others_only():
    """Two rows of one token each: advantages 1 and 3 are whitened to -1/sqrt 2 and 1/sqrt 2, whatever a third has."""
    case, cfg = make_case(), PPOConfig(kl_coef=0.0, gae_lambda=1.0)
    case.mask[:] = False
    case.mask[:3, 4] = True
    case.values[:] = 0
    case.scores[:3] = [1, 3, 50]
    experience, metrics = prepare(case, cfg, [2])
    found = np.asarray(experience.advantages)[:, 4]
    np.testing.assert_allclose(found, [-(0.5**0.5), 0.5**0.5, 0, 0, 0, 0], atol=1e-6)
    assert metrics["score/mean"] == 2 and metrics["score/std"] == pytest.approx(2**0.5)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_each_grader_has_a_mean_of_its_own(name):
    case = make_case()
    correct, short = np.array([1, 0, 1, np.nan, 1, 0]), np.array([np.nan, 2, 9, 4, 6, 8.0])
    case.scores[:] = [1, 2, 3, 4, 5, 6]
    _, metrics = prepare(case, CONFIGS[name], [4], {"correct": jnp.array(correct), "short": jnp.array(short)})
    assert metrics["score/correct"] == pytest.approx(1 / 3)  # rows 0, 1, 5: 2 is empty, 3 has none, 4 is left out
    assert metrics["score/short"] == pytest.approx((2 + 4 + 8) / 3)
    assert metrics["score/mean"] == pytest.approx((1 + 2 + 4 + 6) / 4)
    counts = {key: value for key, value in metrics.items() if key.startswith("score/unscorable")}
    assert counts == {"score/unscorable": 1, "score/unscorable/correct": 1, "score/unscorable/short": 1}


def test_a_reward_model_s_nan_is_a_fault():
    """It is not left out: it would hide that the model is broken."""
    case = make_case()
    case.scores[0] = np.nan
    sequences = case.sequences()
    _, means = grpo.prepare(FAKE, case.state(0.0), Batch(prompts=prompts_of(2), sequences=sequences), GRPOConfig())
    assert np.isnan(float(means["score/mean"].value())) and "score/unscorable" not in means
