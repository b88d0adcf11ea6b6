"""The types of a record's fields: what may stand where in a config, and what it is called."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

NAMED = {
    "functions": "<name>",
    "bars": "<name>",
}  # sections whose keys are the user's own words, where they are no roles


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The types of a record's fields, by name."""
    types = get_type_hints(cls)
    return {field.name: types[field.name] for field in dataclasses.fields(cls)}


def bare(hint: Any) -> Any:
    """``hint`` without ``| None``."""
    if get_origin(hint) in (Union, UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def type_under(hint: Any, keys: Sequence[Any]) -> Any:
    """The type of what stands at ``keys`` inside a value of type ``hint``; None where nothing may stand."""
    for key in keys:
        hint = bare(hint)
        if dataclasses.is_dataclass(hint):
            hint = hints(hint).get(key)  # type: ignore[arg-type]
        else:
            hint = (*get_args(hint), None)[1 if get_origin(hint) is dict else 0] if get_args(hint) else None
    return hint


def names_under(cls: type, keys: Sequence[Any]) -> list[str]:
    """The keys of the record that stands at ``keys``."""
    record = bare(type_under(cls, keys))
    return [name for name in hints(record) if name != "algorithm_name"] if dataclasses.is_dataclass(record) else []


def records(cls: type, path: str = "") -> Iterator[tuple[str, type]]:
    """Every record in ``cls`` with its dotted path: ("", Config), ("models.<role>", RoleConfig), ..."""
    yield path, cls
    for name, hint in hints(cls).items():
        inner, below = bare(hint), f"{path}.{name}".lstrip(".")
        if get_origin(inner) is dict:
            inner, below = bare(get_args(inner)[1]), f"{below}.{NAMED.get(name, '<role>')}"
        if dataclasses.is_dataclass(inner):
            yield from records(inner, below)  # type: ignore[arg-type]


def type_name(hint: Any) -> str:
    """A type in words: "text", "integer or null", "`max` or `min`"."""
    inner = bare(hint)
    null = " or null" if inner is not hint else ""
    names = {int: "integer", float: "number", bool: "true or false", str: "text", Any: "section"}
    if get_origin(inner) is Literal:
        return " or ".join([f"`{choice}`" for choice in get_args(inner)]) + null
    if get_origin(inner) in (tuple, list):
        return f"list of {type_name(get_args(inner)[0])}{null}"
    if get_origin(inner) is dict or dataclasses.is_dataclass(inner):
        return f"section{null}"
    return names.get(inner, str(inner)) + null
