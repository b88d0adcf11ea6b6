"""A section of a config as a record, by strict rules; a mistake in it is one line that names the nearest choice."""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from jaxrlhf.config.field_types import bare, hints, names_under, records, type_name, type_under
from jaxrlhf.errors import nearest, one_line, show

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


def read_record(cls: type, section: Any, keys: tuple[str, ...]) -> tuple[Any, list[tuple[tuple, str]]]:
    """``section`` as the dataclass ``cls``, and the mistakes in it as (keys, text). ``keys``: where it stands.

    Strict JSON rules: no text or boolean for a number, no number for text; a whole number will do for a float. Extra
    keys are refused in every record below."""
    try:
        return adapter_of(cls).validate_json(json.dumps({"": section}))[""], []
    except ValidationError as error:
        rows = error.errors(include_url=False)
        return None, [((*keys, *row["loc"][1:]), explain(row, cls)) for row in rows]


@functools.cache
def adapter_of(cls: type) -> TypeAdapter:
    """The rules of ``cls``, which take longer to make than to apply."""
    rules = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return TypeAdapter(dict[str, cls], config=rules)  # type: ignore[valid-type]


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
