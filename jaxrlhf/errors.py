"""Errors that are one line: the value, what was expected, the nearest valid choice. Imports nothing of this package."""

import difflib
import json
from collections.abc import Sequence
from typing import Any


class ConfigError(ValueError):
    """What is wrong with a config: one line for each mistake."""


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def cut(text: str) -> str:
    """``text`` at most 60 characters long."""
    return text if len(text) <= 60 else text[:57] + "..."


def counted(number: int, noun: str, plural: str = "") -> str:
    """ "1 row", "1,200 rows"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def nearest(word: object, choices: Sequence[str], otherwise: str | None = None, cutoff: float = 0.6) -> str:
    """The choice nearest to ``word``; where none is near, ``otherwise``, or all choices."""
    if close := difflib.get_close_matches(str(word), choices, 1, cutoff):
        return f"nearest: {close[0]}"
    return f"choices: {', '.join(choices) or 'none'}" if otherwise is None else otherwise


def show(value: Any) -> str:
    """``value`` as one would write it, cut short."""
    return cut(json.dumps(value, ensure_ascii=False, default=str))


def dotted(keys: Sequence[Any]) -> str:
    return ".".join(map(str, keys))
