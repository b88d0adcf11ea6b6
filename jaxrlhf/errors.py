"""Errors that are one line: the value, what was expected, the nearest valid choice. Imports nothing of this package."""

import contextlib
import difflib
import json
import traceback
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent


class ConfigError(ValueError):
    """What is wrong with a config: one line for each mistake."""


@contextlib.contextmanager
def content_of(where: str) -> Iterator[None]:
    """Around what makes sense of a file's content: whatever that raises is an error of the content, and becomes a
    ValueError of one line that begins with ``where``; what a raise statement of this package says goes through. A type
    that no field was checked for has many names: TypeError, KeyError."""
    try:
        yield
    except Exception as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        ours = PACKAGE in Path(last.filename).parents and (last.line or "").startswith("raise ")
        if isinstance(error, ValueError) and ours:
            raise
        said = f"{one_line(error)[:200]} ({type(error).__name__})"
        raise ValueError(f"{where}: holds something that can't be read: {said}") from error


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def cut(text: str) -> str:
    """``text`` at most 60 characters long."""
    return text if len(text) <= 60 else text[:57] + "..."


def counted(number: int, noun: str, plural: str = "") -> str:
    """ "1 row", "1,200 rows"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def need_extra(command: str, extra: str, *modules: str) -> None:
    """Raises ConfigError where one of the ``modules`` of an extra is not installed."""
    if missing := [name for name in modules if find_spec(name) is None]:
        names = " and ".join(missing)
        raise ConfigError(f"{command}: {names} not installed; expected: pip install 'jaxrlhf[{extra}]'")


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
