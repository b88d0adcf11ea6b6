"""What ``prepare`` asks of networks and no score decides: computed while the host still works the scores out.

``prepare`` stays one function, and is traced twice: with networks that note what they answer, which is all that the
program before the scores returns (XLA leaves out the rest), and with networks that give those answers again.
"""

from collections.abc import Callable, Iterable
from typing import Any

from jaxrlhf.types import READING, Nets


def noting(nets: Nets, noted: list[Any]) -> Nets:
    """``nets``, whose answers are kept in ``noted``, one after the other."""

    def watched(ask: Callable) -> Callable:
        def asked(*given):
            noted.append(ask(*given))
            return noted[-1]

        return asked

    return nets._replace(**{name: watched(getattr(nets, name)) for name in READING})


def repeating(nets: Nets, answers: Iterable[Any]) -> Nets:
    """``nets`` that give ``answers``, one after the other, to what reads."""
    left = iter(answers)
    return nets._replace(**dict.fromkeys(READING, lambda *_: next(left)))
