"""Environments of text: what answers a response with an observation, a reward, and whether the episode is over.

A user's class has two methods, which may be ``async``; both see many episodes at once::

    class Guess:
        def reset(self, records):  # the data record of each prompt -> a state of any kind for each
            return [{"secret": record["secret"]} for record in records]

        def step(self, states, responses):  # of the episodes that are not over; states may be changed in place
            return [Turn("too high", 0.0, False) if ... else Turn("", 1.0, True) for ...]
"""

import copy
import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set, Sized
from typing import Any, NamedTuple

from jaxrlhf import user_code
from jaxrlhf.errors import counted, one_line
from jaxrlhf.hosts.call_timeout import Interrupted, interruptible
from jaxrlhf.rewards.environments import EnvironmentConfig
from jaxrlhf.rewards.event_loop import wait_for
from jaxrlhf.rewards.functions import LARGEST, plain, show
from jaxrlhf.rewards.graders import SAMPLES, GraderError

Record = dict[str, Any]
METHODS = ("reset", "step")


class Turn(NamedTuple):
    """What an environment answers to a response."""

    observation: str | list[dict[str, Any]] = ""  # a text, or messages of a conversation: {"role": ..., "content": ...}
    reward: float | None = 0.0  # of the response; None: the episode can't be scored, and is left out
    done: bool = True  # the episode is over; the observation is then not read


class TextEnvironment:
    """A user's environment, whose answers are checked.

    Raises, in one line, GraderError where the user's code raises anything (that is the cause of it) or takes more than
    ``timeout`` seconds, ValueError where it does not answer with a state, or a Turn, for each episode."""

    def __init__(self, name: str, environment: Any, timeout: float | None = None):
        self.name, self.environment, self.timeout = name, environment, timeout
        self.metric_names: list[str] | None = None  # known once it was tried

    def __str__(self) -> str:
        return f"environment.function: {self.name}"

    def reset(self, records: Sequence[Record]) -> list[Any]:
        """The state of a new episode for each of the prompts' data records, of which it has its own copies."""
        found = self.call("reset", [copy.deepcopy(record) for record in records])
        return listed(self, "reset", found, len(records), "states")

    def step(self, states: list[Any], responses: list[str]) -> list[Turn]:
        """What answers each response of the episodes in ``states``."""
        found = listed(self, "step", self.call("step", list(states), list(responses)), len(states), "turns")
        return [checked(self, at, turn) for at, turn in enumerate(found)]

    def metrics(self, states: list[Any]) -> dict[str, float]:
        """Numbers on the finished episodes of an iteration, where the class has a method ``metrics``; else none."""
        if not states or not hasattr(self.environment, "metrics"):
            return {}
        found = self.call("metrics", list(states))
        is_number = lambda value: isinstance(plain(value), (int, float))
        if not isinstance(found, Mapping) or not all(
            str(name).isidentifier() and is_number(value) for name, value in found.items()
        ):
            raise ValueError(f"{self}: metrics: returned {show(found)}: expected a number by name")
        return {str(name): float(value) for name, value in found.items()}

    @property
    def tools(self) -> list[Mapping[str, Any]] | None:
        """The JSON schemas of functions that the policy may call, which go into its prompts; None: it has none."""
        return getattr(self.environment, "tools", None) or None

    def call(self, method: str, *given: Any) -> Any:
        """What the user's method returns."""
        try:
            with interruptible(self.timeout):
                found = getattr(self.environment, method)(*given)
                return wait_for(found) if inspect.isawaitable(found) else found
        except Interrupted as error:
            raise GraderError(f"{self}: {method}: {error} to {counted(len(given[0]), 'episode')}") from error
        except (Exception, SystemExit) as error:
            if not user_code.raised_in(user_code.PACKAGE, error):
                raise GraderError(f"{self}: {method}: raised {user_code.describe(error)}") from error
            raise ValueError(f"{self}: {method}: {one_line(error)}") from error

    def try_on(self, records: Sequence[Record], where: str) -> list[Turn]:
        """Resets episodes of two ``records`` (of the data section ``where``), answers each with a sample response,
        remembers what metrics there are, and returns the turns. Raises ValueError, in one line, where something is
        wrong."""
        some = [dict(records[at % len(records)]) for at in range(len(SAMPLES))]
        try:
            states = self.reset(some)
            turns = self.step(states, list(SAMPLES))
            self.metric_names = [*self.metrics(states)]
        except GraderError as error:
            raise ValueError(f"{error} on a sample response to a record of {where}") from error
        return turns


