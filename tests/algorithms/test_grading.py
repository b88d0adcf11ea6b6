"""An ensemble scores as one model does whose score is the combined one; PPO and GRPO say what its members thought."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithms import grpo, ppo
from jaxrlhf.algorithms.grading import members_of, read_scores
from jaxrlhf.algorithms.grpo import GRPOConfig
from jaxrlhf.algorithms.ppo import PPOConfig
from jaxrlhf.types import Batch, Grader
from tests.support import tiny
from tests.support.fake import FAKE, make_case, prompts_of

MEMBERS = ("reward_0", "reward_1", "reward_2")


def ensemble(combine: Any, coef: float = 0.5):
    """(networks, a state whose members score at random, their scores f32[3, B])."""
    case = make_case(3)
    scores = np.random.default_rng(0).normal(size=(3, len(case.scores))).astype(np.float32)
    state = case.state(0.05)
    slow = {role: part for role, part in state.slow.items() if role != "reward"}
    slow |= {role: {"scores": jnp.array(row)} for role, row in zip(MEMBERS, scores)}
    nets = FAKE._replace(graders={"reward": Grader(MEMBERS, combine, coef)})
    return case, nets, state.replace(slow=slow), scores


@pytest.mark.parametrize("combine", ["min", "mean_minus_variance"])
@pytest.mark.parametrize(("algorithm", "cfg"), [(ppo, PPOConfig()), (grpo, GRPOConfig())], ids=["ppo", "grpo"])
def test_an_ensemble_is_one_model_with_the_combined_score(algorithm, cfg, combine):
    case, nets, state, scores = ensemble(combine)
    whole = scores.min(0) if combine == "min" else scores.mean(0) - 0.5 * scores.var(0)
    alone = dataclasses.replace(case, scores=whole.astype(np.float32)).state(0.05)
    batch = Batch(prompts=prompts_of(len(case.scores) // 2), sequences=case.sequences())
    ours, metrics = algorithm.prepare(nets, state, batch, cfg)
    theirs, expected = algorithm.prepare(FAKE, alone, batch, cfg)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    real = case.mask.any(1)
    more = {f"score/{role}": row[real].mean() for role, row in zip(MEMBERS, scores)}
    more["score/disagreement"] = scores.std(0)[real].mean()
    assert metrics.keys() - expected.keys() == more.keys()
    for name, value in more.items():
        np.testing.assert_allclose(metrics[name].value(), value, rtol=1e-5, err_msg=name)


def test_one_model_is_its_own_member():
    case = make_case(3)
    assert members_of(FAKE) == ("reward",)
    scores, members = read_scores(FAKE, case.state(0.0).trees, case.sequences())
    np.testing.assert_array_equal(scores, case.scores)
    assert members == {}


def test_scores_of_the_host_come_before_those_of_an_ensemble():
    case, nets, state, _ = ensemble("mean")
    given = case.sequences(scores=jnp.arange(6.0))
    experience, metrics = ppo.prepare(nets, state, Batch(sequences=given), PPOConfig())
    np.testing.assert_array_equal(experience.responses.scores, np.arange(6.0))  # type: ignore[union-attr]
    assert "score/disagreement" not in metrics


@pytest.mark.nightly  # by day: their losses, above
def test_members_learn_beside_the_policy():
    """PPO with reward_update: each member has an optimizer of its own."""
    run = tiny.build("ppo", PPOConfig(num_epochs=1, reward_update=True), members=2)
    found, metrics, _ = jax.eval_shape(steps.make_iteration(run.recipe), run.state, run.batch)
    assert found.opt_state.keys() == {"policy", "value", "reward_0", "reward_1"}
    assert {"reward_0/grad_norm", "reward/disagreement", "score/disagreement"} <= metrics.keys()
