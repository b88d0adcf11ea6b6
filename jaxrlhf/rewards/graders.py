"""Several graders of a response, and the score that they make together."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.rewards import calls
from jaxrlhf.rewards.calls import CallLimits, GraderError, call_all
from jaxrlhf.rewards.functions import Details, GraderConfig, RewardFunction, RewardsConfig, resolve

RESERVED = ("mean", "std", "unscorable", "disagreement", "length_correlation")  # score/... metrics of ours
SAMPLES = ("This is a sample response.", "The answer is 42.\n#### 42")
SAMPLE_DETAILS = Details([[*text.encode()] for text in SAMPLES], [True] * len(SAMPLES), [0] * len(SAMPLES), 64)


class Graded(NamedTuple):
    """What the graders of a run gave."""

    grades: np.ndarray  # f32[len(responses), functions]; NaN where none
    seconds: tuple[float, ...]  # of each function


class Graders(NamedTuple):
    """The reward functions of a run, called with the same responses and records."""

    functions: tuple[RewardFunction, ...]
    names: tuple[str, ...] = ()  # of rewards.functions; none for rewards.function alone
    weights: tuple[float, ...] = (1.0,)
    required: tuple[bool, ...] = (True,)
    limits: CallLimits | None = None  # None: of nothing

    def grade(self, responses: list[str], records: Sequence[dict[str, Any]], details: Details | None = None) -> Graded:
        """What each function gives a response. Raises as calls.call_all."""
        count = len(self.functions)
        limits = self.limits or CallLimits((None,) * count, (0,) * count)
        found = call_all(self.functions, calls.ToGrade(responses, records, details), limits)
        return Graded(np.stack([one.grades for one in found], axis=1), tuple(one.seconds for one in found))

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

    def try_on(self, records: Sequence[dict[str, Any]], where: str, max_new_tokens: int = 64) -> None:
        """Calls every function once, with a sample response to each of two ``records`` (of the data section ``where``).

        Raises ValueError, in one line, where one raises anything or does not answer with numbers."""
        some = [records[at % len(records)] for at in range(len(SAMPLES))]
        for at, function in enumerate(self.functions):
            alone = self._replace(functions=(function,))
            if self.limits:
                picked = {"timeouts": self.limits.timeouts[at : at + 1], "retries": self.limits.retries[at : at + 1]}
                alone = alone._replace(limits=self.limits._replace(**picked, on_timeout="stop"))
            try:
                alone.grade(list(SAMPLES), some, SAMPLE_DETAILS._replace(max_new_tokens=max_new_tokens))
            except GraderError as error:
                raise ValueError(f"{error} on a sample response to a record of {where}") from error


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
        CallLimits(
            tuple(cfg.timeout if grader.timeout is None else grader.timeout for grader in graders),
            tuple(cfg.retries if grader.retries is None else grader.retries for grader in graders),
            cfg.deadline,
            cfg.on_timeout,
            cfg.threads,
        ),
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