def listed(environment: TextEnvironment, method: str, found: Any, count: int, what: str) -> list[Any]:
    """``found`` as a list of ``count`` items. Raises ValueError where it is none."""
    if isinstance(found, (str, bytes, Mapping, Set, Turn)) or not isinstance(found, Iterable):
        raise ValueError(f"{environment}: {method}: returned {show(found)}: expected a list of {count} {what}")
    items = list(itertools.islice(found, count + 1))
    if len(items) != count:
        given = len(found) if isinstance(found, Sized) else f"more than {count}" if items[count:] else len(items)
        raise ValueError(f"{environment}: {method}: returned {given} {what}: expected {count}, one an episode")
    return items


def checked(environment: TextEnvironment, at: int, turn: Any) -> Turn:
    """A turn with Python's own types. Raises ValueError for what is none."""
    where = f"{environment}: step: turn {at}"
    if not isinstance(turn, tuple) or len(turn) != len(Turn._fields):
        raise ValueError(f"{where} is {show(turn)}: expected Turn(observation, reward, done)")
    observation, reward, done = turn[0], plain(turn[1]), plain(turn[2])
    if not isinstance(observation, str) and not are_messages(observation):
        wrong = f"{where}: observation is {show(observation)}"
        raise ValueError(f'{wrong}: expected a text, or messages: [{{"role": "user", "content": "..."}}]')
    if reward is not None and (not isinstance(reward, (int, float)) or not abs(reward) <= LARGEST):
        raise ValueError(f"{where}: reward is {show(turn[1])}: expected a finite number, or None")
    if not isinstance(done, bool):
        raise ValueError(f"{where}: done is {show(turn[2])}: expected True or False")
    return Turn(observation, None if reward is None else float(reward), done)


def are_messages(value: Any) -> bool:
    """Whether it is a list of messages of others than the assistant."""
    one = lambda item: isinstance(item, Mapping) and isinstance(item.get("content"), str)
    role = lambda item: isinstance(item.get("role"), str) and item["role"] != "assistant"
    return isinstance(value, list) and len(value) > 0 and all(one(item) and role(item) for item in value)


# ---- from the config ------------------------------------------------------------------------------------------------


def find_class(name: str) -> Any:
    """What is called ``name``: a class, or anything else, with the two methods. Raises ValueError, in one line that
    starts with "function: "."""
    try:
        found = user_code.find(name)
    except ValueError as error:
        raise ValueError(f"function: {name}: {error}") from None
    missing = [method for method in METHODS if not callable(getattr(found, method, None))]
    if missing:
        raise ValueError(f"function: {name}: has no {missing[0]}: expected a class with reset and step")
    return found


def find_environment(cfg: EnvironmentConfig, timeout: float | None = None) -> TextEnvironment | None:
    """The environment that the config names, made with its arguments; None where it names none. ``timeout``: seconds
    that a call may take. Raises ValueError, in one line that starts with the key below ``environment``."""
    if cfg.function is None:
        return None
    found = find_class(cfg.function)
    if not isinstance(found, type):
        if cfg.arguments:
            raise ValueError(
                f"arguments: {show(cfg.arguments)}: {cfg.function} is no class that takes them; expected {{}}"
            )
        return TextEnvironment(cfg.function, found, timeout)
    try:
        return TextEnvironment(cfg.function, found(**cfg.arguments), timeout)
    except Exception as error:
        if user_code.raised_in(user_code.PACKAGE, error):
            raise ValueError(f"arguments: {error}") from error
        raise ValueError(f"function: {cfg.function}: raised {user_code.describe(error)}") from error


def function_problems(cfg: EnvironmentConfig) -> Iterator[str]:
    """What is wrong with the section of an environment of text, a line each."""
    if cfg.function is None:
        return
    if cfg.id is not None:
        yield f"environment.id: {cfg.id}: function {cfg.function} is given too; expected one of them"
    try:
        find_class(cfg.function)
    except ValueError as error:
        yield f"environment.{error}"
