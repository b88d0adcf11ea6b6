import numpy as np
import pytest

from jaxrlhf.data.document_packing import pack


def test_best_fit_by_hand():
    # 5 | 4 | 3 | 3 joins 3 | 2 joins 4 (room 2, none is left), not 5 (room 1) | 1 joins 5
    rows = pack([4, 3, 3, 2, 1, 5], capacity=6)
    assert [row.tolist() for row in rows] == [[4, 5], [0, 3], [1, 2]]


def test_tightest_row_is_taken():
    # rows 7 (room 3) and 8 (room 2); the 2 goes where it leaves nothing
    assert [row.tolist() for row in pack([7, 8, 2], capacity=10)] == [[1, 2], [0]]


def test_every_document_is_in_one_row_and_rows_hold_them():
    lengths = np.random.default_rng(0).integers(1, 33, 3000)
    rows = pack(lengths, 32)
    assert sorted(np.concatenate(rows).tolist()) == list(range(3000))
    fill = np.array([lengths[row].sum() for row in rows])
    assert fill.max() <= 32 and fill.mean() > 0.97 * 32  # one a row would fill 16.5


def test_lengths_at_the_edges():
    assert [row.tolist() for row in pack([4, 4], 4)] == [[0], [1]]
    assert [row.tolist() for row in pack([1] * 4, 4)] == [[0, 1, 2, 3]]
    assert pack([], 4) == []


@pytest.mark.parametrize("length", [0, 5])
def test_document_that_fits_nowhere(length):
    with pytest.raises(ValueError, match=f"document 1 has {length} tokens, expected 1 to 4"):
        pack([1, length], 4)
