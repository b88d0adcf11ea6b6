"""Graders of how unlike a response is to itself, to the other responses to its prompt, and to a corpus; and of how much
the responses to a prompt agree.

N-grams are of words (what blanks separate), or of token ids. A number of the whole group would be the same for all its
responses, and so teach nothing where they are each other's baseline: each response is graded by its own part in it."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from etils import epath

from jaxrlhf.errors import nearest, one_line, show
from jaxrlhf.rewards.math_text import final_answer
from jaxrlhf.rewards.ngrams import bleu_with_others, distinct, ngrams

Pieces = Sequence[Hashable]
PART = 1_000_000  # n-grams of a corpus that are sorted at once


def pieces_of(responses: list[str], token_ids: list[list[int]], unit: str, n: int, grader: str) -> list[Pieces]:
    """The words or token ids of each response. Raises ValueError, in one line, for another unit or n below 1."""
    if unit not in ("words", "tokens"):
        raise ValueError(f"{grader}: unit: {show(unit)}: {nearest(unit, ('words', 'tokens'))}")
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"{grader}: n: {show(n)}: expected an integer of at least 1")
    return [*token_ids] if unit == "tokens" else [text.split() for text in responses]


def in_groups(values: Sequence[Any], groups: list[int], work: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """What ``work`` makes of the values of each prompt's responses, in their order."""
    found: list[Any] = []
    start = 0
    for at in range(1, len(groups) + 1):
        if at == len(groups) or groups[at] != groups[start]:
            found += work([*values[start:at]])
            start = at
    return found


# ---- in itself ------------------------------------------------------------------------------------------------------


def distinct_n(
    responses: list[str],
    records: list[dict[str, Any]],
    token_ids: list[list[int]],
    n: int = 2,
    unit: Literal["words", "tokens"] = "words",
) -> list[float]:
    """The different n-grams of a response over all of its n-grams (Li et al. 2016, arXiv:1510.03055); 0 of none."""
    each = [distinct([pieces], n) for pieces in pieces_of(responses, token_ids, unit, n, "distinct")]
    return [0.0 if math.isnan(value) else value for value in each]


def repetition(
    responses: list[str],
    records: list[dict[str, Any]],
    token_ids: list[list[int]],
    n: int = 3,
    unit: Literal["words", "tokens"] = "words",
) -> list[float]:
    """Minus the share of a response's n-grams that were there before: 0 where none repeats, towards -1 where all do."""
    each = [distinct([pieces], n) for pieces in pieces_of(responses, token_ids, unit, n, "repetition")]
    return [0.0 if math.isnan(value) else value - 1 for value in each]


# ---- in its group ---------------------------------------------------------------------------------------------------


def self_bleu(responses: list[str], records: list[dict[str, Any]], groups: list[int]) -> list[float | None]:
    """The BLEU-4 of a response with the others to its prompt as references (Zhu et al. 2018, arXiv:1802.01886): 1 where
    they are the same, so that variety needs a weight below 0. None of an empty response, and of one that is alone."""
    found = in_groups([text.split() for text in responses], groups, bleu_with_others)
    return [None if math.isnan(value) else value for value in found]


def unlike_others(
    responses: list[str],
    records: list[dict[str, Any]],
    token_ids: list[list[int]],
    groups: list[int],
    n: int = 2,
    unit: Literal["words", "tokens"] = "words",
) -> list[float | None]:
    """The share of a response's different n-grams that no other response to its prompt has; 0 of none. None of a
    response that is alone."""

    def work(group: list[Pieces]) -> list[float | None]:
        grams = [{*ngrams(pieces, n)} for pieces in group]
        holders = Counter(gram for mine in grams for gram in mine)
        own: list[float | None] = [sum(holders[gram] == 1 for gram in mine) / max(len(mine), 1) for mine in grams]
        return own if len(group) > 1 else [None]

    return in_groups(pieces_of(responses, token_ids, unit, n, "unlike_others"), groups, work)


