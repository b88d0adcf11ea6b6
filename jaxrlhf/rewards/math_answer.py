"""Rewards for word problems with a number as their answer: 1 where the response says it, 0 elsewhere.

A record's ``answer`` is a number, or a worked answer that ends in "#### 42", as in GSM8K (Cobbe et al. 2021).
``strict`` wants the response to mark its answer so (or in \\boxed{42}); ``lenient`` takes the last number that it
mentions. Report both: what a policy learns first is the mark.
"""

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")
MARKED = re.compile(r"####\s*[$€£]?\s*(\S+)|\\boxed\{\s*\\?[$€£]?\s*([^{}]*)\}")


def strict(responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """f[len(responses)]: whether the last answer that a response marks is the record's. Raises ValueError for a record
    without an answer."""
    return compare(responses, records, marked)


def lenient(responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """f[len(responses)]: whether the last number in a response is the record's answer. Raises ValueError as strict."""
    return compare(responses, records, last_number)


def compare(responses: list[str], records: list[dict[str, Any]], read: Callable[[str], Decimal | None]) -> list[float]:
    return [float(read(text) == expected(record)) for text, record in zip(responses, records, strict=True)]


def expected(record: dict[str, Any]) -> Decimal:
    """The number that a record's ``answer`` says."""
    text = str(record.get("answer", ""))
    found = marked(text) if "####" in text or "\\boxed" in text else last_number(text)
    if found is None:
        shown = f"{text[:60]!r}" if text else f"missing among {', '.join(record)}"
        raise ValueError(f"rewards: answer: {shown}: expected a number, or a worked answer that ends in #### and one")
    return found


def marked(text: str) -> Decimal | None:
    """The number behind the last #### or in the last \\boxed{}; None where there is none."""
    found = MARKED.findall(text)
    return last_number("".join(found[-1])) if found else None


def last_number(text: str) -> Decimal | None:
    """The last number in a text, thousands separators left out; None where there is none."""
    found = NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None
