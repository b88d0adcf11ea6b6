"""Graders that compare a response with its record: the same text, the same number, a pattern, a JSON schema.

A record whose column is null has no score (None); a record without the column is a mistake."""

import importlib
import json
import re
import string
import unicodedata
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

from jaxrlhf.errors import nearest, one_line, show
from jaxrlhf.rewards.math_text import Answer, last_number, marked, read

ARTICLES = re.compile(r"\b(?:a|an|the)\b", re.I)
FENCED = re.compile(r"^[ \t]*```[ \t]*(?:json)?[ \t]*\n(.*?)^[ \t]*```", re.S | re.M | re.I)


def right_answers(record: Mapping[str, Any], column: str, grader: str) -> list[Any] | None:
    """What the column of a record says is right: a value, or any of a list. None where it is null. Raises ValueError,
    in one line, where there is no such column."""
    if column not in record:
        raise ValueError(f"{grader}: {column}: missing among {', '.join(record)}")
    given = record[column]
    return None if given is None else [*given] if isinstance(given, (list, tuple)) else [given]


# ---- the same text --------------------------------------------------------------------------------------------------

IGNORED = {
    "case": str.casefold,
    "punctuation": lambda text: "".join(letter for letter in text if not is_punctuation(letter)),
    "articles": lambda text: ARTICLES.sub(" ", text),
    "accents": lambda text: "".join(
        letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter)
    ),
    "blanks": lambda text: " ".join(text.split()),
}


def is_punctuation(letter: str) -> bool:
    return letter in string.punctuation or unicodedata.category(letter).startswith("P")


def exact_match(
    responses: list[str],
    records: list[dict[str, Any]],
    column: str = "answer",
    ignore: tuple[str, ...] | list[str] = ("blanks",),
) -> list[float | None]:
    """1 where the response is what the column says, or one of its list; else 0.

    Args:
        ignore: differences that do not count, in this order: case, punctuation, articles (a, an, the), accents, blanks
            (their number, and those at the ends). All but accents is how SQuAD compares (Rajpurkar et al. 2016).
    """
    for name in ignore:
        if name not in IGNORED:
            raise ValueError(f"exact_match: ignore: {show(name)}: {nearest(name, [*IGNORED])}")

    def plain(value: Any) -> str:
        text = str(value)
        for name, without in IGNORED.items():
            text = without(text) if name in ignore else text
        return text

    rights = [right_answers(record, column, "exact_match") for record in records]
    return [
        None if right is None else float(plain(response) in map(plain, right))
        for response, right in zip(responses, rights, strict=True)
    ]


# ---- the same number ------------------------------------------------------------------------------------------------


def numeric(
    responses: list[str],
    records: list[dict[str, Any]],
    column: str = "answer",
    tolerance: float = 0.0,
    relative: float = 0.0,
    find: Literal["last", "marked"] = "last",
) -> list[float | None]:
    r"""1 where the answer of the response is the number of the column, else 0: no library, no formulas (math_strict
    and math_lenient compare those). 1,200 is 1200.0, 3/4 is 0.75, 50% is 50 and 0.5.

    Args:
        tolerance: difference that does not count; the larger of it and ``relative`` times the right number.
        find: "marked": the answer is what the last \boxed{} or #### says; "last": without such a mark, the last number.
    """
    if find not in ("last", "marked"):
        raise ValueError(f"numeric: find: {show(find)}: expected last or marked")
    allowed, part = Fraction(str(tolerance)), Fraction(str(relative))
    scores: list[float | None] = []
    for response, record in zip(responses, records, strict=True):
        rights = right_answers(record, column, "numeric")
        values = [value for right in rights or () for value in right_number(right, column)]
        given = number_of(response, find)
        near = lambda right, given=given: any(
            abs(one - right) <= max(allowed, part * abs(right)) for one in (given.values if given else ())
        )
        scores.append(None if rights is None else float(any(map(near, values))))
    return scores


def number_of(text: str, find: str = "last") -> Answer | None:
    """The number that a text marks, or its last one."""
    mark = marked(text)
    if mark is None:
        return last_number(text) if find == "last" else None
    return read(mark) or last_number(mark)


def right_number(right: Any, column: str) -> frozenset[Fraction]:
    """The number of a record, or of the solution that it has. Raises ValueError, in one line, where there is none."""
    found = number_of(str(right))
    if found is None or not found.values:
        raise ValueError(f"numeric: {column}: {show(right)}: expected a number, or a solution that marks one")
    return found.values


