"""Graders of how long a response is, and whether it ended. Lengths are in tokens unless another unit is given."""

from typing import Any, Literal

from jaxrlhf.errors import nearest, show

Unit = Literal["tokens", "words", "characters"]
UNITS = ("tokens", "words", "characters")


def sizes_of(responses: list[str], token_ids: list[list[int]], unit: Unit, grader: str) -> list[int]:
    """The length of each response. Raises ValueError, in one line, for another unit."""
    if unit not in UNITS:
        raise ValueError(f"{grader}: unit: {show(unit)}: {nearest(unit, UNITS)}")
    if unit == "tokens":
        return [len(ids) for ids in token_ids]
    return [len(text.split()) if unit == "words" else len(text) for text in responses]


def length(
    responses: list[str], records: list[dict[str, Any]], token_ids: list[list[int]], unit: Unit = "tokens"
) -> list[int]:
    """The length of the response: give it a weight below 0 for short ones, or 0 to log it."""
    return sizes_of(responses, token_ids, unit, "length")


def length_drift(
    responses: list[str],
    records: list[dict[str, Any]],
    token_ids: list[list[int]],
    target: float,
    unit: Unit = "tokens",
) -> list[float]:
    """- |length - target| / target, and at least -1: 0 at the target, -1 for nothing, and from twice the target on."""
    if not target > 0:
        raise ValueError(f"length_drift: target: {show(target)}: expected a number above 0")
    sizes = sizes_of(responses, token_ids, unit, "length_drift")
    return [-min(1.0, abs(size - target) / target) for size in sizes]


def soft_overlong(
    responses: list[str],
    records: list[dict[str, Any]],
    token_ids: list[list[int]],
    max_new_tokens: int,
    buffer: int,
    limit: int | None = None,
) -> list[float]:
    """A punishment that grows with the last tokens before the limit.

        0                                        length <= limit - buffer
        (limit - buffer - length) / buffer       up to the limit
        -1                                       beyond it

    Args:
        buffer: the last tokens, in which it grows.
        limit: tokens; None: generate.max_new_tokens.

    Source: DAPO, Yu et al. 2025 (arXiv:2503.14476), equation 13, with limit 20480 and buffer 4096.
    """
    most = max_new_tokens if limit is None else limit
    if not 0 < buffer <= most:
        raise ValueError(f"soft_overlong: buffer: {show(buffer)}: expected 1 to the limit, which is {most}")
    return [max(-1.0, min(0.0, (most - buffer - len(ids)) / buffer)) for ids in token_ids]


def ended_itself(responses: list[str], records: list[dict[str, Any]], ended: list[bool]) -> list[float]:
    """1 where the response ended with EOS or a stop text, 0 where it was cut."""
    return [float(one) for one in ended]
