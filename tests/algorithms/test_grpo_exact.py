"""GRPO's gradient against expectations summed by hand, and policies that learn what is best.

A policy small enough to list all that it may say: every group of responses counts as often as it would be sampled.
"""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithms import grpo
from jaxrlhf.algorithms.grpo import GRPOConfig
from jaxrlhf.types import Batch, Sequences, TokenStats, TrainState, Trees
from tests.support import fake, tiny
from tests.support.enumerated import run as enumerated_run
from tests.support.fake import prompts_of

VOCAB, STOP = 3, 0  # token 0 ends a response; at most 2 tokens
RESPONSES = [(STOP,)] + [(first, second) for first in (1, 2) for second in range(VOCAB)]
REWARDS = np.array([0.3, 1.0, -0.7, 2.0, 0.1, -1.2, 0.6], np.float32)


def tabular(theta):
    """log p of each token of each response under a table of logits: row 0 first, row t after token t. [7, 2]."""
    logp = jax.nn.log_softmax(theta)
    return jnp.array([[logp[0, row[0]], logp[row[0], row[1]] if len(row) > 1 else 0.0] for row in RESPONSES])


# Column 0 of a sequence says which response it is; columns 1 and 2 are its tokens.
TABULAR = fake.answering(
    token_stats=lambda params, rows: TokenStats(
        jnp.pad(tabular(params), ((0, 0), (1, 0)))[rows.tokens[:, 0]], jnp.zeros(rows.tokens.shape)
    ),
    scores=lambda params, rows: params[rows.tokens[:, 0]],
)


def responses_of(ids) -> Sequences:
    mask = np.array([[False, True, len(RESPONSES[i]) > 1] for i in ids])
    tokens = jnp.broadcast_to(jnp.array(ids)[:, None], mask.shape)
    return Sequences(tokens, jnp.array(mask), jnp.array(mask), ended=jnp.array(mask.any(1)), response_start=1)


THETA = jnp.array(np.random.default_rng(0).normal(size=(VOCAB, VOCAB)), jnp.float32)


def expected_gradient(theta, reference, cfg: GRPOConfig, size: int):
    """The mean gradient of GRPO's loss over every group of ``size`` responses that the policy may sample.

    The loss is a sum over groups, so a group counts as often as it is sampled once its advantages are multiplied by
    its probability (kl_coef 0)."""
    groups = np.array(list(itertools.product(range(len(RESPONSES)), repeat=size)))

    @tiny.program
    def gradient(theta, reference):
        slow = {"reference": reference, "reward": jnp.array(REWARDS)}
        state = TrainState(jnp.int32(0), jnp.int32(0), {"policy": theta}, slow, {}, {})
        batch = Batch(prompts=prompts_of(len(groups)), sequences=responses_of(groups.ravel()))
        experience, _ = grpo.prepare(TABULAR, state, batch, cfg)
        chance = jnp.exp(tabular(theta).sum(1))[groups].prod(1)
        weight = jnp.repeat(chance, size)[:, None] * len(groups)
        experience = replace(experience, advantages=experience.advantages * weight)
        loss = lambda theta: grpo.loss(TABULAR, Trees({"policy": theta}, slow), experience, cfg)[0]["policy"].value()
        return jax.grad(loss)(theta)

    return gradient(theta, reference)


@pytest.mark.parametrize(("advantages", "share"), [("leave_one_out", 1.0), ("mean", 1 / 2)])
def test_the_gradient_is_that_of_the_expected_reward(advantages, share):
    """Summed over all 49 pairs of responses; with the mean of the group as baseline, (n - 1) / n of it."""
    cfg = GRPOConfig(advantages=advantages, aggregation="seq-mean-token-sum", kl_coef=0.0, old_logprobs="recompute")
    expected_reward = lambda theta: jnp.exp(tabular(theta).sum(1)) @ jnp.array(REWARDS)
    exact = tiny.program(jax.grad(expected_reward))(THETA)
    assert jnp.abs(exact).max() > 0.1
    np.testing.assert_allclose(expected_gradient(THETA, THETA, cfg, 2), -share * exact, atol=2e-6)


