"""Weights of experts in MXFP4, as gpt-oss is published: read as the bfloat16 tensors that they stand for.

A file has two tensors in place of one [experts, inputs, outputs]: <name>_blocks u8[experts, outputs, inputs / 32, 16],
two 4-bit numbers (E2M1) a byte, the first in the low bits, and <name>_scales u8[experts, outputs, inputs / 32], an
exponent for each block of 32 numbers. Source: OCP Microscaling Formats v1.0 (2023), sections 5.3.3 and 5.4.1.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

BLOCKS, SCALES = "_blocks", "_scales"  # endings of the two tensors' names
BLOCK = 32  # numbers that share a scale
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
PAIRS = np.array([(E2M1[byte & 15], E2M1[byte >> 4]) for byte in range(256)], np.float32)  # the numbers of each byte
with np.errstate(over="ignore"):
    POWERS = np.ldexp(np.float32(1), np.arange(256) - 127)  # the last is no number, and infinite here


@dataclasses.dataclass(frozen=True)
class Mxfp4:
    """Both tensors as one, as lazy as a safetensors slice: a part that is asked for is read and dequantised, bfloat16,
    which holds every such number exactly."""

    blocks: Any
    scales: Any
    strided = True  # with a step over outputs, only those are dequantised: see hf_weights.read_tensor

    def get_shape(self) -> list[int]:
        experts, outputs, groups, _ = self.blocks.get_shape()
        return [experts, groups * BLOCK, outputs]

    def get_dtype(self) -> str:
        return "BF16"

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        bounds = [one.indices(size) for one, size in zip(index, self.get_shape(), strict=True)]
        assert all(step == 1 for _, _, step in bounds[:2]), index
        (*experts, _), (start, stop, _), (*outputs, step) = bounds
        first, last = start // BLOCK, -(-stop // BLOCK)
        out = np.empty([len(range(*bound)) for bound in bounds], jnp.bfloat16)
        for place, expert in enumerate(range(*experts)):  # one at a time: float32 takes four times what is read
            picked = slice(expert, expert + 1), slice(*outputs), slice(first, last)
            blocks, scales = self.blocks[*picked, slice(None)][0, ::step], self.scales[picked][0, ::step]
            numbers = PAIRS[blocks].reshape(len(blocks), last - first, BLOCK)
            with np.errstate(invalid="ignore"):
                numbers = numbers * POWERS[scales][..., None]
            whole = numbers.reshape(len(numbers), -1)
            out[place] = whole[:, start - first * BLOCK : stop - first * BLOCK].T
        return out


def joined(tensors: dict[str, Any], where: str) -> dict[str, Any]:
    """``tensors`` with one for each pair of blocks and scales. Raises ValueError for a pair that is none."""
    found = dict(tensors)
    for name in [name.removesuffix(BLOCKS) for name in tensors if name.endswith(BLOCKS)]:
        parts = [found.pop(name + ending, None) for ending in (BLOCKS, SCALES)]
        if parts[1] is None:
            raise ValueError(f"{where}: {name}{BLOCKS}: has no scales; expected {name}{SCALES}")
        shapes = [tuple(part.get_shape()) for part in parts]
        kinds = {part.get_dtype() for part in parts}
        if len(shapes[0]) != 4 or shapes[0] != (*shapes[1], BLOCK // 2) or kinds != {"U8"}:
            what = f"{', '.join(sorted(kinds))} {shapes[0]} and {shapes[1]}"
            raise ValueError(f"{where}: {name}{BLOCKS}, {SCALES}: {what}; expected U8 (E, M, G, 16) and (E, M, G)")
        found[name] = Mxfp4(*parts)
    return found
