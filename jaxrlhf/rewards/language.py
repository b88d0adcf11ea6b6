"""A grader of the language of a response, by the library py3langid (extra ``graders``), whose model comes with it."""

import copy
import functools
import importlib
from collections.abc import Sequence
from typing import Any

from jaxrlhf.errors import nearest, show

LETTERS = 10  # fewer say too little


@functools.cache
def load_model() -> Any:
    """The model, read once. Raises ImportError, in one line, without py3langid."""
    try:
        library = importlib.import_module("py3langid.langid")
    except ModuleNotFoundError:
        raise ImportError("language: needs py3langid; pip install 'jaxrlhf[graders]'") from None
    return library.LanguageIdentifier.from_model_file(library.MODEL_FILE, norm_probs=True)


class Language:
    """The probability that the response is in a language, by its letters; None of fewer than ``letters`` letters.

    Args:
        language: of ISO 639-1, such as en, de, zh.
        column: of the records, whose language counts in place of it; null: no score (None).
        among: the only languages that are told apart; with few, short texts are told apart better.
        letters: the fewest letters that are graded.

    Source: langid.py, Lui & Baldwin 2012.
    """

    def __init__(
        self,
        language: str | None = None,
        column: str | None = None,
        among: Sequence[str] | None = None,
        letters: int = LETTERS,
    ):
        if (language is None) == (column is None):
            raise ValueError("language: expected either language, or column of the records")
        self.model = copy.copy(load_model())
        self.known = sorted(map(str, self.model.labels))
        for name in among or ():
            self.check(name, "among")
        if among:
            self.known = [*among]
            self.model.set_languages([*among])
        self.language = None if language is None else self.check(language, "language")
        self.column, self.letters = column, letters

    def check(self, name: Any, where: str) -> str:
        """Raises ValueError, in one line, for a language that is not known."""
        if name not in self.known:
            raise ValueError(f"language: {where}: {show(name)}: unknown; {nearest(name, self.known, cutoff=0.5)}")
        return name

    def __call__(self, responses: list[str], records: list[dict[str, Any]]) -> list[float | None]:
        return [self.grade(response, record) for response, record in zip(responses, records, strict=True)]

    def grade(self, response: str, record: dict[str, Any]) -> float | None:
        """The score of one response."""
        wanted = self.language
        if self.column is not None:
            if self.column not in record:
                raise ValueError(f"language: {self.column}: missing among {', '.join(record)}")
            wanted = record[self.column] and self.check(record[self.column], self.column)
        if wanted is None or sum(map(str.isalpha, response)) < self.letters:
            return None
        return float(dict(self.model.rank(response))[wanted])
