"""Tensors of a GGUF file, as lazy as safetensors slices: a part that is asked for is read and dequantised, to float32.

Beside their format they differ from those of a Hugging Face folder in the order of rows, axes and features, which the
classes here put back.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

ROWS = 1024  # dequantised at once


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the file, of three axes at most: [experts, outputs, inputs]."""

    file: str
    kind: str  # of ggml: F32, F16, Q4_1, MXFP4, ...
    shape: tuple[int, ...]
    offset: int  # bytes into the file
    heads: int = 0  # of a query or key whose rows have ggml's order; else 0
    less: float = 0.0  # subtracted: files hold 1 + scale of norms that multiply by that

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: Any) -> np.ndarray:
        picked = whole(index, self.shape)
        if len(self.shape) == 3:
            out = np.empty([len(range(size)[one]) for size, one in zip(self.shape, picked)], np.float32)
            for place, expert in enumerate(range(self.shape[0])[picked[0]]):
                out[place] = self.expert(expert)[picked[1:]]
            return out
        rows, *rest = picked
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1, index
        unit = self.shape[0] // self.heads if self.heads else 1  # rows of a head change places among themselves
        first, last = start // unit * unit, -(-stop // unit) * unit
        value = self.read(first, last)
        if self.heads:
            value = unturn(value, (last - first) // unit)
        value = value[(slice(start - first, stop - first), *rest)]
        return value - np.float32(self.less) if self.less else value

    def expert(self, number: int) -> "Tensor":
        """One of the stacked tensors [outputs, inputs]."""
        size = self.shape[1] * row_bytes(self.kind, self.shape[2])
        return dataclasses.replace(self, shape=self.shape[1:], offset=self.offset + number * size)

    def read(self, first: int, last: int) -> np.ndarray:
        """Rows first to last as they are in the file. A piece at a time: dequantising takes twice its result."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        out = np.empty((last - first, *self.shape[1:]), np.float32)
        width = row_bytes(self.kind, self.shape[1] if len(self.shape) > 1 else 1)
        with open(self.file, "rb") as file:
            for at in range(first, last, ROWS):
                count = min(ROWS, last - at)
                file.seek(self.offset + at * width)
                data = np.fromfile(file, np.uint8, count * width)
                part = out[at - first : at - first + count]
                part[...] = dequantize(data.reshape(count, width), GGMLQuantizationType[self.kind]).reshape(part.shape)
        return out


@dataclasses.dataclass(frozen=True)
class Transposed:
    """A tensor whose last two axes are exchanged: [..., inputs, outputs]."""

    tensor: Tensor

    def get_shape(self) -> list[int]:
        *lead, rows, columns = self.tensor.shape
        return [*lead, columns, rows]

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: Any) -> np.ndarray:
        *lead, rows, columns = whole(index, self.get_shape())
        return self.tensor[(*lead, columns, rows)].swapaxes(-1, -2)


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """Two tensors as one: along the last axis feature 0 of the first, feature 0 of the second, feature 1 of the first,
    and so on. With a step of 2 the other one is not read."""

    first: Any
    second: Any
    strided = True  # see hf_weights.read_tensor

    def get_shape(self) -> list[int]:
        *lead, size = self.first.get_shape()
        return [*lead, 2 * size] if self.second.get_shape() == [*lead, size] else [*lead, size]

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: Any) -> np.ndarray:
        *lead, last = whole(index, self.get_shape())
        features = range(self.get_shape()[-1])[last]
        parts = (self.first, self.second)
        of = lambda part: (*lead, slice((features.start - part + 1) // 2, (features.stop - part + 1) // 2))
        if features.step == 2:
            return parts[features.start % 2][of(features.start % 2)]
        assert features.step == 1, index
        both = [tensor[of(part)] for part, tensor in enumerate(parts)]
        out = np.empty((*both[0].shape[:-1], len(features)), np.float32)
        for part, value in enumerate(both):
            out[..., (features.start + part) % 2 :: 2] = value
        return out


def whole(index: Any, shape: Any) -> tuple[slice, ...]:
    """``index`` with a slice for each axis."""
    given = index if isinstance(index, tuple) else (index,)
    return (*given, *(slice(None) for _ in range(len(shape) - len(given))))


@functools.cache
def row_bytes(kind: str, numbers: int) -> int:
    """Bytes that a row of so many numbers takes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return numbers // block * size


def unturn(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys from ggml's order to that of Hugging Face: there the two numbers that a rotation turns
    are next to each other, here they are half a head apart."""
    size, *rest = rows.shape
    pairs = rows.reshape(heads, size // heads // 2, 2, *rest)
    return pairs.swapaxes(1, 2).reshape(size, *rest)


def open_place(file: str | os.PathLike, place: Mapping[str, Any]) -> Any:
    """The lazy tensor that a record of gguf.json describes: a Tensor's fields and ``transposed``, or ``pair``."""
    if "pair" in place:
        return Interleaved(*(open_place(file, one) for one in place["pair"]))
    fields: dict[str, Any] = {name: value for name, value in place.items() if name != "transposed"}
    fields["shape"] = tuple(place["shape"])
    tensor = Tensor(str(file), **fields)
    return Transposed(tensor) if place.get("transposed") else tensor
