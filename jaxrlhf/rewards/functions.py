"""Rewards from a Python function of the user's: text and data record in, one number a response out."""

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.wording import cut, nearest, one_line

LARGEST = float(np.finfo(np.float32).max)
SHAPE = 'expected "package.module:name"'


@dataclasses.dataclass(frozen=True)
class RewardsConfig:
    """What scores the responses, where models.reward does not."""

    function: str | None = None  # "package.module:name" of (responses, records) -> floats; the module may lie here
    overlap: bool | None = None  # read reference and old values while it runs; null: where there is an accelerator


class RewardFunction:
    """A user's function, whose answers are checked.

    Raises ValueError, in one line, where it does not answer with one finite number a response; what the function itself
    raises goes through."""

    def __init__(self, name: str, function: Callable[[list[str], list[dict[str, Any]]], Iterable[Any]]):
        self.name, self.function = name, function

    def __call__(self, responses: list[str], records: list[dict[str, Any]]) -> np.ndarray:
        """f32[len(responses)]: the score of each response; ``records[i]`` is the data record of its prompt."""
        found, count = plain(self.function(responses, records)), len(responses)
        if isinstance(found, (str, bytes, Mapping, Set)) or not isinstance(found, Iterable):
            raise ValueError(f"{self}: returned {show(found)}: expected a list of {count} numbers, one a response")
        scores = [plain(score) for score in found]
        if len(scores) != count:
            raise ValueError(f"{self}: returned {len(scores)} scores: expected {count}, one a response")
        for at, score in enumerate(scores):
            # NaN fails the comparison too; a number beyond float32 would become infinite
            if not isinstance(score, (int, float)) or not abs(score) <= LARGEST:
                raise ValueError(f"{self}: score {at} is {show(score)}: expected a finite number")
        return np.array([float(score) for score in scores], np.float32)

    def __str__(self) -> str:
        return f"rewards.function: {self.name}"


def plain(score: Any) -> Any:
    """The Python number in an array or tensor of no dimension; anything else as it is."""
    return score.item() if getattr(score, "ndim", None) == 0 else score


def show(value: Any) -> str:
    """``value`` on one line, cut short."""
    return cut(one_line(repr(value)))


# ---- finding it -----------------------------------------------------------------------------------------------------


def resolve(name: str) -> RewardFunction:
    """The function called ``name``, "package.module:name". Modules of the working directory can be imported too, unless
    an installed one has the name.

    Raises ValueError, in one line that starts with "function: ", where there is none. What else the module raises while
    it is imported goes through."""
    module_name, colon, attribute = name.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise ValueError(f"function: {name}: {SHAPE}")
    module = import_module(name, module_name)
    if not hasattr(module, attribute):
        named = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"function: {name}: {module_name} has no {attribute}; {nearest(attribute, sorted(named))}")
    function: Any = getattr(module, attribute)
    if not callable(function):
        raise ValueError(f"function: {name}: {show(function)} can't be called: expected a function")
    return RewardFunction(name, function)  # type: ignore[arg-type]


def import_module(name: str, module_name: str):
    """The module, found in the working directory last. Raises ValueError where it, or what it imports, is missing."""
    here = os.getcwd()
    if here not in sys.path:  # the jaxrlhf script, unlike python -m, starts without it
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):  # it is there; what it imports is not
            raise ValueError(f"function: {name}: importing {module_name}: {one_line(error)}") from error
        beside = [path.stem for path in Path(here).glob("*.py")]
        hint = f"{SHAPE}, of an installed module or of one in {here}"
        raise ValueError(f"function: {name}: no module {error.name}; {nearest(module_name, beside, hint)}") from None
    except ImportError as error:
        raise ValueError(f"function: {name}: importing {module_name}: {one_line(error)}") from error
