"""Single fields of a Hugging Face config.json: read as what they have to be, or refused by name."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, get_args

from jaxrlhf.models.config import ModelConfig

MOST_LAYERS = 2**16  # a list of their kinds stays small


def refuse_unsupported(raw: Mapping[str, Any], fixed: Mapping[str, tuple], where: str) -> None:
    """Raises ValueError for fields that change the maths and have another value than those supported."""
    for name, allowed in fixed.items():
        value = raw.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{where}: {name}: {value!r} is not supported; expected {allowed[0]!r}")


def parse_field(raw: Mapping[str, Any], ours: str, theirs: str, default: Any, where: str) -> Any:
    """One field of ModelConfig, checked against its annotation: numbers are positive.

    Null is the same as absent, but for fields that ModelConfig may leave open: those stay open. Raises ValueError, in
    one line, for a field that is required or wrong."""
    field = next(field for field in dataclasses.fields(ModelConfig) if field.name == ours)
    value = raw.get(theirs, default)
    if default is ... and value in (..., None):
        raise ValueError(f"{where}: {theirs}: is missing")
    if value is None:
        return default if field.default not in (0, None) else field.default
    return checked(value, field.type, f"{where}: {theirs}")


def parse_count(raw: Mapping[str, Any], theirs: str, default: int, where: str) -> int:
    """A whole number that may be 0; null is the same as absent. Raises ValueError, in one line, for another."""
    value = default if raw.get(theirs) is None else raw[theirs]
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"{where}: {theirs}: {value!r}; expected a whole number")
    return value


def checked(value: Any, kind: Any, what: str) -> Any:
    """``value`` if it is a ``kind`` (bool, int or float, or null) in a sane range; else a ValueError about ``what``."""
    kinds = get_args(kind) or (kind,)
    if bool in kinds:
        good, expected = isinstance(value, bool), "true or false"
    elif int in kinds:
        good, expected = type(value) is int and 0 < value < 2**31, "a positive whole number"
    else:
        good, expected = type(value) in (int, float) and 0 < value < math.inf, "a positive number"
    if not good:
        raise ValueError(f"{what}: {value!r}; expected {expected}")
    return float(value) if float in kinds else value
