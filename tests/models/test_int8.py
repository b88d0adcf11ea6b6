"""Eight bits, against arithmetic by hand and against the wide numbers that they stand for."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models.attention.products import branches
from jaxrlhf.models.int8 import quantized
from jaxrlhf.models.linear import in_int8, linear
from tests.support.tiny import wide

RNG = np.random.default_rng(4)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def test_by_hand():
    """Rows share a scale each: 127 steps to the largest, and to the nearest step; nothing but zeros stays zeros."""
    found = quantized(jnp.array([[0.0, 12.7, -6.36], [-254.0, 1.0, 0.9], [0.0, 0.0, 0.0]]), (1,))
    assert found.values.dtype == jnp.int8 and found.values.tolist() == [[0, 127, -64], [-127, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(found.scale[:2], [[0.1], [2.0]], rtol=1e-6)


@pytest.mark.parametrize("axes", [(0,), (-1,), (0, 1)])
def test_no_number_is_further_off_than_half_a_step(axes):
    x = normal(6, 5, 7) * 10.0 ** RNG.integers(-6, 6, (6, 5, 1))
    found = quantized(jnp.asarray(x), axes)
    assert (np.abs(wide(found) - x) <= np.asarray(found.scale) * 0.501).all()
    np.testing.assert_array_equal(quantized(jnp.asarray(-x), axes).values, -np.asarray(found.values))


@pytest.mark.parametrize(
    "equation, axes, out, shapes",
    [
        (
            "bsd,dhk->bshk",
            ("embed", "heads", "head_dim"),
            ("batch", "seq", "heads", "head_dim"),
            [(2, 3, 8), (8, 4, 5)],
        ),
        ("bshk,hkd->bsd", ("heads", "head_dim", "embed"), ("batch", "seq", "hidden"), [(2, 3, 4, 5), (4, 5, 8)]),
        ("bsm,md->bsd", ("mlp", "embed"), ("batch", "seq", "hidden"), [(2, 3, 6), (6, 8)]),
        ("bsd,dv->bsv", ("embed", "vocab"), ("batch", "seq", "vocab"), [(2, 3, 8), (8, 9)]),
    ],
)
def test_a_linear_map_is_that_of_the_wide_kernel(equation, axes, out, shapes):
    """With its bias; every output has a scale of its own, whatever the others are."""
    x, kernel = map(jnp.asarray, (normal(*shapes[0]), normal(*shapes[1])))
    kernel = kernel * 10.0 ** jnp.arange(kernel.shape[-1])
    found, bias = in_int8(kernel, axes), normal(kernel.shape[-1])
    assert np.abs(wide(found) / np.asarray(kernel) - 1).mean() < 0.1
    y = linear({"kernel": found, "bias": jnp.asarray(bias)}, x, equation, axes, out)
    np.testing.assert_allclose(y, np.einsum(equation, x, wide(found)) + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_is_that_of_the_wide_keys_and_values(softcap):
    """A part that 3 samples share, and one of each."""
    query, bias = jnp.asarray(normal(2, 2, 3, 2, 1, 8)), jnp.zeros((1, 1, 1, 1))
    stored = lambda *shape: quantized(jnp.asarray(normal(*shape)), (-1,))
    keys = [(stored(2, 2, 5, 8), stored(2, 2, 5, 8)), (stored(2, 2, 3, 4, 8), stored(2, 2, 3, 4, 8))]
    found = branches(query, [(key, value, bias) for key, value in keys], softcap=softcap)
    widened = [(jnp.asarray(wide(key)), jnp.asarray(wide(value)), bias) for key, value in keys]
    same = branches(query, widened, softcap=softcap)
    np.testing.assert_allclose(found, same, atol=1e-5)
