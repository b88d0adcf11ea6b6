"""The splash kernel's mask of queries that stand in any columns of their row.

Kept apart from context.py, which loads splash only where it is used.
"""

import dataclasses
import functools

import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks


@dataclasses.dataclass(frozen=True)
class ColumnMask(masks.Mask):
    """A token attends to the columns up to its own; with ``window``, to that many of them at most."""

    columns: tuple[int, ...]  # of the queries
    keys: int  # columns of the row, padded to whole blocks
    window: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.columns), self.keys

    @functools.cached_property
    def q_sequence(self) -> np.ndarray:
        """i32[queries]."""
        return np.asarray(self.columns, np.int32)

    def mask_function(self, queries, keys):
        """bool: which keys, given by their columns, are read by queries in theirs; i32 of one rank, of NumPy or JAX."""
        seen = keys <= queries
        return seen if self.window is None else seen & (keys > queries - self.window)

    def __getitem__(self, at) -> np.ndarray:
        queries, keys = at
        return self.mask_function(self.q_sequence[queries, None], np.arange(self.keys, dtype=np.int32)[None, keys])
