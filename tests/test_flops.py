"""The walk over jaxprs against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxrlhf.sharding import MeshConfig, make_mesh
from tests.support.flops import flops

ROWS, SIZE, LENGTH = 3, 4, 5
ONCE = 2 * ROWS * SIZE * SIZE  # x [3, 4] times a weight [4, 4]
X, WEIGHTS = jnp.ones((ROWS, SIZE)), jnp.ones((LENGTH, SIZE, SIZE))


def count(function, *args) -> float:
    return flops(jax.make_jaxpr(function)(*args))


def through(layer):
    """All weights in a scan."""
    return lambda weights, x: jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0].sum()


def test_a_product_in_a_batch():
    """6 products of [2, 3] and [3, 5]."""
    left, right = jnp.ones((6, 2, 3)), jnp.ones((6, 5, 3))
    assert count(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), left, right) == 6 * 2 * 2 * 5 * 3


def test_a_scan_under_grad_and_checkpoint():
    """Backward is a product for x and one for the weight; checkpoint makes the forward product once more."""
    plain, again = through(lambda x, w: jnp.tanh(x @ w)), through(jax.checkpoint(lambda x, w: jnp.tanh(x @ w)))
    assert count(plain, WEIGHTS, X) == count(again, WEIGHTS, X) == LENGTH * ONCE
    both = lambda function: count(jax.jit(jax.grad(function, (0, 1))), WEIGHTS, X)
    assert both(plain) == LENGTH * 3 * ONCE and both(again) == LENGTH * 4 * ONCE


def test_rules_of_one_s_own():
    """custom_vjp: what it does forward, and backward its rule: here 3 products, none of which autodiff would make."""

    @jax.custom_vjp
    def times(x, w):
        return x @ w

    times.defvjp(lambda x, w: (times(x, w), (x, w)), lambda saved, g: (g @ saved[1] @ saved[1] @ saved[1], saved[1]))
    function = lambda x, w: times(x, w).sum()
    assert count(function, X, WEIGHTS[0]) == ONCE
    assert count(jax.grad(function), X, WEIGHTS[0]) == (1 + 3) * ONCE


def test_a_switch_takes_its_costliest_branch():
    branches = [lambda x: x, lambda x: x @ WEIGHTS[0] @ WEIGHTS[1], lambda x: x @ WEIGHTS[0]]
    assert count(lambda which, x: jax.lax.switch(which, branches, x), 0, X) == 2 * ONCE


def loop(x, w, start, bound: int):
    """Rows are multiplied until the count is there, or all are large."""
    go_on = lambda carry: (carry[0] < bound) & ~(carry[1] > 9).all()
    return jax.lax.while_loop(go_on, lambda carry: (carry[0] + 1, carry[1] @ w), (start, x))


def test_a_while_loop_goes_on_as_long_as_it_can():
    assert count(lambda x, w: loop(x, w, 0, 7), X, WEIGHTS[0]) == 7 * ONCE
    assert count(lambda x, w: loop(x, w, 2, 7), X, WEIGHTS[0]) == 5 * ONCE


def test_loops_with_one_counter_share_its_trips():
    """The second has a row less: at worst the first makes all trips. With a row more each, the second does."""

    def chain(x, w, rows):
        index, y = loop(x, w, 0, 7)
        return loop(jnp.resize(y, (rows, SIZE)), w, index, 7)

    for rows in (ROWS - 1, ROWS + 1):
        found = count(lambda x, w, rows=rows: chain(x, w, rows), X, WEIGHTS[0])
        assert found == 7 * 2 * max(rows, ROWS) * SIZE * SIZE
    twice = lambda x, w: (loop(x, w, 0, 7), loop(x, w, 0, 7))
    assert count(twice, X, WEIGHTS[0]) == 14 * ONCE


def test_a_loop_that_nothing_bounds_is_refused():
    def endless(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)

    with pytest.raises(ValueError, match="without a bound"):
        count(endless, X, WEIGHTS[0])
    assert count(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x), X) == 0


def test_a_convolution_is_refused():
    with pytest.raises(ValueError, match="conv_general_dilated: nobody"):
        count(lambda x, w: jnp.convolve(x, w), jnp.ones(8), jnp.ones(3))


def test_all_devices_are_counted():
    """Rows over 4 devices, by sharding in types and by shard_map, whose shapes are a device's."""
    mesh = make_mesh(MeshConfig(4, 1, 1), jax.devices()[:4])
    rows = jnp.ones((8, SIZE))
    with jax.set_mesh(mesh):
        laid = jax.sharding.reshard(rows, P("data", None))
        typed = lambda x, w: jnp.einsum("ij,jk->ik", x, w)
        mapped = jax.shard_map(typed, in_specs=(P("data", None), P()), out_specs=P("data", None), axis_names={"data"})
        assert count(typed, laid, WEIGHTS[0]) == count(mapped, laid, WEIGHTS[0]) == 2 * 8 * SIZE * SIZE
