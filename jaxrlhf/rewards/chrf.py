"""A grader of translations: how many character n-grams a response shares with a reference (extra ``graders``)."""

import importlib
from typing import Any

from jaxrlhf.errors import show
from jaxrlhf.rewards.answers import right_answers


class ChrF:
    """The chrF of the response with the reference of its record, 0 to 1 (sacrebleu's own number over 100).

        chrF = (1 + beta^2) P R / (beta^2 P + R)        P, R: means over n of the precision and recall of n-grams

    Blanks do not count. With several references the best one counts. Orders that either text is too short for are left
    out of the means; 0 of an empty response.

    Args:
        column: of the records: the reference, a text or a list of texts; null: no score (None).
        char_order: the longest n-grams of characters.
        word_order: the longest n-grams of words; 2 is chrF++ (Popović 2017), 0 none.
        beta: recall counts beta times as much as precision.
        lowercase: case does not count.

    Raises:
        ValueError: a number out of range; a record without the column; a reference that is no text, or an empty one.
        ImportError: sacrebleu is not installed.

    Source: Popović 2015 (https://aclanthology.org/W15-3049), as sacrebleu computes it (Post 2018, arXiv:1804.08771).
    """

    def __init__(
        self,
        column: str = "answer",
        char_order: int = 6,
        word_order: int = 0,
        beta: int = 2,
        lowercase: bool = False,
    ):
        for name, value, least in (("char_order", char_order, 1), ("word_order", word_order, 0), ("beta", beta, 1)):
            if type(value) is not int or value < least:
                raise ValueError(f"chrf: {name}: {show(value)}: expected an integer of at least {least}")
        try:
            library = importlib.import_module("sacrebleu.metrics.chrf")
        except ModuleNotFoundError:
            raise ImportError("chrf: needs sacrebleu; pip install 'jaxrlhf[graders]'") from None
        self.metric = library.CHRF(char_order, word_order, beta, lowercase)
        self.column = column

    def __call__(self, responses: list[str], records: list[dict[str, Any]]) -> list[float | None]:
        return [self.grade(response, record) for response, record in zip(responses, records, strict=True)]

    def grade(self, response: str, record: dict[str, Any]) -> float | None:
        """The score of one response."""
        references = right_answers(record, self.column, "chrf")
        if references is None:
            return None
        if not references or not all(isinstance(one, str) and one.strip() for one in references):
            raise ValueError(f"chrf: {self.column}: {show(record[self.column])}: expected a text, or a list of texts")
        return self.metric.sentence_score(response, references).score / 100
