"""Orthogonalised stacks of matrices: against a NumPy loop, SVD, and the same on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxrlhf.ops.newton_schulz import MatrixAxes, newton_schulz, orthogonalized
from jaxrlhf.plan import hlo
from jaxrlhf.sharding import MeshConfig, make_mesh, partition

UP = (2, 16, 24), ("layers", "embed", "mlp"), MatrixAxes(1, 1)
QUERY = (2, 16, 4, 6), ("layers", "embed", "heads", "head_dim"), MatrixAxes(1, 1)
OUT = (3, 4, 6, 16), ("layers", "heads", "head_dim", "embed"), MatrixAxes(1, 2)
EXPERTS = (3, 4, 16, 8), ("layers", "expert", "embed_of_expert", "mlp"), MatrixAxes(2, 1)
LEAVES = [UP, QUERY, OUT, EXPERTS]


def drawn(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32) * 1e-3


def looped(x: np.ndarray, steps: int) -> np.ndarray:
    """One matrix in float64, by its own equation: X <- a X + b (X X^T) X + c (X X^T)^2 X."""
    x = x.astype(np.float64) / np.linalg.norm(x)
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return x


@pytest.mark.parametrize(("shape", "_", "axes"), LEAVES, ids=["up", "query", "out", "experts"])
def test_each_matrix_of_a_stack_by_a_loop(shape, _, axes):
    """Whatever the other matrices are: the first is a thousand times the others."""
    x = drawn(shape)
    x[0] *= 1000
    found = np.asarray(orthogonalized(jnp.array(x), axes, 5))
    ins, outs = axes.sizes(shape)
    assert found.shape == shape
    flat = x.reshape(-1, ins, outs)
    expected = np.stack([looped(matrix, 5) for matrix in flat])
    np.testing.assert_allclose(found.reshape(flat.shape), expected, atol=2e-5)


@pytest.mark.parametrize("shape", [(6, 6), (6, 40), (40, 6)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    x = drawn(shape)
    u, _, v = np.linalg.svd(x, full_matrices=False)
    found = np.asarray(newton_schulz(jnp.array(x), 8), np.float64)
    inside = u.T @ found @ v.T
    assert (np.diag(inside) > 0.6).all() and (np.diag(inside) < 1.3).all()
    np.testing.assert_allclose(inside - np.diag(np.diag(inside)), 0, atol=1e-4)


def test_zeros_stay_zeros():
    assert not np.asarray(orthogonalized(jnp.zeros((2, 4, 6)), MatrixAxes(1, 1), 5)).any()


@pytest.mark.parametrize("leaf", LEAVES, ids=["up", "query", "out", "experts"])
@pytest.mark.parametrize(
    "mesh", [MeshConfig(1, 8), MeshConfig(2, 2, 2), MeshConfig(1, 2, 2, slices=2), MeshConfig(1, 2, 2, expert=2)]
)
def test_a_mesh_computes_the_same_and_keeps_the_layout(leaf, mesh):
    """Of 2 or 3 layers, which no number of devices here divides."""
    shape, names, axes = leaf
    x = drawn(shape)
    alone = orthogonalized(jnp.array(x), axes, 5)
    with jax.set_mesh(here := make_mesh(mesh)):
        split = jax.device_put(x, NamedSharding(here, partition(names)))
        program = jax.jit(lambda x: orthogonalized(x, axes, 5)).lower(split).compile()
        found = program(split)
    sent = hlo.collectives(program.as_text() or "")
    assert {one.kind for one in sent} == {"all-to-all"} | ({"all-gather"} if mesh.data > 1 else set())
    whole = 8 / shape[0] * x.nbytes  # of 8 layers, one a device
    part = whole * np.prod(split.sharding.shard_shape(shape)) / x.size
    assert all(one.bytes <= one.count * part for one in sent)  # nobody ever has more than its part
    assert sum(one.count for one in sent) <= 5  # along fsdp and tensor there and back, and copies
    assert found.sharding.shard_shape(shape) == split.sharding.shard_shape(shape) != shape
    np.testing.assert_allclose(np.asarray(found), np.asarray(alone), atol=1e-5)
