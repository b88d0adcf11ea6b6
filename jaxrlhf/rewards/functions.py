"""Rewards from Python functions of the user's: text and data records in, one number per response out."""

import asyncio
import copy
import dataclasses
import functools
import importlib
import inspect
import itertools
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Set, Sized
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxrlhf import user_code
from jaxrlhf.errors import cut, nearest, one_line
from jaxrlhf.rewards import trl
from jaxrlhf.types import Combine

LARGEST = float(np.finfo(np.float32).max)
SHAPE = 'expected "package.module:name"'


@dataclasses.dataclass(frozen=True)
class GraderConfig:
    """One of several graders of a response."""

    function: str  # as rewards.function
    weight: float = 1.0  # of its number in the score; 0: it is logged only
    required: bool = True  # it gives no number (None): the response is left out; false: the other graders score it
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)  # keywords for it, or to make one of a class


@dataclasses.dataclass(frozen=True)
class RewardsConfig:
    """What scores the responses, where models.reward does not."""

    function: str | None = None  # "package.module:name" of (responses, records) -> floats; the module may lie here
    functions: dict[str, GraderConfig] = dataclasses.field(default_factory=dict)  # several: the weighted sum counts
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)  # keywords for function
    # of several, in grpo: their sum is compared within the group of a prompt, or each is, and then they are summed
    normalize: Literal["sum_then_group", "group_then_sum"] = "sum_then_group"
    timeout: float | None = None  # seconds that a call of a function may take; null: any number
    overlap: bool | None = None  # read reference and old values while it runs; null: where there is an accelerator
    combine: Combine = "mean"  # one score of the list under models.reward; min: worst case; or mean - coef * variance
    variance_coef: float = 0.5  # mean_minus_variance: score lost for each unit of the members' variance

    @property
    def on_host(self) -> bool:
        """Whether functions score, and no reward model."""
        return self.function is not None or bool(self.functions)

    @property
    def apart(self) -> dict[str, float]:
        """Nets.apart: the weights of the functions that are normalised each by itself; empty: of none."""
        if self.normalize == "sum_then_group":
            return {}
        return {name: grader.weight for name, grader in self.functions.items() if grader.weight}


class RewardFunction:
    """A user's function, whose answers are checked.

    Raises ValueError, in one line, where it does not answer with one number, or None, a response; what the function
    itself raises goes through."""

    def __init__(self, name: str, function: Callable, where: str = "rewards.function"):
        self.name, self.function, self.where = name, function, where

    def __call__(self, responses: list[str], records: list[dict[str, Any]]) -> np.ndarray:
        """f32[len(responses)]: the score of each response, NaN where the function gives None, NaN or a masked number of
        NumPy's: it can't be scored.

        ``records[i]`` is the data record of its prompt; the function has its own copies, and may change them."""
        count = len(responses)
        found = self.function(list(responses), [copy.deepcopy(record) for record in records])
        found = plain(wait_for(found) if inspect.isawaitable(found) else found)
        if isinstance(found, (str, bytes, Mapping, Set)) or not isinstance(found, Iterable):
            raise ValueError(f"{self}: returned {show(found)}: expected a list of {count} numbers, one a response")
        scores = [plain(score) for score in itertools.islice(found, count + 1)]
        if len(scores) != count:
            given = len(found) if isinstance(found, Sized) else f"more than {count}" if scores[count:] else len(scores)
            raise ValueError(f"{self}: returned {given} scores: expected {count}, one a response")
        for at, score in enumerate(scores):
            # a number beyond float32 would become infinite
            if score is not None and (not isinstance(score, (int, float)) or abs(score) > LARGEST):
                raise ValueError(
                    f"{self}: score {at} is {show(score)}: expected a finite number, or None; response: "
                    f"{show(responses[at])}; record: {show(records[at])}"
                )
        return np.array([np.nan if score is None else float(score) for score in scores], np.float32)

    def __str__(self) -> str:
        return f"{self.where}: {self.name}"


def plain(score: Any) -> Any:
    """The Python number in an array or tensor of no dimension, None where it is masked; anything else as it is."""
    if np.ma.isMaskedArray(score) and score.ndim == 0 and np.ma.is_masked(score):
        return None
    return score.item() if getattr(score, "ndim", None) == 0 else score


