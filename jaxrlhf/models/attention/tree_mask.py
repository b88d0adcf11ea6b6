"""The splash kernel's mask of a row that is a tree: a prompt, and responses that branch from it.

Kept apart from kernels.py, which loads splash only where it is used.
"""

import dataclasses
import functools

import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks


@dataclasses.dataclass(frozen=True)
class TreeMask(masks.Mask):
    """A token attends to the prompt and its own response, up to itself; with ``window``, to that many columns at most,
    as if the response came right after the prompt.

    Blocks of it are computed where they are asked for, in NumPy while tracing and in the kernel while running: the
    whole would be a byte for each pair of columns. Of a query the kernel hands ``mask_function`` one number, which so
    holds its column and, in the bits below, its branch: no division is left for the kernel.
    """

    columns: int  # of the row, padded to whole blocks
    prompt: int
    copies: int
    room: int  # columns of a response
    window: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.columns, self.columns

    @property
    def bits(self) -> int:
        return self.copies.bit_length()

    @functools.cached_property
    def q_sequence(self) -> np.ndarray:
        """i32[columns]. What pads the row is one more branch."""
        columns = np.arange(self.columns, dtype=np.int32)
        branch = np.clip((columns - self.prompt) // self.room, 0, self.copies)
        return ((columns << self.bits) | branch).astype(np.int32)

    def mask_function(self, queries, keys):
        """bool: which keys, given by their columns, are read by queries, given as in q_sequence; i32 of one rank, of
        NumPy or JAX."""
        column, ahead = queries >> self.bits, (queries & ((1 << self.bits) - 1)) * self.room  # other responses' columns
        shared = keys < self.prompt
        seen = (keys <= column) & (shared | (keys >= ahead + self.prompt))
        if self.window is None:
            return seen
        return seen & ((keys > column - self.window) | (shared & (keys > column - ahead - self.window)))

    def __getitem__(self, at) -> np.ndarray:
        queries, keys = at
        return self.mask_function(self.q_sequence[queries, None], np.arange(self.columns, dtype=np.int32)[None, keys])
