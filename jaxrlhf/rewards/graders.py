"""Several graders of a response, and the score that they make together."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf import user_code
from jaxrlhf.errors import counted, one_line, show
from jaxrlhf.hosts.call_timeout import Interrupted, interruptible
from jaxrlhf.rewards.functions import GraderConfig, RewardFunction, RewardsConfig, resolve

RESERVED = ("mean", "std", "unscorable", "disagreement", "length_correlation")  # score/... metrics of ours
SAMPLES = ("This is a sample response.", "The answer is 42.\n#### 42")


class GraderError(RuntimeError):
    """A reward function raised something: one line, with the place in its file."""


class Graders(NamedTuple):
    """The reward functions of a run, called with the same responses and records."""

    functions: tuple[RewardFunction, ...]
    names: tuple[str, ...] = ()  # of rewards.functions; none for rewards.function alone
    weights: tuple[float, ...] = (1.0,)
    required: tuple[bool, ...] = (True,)
    timeout: float | None = None  # seconds that a call may take

    def __call__(self, responses: list[str], records: list[dict[str, Any]]) -> np.ndarray:
        """f32[len(responses), functions]: what each gives a response; NaN where none. Raises as ``answers``."""
        given = [answers(function, responses, records, self.timeout) for function in self.functions]
        return np.stack(given, axis=1)

    def combine(self, grades: np.ndarray) -> np.ndarray:
        """f32[B]: the score of each row of ``grades`` f32[B, functions]: the sum of weight x number over the functions.

        NaN, no score, where a required function gives none, or no function gives one. One that is not required adds
        nothing where it gives none. Functions of weight 0 have no say."""
        weights, required = np.array(self.weights), np.array(self.required)
        missing = np.isnan(grades)
        total = np.where(missing, 0.0, grades.astype(np.float64)) @ weights
        counts = weights != 0
        lost = (missing & required & counts).any(1) | (missing | ~counts).all(1)
        return np.where(lost, np.nan, total).astype(np.float32)

    def try_on(self, records: Sequence[dict[str, Any]], where: str) -> None:
        """Calls every function once, with a sample response to each of two ``records`` (of the data section ``where``).

        Raises ValueError, in one line, where one raises anything or does not answer with numbers."""
        some = [records[at % len(records)] for at in range(len(SAMPLES))]
        for function in self.functions:
            try:
                answers(function, list(SAMPLES), some, self.timeout)
            except GraderError as error:
                raise ValueError(f"{error} on a sample response to a record of {where}") from error


def answers(
    function: RewardFunction, responses: list[str], records: Sequence[dict[str, Any]], timeout: float | None = None
) -> np.ndarray:
    """What ``function`` gives the responses. Raises, in one line, GraderError where it raises anything (that is the
    cause of it) or takes more than ``timeout`` seconds, ValueError where this package did: what the function gives is
    no list of numbers, say."""
    try:
        with interruptible(timeout):
            return function(responses, list(records))
    except Interrupted as error:
        first = f", the first of them to the record {show(records[0])}" if records else ""
        raise GraderError(f"{function}: {error} to {counted(len(responses), 'response')}{first}") from error
    except (Exception, SystemExit) as error:
        if not user_code.raised_in(user_code.PACKAGE, error):
            raise GraderError(f"{function}: raised {user_code.describe(error)}") from error
        if str(error).startswith(str(function)):
            raise
        raise ValueError(f"{function}: {one_line(error)}") from error


# ---- from the config ------------------------------------------------------------------------------------------------


def configured(cfg: RewardsConfig) -> dict[str, tuple[str, GraderConfig]]:
    """Name -> (its place below ``rewards``, its config); the name of ``rewards.function`` alone is empty."""
    alone = {} if cfg.function is None else {"": ("", GraderConfig(cfg.function, arguments=cfg.arguments))}
    return alone | {name: (f"functions.{name}.", grader) for name, grader in cfg.functions.items()}


def find_graders(cfg: RewardsConfig) -> Graders | None:
    """The graders that the config names; None where it names none. Raises ValueError, in one line that starts with the
    key below ``rewards``, where one is not there."""
    found = configured(cfg)
    if not found:
        return None
    functions = tuple(found_function(place, grader) for place, grader in found.values())
    graders = [grader for _, grader in found.values()]
    return Graders(
        functions,
        tuple(name for name in found if name),
        tuple(grader.weight for grader in graders),
        tuple(grader.required for grader in graders),
        cfg.timeout,
    )


def gold_graders(name: str) -> Graders:
    """The function of eval.gold as a grader. Raises ValueError, in one line, where there is none."""
    try:
        return Graders((resolve(name, where="eval.gold"),))
    except ValueError as error:
        raise ValueError(f"eval.gold{str(error).removeprefix('function')}") from None


def found_function(place: str, grader: GraderConfig) -> RewardFunction:
    try:
        return resolve(grader.function, grader.arguments, f"rewards.{place}function")
    except ValueError as error:
        raise ValueError(f"{place}{error}") from None


def grader_problems(cfg: RewardsConfig) -> Iterator[str]:
    """What is wrong with the graders of a config, a line each."""
    if cfg.function is not None and cfg.functions:
        yield f"rewards.function: {cfg.function}: functions are given too; expected one of them"
    if cfg.arguments and cfg.function is None:
        yield "rewards.arguments: there is no rewards.function that takes them; expected functions.NAME.arguments"
    for name in cfg.functions:
        if not name.isidentifier() or name in RESERVED:
            taken = f"score/{name} is a metric of its own" if name in RESERVED else "no name for the metric score/NAME"
            yield f"rewards.functions.{name}: {taken}; expected another name, of letters, digits and _"
    if cfg.functions and not any(grader.weight for grader in cfg.functions.values()):
        yield "rewards.functions: the weight of each is 0, so nothing is rewarded; expected one of another weight"
    for place, grader in configured(cfg).values():
        try:
            found_function(place, grader)
        except ValueError as error:
            yield f"rewards.{error}"
