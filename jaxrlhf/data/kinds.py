"""What a record must hold for each use of data, in one table: KINDS. A new use of data is a new row."""

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Check = Callable[[Any], str | None]  # a value -> what is wrong with it, or None


class BadRecord(ValueError):
    """One record that can't be used; ``skip_bad`` counts it instead of raising."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """The end of an error message: " (did you mean 'x'?)", or the choices when none is near."""
    choices = sorted(choices)
    near = difflib.get_close_matches(str(word), choices, n=3, cutoff=0.6)
    if near:
        return f" (did you mean {' or '.join(map(repr, near))}?)"
    shown = ", ".join(map(repr, choices[:20])) + (", ..." if len(choices) > 20 else "")
    return f" (there is {shown})" if choices else " (there is none)"


def text(value: Any) -> str | None:
    """Any text, the empty one too."""
    if not isinstance(value, str):
        return f"is {_type_name(value)}, expected text"
    if "\0" in value:
        return "holds a NUL byte"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid UTF-8 text"
    return None


def filled_text(value: Any) -> str | None:
    """Text with something to learn from."""
    return text(value) or (None if value.strip() else "is empty")


def messages(value: Any) -> str | None:
    """A list of {"role": text, "content": text}."""
    if not isinstance(value, list) or not value:
        return "is empty" if value == [] else f"is {_type_name(value)}, expected a list of messages"
    for turn, message in enumerate(value):
        if not isinstance(message, dict):
            return f"[{turn}] is {_type_name(message)}, expected an object with role and content"
        for key in ("role", "content"):
            if key not in message:
                return f"[{turn}] has no {key!r}" + nearest(key, message)
            wrong = text(message[key])
            if wrong:
                return f"[{turn}].{key} {wrong}"
    return None


def answered(value: Any) -> str | None:
    """Messages that end with something that the assistant said."""
    wrong = messages(value)
    if wrong:
        return wrong
    if value[-1]["role"] != "assistant":
        return f"ends with role {value[-1]['role']!r}, expected 'assistant'"
    return None if value[-1]["content"].strip() else "ends with an empty turn of the assistant"


def unanswered(value: Any) -> str | None:
    """Messages that wait for the assistant."""
    wrong = messages(value)
    if not wrong and value[-1]["role"] == "assistant":
        return "ends with role 'assistant': nothing is left to say"
    return wrong


def number(value: Any) -> str | None:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"is {_type_name(value)}, expected a number"
    return None if math.isfinite(value) else f"is {value}, expected a finite number"


def text_or(check: Check, text_check: Check = filled_text) -> Check:
    """Text, or else messages that pass ``check``."""
    return lambda value: text_check(value) if isinstance(value, str) else check(value)


def same_sort(record: Mapping[str, Any]) -> str | None:
    """The two sides of a pair are both text or both messages."""
    if isinstance(record["chosen"], str) != isinstance(record["rejected"], str):
        chosen, rejected = _type_name(record["chosen"]), _type_name(record["rejected"])
        return f"chosen is {chosen} and rejected is {rejected}, expected the same"
    return None


@dataclasses.dataclass(frozen=True)
class Kind:
    """The fields of one use of data. A record fills the first of ``forms`` whose fields it all has."""

    forms: tuple[tuple[str, ...], ...]
    checks: Mapping[str, Check]  # of the fields of every form, and of the optional ones
    whole: Callable[[Mapping[str, Any]], str | None] = lambda record: None  # of the fields together


KINDS: dict[str, Kind] = {
    "demonstrations": Kind(
        forms=(("prompt", "response"), ("messages",), ("text",)),
        checks={"prompt": text, "response": filled_text, "messages": answered, "text": filled_text},
    ),
    "preferences": Kind(
        forms=(("chosen", "rejected"),),
        checks={
            "chosen": text_or(answered),
            "rejected": text_or(answered),
            "prompt": text_or(unanswered, text),
            "margin": number,
        },
        whole=same_sort,
    ),
    "prompts": Kind(forms=(("prompt",), ("messages",)), checks={"prompt": text, "messages": unanswered}),
    "labels": Kind(forms=(("text", "label"),), checks={"text": filled_text, "label": number}),
}

# a CSV cell is text: how the other fields are read from it
FROM_TEXT: dict[str, Callable[[str], Any]] = {
    "messages": json.loads,
    "margin": lambda cell: float(cell) if cell.strip() else None,
    "label": float,
}


def find_kind(name: str) -> Kind:
    """The row of KINDS. Raises ValueError for a name that is not there."""
    if name not in KINDS:
        raise ValueError(f"kind of data: {name!r} is unknown{nearest(name, KINDS)}")
    return KINDS[name]


def form_of(kind: Kind, record: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The first form whose fields the record has (null is not having it)."""
    return next((form for form in kind.forms if all(record.get(field) is not None for field in form)), None)


