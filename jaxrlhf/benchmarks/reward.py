"""A reward on the host for text that nobody wrote: how random tokens are decoded, and what scores them."""

from collections.abc import Iterable
from typing import Any

FUNCTION = "jaxrlhf.benchmarks.reward:letters"


class Words:
    """The part of a tokenizer that scoring asks for: token i is the word "wi"."""

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The words of ``ids``, with a blank between two."""
        return " ".join([f"w{ident}" for ident in ids])


def letters(responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """The letters and digits of a response modulo 7, over 7: cheap, and not the same for a whole group."""
    return [sum(map(len, text.split())) % 7 / 7 for text in responses]
