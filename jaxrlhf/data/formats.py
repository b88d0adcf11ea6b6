"""How a row in any of the formats of its kind (KINDS) becomes a record of it.

A record has the words of jaxrlhf.data.record_kinds, whose values are text or messages; all other columns stay beside
them. What was recognised, and which columns were not used, is told with the record, and announced when a run starts.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxrlhf.data.conversations import fit_pair, fit_response, read_value, text_holds_messages, with_system
from jaxrlhf.data.record_kinds import (
    KINDS,
    SEGMENTS,
    USUAL,
    BadRecord,
    Words,
    boolean,
    check_record,
    closeness,
    nearest,
    number,
)

SYSTEM = ("system", "system_prompt")  # columns with a system prompt, beside any prompt or messages
CONVERSATIONS = ("prompt", "response", "chosen", "rejected", "messages")  # words whose values may be messages
PARTS = {"instruction": "input"}  # Alpaca: the second part of the prompt that the first column begins
USED_BY_TEMPLATES = ("tools",)  # beside messages
WEIGHTS = ("weight", "train", "training")  # of messages: how much they count, in OpenAI's files and axolotl's
EMPTY_IS_NULL = (
    "messages",
    "conversations",
    "conversation",
    "tools",
    "margin",
    "label",
    "input",
    "truncated",
    "tie",
)  # of CSV's cells


class Recognised(NamedTuple):
    """A row that could be used."""

    record: dict[str, Any]
    format: str  # what it was recognised as, for messages
    unused: tuple[str, ...]  # its columns that nothing uses


def recognise(row: Mapping[str, Any], kind: str, fields: Words, where: str, from_text: bool = False) -> Recognised:
    """The record of a row.

    Args:
        fields: our word -> the column that holds it; "" leaves the word out.
        where: the config's section, for messages.
        from_text: all values are text, as in CSV: numbers are read from them.

    Raises:
        BadRecord: in one line, where the row can't be used as ``kind``, or in two ways.
    """
    row = take_fields(row, fields, where)
    if from_text:
        row = {name: _cell(kind, name, value) for name, value in row.items()}
    known, words, notes = KINDS[kind], _choose(row, kind, fields, where), set[str]()
    columns = [*words.values(), *(part for column, part in PARTS.items() if column in words.values() and part in row)]
    taken = _values(row, words, notes)
    if not {*words} & {*SEGMENTS}:
        taken = fit_pair(taken, where, notes) if "chosen" in known.checks else fit_response(taken, where, notes)
    system = _system_column(row, taken, where)
    if system:
        columns = [system, *columns]
        taken = with_system(taken, row[system])
    if known.checks.get("label") is boolean:
        taken["label"] = truth(taken["label"])
    taken |= {name: truth(row[name]) for name in known.beside if known.checks[name] is boolean and name in row}
    left_out = {word for word in known.checks if word in row and word not in taken and word not in known.beside}
    record = {name: value for name, value in row.items() if name not in left_out} | taken
    check_record(record, known, words)
    chat = any(isinstance(taken.get(word), list) for word in CONVERSATIONS)
    used = {*columns, *(USED_BY_TEMPLATES if chat else ()), *known.beside}
    unused = left_out - used if known.passes_on else row.keys() - used
    weighted = [
        f"{words[word]}[].{key}"
        for word in CONVERSATIONS
        if word in words
        for key in WEIGHTS
        if _has_key(taken.get(word), key)
    ]
    return Recognised(record, _describe(columns, chat, notes), (*(name for name in row if name in unused), *weighted))


def _has_key(messages: Any, key: str) -> bool:
    return isinstance(messages, list) and any(turn.get(key) is not None for turn in messages)


def _describe(columns: Sequence[str], chat: bool, notes: set[str]) -> str:
    """What a row was recognised as: "chosen + rejected: messages, implicit prompt"."""
    what = [] if len(columns) == 1 and columns[0] in ("messages", "text") else ["messages" if chat else "text"]
    more = ", ".join([*what, *sorted(notes)])
    return " + ".join(columns) + (f": {more}" if more else "")


# ---- which format ---------------------------------------------------------------------------------------------------


def words_of(kind: str) -> set[str]:
    """What ``fields`` may name: the words of the kind, and the optional columns that its formats use."""
    optional = {"system"} if any({"prompt", "messages"} & set(words) for words in KINDS[kind].formats) else set()
    return {*KINDS[kind].checks, *optional}


def check_fields(fields: Words, kind: str, where: str) -> None:
    """Raises ValueError when ``fields`` (our word -> column) names a word that this kind of data doesn't have."""
    for word in fields:
        if word not in words_of(kind):
            raise ValueError(f"{where}.fields: {word!r} is not a field{nearest(word, words_of(kind))}")


def take_fields(row: Mapping[str, Any], fields: Words, where: str) -> dict[str, Any]:
    """The row with its columns renamed to our words; columns that ``fields`` doesn't name stay as they are.

    Raises BadRecord when a column that ``fields`` names is not in the row; "" names none: the word is left out.
    """
    record = {name: value for name, value in row.items() if name not in fields.values() and name not in fields}
    for word, column in fields.items():
        if column and column not in row:
            raise BadRecord(f"no column {column!r}, which {where}.fields.{word} names{nearest(column, row)}")
        if column:
            record[word] = row[column]
    return record


