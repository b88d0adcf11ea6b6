"""KL estimators and the coefficient, against published numbers and sums over a whole small vocabulary."""

import json
import math
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.ops.kl import Estimator, adaptive_kl_coef, kl_estimate

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "kl.json").read_text())
LOGITS = jnp.array([0.3, -1.2, 0.8, 0.0, 1.5])
REF_LOGPROBS = jax.nn.log_softmax(jnp.array([1.0, 0.4, -0.7, 0.2, 0.1]))


@pytest.mark.parametrize("kind", get_args(Estimator))
def test_estimators_published(kind: Estimator):
    case = GOLDEN["estimators"]
    ours = kl_estimate(jnp.array(case["logprobs"]), jnp.array(case["ref_logprobs"]), kind)
    np.testing.assert_allclose(ours, case[kind], atol=1e-6)


def test_estimators_are_a_loop():
    logprobs, ref = -np.random.default_rng(0).exponential(2.0, (2, 4, 5)).astype(np.float32)
    k1, k2, k3 = (np.asarray(kl_estimate(jnp.array(logprobs), jnp.array(ref), kind)) for kind in get_args(Estimator))
    for i in np.ndindex(*logprobs.shape):
        gap = float(logprobs[i]) - float(ref[i])
        np.testing.assert_allclose([k1[i], k2[i]], [gap, gap**2 / 2], rtol=1e-5)
        np.testing.assert_allclose(k3[i], math.exp(-gap) - 1 + gap, rtol=1e-5)


def test_drift_of_an_update():
    """Tokens were sampled from the old policy, so old is the first argument; k3 is ratio - 1 - log ratio."""
    case = GOLDEN["drift"]
    new = jnp.log(jnp.array(case["ratios"]))
    np.testing.assert_allclose(kl_estimate(jnp.zeros(5), new, "k1").mean(), case["mean_k1"], atol=1e-6)
    np.testing.assert_allclose(
        kl_estimate(jnp.zeros(5), new, "k3"), [r - 1 - math.log(r) for r in case["ratios"]], rtol=1e-5
    )


def exact_kl(logprobs, ref_logprobs):
    return jnp.sum(jnp.exp(logprobs) * (logprobs - ref_logprobs))


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_expected_value_is_the_kl(kind):
    logprobs = jax.nn.log_softmax(LOGITS)
    expected = jnp.sum(jnp.exp(logprobs) * kl_estimate(logprobs, REF_LOGPROBS, kind))
    np.testing.assert_allclose(expected, exact_kl(logprobs, REF_LOGPROBS), rtol=1e-5)


def expected_gradient(kind):
    """Of the estimator as a loss, over tokens sampled from the policy: the sampling itself is not differentiated."""
    probs = jax.nn.softmax(LOGITS)
    return jax.grad(lambda logits: jnp.sum(probs * kl_estimate(jax.nn.log_softmax(logits), REF_LOGPROBS, kind)))(LOGITS)


def test_k1_as_a_loss_has_no_expected_gradient():
    np.testing.assert_allclose(expected_gradient("k1"), np.zeros(5), atol=1e-6)


def test_k2_as_a_loss_has_the_gradient_of_the_reverse_kl():
    exact = jax.grad(lambda logits: exact_kl(jax.nn.log_softmax(logits), REF_LOGPROBS))(LOGITS)
    np.testing.assert_allclose(expected_gradient("k2"), exact, atol=1e-6)
    assert jnp.abs(exact).max() > 0.1


def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl():
    exact = jax.grad(lambda logits: exact_kl(REF_LOGPROBS, jax.nn.log_softmax(logits)))(LOGITS)
    np.testing.assert_allclose(expected_gradient("k3"), exact, atol=1e-6)
    assert jnp.abs(exact - expected_gradient("k2")).max() > 0.1


def test_k3_is_finite_and_its_small_values_are_not_rounding():
    far = kl_estimate(jnp.array([-500.0, 0.0]), jnp.array([0.0, -500.0]), "k3")
    assert jnp.isfinite(far).all() and far[1] == 499.0
    near = kl_estimate(jnp.array([0.0]), jnp.array([1e-3]), "k3")
    np.testing.assert_allclose(near, math.expm1(1e-3) - 1e-3, rtol=1e-3)  # exp(x) - x - 1 is 10% off in float32


def test_bfloat16_is_compared_in_float32():
    assert kl_estimate(jnp.zeros(2, jnp.bfloat16), jnp.ones(2, jnp.bfloat16), "k3").dtype == jnp.float32


def test_another_estimator_is_refused():
    with pytest.raises(ValueError, match="KL estimator 'k4': expected one of k1, k2, k3"):
        kl_estimate(jnp.zeros(2), jnp.zeros(2), "k4")  # pyright: ignore[reportArgumentType]


def test_adaptive_coefficient_published():
    case = GOLDEN["adaptive"]
    coef = jnp.float32(case["kl_coef"])
    for current, expected in zip(case["current_kl"], case["kl_coef_after"]):
        coef = adaptive_kl_coef(coef, jnp.float32(current), case["target"], case["horizon"], case["num_samples"])
        np.testing.assert_allclose(coef, expected, rtol=1e-6)
    assert coef.dtype == jnp.float32


def test_adaptive_coefficient_in_jit_with_traced_arguments():
    ours = jax.jit(adaptive_kl_coef)(0.1, 6.6, 6.0, 1000, 100)
    np.testing.assert_allclose(ours, 0.1 * (1 + 0.1 * 0.1), rtol=1e-5)
