"""Conversations with an environment of text: rewards of turns, and tokens of the environment between them."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import grpo, ppo
from jaxrlhf.algorithms.grpo import GRPOConfig
from jaxrlhf.algorithms.ppo import PPOConfig
from jaxrlhf.types import Batch, Sequences, TrainState
from tests.support.fake import FAKE, prompts_of

# prompt | response 1 | observation | response 2; the second row has one response
MASK = np.array([[0, 1, 1, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 1, 0, 0, 0]], bool)
VALID = np.array([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]], bool)
REWARDS = np.array([[0, 0, 0.5, 0, 0, 0, 0, 2.0], [0, 0, 0, -1.0, 0, 0, 0, 0], [0, 0.25, 0, 0, 0.25, 0, 0, 0]])
ENDED = np.array([True, False, True])


def rows(scores: np.ndarray | None = None) -> Sequences:
    """Conversations, of which the host knows the scores: the sums of their rewards."""
    scores = REWARDS.sum(1) if scores is None else scores
    zeros, tokens = jnp.zeros(MASK.shape), jnp.zeros(MASK.shape, jnp.int32)
    return Sequences(
        tokens,
        jnp.array(VALID),
        jnp.array(MASK),
        logprobs=zeros,
        scores=jnp.array(scores, jnp.float32),
        rewards=jnp.array(REWARDS, jnp.float32),
        ended=jnp.array(ENDED),
        response_start=1,
    )


def state_of(values: np.ndarray, reference: np.ndarray) -> TrainState:
    """Networks that answer these numbers; the policy's log-probs are 0."""
    zeros = jnp.zeros(MASK.shape)
    params = {"policy": {"logprobs": zeros, "entropy": zeros}, "value": {"values": jnp.array(values, jnp.float32)}}
    slow = {"reference": {"logprobs": jnp.array(reference, jnp.float32), "entropy": zeros}}
    return TrainState(jnp.int32(0), jnp.int32(0), params, slow, {}, {"kl_coef": jnp.float32(0.1)})


def by_loop(values: np.ndarray, reference: np.ndarray, cfg: PPOConfig) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, returns): the policy's tokens alone, as if they were side by side."""
    advantages, returns = np.zeros(MASK.shape), np.zeros(MASK.shape)
    for row in range(len(MASK)):
        own = np.flatnonzero(MASK[row])
        earned = [REWARDS[row, t] + cfg.kl_coef * reference[row, t] for t in own]  # the KL estimate is 0 - reference
        earned[-1] -= 0 if ENDED[row] else cfg.missing_eos_penalty
        after, gain = 0.0, 0.0
        for t, reward in reversed([*zip(own, earned)]):
            gain = reward + cfg.gamma * after - values[row, t] + cfg.gamma * cfg.gae_lambda * gain
            advantages[row, t], returns[row, t], after = gain, gain + values[row, t], values[row, t]
    return advantages, returns


@pytest.mark.parametrize("junk", [0.0, 1e6, np.nan])
def test_ppo_steps_over_the_environments_tokens(junk):
    """What networks say of them, NaN too, has no part in rewards, advantages, returns, KL and metrics."""
    rng = np.random.default_rng(0)
    values, reference = (np.where(MASK, rng.normal(size=MASK.shape), junk) for _ in range(2))
    cfg = PPOConfig(kl_coef=0.1, gamma=0.9, gae_lambda=0.8, whiten_advantages="no", missing_eos_penalty=0.75)
    found, metrics = ppo.prepare(FAKE, state_of(values, reference), Batch(sequences=rows()), cfg)
    advantages, returns = by_loop(values, reference, cfg)
    np.testing.assert_allclose(found.advantages, advantages, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.returns, returns, rtol=1e-5, atol=1e-6)
    assert float(metrics["response/length_mean"].value()) == pytest.approx(MASK.sum(1).mean())
    assert float(metrics["score/mean"].value()) == pytest.approx(REWARDS.sum(1).mean())
    drift = -np.where(MASK, reference, 0).sum(1).mean()
    assert float(metrics["kl/reference"].value()) == pytest.approx(drift, rel=1e-5)


