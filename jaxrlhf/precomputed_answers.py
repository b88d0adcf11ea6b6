"""What networks answer before the scores are known: computed while the host still works the scores out.

``prepare`` stays one function and is traced twice. The program before the scores runs it with networks that record
their answers, and returns those alone (XLA leaves out the rest). The program after the scores runs it with networks
that replay them.
"""

from collections.abc import Iterable
from typing import Any

from flax import struct

from jaxrlhf.types import Ask, Batch, Nets, Sequences, Trees


class Answered(struct.PyTreeNode):
    """A batch whose responses have scores, and what networks answered about them before."""

    batch: Batch
    answers: tuple[Any, ...]


def recording(nets: Nets, answers: list[Any]) -> Nets:
    """``nets`` that append what ``read`` answers to ``answers``."""

    def read(trees: Trees, sequences: Sequences, /, *asks: Ask) -> tuple[Any, ...]:
        answers.append(nets.read(trees, sequences, *asks))
        return answers[-1]

    return nets._replace(read=read)


def replaying(nets: Nets, answers: Iterable[Any]) -> Nets:
    """``nets`` whose ``read`` gives ``answers``, one a call."""
    left = iter(answers)
    return nets._replace(read=lambda *_: next(left))
