"""Code of the user's that every process of a run calls for its own rows: what one of them raises, all of them raise."""

from collections.abc import Callable
from typing import TypeVar, cast

import jax

from jaxrlhf.hosts import processes
from jaxrlhf.rewards.graders import GraderError

T = TypeVar("T")


class RaisedByAll:
    """An error that every process of a run raises at this point, as one of them did."""


class FailureOfAll(RaisedByAll, GraderError):
    """A reward function raised something, or took too long."""


class MistakeOfAll(RaisedByAll, ValueError):
    """A reward function did not answer with numbers."""


def raised_by_all(error: BaseException) -> bool:
    """Whether all processes of the run, which may be one, have raised ``error``."""
    return not processes.several() or isinstance(error, RaisedByAll)


def together(work: Callable[[], T]) -> T:
    """What ``work`` returns. Where it raises GraderError or ValueError on one process, all processes of the run raise
    that here: none of them begins what needs all, so that they can save what they have."""
    if not processes.several():
        return work()
    found, failed, problem = None, None, ""
    try:
        found = work()
    except (GraderError, ValueError) as error:
        kind = FailureOfAll if isinstance(error, GraderError) else MistakeOfAll
        failed, problem = error, f"{kind.__name__} process {jax.process_index()}: {error}"
    if first := processes.first_told(problem):
        name, _, text = first.partition(" ")
        raise (FailureOfAll if name == FailureOfAll.__name__ else MistakeOfAll)(text) from failed
    return cast(T, found)