def formats_of(kind: str, fields: Words) -> list[Words]:
    """The formats that a row may have: where ``fields`` names words, those with these words under our own names."""
    named = [word for word in fields if any(word in words for words in KINDS[kind].formats)]
    left = [word for word in named if not fields[word]]
    fits = lambda words: all(words.get(word, word) == word for word in named) and not set(left) & set(words)
    found = [words for words in KINDS[kind].formats if fits(words)]
    asked = [words for words in found if set(named) & set(words)]
    return asked or found


def check_columns(columns: Iterable[str], kind: str, fields: Words, where: str) -> None:
    """Raises BadRecord, naming the nearest column, when no format of the kind can be filled from ``columns``."""
    columns, formats = list(columns), formats_of(kind, fields)
    if any(set(words.values()) <= set(columns) for words in formats):
        return
    ours = [words for words in formats if all(word == column for word, column in words.items())]
    ours = [words for words in ours if not any(set(other) < set(words) for other in ours)]
    if not {*SEGMENTS} & {*columns}:
        ours = [words for words in ours if {*words} != {*SEGMENTS}]  # of an environment, which is rare
    wanted = " or ".join(" + ".join(words) for words in ours)
    words = max([*ours, *formats], key=lambda words: closeness(tuple(words.values()), columns))
    missing = next(column for column in words.values() if column not in columns)
    others = [column for column in columns if column not in words.values()]
    raise BadRecord(
        f"no column {missing!r}{nearest(missing, others)}: expected {wanted}; {where}.fields renames columns"
    )


def _choose(row: Mapping[str, Any], kind: str, fields: Words, where: str) -> Words:
    check_columns(row, kind, fields, where)
    formats = formats_of(kind, fields)
    complete = [words for words in formats if all(row.get(column) is not None for column in words.values())]
    if not complete:
        named = next(words for words in formats if set(words.values()) <= set(row))
        raise BadRecord(f"{next(column for column in named.values() if row[column] is None)} is null")
    first = complete[0]
    if all(word == column for word, column in first.items()):
        return first
    used = {*first.values(), *(PARTS.get(column) for column in first.values())}
    rival = next(
        (
            other
            for other in complete[1:]
            if set(other) == set(first) and not set(other.values()) <= used and not _is_usual(other)
        ),
        None,
    )
    if rival:
        word = next(word for word in first if first[word] != rival[word])
        raise BadRecord(f"{word} may be {first[word]!r} or {rival[word]!r}; {where}.fields.{word} says which")
    return first


def _is_usual(words: Words) -> bool:
    return {word: words.get(word) for word in ("prompt", "response")} in USUAL


# ---- its values -----------------------------------------------------------------------------------------------------


def _cell(kind: str, name: str, value: str) -> Any:
    """What a CSV cell holds: a number under our words for them, nothing where it is empty and no text can be."""
    if name in EMPTY_IS_NULL and not value.strip():
        return None
    if name == "margin" or KINDS[kind].checks.get(name) is number:
        try:
            return float(value)
        except ValueError:
            raise BadRecord(f"{name} is {value[:40]!r}, expected a number") from None
    return value


def _values(row: Mapping[str, Any], words: Words, notes: set[str]) -> dict[str, Any]:
    """The values of the words, conversations as messages."""
    taken = {word: row[column] for word, column in words.items()}
    request = taken.get("prompt")
    if isinstance(request, Mapping) and "messages" in request:  # OpenAI: {"messages": [...], "tools": [...]}
        taken["prompt"] = request["messages"]
        if request.get("tools"):
            taken["tools"] = request["tools"]
    for word in CONVERSATIONS:
        if word in taken:
            taken[word] = read_value(taken[word], words[word], notes)
    if isinstance(taken.get("text"), str) and text_holds_messages(taken["text"]):
        raise BadRecord("text holds messages as JSON; fields: {messages: text} reads them")
    part = PARTS.get(words.get("prompt", ""))
    second = None if part is None else row.get(part)
    if isinstance(taken.get("prompt"), str) and isinstance(second, str) and second.strip():
        taken["prompt"] = f"{taken['prompt']}\n\n{second}"
    return taken


def truth(value: Any) -> Any:
    """True or false as data sets write them; anything else as it is, for the check of the record to refuse."""
    if isinstance(value, str):
        known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
        return known.get(value.strip().lower(), value)
    return bool(value) if not isinstance(value, bool) and value in (0, 1) else value


def _system_column(row: Mapping[str, Any], taken: Mapping[str, Any], where: str) -> str | None:
    """The column with a system prompt, where the row has one and there is a conversation that it can begin."""
    there = [column for column in SYSTEM if column in row]
    if len([column for column in there if row[column] is not None]) > 1:
        raise BadRecord(f"system may be {' or '.join(map(repr, there))}; {where}.fields.system says which")
    usable = "messages" in taken or "prompt" in taken or isinstance(taken.get("chosen"), list)
    return max(there, key=lambda column: row[column] is not None) if there and usable else None
