"""How far one next-token distribution is from another, over the whole vocabulary or over what the other holds likely.

    P: the teacher's (no gradient), Q: the student's, both softmax(logits / temperature)

    reverse_kl   KL(Q || P) = sum Q log(Q / P)          seeks a mode of P
    forward_kl   KL(P || Q) = sum P log(P / Q)          covers P
    jsd          beta KL(P || M) + (1 - beta) KL(Q || M),   M = beta P + (1 - beta) Q

jsd / beta goes to forward_kl as beta goes to 0, and jsd / (1 - beta) to reverse_kl as beta goes to 1. With top_k, the
sums are over the k tokens that P holds likeliest (ties with the last are in), and what is outside counts so:

    tail: bucket   as one more outcome, whose probability is what is left; never more than over the whole vocabulary
    tail: drop     not at all: P and Q are renormalised over the k tokens

Source: Agarwal et al. 2023, "On-Policy Distillation of Language Models" (arXiv:2306.13649), section 2 and equation 1.
"""

import jax
import jax.numpy as jnp

from jaxrlhf.ops.sampling import IMPOSSIBLE, support
from jaxrlhf.types import Array, Divergence, DivergenceStats


def divergence_stats(logits: Array, against: Array, how: Divergence) -> DivergenceStats:
    """The divergence of softmax(logits / temperature) from the same of ``against``, in float32, and both entropies.

    Args:
        logits: [..., V], of the student. Only the divergence is differentiated, and only with respect to these.
        against: [..., V], of the teacher.
        how: which divergence.

    Returns:
        DivergenceStats of arrays [...], nats.

    Raises:
        ValueError: for another kind of divergence.
    """
    assert logits.shape == against.shape, (logits.shape, against.shape)
    ours = log_softmax(logits, how.temperature)
    theirs = jax.lax.stop_gradient(log_softmax(against, how.temperature))
    entropies = jax.lax.stop_gradient(entropy(ours)), entropy(theirs)
    if how.top_k == 0:
        return DivergenceStats(terms(ours, theirs, how).sum(-1), *entropies, jnp.ones(ours.shape[:-1]))
    inside = support(theirs, how.top_k, 1.0)
    mass = jnp.where(inside, jnp.exp(theirs), 0.0).sum(-1)
    if how.tail == "drop":
        ours, theirs = (log_p - log_sum(log_p, inside)[..., None] for log_p in (ours, theirs))
    found = jnp.where(inside, terms(ours, theirs, how), 0.0).sum(-1)
    if how.tail == "bucket":
        found = found + terms(log_sum(ours, ~inside), log_sum(theirs, ~inside), how)
    return DivergenceStats(found, *entropies, mass)


def terms(ours: Array, theirs: Array, how: Divergence) -> Array:
    """What each outcome adds to the divergence, of its log-probs under Q and P: [...] -> f32[...]."""
    if how.kind == "reverse_kl":
        return jnp.exp(ours) * (ours - theirs)
    if how.kind == "forward_kl":
        return jnp.exp(theirs) * (theirs - ours)
    if how.kind == "jsd":
        between = jnp.logaddexp(theirs + jnp.log(how.beta), ours + jnp.log1p(-how.beta))
        return how.beta * jnp.exp(theirs) * (theirs - between) + (1 - how.beta) * jnp.exp(ours) * (ours - between)
    raise ValueError(f"divergence {how.kind!r}: expected reverse_kl, forward_kl or jsd")


def log_softmax(logits: Array, temperature: float) -> Array:
    """f32[..., V]."""
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)


def entropy(log_p: Array) -> Array:
    """[..., V] -> f32[...], nats."""
    return -(jnp.exp(log_p) * log_p).sum(-1)


def log_sum(log_p: Array, where: Array) -> Array:
    """The log of the probability of what ``where`` keeps: [..., V] -> f32[...]; IMPOSSIBLE, near enough, of nothing."""
    return jax.nn.logsumexp(jnp.where(where, log_p, IMPOSSIBLE), axis=-1)
