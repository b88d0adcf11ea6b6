"""Which documents share a row."""

from collections.abc import Sequence

import numpy as np

OPEN_ROWS = 64  # looked at for each document: more packs tighter and takes longer


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[np.ndarray]:
    """First fit: each document, in order, goes into the first open row with room for it.

    When none has, the fullest row is closed and a new one opened. Every document is in exactly one row, and the plan is
    a function of the lengths alone, so every process makes the same one without reading a token.

    Args:
        lengths: tokens of each document, each between 1 and ``capacity``.

    Returns:
        A row: the positions, in ``lengths``, of its documents.
    """
    closed: list[list[int]] = []
    rows: list[list[int]] = []
    room = np.zeros(0, np.int64)
    for document, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"document {document} has {length} tokens, expected 1 to {capacity}")
        fits = room >= length
        row = int(fits.argmax()) if fits.any() else len(rows)
        if row == len(rows):
            if len(rows) == OPEN_ROWS:
                row = int(room.argmin())
                closed.append(rows[row])
                rows[row], room[row] = [], capacity
            else:
                rows.append([])
                room = np.append(room, capacity)
        rows[row].append(document)
        room[row] -= length
    return [np.asarray(row, np.int64) for row in closed + rows]
