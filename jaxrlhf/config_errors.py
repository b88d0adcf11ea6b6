"""What is said about a mistake in a config: one line with the key, the value, what was expected, the nearest choice."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from jaxrlhf.config_types import bare, hints, names_under, records, type_name, type_under
from jaxrlhf.wording import cut, nearest, one_line


class ConfigError(ValueError):
    """What is wrong with a config: one line for each mistake."""


EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section of key: value lines",
    "dataclass_type": "a section of key: value lines",
}


def explain(row: Mapping[str, Any], cls: type) -> str:
    """One mistake found by pydantic, in our words."""
    *inside, last = row["loc"][1:] or ("",)
    kind, value = row["type"], show(row["input"])
    if kind == "unexpected_keyword_argument":
        return f"unknown key (value {value}); {suggest(last, names_under(cls, inside), cls)}"
    if kind == "missing":
        return f"missing; expected {type_name(type_under(cls, row['loc'][1:])).replace('`', '')}"
    if kind == "literal_error":
        choices = get_args(bare(type_under(cls, row["loc"][1:])))
        near = nearest(row["input"], choices, "")
        return f"{value}: expected one of {', '.join(choices)}{f'; {near}' if near else ''}"
    return f"{value}: expected {EXPECTED.get(kind) or one_line(row['msg'])}"


def suggest(word: Any, choices: Sequence[Any], cls: type | None = None) -> str:
    """The choice nearest to ``word``; where none is near, a key of this name elsewhere in ``cls``, or all choices."""
    elsewhere = [path for path, record in records(cls) if word in hints(record) and path] if cls else []
    return nearest(word, [str(choice) for choice in choices], f"nearest: {elsewhere[0]}.{word}" if elsewhere else None)


def show(value: Any) -> str:
    """``value`` as one would write it, cut short."""
    return cut(json.dumps(value, ensure_ascii=False, default=str))


def dotted(keys: Sequence[Any]) -> str:
    return ".".join(map(str, keys))