@pytest.mark.nightly  # by day: other advantages, above
def test_the_gradient_of_normalised_advantages_is_a_sum_over_groups():
    """(score - mean) / deviation by NumPy, times grad log p by autodiff, over all 343 groups of three."""
    cfg = GRPOConfig(aggregation="seq-mean-token-sum", kl_coef=0.0, old_logprobs="recompute")
    slopes = np.asarray(jax.jacobian(lambda theta: tabular(theta).sum(1))(THETA), np.float64)
    log_p, expected = np.asarray(tabular(THETA).sum(1), np.float64), np.zeros((VOCAB, VOCAB))
    for group in itertools.product(range(len(RESPONSES)), repeat=3):
        scores = REWARDS[list(group)].astype(np.float64)
        if len(set(group)) > 1:
            advantages = (scores - scores.mean()) / (scores.std(ddof=1) + 1e-6)
            expected += np.exp(log_p[list(group)].sum()) * np.tensordot(advantages, slopes[list(group)], 1) / 3
    np.testing.assert_allclose(expected_gradient(THETA, THETA, cfg, 3), -expected, atol=2e-6)


def test_the_kl_regularised_optimum_is_a_stationary_point():
    """One-token responses, where k2's gradient is that of the KL: none at reference * exp(reward / kl_coef)."""
    beta, rewards = 0.5, np.array([0.3, 1.0, -0.7], np.float32)
    reference = jax.nn.log_softmax(THETA[0])
    best = jax.nn.log_softmax(reference + rewards / beta)
    cfg = GRPOConfig(advantages="leave_one_out", kl_coef=beta, kl_estimator="k2", old_logprobs="recompute")

    @tiny.program
    def gradient(log_p):
        """Over all pairs; a pair's loss is differentiated by itself, then weighted."""
        total = jnp.zeros(VOCAB)
        for pair in itertools.product(range(VOCAB), repeat=2):
            nets = fake.answering(
                token_stats=lambda params, rows: TokenStats(
                    jax.nn.log_softmax(params)[rows.tokens], jnp.zeros(rows.tokens.shape)
                )
            )
            column = jnp.array(pair)[:, None]
            sequences = Sequences(column, column >= 0, column >= 0, scores=jnp.array(rewards)[column[:, 0]])
            sequences = sequences.replace(ended=column[:, 0] >= 0)
            state = TrainState(jnp.int32(0), jnp.int32(0), {"policy": log_p}, {"reference": reference}, {}, {})
            experience, _ = grpo.prepare(nets, state, Batch(prompts=prompts_of(1), sequences=sequences), cfg)
            loss = lambda log_p: grpo.loss(nets, Trees({"policy": log_p}, {}), experience, cfg)[0]["policy"].value()  # noqa: B023
            total = total + jnp.exp(log_p[column].sum()) * jax.grad(loss)(log_p)
        return total

    assert jnp.abs(gradient(reference)).max() > 0.05
    np.testing.assert_allclose(gradient(best), np.zeros(VOCAB), atol=1e-6)


# ---- a policy that can be enumerated --------------------------------------------------------------------------------


def trained(cfg: GRPOConfig):
    """(expectations, the policy before and after 30 iterations of 8 prompts x 8 samples)."""
    run, exact = enumerated_run("grpo", cfg, samples_per_prompt=8)
    step, state = tiny.program(steps.make_iteration(run.recipe)), run.state
    for _ in range(30):
        state, *_ = step(state, run.batch)
    return exact, run.state.params["policy"], state.params["policy"]


@pytest.mark.nightly  # by day: the gradient, above
@pytest.mark.parametrize(
    "cfg",
    [
        GRPOConfig(num_epochs=2, aggregation="seq-mean-token-mean"),
        pytest.param(
            GRPOConfig(num_epochs=2, ratio="sequence", advantages="leave_one_out", kl_coef=0.0),
            marks=pytest.mark.nightly,
        ),
    ],
    ids=lambda cfg: cfg.ratio,
)
def test_expected_reward_rises(cfg):
    exact, start, end = trained(cfg)
    (before, _), (after, moved) = exact(start, start), exact(end, start)
    highest = exact.rewards.max()  # 3.5: two tokens 3, then the end
    assert after > before + 0.8 * (highest - before) and moved > 1


@pytest.mark.nightly
def test_a_large_kl_coef_holds_the_policy_at_the_reference():
    exact, start, end = trained(GRPOConfig(kl_coef=10.0))
    assert 0 < exact(end, start)[1] < 0.1
