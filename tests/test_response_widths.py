"""Which width the responses of some rows are computed in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.ops.rows import join_rows, reorder, split_rows
from jaxrlhf.response_widths import alike_in_parts, at_least_width, can_pack, columns_needed, widths_of
from jaxrlhf.types import Sequences


def sequences(lengths: list[int], copies: int, start: int = 2, room: int = 5) -> Sequences:
    valid = np.arange(start + room) < start + np.array(lengths)[:, None]
    return Sequences(
        jnp.zeros(valid.shape, int), jnp.array(valid), jnp.array(valid), response_start=start, copies=copies
    )


def test_widths():
    assert widths_of(10, 1) == [10] and widths_of(10, 4) == [3, 5, 8, 10] and widths_of(2, 4) == [1, 2]


@pytest.mark.parametrize(
    ("lengths", "copies", "expected"),
    [
        ([0, 0, 0, 0], 2, 4),
        ([1, 2, 0, 4], 2, 4),  # the longest sum of two counts, and fits exactly
        ([1, 2, 0, 5], 2, 7),
        ([5, 2, 0, 0], 2, 7),
        ([5, 3, 0, 0], 2, None),  # all columns
        ([5, 5, 5, 5], 2, None),
        ([1, 2, 0, 2], 1, 2),
        ([1, 3, 0, 2], 1, 4),
    ],
)
def test_the_narrowest_width_that_holds_all(lengths, copies, expected):
    seen = []

    def compute(rows):
        seen.append(rows.width)
        return jnp.float32(-1 if rows.width is None else rows.width)

    found = jax.jit(lambda rows: at_least_width(rows, 3, compute))(sequences(lengths, copies))
    assert found == (-1 if expected is None else expected)
    assert len(seen) == 3 and at_least_width(sequences(lengths, copies), 1, lambda rows: rows.width) is None


def test_documents_are_not_packed():
    rows = sequences([1, 2], 1)
    assert can_pack(rows) and at_least_width(None, 3, lambda rows: rows) is None
    assert not can_pack(rows.replace(response_start=1)) and not can_pack(rows.replace(segment_ids=rows.tokens))


def test_parts_are_as_narrow_as_they_can_be():
    """8 prompts with two responses each, two prompts in each of 4 parts."""
    lengths = [2, 2, 0, 0, 1, 2, 1, 0, 0, 0, 1, 3, 0, 1, 2, 1]  # 4, 0, 3, 1, 0, 4, 1, 3 to a prompt
    rows = sequences(lengths, 2)

    def widths(rows) -> list[int]:
        parts = split_rows(rows, 4, together=2)
        return [int(columns_needed(jax.tree.map(lambda x, i=i: x[i], parts)).max()) for i in range(4)]

    assert widths(rows) == [4, 4, 3, 3]
    order = alike_in_parts(rows, 4, 8)
    assert order is not None
    assert widths(reorder(rows, order, 2)) == [0, 1, 3, 4]
    assert alike_in_parts(rows, 1, 8) is None and alike_in_parts(rows, 4, 1) is None


@pytest.mark.parametrize("together", [1, 2])
def test_split_rows_are_joined_again(together):
    rows = jnp.arange(24).reshape(12, 2)
    np.testing.assert_array_equal(join_rows(split_rows(rows, 3, together), together), rows)
