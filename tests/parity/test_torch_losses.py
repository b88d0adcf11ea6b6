"""Values and gradients of the losses against the same equations written plainly in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.ops.advantages import gae
from jaxrlhf.ops.losses import aggregate, bradley_terry, clipped_policy_terms, clipped_value_terms

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def batch(seed: int, rows: int = 8, columns: int = 12):
    """Three float32 arrays near each other, and a ragged mask with gaps and an empty row."""
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, columns)) < 0.6
    mask[0] = False
    first = rng.normal(size=mask.shape)
    second, third = first + rng.normal(0, 0.4, mask.shape), rng.normal(size=mask.shape)
    return *(x.astype(np.float32) for x in (first, second, third)), mask


def agree(ours, ours_gradients, theirs, their_leaves):
    """To float32 rounding of the largest gradient: the small ones are differences of large terms."""
    theirs.backward()
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    for gradient, leaf in zip(ours_gradients, their_leaves, strict=True):
        expected = leaf.grad.numpy()
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def constant(x):
    return torch.tensor(x).double()


def leaf(x):
    return constant(x).requires_grad_()


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.3)])
def test_policy_loss(low, high):
    new, old, advantages, mask = batch(0)

    def loss(new):
        terms, _, _ = clipped_policy_terms(new, jnp.array(old), jnp.array(advantages), low, high)
        return aggregate(terms, jnp.array(mask), "token-mean").value()

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.array(new))

    t_new, t_advantages, t_mask = leaf(new), constant(advantages), torch.tensor(mask)
    ratio = torch.exp(t_new - constant(old))
    surrogate = torch.minimum(ratio * t_advantages, ratio.clamp(1 - low, 1 + high) * t_advantages)
    agree(value, [gradient], -surrogate[t_mask].mean(), [t_new])


@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_value_loss(clip_range):
    values, old, returns, mask = batch(1)

    def loss(values):
        terms, _ = clipped_value_terms(values, jnp.array(old), jnp.array(returns), clip_range)
        return aggregate(terms, jnp.array(mask), "token-mean").value()

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.array(values))

    t_values, t_old, t_returns = leaf(values), constant(old), constant(returns)
    error = (t_values - t_returns).pow(2)
    if clip_range is not None:
        near = t_old + (t_values - t_old).clamp(-clip_range, clip_range)
        error = torch.maximum(error, (near - t_returns).pow(2))
    agree(value, [gradient], 0.5 * error[torch.tensor(mask)].mean(), [t_values])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bradley_terry(smoothing):
    chosen, rejected, margin = np.random.default_rng(2).normal(0, 3, (3, 16)).astype(np.float32)

    def loss(chosen, rejected):
        return bradley_terry(chosen, rejected, jnp.array(margin), smoothing).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(jnp.array(chosen), jnp.array(rejected))

    t_chosen, t_rejected = leaf(chosen), leaf(rejected)
    wins = torch.full((16,), 1 - smoothing).double()
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(t_chosen - t_rejected - constant(margin), wins)
    agree(value, gradients, theirs, [t_chosen, t_rejected])


@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 1.0), (0.8, 0.6)])
def test_gae(gamma, gae_lambda):
    rewards, values, weights, mask = batch(3)

    def loss(rewards, values):
        advantages, returns = gae(rewards, values, jnp.array(mask), gamma=gamma, gae_lambda=gae_lambda)
        return jnp.sum(weights * advantages) + jnp.sum(jnp.square(returns))

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(jnp.array(rewards), jnp.array(values))

    t_rewards, t_values, theirs = leaf(rewards), leaf(values), constant(0.0)
    for row in range(len(mask)):
        advantage, following = constant(0.0), constant(0.0)
        for t in np.flatnonzero(mask[row])[::-1].tolist():
            delta = t_rewards[row, t] + gamma * following - t_values[row, t]
            advantage, following = delta + gamma * gae_lambda * advantage, t_values[row, t]
            theirs = theirs + float(weights[row, t]) * advantage + (advantage + t_values[row, t]).pow(2)
    agree(value, gradients, theirs, [t_rewards, t_values])
