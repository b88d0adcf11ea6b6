"""Which documents share a row."""

from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[np.ndarray]:
    """Best fit, long documents first: each goes into the row that it leaves the least room in.

    Every document is in exactly one row, and the plan is a function of the lengths alone, so every process makes the
    same one without reading a token. Documents of one length keep their order.

    Args:
        lengths: tokens of each document, each between 1 and ``capacity``.

    Returns:
        A row: the positions, in ``lengths``, of its documents.
    """
    lengths = np.asarray(lengths, np.int64)
    outside = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if len(outside):
        raise ValueError(f"document {outside[0]} has {lengths[outside[0]]} tokens, expected 1 to {capacity}")
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # the rows with that much room
    rooms = 0  # bit r is set where by_room[r] holds a row, so the tightest fit is one bit operation away
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(document)
        if room > length:
            by_room[room - length].append(row)
            rooms |= 1 << (room - length)
    return [np.sort(np.asarray(row, np.int64)) for row in rows]