def check_fields(fields: Mapping[str, str], kind: Kind, where: str) -> None:
    """Raises ValueError when ``fields`` (our word -> column) names a word that this kind of data doesn't have."""
    for word in fields:
        if word not in kind.checks:
            raise ValueError(f"{where}.fields: {word!r} is not a field{nearest(word, kind.checks)}")


def take_fields(row: Mapping[str, Any], fields: Mapping[str, str], kind: Kind, where: str) -> dict[str, Any]:
    """The row with its columns renamed to our words; columns that ``fields`` doesn't name stay as they are.

    Only a column that would make another form of the record than the one that ``fields`` asks for is left out.
    Raises BadRecord when a column that ``fields`` names is not in the row.
    """
    asked = [form for form in kind.forms if set(form) & set(fields)]
    other = {word for form in kind.forms for word in form}.difference(*asked) if asked else set()
    record = {name: value for name, value in row.items() if name not in other and name not in fields.values()}
    for word, column in fields.items():
        if column not in row:
            raise BadRecord(f"no column {column!r}, which {where}.fields.{word} names{nearest(column, row)}")
        record[word] = row[column]
    return record


def check_columns(columns: Iterable[str], kind: Kind, where: str) -> None:
    """Raises BadRecord, naming the nearest column, when no form of the kind can be filled from ``columns``."""
    columns = list(columns)
    if any(set(form) <= set(columns) for form in kind.forms):
        return
    wanted = " or ".join(" + ".join(form) for form in kind.forms)
    form = max(kind.forms, key=lambda form: _closeness(form, columns))
    missing = next(field for field in form if field not in columns)
    others = [column for column in columns if column not in form]
    raise BadRecord(
        f"no column {missing!r}{nearest(missing, others)}: expected {wanted}; {where}.fields renames columns"
    )


def check_record(record: Mapping[str, Any], kind: Kind, where: str) -> None:
    """Raises BadRecord, in one line, when the record can't be used as ``kind``."""
    check_columns(record, kind, where)
    form = form_of(kind, record)
    if form is None:
        empty = next(field for form in kind.forms for field in form if field in record and record[field] is None)
        raise BadRecord(f"{empty} is null")
    optional = set(kind.checks).difference(*kind.forms)
    for field in (*form, *optional):
        value = record.get(field)
        wrong = kind.checks[field](value) if value is not None else None
        if wrong:
            raise BadRecord(f"{field}{'' if wrong.startswith('[') else ' '}{wrong}")
    wrong = kind.whole(record)
    if wrong:
        raise BadRecord(wrong)
    for column, value in record.items():
        wrong = text(value) if isinstance(value, str) else None
        if wrong:
            raise BadRecord(f"{column} {wrong}")


def _closeness(form: tuple[str, ...], columns: list[str]) -> float:
    """How much of the form the columns look like: 1 a field that is there, less for one that is misspelt."""
    scores = [
        max((difflib.SequenceMatcher(None, field, column).ratio() for column in columns), default=0.0) for field in form
    ]
    return sum(score if score > 0.6 else 0.0 for score in scores) / len(form)


def _type_name(value: Any) -> str:
    names = {str: "text", bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