# ---- a pattern ------------------------------------------------------------------------------------------------------


class Regex:
    """1 where the pattern matches the response, else 0; with a ``column`` where a group of its last match is what the
    column says.

    Args:
        pattern: a regular expression of Python's re; (?is) in front ignores case, and lets . match ends of lines. On
            what a policy writes, nested repeats such as (a+)+ can take very long.
        column: of the records; None: the match alone counts.
        group: the number or name of the group that is compared, stripped; 0: the whole match.
        whole: the pattern has to match the whole response.
    """

    def __init__(self, pattern: str, column: str | None = None, group: int | str = 1, whole: bool = False):
        try:
            self.pattern = re.compile(pattern)
        except (re.error, RecursionError) as error:
            raise ValueError(f"regex: pattern: {show(pattern)}: {one_line(error)}") from None
        groups = [*range(self.pattern.groups + 1), *self.pattern.groupindex]
        if column is not None and group not in groups:
            raise ValueError(f"regex: group: {show(group)}: no group of {show(pattern)}; choices: {groups}")
        self.column, self.group, self.whole = column, group, whole

    def __call__(self, responses: list[str], records: list[dict[str, Any]]) -> list[float | None]:
        return [self.grade(response, record) for response, record in zip(responses, records, strict=True)]

    def grade(self, response: str, record: dict[str, Any]) -> float | None:
        """The score of one response."""
        if self.whole:
            found = self.pattern.fullmatch(response)
        elif self.column is None:
            found = self.pattern.search(response)
        else:
            found = next(reversed([*self.pattern.finditer(response)]), None)
        if self.column is None:
            return float(found is not None)
        rights = right_answers(record, self.column, "regex")
        said = found and found[self.group]
        return None if rights is None else float(said is not None and said.strip() in [str(r).strip() for r in rights])


# ---- a JSON schema --------------------------------------------------------------------------------------------------


class JsonSchema:
    """1 where the response is JSON of the schema, else 0 (extra ``graders``: the library jsonschema).

    Args:
        schema: a JSON schema; {}: any JSON. Its $ref refer to itself; nothing is downloaded.
        column: of the records, whose schema (an object, or JSON) counts in place of ``schema``.
        fenced: the JSON may be the last block that is fenced by ```json or ```, with other text around it.
    """

    def __init__(self, schema: dict[str, Any] | None = None, column: str | None = None, fenced: bool = True):
        if (schema is None) == (column is None):
            raise ValueError("json_schema: expected either schema, or column of the records")
        try:
            self.library = importlib.import_module("jsonschema")
        except ModuleNotFoundError:
            raise ImportError("json_schema: needs jsonschema; pip install 'jaxrlhf[graders]'") from None
        self.column, self.fenced = column, fenced
        self.validator = None if schema is None else self.validator_of(schema, "schema")

    def __call__(self, responses: list[str], records: list[dict[str, Any]]) -> list[float | None]:
        return [self.grade(response, record) for response, record in zip(responses, records, strict=True)]

    def validator_of(self, schema: Any, where: str) -> Any:
        """What checks JSON. Raises ValueError, in one line, where ``schema`` is none."""
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
            kind = self.library.validators.validator_for(schema, default=self.library.Draft202012Validator)
            kind.check_schema(schema)
        except (ValueError, RecursionError, self.library.exceptions.SchemaError) as error:
            said = getattr(error, "message", error)
            raise ValueError(f"json_schema: {where}: {show(schema)}: no JSON schema: {one_line(said)[:100]}") from None
        return kind(schema, registry=importlib.import_module("referencing").Registry())

    def grade(self, response: str, record: dict[str, Any]) -> float | None:
        """The score of one response."""
        validator = self.validator
        if self.column is not None:
            rights = right_answers(record, self.column, "json_schema")
            if rights is None:
                return None
            validator = self.validator_of(rights[0], self.column)
        blocks = FENCED.findall(response) if self.fenced else []
        try:
            value = json.loads(blocks[-1] if blocks else response, parse_constant=refuse)
            return float(validator.is_valid(value))  # pyright: ignore[reportOptionalMemberAccess]
        except (ValueError, RecursionError):  # no JSON, a number of too many digits, too deep
            return 0.0


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
