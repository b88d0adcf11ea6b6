"""Sums, means and whitening over the positions that a mask keeps.

What lies outside the mask never counts, not even when it is NaN or infinite: every function puts 0 there *before* it
computes, since NaN * 0 is NaN, in values and in gradients alike. Statistics (count, mean, variance, whiten) are over
the whole batch, and so have no place in a loss: under pmap they are sums over devices. A Mean (``sums``) is of the rows
at hand, and whoever divides it adds those of micro-batches and devices first.
"""

from typing import Literal

import jax.numpy as jnp

from jaxrlhf.sharding import across
from jaxrlhf.types import Array, Mean


def keep(x: Array, mask: Array) -> Array:
    """``x`` where ``mask`` (bool, same shape), 0 elsewhere, as float32.

    Meant for the *inputs* of per-token terms that take no mask: masking only their result leaves 0 * NaN in the
    gradient.
    """
    assert x.shape == mask.shape, (x.shape, mask.shape)
    return jnp.where(mask, x.astype(jnp.float32), 0.0)


def sums(x: Array, mask: Array) -> Mean:
    """Sum of ``x`` under ``mask`` (any shape) and how many positions that is, both f32[].

    Means of micro-batches are added before they are divided, so the result does not depend on how the rows were split.
    """
    return Mean(total=jnp.sum(keep(x, mask)), count=jnp.sum(mask, dtype=jnp.float32))


def count(mask: Array) -> Array:
    """f32[]: how many positions are kept."""
    return across(jnp.sum(mask, dtype=jnp.float32))


def mean(x: Array, mask: Array) -> Array:
    """f32[]: the mean of ``x`` under ``mask``; 0 where the mask is empty."""
    return across(sums(x, mask)).value()


def variance(x: Array, mask: Array, unbiased: bool) -> Array:
    """f32[]: the variance of ``x`` under ``mask``, over n - 1 (``unbiased``) or n; 0 where it is not defined."""
    return _mean_square(_centered(x, mask), mask, unbiased)


def whiten(
    x: Array,
    mask: Array,
    *,
    variance: Literal["unbiased", "biased"],
    shift_mean: bool = True,
    eps: float = 1e-8,
) -> Array:
    """(x - mean) / sqrt(variance + eps) under ``mask``, 0 elsewhere; f32, shape of ``x``.

    Without ``shift_mean`` the mean is added back, so that only the scale changes (used on rewards). One position, or
    equal ones, give 0 and never 0/0. The divisor is a choice because published code differs: "biased" divides the
    squares by n (Ziegler et al. 2019, arXiv:1909.08593, and its released code), "unbiased" by n - 1 (most later code).

    Raises:
        ValueError: for another ``variance``.
    """
    if variance not in ("unbiased", "biased"):
        raise ValueError(f"whitening variance {variance!r}: expected unbiased or biased")
    centered = _centered(x, mask)
    scaled = centered / jnp.sqrt(_mean_square(centered, mask, variance == "unbiased") + eps)
    return scaled if shift_mean else keep(scaled + mean(x, mask), mask)


def row_means(x: Array, mask: Array) -> Array:
    """The mean of each row of ``x`` under ``mask`` (both [B, S]) at each of the row's kept positions; 0 elsewhere."""
    count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.float32), 1.0)
    return keep(jnp.broadcast_to(jnp.sum(keep(x, mask), axis=1, keepdims=True) / count, x.shape), mask)


def last_index(mask: Array) -> Array:
    """i32[B]: the last True column of each row of ``mask`` (bool[B, S]), whatever its gaps; -1 for an empty row."""
    columns = jnp.arange(mask.shape[1], dtype=jnp.int32)
    return jnp.max(jnp.where(mask, columns[None, :], -1), axis=1)


def at_last(mask: Array) -> Array:
    """bool[B, S]: True at the last True column of each row of ``mask`` (bool[B, S]); an empty row is all False."""
    columns = jnp.arange(mask.shape[1], dtype=jnp.int32)
    return columns[None, :] == last_index(mask)[:, None]


def _centered(x: Array, mask: Array) -> Array:
    """``x`` minus its mean under ``mask``, 0 elsewhere.

    The mean is taken off twice. It is rounded, and where all values are (nearly) equal whitening would blow that
    rounding error up: 1000.1 in 333 places became 0.97 in each of them (float32, CPU) instead of 0.
    """
    once = keep(x - mean(x, mask), mask)
    return keep(once - mean(once, mask), mask)


def _mean_square(centered: Array, mask: Array, unbiased: bool) -> Array:
    squares = across(sums(jnp.square(centered), mask))
    return squares.total / jnp.maximum(squares.count - (1.0 if unbiased else 0.0), 1.0)
