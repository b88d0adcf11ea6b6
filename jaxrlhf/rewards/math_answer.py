r"""Rewards for mathematical problems: 1 where the response has the record's answer, 0 elsewhere.

A record's ``answer`` is a number, a formula, a word, a solution that ends in "#### 42" (GSM8K: Cobbe et al. 2021) or
\boxed{42} (MATH: Hendrycks et al. 2021), or a list of answers of which any will do. ``strict`` wants the response to
mark its answer so; ``lenient`` takes also the last number or formula of a response without a mark. Report both: what a
policy learns first is the mark.

    the last mark counts; its braces may be nested      \boxed{\frac{\sqrt{3}}{2}}
    numbers are compared by value                       1,200 = 1 200 = 1200.0, 3/4 = 0.75 = \frac34, 2 1/2 = 2.5
    a percentage is its number or its fraction          50% = 50 = 0.5
    units, currencies and a last full stop are left out $5. = 5 dollars = 5
    a variable may be named                             x = 5 is 5, and is not y = 5
    sets, intervals, tuples, formulas                   as math-verify compares them

Decimals are equal where they are exactly so; a decimal is a fraction or root to 6 places. The rest is the judgement of
math-verify, which runs in a process of its own (math_worker.py)."""

from typing import Any

from jaxrlhf.rewards.math_text import Answer, marked, mentioned, read
from jaxrlhf.rewards.math_worker import Pair, equal_answers


def strict(responses: list[str], records: list[dict[str, Any]], column: str = "answer") -> list[float]:
    r"""f[len(responses)]: 1 where the last \boxed{} or #### of a response is what ``column`` of its record says.

    Raises ValueError for a record without an answer, ImportError without math-verify."""
    return score([[read(text) for text in [marked(response)] if text] for response in responses], records, column)


def lenient(responses: list[str], records: list[dict[str, Any]], column: str = "answer") -> list[float]:
    """f[len(responses)]: as strict, and for a response without a mark 1 where its last number or formula is the answer,
    or for an answer in words, what it says behind "answer is" or in its last line."""
    answers: list[list[Answer | None]] = [
        [*mentioned(response)] if (text := marked(response)) is None else [read(text)] for response in responses
    ]
    return score(answers, records, column)


def score(answers: list[list[Answer | None]], records: list[dict[str, Any]], column: str) -> list[float]:
    """1 where one of a response's answers (at most a few readings of one text) equals one of its record's."""
    jobs: dict[Pair, bool] = {}
    compared: list[list[bool | Pair]] = []
    for given, record in zip(answers, records, strict=True):
        pairs = [compare(right, other) for right in expected(record, column) for other in given if other]
        compared.append(pairs)
        jobs |= dict.fromkeys([pair for pair in pairs if isinstance(pair, tuple)], False)
    jobs = dict(zip(jobs, equal_answers([*jobs]), strict=True))
    return [float(any(jobs[pair] if isinstance(pair, tuple) else pair for pair in pairs)) for pairs in compared]


def compare(right: Answer, other: Answer) -> bool | Pair:
    """Whether they are equal, or what math-verify is to compare."""
    if right.words and other.words:
        return right.words == other.words
    if right.values & other.values or right.text == other.text:
        return True
    if right.decimal and other.decimal:
        return False
    return right.text, other.text


def expected(record: dict[str, Any], column: str) -> list[Answer]:
    """The answers that a record's ``column`` gives. Raises ValueError where there is none."""
    given = record.get(column)
    found = []
    for one in given if isinstance(given, (list, tuple)) else [given]:
        text = "" if one is None else str(one)
        inner = marked(text)
        found.append(read(text if inner is None else inner))
    answers = [answer for answer in found if answer]
    if not answers:
        shown = f"{str(given)[:60]!r}" if column in record else f"missing among {', '.join(record)}"
        raise ValueError(
            f"math_answer: {column}: {shown}: expected a number, formula or word, or a solution that marks it"
        )
    return answers