def show(value: Any) -> str:
    """``value`` on one line, cut short."""
    return cut(one_line(repr(value)))


# ---- async functions ------------------------------------------------------------------------------------------------


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The loop, in a thread of its own, of all async functions: what they keep open between calls belongs to it. A
    notebook's thread has a loop that is running already."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async rewards", daemon=True).start()
    return loop


def wait_for(answer: Awaitable[Any]) -> Any:
    """What an async function returns."""

    async def finished() -> Any:
        return await answer

    return asyncio.run_coroutine_threadsafe(finished(), event_loop()).result()


# ---- finding it -----------------------------------------------------------------------------------------------------


def resolve(name: str, arguments: Mapping[str, Any] | None = None, where: str = "rewards.function") -> RewardFunction:
    """The function called ``name``, "package.module:name", or "trl:package.module:name" for one that takes what TRL
    passes. Modules of the working directory can be imported too, unless an installed one has the name.

    ``arguments``: keywords for it; a class becomes an instance made with them, when it is first called.
    Raises ValueError, in one line that starts with "function: ", where there is none. What else the module raises while
    it is imported goes through."""
    for_trl = name.startswith(trl.PREFIX)
    module_name, colon, attribute = name.removeprefix(trl.PREFIX).partition(":")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise ValueError(f"function: {name}: {SHAPE}")
    module = import_module(name, module_name)
    if not hasattr(module, attribute):
        named = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"function: {name}: {module_name} has no {attribute}; {nearest(attribute, sorted(named))}")
    function: Any = getattr(module, attribute)
    called = getattr(function, "__call__", None) if isinstance(function, type) else function  # noqa: B004
    if not callable(called) or (isinstance(function, type) and not inspect.isfunction(called)):
        raise ValueError(f"function: {name}: {show(function)} can't be called: expected a function")
    check_parameters(name, called, for_trl)
    bound = OnFirstCall(function, arguments or {}) if isinstance(function, type) else function
    if arguments and not isinstance(function, type):
        bound = functools.partial(function, **arguments)
    return RewardFunction(name, trl.Adapter(bound) if for_trl else bound, where)


class OnFirstCall:
    """An instance of a class, made when it is first called: a check of the config makes none."""

    def __init__(self, cls: type, arguments: Mapping[str, Any]):
        self.make, self.instance = functools.partial(cls, **arguments), None
        parameters = [*inspect.signature(cls.__call__).parameters.values()][1:]
        self.__signature__ = inspect.Signature(parameters)

    def __call__(self, *given: Any, **named: Any) -> Any:
        if self.instance is None:
            self.instance = self.make()
        return self.instance(*given, **named)


def check_parameters(name: str, function: Callable, for_trl: bool) -> None:
    """Raises ValueError where a function takes TRL's arguments and its name doesn't say so, or the other way round."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a builtin
        return
    shown = f"({', '.join(str(one) for one in parameters.values())})"
    if "completions" in parameters and not for_trl:
        raise ValueError(
            f"function: {name}: takes {cut(shown)}, as TRL calls it; expected (responses, records), or the name "
            f"{trl.PREFIX}{name}"
        )
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    if for_trl and not takes_any and "completions" not in parameters:
        plain_name = name.removeprefix(trl.PREFIX)
        raise ValueError(f"function: {name}: takes {cut(shown)}; expected TRL's completions; nearest: {plain_name}")


def import_module(name: str, module_name: str):
    """The module, found in the working directory and beside the config last.

    Raises ValueError where it, or what it imports, is missing."""
    user_code.extend_path()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):  # it is there; what it imports is not
            raise ValueError(f"function: {name}: importing {module_name}: {one_line(error)}") from error
        beside = [path.stem for folder in user_code.folders() for path in Path(folder).glob("*.py")]
        hint = f"{SHAPE}, of an installed module or of one in {', '.join(user_code.folders())}"
        raise ValueError(f"function: {name}: no module {error.name}; {nearest(module_name, beside, hint)}") from None
    except ImportError as error:
        raise ValueError(f"function: {name}: importing {module_name}: {one_line(error)}") from error
