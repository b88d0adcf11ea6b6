"""Rewards from Python functions of the user's: text and data records in, one number per response out."""

import copy
import dataclasses
import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Set, Sized
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxrlhf import user_code
from jaxrlhf.errors import cut, nearest, one_line
from jaxrlhf.rewards import trl
from jaxrlhf.rewards.built_in import BUILT_IN
from jaxrlhf.rewards.event_loop import is_async, wait_for
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
    timeout: float | None = None  # as rewards.timeout, of this function; null: that one
    retries: int | None = None  # as rewards.retries, of this function; null: that one


@dataclasses.dataclass(frozen=True)
class RewardsConfig:
    """What scores the responses, where models.reward does not."""

    function: str | None = None  # "package.module:name" of (responses, records) -> floats; the module may lie here
    functions: dict[str, GraderConfig] = dataclasses.field(default_factory=dict)  # several: the weighted sum counts
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)  # keywords for function
    normalize: Literal["sum_then_group", "group_then_sum"] = "sum_then_group"  # of several: the sum, or each, by group
    timeout: float | None = None  # seconds that a function may take for one batch, retries included; null: any number
    deadline: float | None = None  # seconds that all functions together may take for one batch; null: any number
    on_timeout: Literal["stop", "unscorable"] = "stop"  # unscorable: a function that takes longer gives no number
    retries: int = 0  # calls after one that raised what may pass (no KeyError, TypeError, ...), 1, 2, 4, ... s later
    threads: bool = False  # call functions that are not async at the same time, in threads: signal.alarm fails there
    overlap: bool | None = None  # read reference and old values while it runs; null: where there is an accelerator
    sample_ahead: bool = False  # sample the next responses while it runs: they are older by this iteration's updates
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


class Details(NamedTuple):
    """What a function is given beside responses and records, where it has a parameter of the name."""

    token_ids: list[list[int]]  # of each response, with the EOS token that ended it
    ended: list[bool]  # the response ended with EOS or a stop text, and not by its length
    groups: list[int]  # one number a prompt: its responses are contiguous, and all of them are here
    max_new_tokens: int  # most tokens of a response


class RewardFunction:
    """A user's function, whose answers are checked.

    Raises ValueError, in one line, where it does not answer with one number, or None, a response; what the function
    itself raises goes through."""

    def __init__(self, name: str, function: Callable, where: str = "rewards.function"):
        self.name, self.function, self.where = name, function, where
        self.asks, self.is_async = asked_details(function), is_async(function)

    def __call__(
        self, responses: list[str], records: list[dict[str, Any]], details: Details | None = None
    ) -> np.ndarray:
        """f32[len(responses)]: the score of each response, NaN where the function gives None, NaN or a masked number of
        NumPy's: it can't be scored.

        ``records[i]`` is the data record of its prompt; the function has its own copies, and may change them."""
        found = self.call(responses, records, details)
        return self.checked(wait_for(found) if inspect.isawaitable(found) else found, responses, records)

    async def later(
        self, responses: list[str], records: list[dict[str, Any]], details: Details | None = None
    ) -> np.ndarray:
        """As a call, of an async function in the event loop."""
        return self.checked(await self.call(responses, records, details), responses, records)

    def call(self, responses: list[str], records: list[dict[str, Any]], details: Details | None) -> Any:
        """What the function returns."""
        assert details is not None or not self.asks, f"{self}: asks for {', '.join(self.asks)}"
        more = {name: copied(getattr(details, name)) for name in self.asks}
        return self.function(list(responses), [copy.deepcopy(record) for record in records], **more)

    def checked(self, found: Any, responses: list[str], records: list[dict[str, Any]]) -> np.ndarray:
        """The numbers in what the function returned."""
        count, found = len(responses), plain(found)
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


def copied(detail: Any) -> Any:
    """A list of its own for each function."""
    return [each[:] if isinstance(each, list) else each for each in detail] if isinstance(detail, list) else detail


def asked_details(function: Callable) -> tuple[str, ...]:
    """The details that a function has a parameter for, and ``arguments`` do not give already."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a builtin
        return ()
    given = function.keywords if isinstance(function, functools.partial) else {}
    return tuple(name for name in Details._fields if name in parameters and name not in given)


# ---- finding it -----------------------------------------------------------------------------------------------------


def resolve(name: str, arguments: Mapping[str, Any] | None = None, where: str = "rewards.function") -> RewardFunction:
    """The function called ``name``: one of BUILT_IN, "package.module:name", or "trl:package.module:name" for one that
    takes what TRL passes. Modules of the working directory can be imported too, unless an installed one has the name.

    ``arguments``: keywords for it; a class becomes an instance made with them, when it is first called.
    Raises ValueError, in one line that starts with "function: ", where there is none. What else the module raises while
    it is imported goes through."""
    for_trl = name.startswith(trl.PREFIX)
    module_name, colon, attribute = BUILT_IN.get(name, name.removeprefix(trl.PREFIX)).partition(":")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        near = nearest(name, sorted(BUILT_IN), SHAPE) if name.isidentifier() else SHAPE
        raise ValueError(f"function: {name}: {near}")
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
        self.is_async = inspect.iscoroutinefunction(cls.__call__)
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