def test_the_value_after_a_turn_is_that_of_the_next_turn_by_hand():
    """Row 0 without KL, gamma 1, lambda 0: d = r + V(next token of the policy) - V."""
    values = np.array([[9, 1, 2, 9, 9, 4, 5, 6], *np.zeros((2, 8))])
    cfg = PPOConfig(kl_coef=0.0, gae_lambda=0.0, whiten_advantages="no")
    state = state_of(values, np.zeros(MASK.shape)).replace(controls={"kl_coef": jnp.float32(0)})
    found, _ = ppo.prepare(FAKE, state, Batch(sequences=rows()), cfg)
    expected = [0, 0 + 2 - 1, 0.5 + 4 - 2, 0, 0, 0 + 5 - 4, 0 + 6 - 5, 2 + 0 - 6]
    np.testing.assert_allclose(found.advantages[0], expected, atol=1e-6)


def test_ppo_whitens_and_learns_from_the_policys_tokens_alone():
    """Whitened over 10 tokens, not 24; the losses count 10."""
    rng = np.random.default_rng(1)
    values, reference = np.where(MASK, rng.normal(size=MASK.shape), 1e3), np.zeros(MASK.shape)
    cfg = PPOConfig(kl_coef=0.1)
    state = state_of(values, reference)
    found, _ = ppo.prepare(FAKE, state, Batch(sequences=rows()), cfg)
    own = np.asarray(found.advantages)[MASK]
    assert own.mean() == pytest.approx(0, abs=1e-6) and own.std(ddof=1) == pytest.approx(1, rel=1e-5)
    assert not np.asarray(found.advantages)[~MASK].any()
    losses, metrics = ppo.loss(FAKE, state.trees, found, cfg)
    assert losses["policy"].count == losses["value"].count == metrics["policy/entropy"].count == MASK.sum()


@pytest.mark.parametrize("how", ["mean", "leave_one_out"])
def test_grpo_compares_sums_of_rewards(how):
    """One group of three; a row that the environment could not score is none of them."""
    cfg = GRPOConfig(advantages=how, kl_coef=0.0, missing_eos_penalty=0.5, aggregation="token-mean")
    state = state_of(np.zeros(MASK.shape), np.zeros(MASK.shape))
    for lost in (False, True):
        scores = np.where([False, lost, False], np.nan, REWARDS.sum(1))
        found, metrics = grpo.prepare(FAKE, state, Batch(prompts=prompts_of(1), sequences=rows(scores)), cfg)
        marks = REWARDS.sum(1) - 0.5 * ~ENDED
        kept = [0, 2] if lost else [0, 1, 2]
        gains = marks[kept] - marks[kept].mean()
        gains = gains * len(kept) / (len(kept) - 1) if how == "leave_one_out" else gains
        expected = np.zeros(MASK.shape)
        expected[kept] = np.where(MASK[kept], gains[:, None], 0)
        np.testing.assert_allclose(found.advantages, expected, atol=1e-6)
        losses, _ = grpo.loss(FAKE, state.trees, found, cfg)
        assert losses["policy"].count == MASK[kept].sum()
        assert float(metrics["score/unscorable"].value()) == lost


def test_a_reward_model_that_scores_takes_the_place_of_the_environments_rewards():
    """scores are then not the host's: the rewards are told, and have no part."""
    nets_scores = jnp.array([1.0, 2.0, 3.0])
    cfg = PPOConfig(kl_coef=0.0, gae_lambda=1.0, whiten_advantages="no")
    state = state_of(np.zeros(MASK.shape), np.zeros(MASK.shape)).replace(controls={"kl_coef": jnp.float32(0)})
    state = state.replace(slow=state.slow | {"reward": {"scores": nets_scores}})
    found, metrics = ppo.prepare(FAKE, state, Batch(sequences=rows().replace(scores=None)), cfg)
    np.testing.assert_allclose(found.advantages, np.where(MASK, nets_scores[:, None], 0), atol=1e-6)
    assert float(metrics["return/mean"].value()) == pytest.approx(REWARDS.sum(1).mean())