class Agreement:
    r"""How much the responses to a prompt agree on their answer.

    Args:
        answer: "number": what the last \boxed{} or #### says, or the last number; "whole": the text; else a regular
            expression, whose first group is the answer, of its last match.
        of: "own": the share of the group that gives the answer of this response; "majority": 1 where it gives the
            answer that most of the group give, of equals the first (TTRL, Zuo et al. 2025, arXiv:2504.16084); "group":
            the share of the group that gives that answer, the same number for all: to log, with weight 0. A response
            without an answer has 0, except by "group", and counts in the group.
    """

    def __init__(self, answer: str = "number", of: Literal["own", "majority", "group"] = "own"):
        if of not in ("own", "majority", "group"):
            raise ValueError(f"agreement: of: {show(of)}: {nearest(of, ('own', 'majority', 'group'))}")
        self.of, self.find = of, {"number": final_answer, "whole": str.strip}.get(answer) or self.by_pattern(answer)

    @staticmethod
    def by_pattern(text: str) -> Callable[[str], str | None]:
        """Finds what the first group of the last match says."""
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise ValueError(f"agreement: answer: {show(text)}: {one_line(error)}") from None
        if not pattern.groups:
            raise ValueError(f"agreement: answer: {show(text)}: expected number, whole, or a pattern with a group")
        return lambda response: next(reversed([found[1] for found in pattern.finditer(response)]), None)

    def __call__(self, responses: list[str], records: list[dict[str, Any]], groups: list[int]) -> list[float]:
        return in_groups([self.find(response) for response in responses], groups, self.grade)

    def grade(self, answers: list[str | None]) -> list[float]:
        """The scores of one group."""
        votes = Counter(answer for answer in answers if answer is not None)
        top, most = votes.most_common(1)[0] if votes else (None, 0)
        if self.of == "group":
            return [most / len(answers)] * len(answers)
        if self.of == "majority":
            return [float(answer is not None and answer == top) for answer in answers]
        return [votes[answer] / len(answers) if answer is not None else 0.0 for answer in answers]


# ---- against a corpus -----------------------------------------------------------------------------------------------


class Novelty:
    """The share of a response's n-grams of words that are not in a corpus; 0 of none.

    Args:
        path: a text file, of which every line is a text, or a .jsonl file.
        column: of the .jsonl file.
        n: words of an n-gram, which does not go over the end of a text.

    The corpus is kept as 8 bytes for each of its different n-grams.
    """

    def __init__(self, path: str, column: str = "text", n: int = 4):
        pieces_of([], [], "words", n, "novelty")
        self.n, self.path, self.column = n, path, column
        parts: list[np.ndarray] = [np.zeros(0, np.int64)]
        codes: list[int] = []
        for text in self.texts():
            codes += map(hash, ngrams(text.split(), n))
            if len(codes) > PART:
                parts, codes = [np.union1d(parts[0], np.array(codes, np.int64))], []
        self.known = np.union1d(parts[0], np.array(codes, np.int64))
        if not len(self.known):
            raise ValueError(f"novelty: path: {path}: holds no {n}-gram of words; expected a corpus")

    def texts(self) -> Iterator[str]:
        """The texts of the corpus. Raises ValueError, in one line, where there are none."""
        file = epath.Path(self.path)
        if not file.exists():
            raise ValueError(f"novelty: path: {self.path}: no such file; expected a text file or .jsonl")
        with file.open() as lines:
            for number, line in enumerate(lines, 1):
                if not self.path.endswith(".jsonl"):
                    yield line
                elif line.strip():
                    yield self.text_in(line, number)

    def text_in(self, line: str, number: int) -> str:
        """The column of a line of .jsonl."""
        try:
            row = json.loads(line)
        except ValueError:
            raise ValueError(f"novelty: path: {self.path}:{number}: {show(line)}: no JSON") from None
        if not isinstance(row, dict) or not isinstance(row.get(self.column), str):
            there = ", ".join(row) if isinstance(row, dict) else show(row)
            raise ValueError(f"novelty: column: {self.column}: no text at {self.path}:{number}; it has {there}")
        return row[self.column]

    def __call__(self, responses: list[str], records: list[dict[str, Any]]) -> list[float]:
        return [self.grade(response) for response in responses]

    def grade(self, response: str) -> float:
        """The score of one response."""
        grams = ngrams(response.split(), self.n)
        codes = np.array([hash(gram) for gram in grams], np.int64)
        new = ~np.isin(codes, self.known)
        return float(np.array([*grams.values()]) @ new) / grams.total() if grams else 0.0
