"""One score from those of several models, how far they are apart, and bootstrap samples for each."""

import jax.numpy as jnp

from jaxrlhf.types import Array, Combine

POISSON = (
    0.36787944,
    0.73575888,
    0.91969860,
    0.98101184,
    0.99634015,
    0.99940582,
    0.99991676,
)  # its distribution, rate 1


def combine_scores(scores: Array, how: Combine, variance_coef: float) -> Array:
    """One score for each row of an ensemble's.

        mean                   1/K sum_k s_k
        median                 the middle one; of an even number the mean of the two in the middle
        min                    min_k s_k                               worst case (WCO)
        mean_minus_variance    mean - variance_coef * variance         uncertainty-weighted (UWO)

    The variance is that over K, not K - 1.

    Args:
        scores: f32[K, B].
        variance_coef: lambda of Coste et al.

    Returns:
        f32[B].

    Source: Coste et al. 2023 (arXiv:2310.02743), equations 4 to 6.

    Raises:
        ValueError: for another ``how``.
    """
    mean = jnp.mean(scores, axis=0)
    if how == "mean":
        return mean
    if how == "min":
        return jnp.min(scores, axis=0)
    if how == "mean_minus_variance":
        return mean - variance_coef * jnp.mean(jnp.square(scores - mean), axis=0)
    if how != "median":
        raise ValueError(f"combine {how!r}: expected mean, median, min or mean_minus_variance")
    ordered, half = jnp.sort(scores, axis=0), len(scores) // 2
    return ordered[half] if len(scores) % 2 else 0.5 * (ordered[half - 1] + ordered[half])


def disagreement(scores: Array) -> Array:
    """f32[B]: the standard deviation (over K) of each row of an ensemble's scores f32[K, B]."""
    return jnp.sqrt(jnp.mean(jnp.square(scores - jnp.mean(scores, axis=0)), axis=0))


def row_hash(tokens: Array, valid: Array) -> Array:
    """u32[B]: a hash of the valid tokens of each row [B, S], the same in every batch and on every mesh."""
    columns = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.uint32)
    return jnp.sum(jnp.where(valid, mixed((tokens.astype(jnp.uint32) + 1) * columns), jnp.uint32(0)), axis=1)


def bootstrap_counts(rows: Array, member: int) -> Array:
    """f32[B]: how often each row is in the bootstrap sample of an ensemble's member: Poisson with rate 1.

    A row has the same count in every epoch, since it depends on what ``row_hash`` (u32[B]) says of it alone.

    Source: Oza and Russell 2001, "Online bagging and boosting".
    """
    noise = mixed(rows ^ mixed(jnp.uint32(member + 1))).astype(jnp.float32) / 2.0**32
    return sum((noise[:, None] > jnp.array(POISSON)).astype(jnp.float32).T)  # type: ignore[return-value]


def mixed(x: Array) -> Array:
    """u32: every bit of ``x`` reaches every bit of the result (the end of MurmurHash3, Appleby)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
