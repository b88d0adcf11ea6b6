"""Reward functions of control cells, which no policy can learn a task from."""

import zlib
from typing import Any


def constant(responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """Every response alike."""
    return [1.0] * len(responses)


def coin(responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """A random reward: 0 or 1, by a hash of prompt and response."""
    texts = [f"{record['prompt']}{text}" for text, record in zip(responses, records, strict=True)]
    return [float(zlib.crc32(text.encode()) >> 16 & 1) for text in texts]
