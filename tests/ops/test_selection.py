"""The best of each group, against a loop."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.ops.selection import best_in_group


def by_loop(scores, rows, size: int, keep: int) -> list[bool]:
    found = []
    for start in range(0, len(scores), size):
        real = [i for i in range(start, start + size) if rows[i]]
        best = sorted(real, key=lambda i: (-scores[i], i))[:keep]
        found += [i in best for i in range(start, start + size)]
    return found


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_it_is_a_loop(keep):
    rng = np.random.default_rng(keep)
    scores = rng.integers(0, 3, 24).astype(np.float32)  # with ties
    rows = rng.random(24) < 0.7
    scores[~rows] = np.nan
    found = best_in_group(jnp.array(scores), jnp.array(rows), 4, keep)
    assert found.tolist() == by_loop(scores, rows, 4, keep)


def test_by_hand():
    scores, rows = jnp.array([1.0, 3.0, 3.0, -9.0, -8.0, 99.0]), jnp.array([True] * 5 + [False])
    assert best_in_group(scores, rows, 3, 1).tolist() == [False, True, False, False, True, False]
    assert best_in_group(scores, rows, 3, 2).tolist() == [False, True, True, True, True, False]
