"""Orthogonal updates: a stack of matrices, each made nearly orthogonal by products alone."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.sharding import explicit
from jaxrlhf.types import Array

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # Jordan's: small singular values grow fastest, all end between 0.7 and 1.2
EPS = 1e-8  # added to the norm, so that a matrix of zeros stays one


class MatrixAxes(NamedTuple):
    """Which axes of a stacked leaf [*stack, *inputs, *outputs] are the two of a matrix."""

    stack: int  # the first axes: layers, or layers and experts; each index is a matrix of its own
    inputs: int  # the next ones, which the product sums over; the rest are outputs

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(inputs, outputs) of one matrix of a leaf of this ``shape``."""
        ins = self.stack + self.inputs
        return math.prod(shape[self.stack : ins]), math.prod(shape[ins:])


Matrices = Mapping[tuple[str, ...], MatrixAxes]  # by the path of the leaf in a role's parameters


def newton_schulz(x: Array, steps: int) -> Array:
    """[..., m, n] -> the same, each matrix U S V^T as nearly U V^T: X <- a X + (b A + c A A) X with A = X X^T, from X
    over its Frobenius norm.

    Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); optax.contrib.muon computes the same."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    wide = x.mT if tall else x  # A is the smaller of the two squares
    wide = wide / (jnp.sqrt(jnp.sum(wide * wide, axis=(-2, -1), keepdims=True)) + EPS)

    def step(_, x: Array) -> Array:
        gram = x @ x.mT
        return a * x + (b * gram + c * (gram @ gram)) @ x

    wide = jax.lax.fori_loop(0, steps, step, wide)
    return wide.mT if tall else wide


def orthogonalized(x: Array, axes: MatrixAxes, steps: int) -> Array:
    """``newton_schulz`` of every matrix in the leaf ``x``, [*stack, *inputs, *outputs], which keeps its layout.

    On a mesh the devices of a slice share the whole matrices: each computes some of the layers, and of their experts
    those that it stores. Layers are padded with zeros to a multiple of the devices."""
    local = lambda x: newton_schulz(x.reshape(*x.shape[: axes.stack], *axes.sizes(x.shape)), steps).reshape(x.shape)
    if not explicit():
        return local(x)
    sizes, own = jax.sharding.get_abstract_mesh().shape, jax.typeof(x).sharding.spec
    names = [((part,) if isinstance(part, str) else part or ()) for part in own.partitions]
    split = [tuple(axis for axis in part if sizes[axis] > 1) for part in names] + [()] * (x.ndim - len(names))
    moved = [(number, part) for number, part in enumerate(split) if part and number >= axes.stack]
    used = {axis for part in split for axis in part}
    rest = tuple(axis for axis, size in sizes.items() if size > 1 and axis not in {*used, "slice"})
    devices = math.prod(sizes[axis] for part in (*(part for _, part in moved), rest) for axis in part)
    layers = x.shape[0]
    x = jnp.pad(x, [(0, -layers % devices)] + [(0, 0)] * (x.ndim - 1))

    def shared(x: Array) -> Array:
        for number, part in moved:  # an all-to-all within each group of devices: fewer layers, wider parts of them
            x = jax.lax.all_to_all(x, part, 0, number, tiled=True)
        if rest:  # what these devices have copies of
            mine = x.shape[0] // math.prod(sizes[axis] for axis in rest)
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(rest) * mine, mine)
        x = local(x)
        if rest:
            x = jax.lax.all_gather(x, rest, tiled=True)
        for number, part in reversed(moved):
            x = jax.lax.all_to_all(x, part, number, 0, tiled=True)
        return x

    return jax.shard_map(shared, in_specs=own, out_specs=own, check_vma=False)(x)[:layers]
