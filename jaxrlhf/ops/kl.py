"""How far one policy is from another, estimated from sampled tokens, and the coefficient that holds it there."""

from typing import Literal, get_args

import jax.numpy as jnp

from jaxrlhf.types import Array

Estimator = Literal["k1", "k2", "k3"]

LARGEST_LOG_RATIO = 20.0  # nats, before an exp: exp(20) is 5e8, and a float32 exp overflows at 88


def kl_estimate(logprobs: Array, ref_logprobs: Array, kind: Estimator) -> Array:
    """Per-token estimate, in nats, of KL(policy || reference), from tokens sampled from the policy.

    With l = log p - log p_ref of the sampled token:

        k1 = l                    unbiased; may be negative
        k2 = l^2 / 2              biased, low variance; never negative
        k3 = exp(-l) - 1 + l      unbiased; never negative

    As part of a *reward* any of them does. As a *loss*, what counts is the gradient expected on-policy:

        k1: zero. E[grad log p] = 0, so it only adds noise
        k2: that of KL(policy || reference), which is the one wanted
        k3: that of KL(reference || policy)

    The drift of an update, KL(old || new) with tokens sampled from the old policy, is
    ``kl_estimate(old_logprobs, logprobs, "k3")``.

    Args:
        logprobs, ref_logprobs: [...], same shape.

    Returns:
        f32[...]. In k3, -l is held at 20 nats at most, so that no token makes the sum infinite.

    Raises:
        ValueError: for another ``kind``.

    Source: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).
    """
    assert logprobs.shape == ref_logprobs.shape, (logprobs.shape, ref_logprobs.shape)
    log_ratio = logprobs.astype(jnp.float32) - ref_logprobs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * jnp.square(log_ratio)
    if kind == "k3":
        inverse = jnp.minimum(-log_ratio, LARGEST_LOG_RATIO)
        return jnp.expm1(inverse) - inverse
    raise ValueError(f"KL estimator {kind!r}: expected one of {', '.join(get_args(Estimator))}")


def adaptive_kl_coef(
    kl_coef: Array, current_kl: Array, target: float | Array, horizon: float | Array, num_samples: float | Array
) -> Array:
    """The next KL coefficient, f32[]: up where the measured KL is over ``target``, down where it is under.

        error = clip(current_kl / target - 1, -0.2, 0.2)
        next  = kl_coef * (1 + error * num_samples / horizon)

    Args:
        current_kl, target: nats per response (summed over its tokens, averaged over responses).
        horizon, num_samples: responses; num_samples are the ones that this iteration sampled.

    Source: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2.
    """
    error = jnp.clip(current_kl / target - 1.0, -0.2, 0.2)
    return jnp.asarray(kl_coef, jnp.float32) * (1.0 + error * num_samples / horizon)
