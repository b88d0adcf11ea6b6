"""Python functions that a policy may call: their schemas go into its prompts, its calls are run, and what they return,
or what is wrong with a call, is the next observation.

    environment:
      function: jaxrlhf.rewards.tools:ToolEnvironment
      arguments: {tools: ["my_tools:calculator"], grader: exact_match}

A tool has type hints and a docstring in Google's style, of which transformers.utils.get_json_schema makes its schema.
A response without a call is the answer, which the grader scores."""

import importlib
import inspect
import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxrlhf import user_code
from jaxrlhf.errors import cut, nearest, one_line
from jaxrlhf.rewards import functions
from jaxrlhf.rewards.event_loop import wait_for
from jaxrlhf.rewards.turns import Turn

FORMS = ("json", "plain")
MARKED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.S)
LINE = re.compile(r"^CALL[ \t]+(\S+)(.*)$", re.M)
ABREAST = 32  # calls that run at the same time


class ToolCall(NamedTuple):
    """One call of a response; ``problem``: why it can't be run."""

    name: str
    arguments: dict[str, Any]
    problem: str = ""


class ToolEnvironment:
    """An environment of text in which the policy calls tools, and then answers.

    Args:
        tools: their names, "package.module:function".
        grader: what scores an answer, as rewards.function has it; it is given the answer's text and the record.
        grader_arguments: keywords for it.
        form: json: a call is <tool_call>{"name": "calculator", "arguments": {"expression": "2 + 2"}}</tool_call>, as
            Qwen and Hermes write it, and its result a message of the role tool; plain, for models without a chat
            template: a call is a line CALL calculator {"expression": "2 + 2"}, and its result a line RESULT 4.
        timeout: seconds that a call may take. One that takes longer is left to itself, in a thread that goes on: a tool
            should have a limit of its own.
        max_calls: of an episode; further ones are answered with an error.
        max_characters: of a result; the rest is cut.

    Raises:
        ValueError: in one line that names the argument, for what is no tool, no grader, no form.
    """

    def __init__(
        self,
        tools: Sequence[str],
        grader: str,
        grader_arguments: Mapping[str, Any] | None = None,
        form: Literal["json", "plain"] = "json",
        timeout: float = 5.0,
        max_calls: int = 8,
        max_characters: int = 2000,
    ):
        if form not in FORMS:
            raise ValueError(f"form: {form}: expected json or plain")
        for name, value in (("timeout", timeout), ("max_calls", max_calls), ("max_characters", max_characters)):
            if value <= 0:
                raise ValueError(f"{name}: {value}: expected more than 0")
        self.functions = dict(find_tool(name) for name in tools)
        if not self.functions:
            raise ValueError('tools: []: expected at least one "package.module:function"')
        self.tools = [schema_of(name, function) for name, function in self.functions.items()]
        try:
            self.grader = functions.resolve(grader, grader_arguments, "environment.arguments.grader")
        except ValueError as error:
            raise ValueError(f"grader: {str(error).removeprefix('function: ')}") from None
        self.form, self.timeout = form, timeout
        self.max_calls, self.max_characters = max_calls, max_characters

    def reset(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A count of calls for each record."""
        return [{"record": record, "calls": 0, "errors": 0} for record in records]

    def step(self, states: list[dict[str, Any]], responses: list[str]) -> list[Turn]:
        """Results of the calls; of a response without one its score."""
        asked = [parse_calls(text, self.form) for text in responses]
        results = iter(self.results(states, asked))
        answers = [at for at, calls in enumerate(asked) if not calls]
        scores = iter(self.scores([responses[at] for at in answers], [states[at]["record"] for at in answers]))
        turns = []
        for calls in asked:
            shown = self.observation(calls, [next(results) for _ in calls])
            turns.append(Turn(shown, 0.0, False) if calls else Turn("", next(scores), True))
        return turns

    def scores(self, texts: list[str], records: list[dict[str, Any]]) -> list[float | None]:
        """What the grader gives the answers; None: it can't tell."""
        found = self.grader(texts, records) if texts else np.zeros(0)
        return [None if np.isnan(score) else float(score) for score in found]

    def results(self, states: list[dict[str, Any]], asked: list[list[ToolCall]]) -> list[str]:
        """The result of each call as text, in their order; errors are results."""
        calls: list[ToolCall] = []
        owners = [state for state, calls in zip(states, asked) for _ in calls]
        for state, call in zip(owners, [call for calls in asked for call in calls], strict=True):
            state["calls"] += 1
            if state["calls"] > self.max_calls:
                call = call._replace(problem=f"no calls are left of {self.max_calls}; answer without one")
            calls.append(call)
        found = [one for at in range(0, len(calls), ABREAST) for one in self.run(calls[at : at + ABREAST])]
        texts = []
        for state, (text, good) in zip(owners, found, strict=True):
            state["errors"] += not good
            more = len(text) - self.max_characters
            texts.append(text if more <= 0 else f"{text[: self.max_characters]}... ({more} characters more)")
        return texts

    def run(self, calls: list[ToolCall]) -> list[tuple[str, bool]]:
        """(the result as text, whether it is one) of each of the calls, which run at the same time."""
        problems = [call.problem or problem_of(call, self.functions) for call in calls]
        running = [
            None if problem else Running(self.functions[call.name], call.arguments, self.timeout)
            for call, problem in zip(calls, problems)
        ]
        return [(f"error: {problem}", False) if one is None else one.text() for one, problem in zip(running, problems)]

    def observation(self, calls: list[ToolCall], results: list[str]) -> str | list[dict[str, Any]]:
        """What the policy is shown of them."""
        if self.form == "plain":
            return "".join(f"\nRESULT {result}" for result in results) + "\n"
        return [{"role": "tool", "name": call.name, "content": text} for call, text in zip(calls, results)]

    def metrics(self, states: list[dict[str, Any]]) -> dict[str, float]:
        """Calls of an episode, and how many of them failed; the share of episodes with a call."""
        count = lambda name: sum(state[name] for state in states) / len(states)
        used = sum(state["calls"] > 0 for state in states) / len(states)
        return {"tool_calls": count("calls"), "tool_errors": count("errors"), "tool_used": used}


# ---- the tools ------------------------------------------------------------------------------------------------------


def find_tool(name: str) -> tuple[str, Callable]:
    """(the name that the policy calls it by, the function). Raises ValueError, in one line."""
    try:
        function = user_code.find(name)
    except ValueError as error:
        raise ValueError(f"tools: {name}: {error}") from None
    if not inspect.isroutine(function):
        raise ValueError(f"tools: {name}: {functions.show(function)}: expected a function")
    return function.__name__, function


def schema_of(name: str, function: Callable) -> dict[str, Any]:
    """The JSON schema of a tool, as chat templates take it. Raises ValueError, in one line, where its type hints or its
    docstring do not tell."""
    schemas = importlib.import_module("transformers.utils.chat_template_utils")
    try:
        return schemas.get_json_schema(function)
    except Exception as error:  # of several kinds, all about the function
        raise ValueError(f"tools: {name}: {one_line(error)}") from error


def problem_of(call: ToolCall, known: Mapping[str, Callable]) -> str:
    """Why a call can't be made of these functions; "" where it can."""
    if call.name not in known:
        return f"no tool {cut(call.name)}; {nearest(call.name, [*known])}"
    try:
        inspect.signature(known[call.name]).bind(**call.arguments)
    except TypeError as error:
        return f"{call.name}: {error}"
    return ""


class Running:
    """A call in a thread of its own."""

    def __init__(self, function: Callable, arguments: dict[str, Any], timeout: float):
        self.timeout, self.began, self.answer = timeout, time.monotonic(), Future()
        work = lambda: self.call(function, arguments)
        threading.Thread(target=work, name=f"tool {function.__name__}", daemon=True).start()

    def call(self, function: Callable, arguments: dict[str, Any]) -> None:
        try:
            found = function(**arguments)
            self.answer.set_result(wait_for(found) if inspect.isawaitable(found) else found)
        except BaseException as error:  # SystemExit, too, is the tool's
            self.answer.set_exception(error)

    def text(self) -> tuple[str, bool]:
        """(what it returns, or what went wrong; whether it is a result). Waits for it."""
        try:
            found = self.answer.result(max(0.0, self.began + self.timeout - time.monotonic()))
            return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str), True
        except TimeoutError:
            if not self.answer.done():
                return f"error: no result within {self.timeout:g} s", False
            return "error: TimeoutError", False
        except BaseException as error:
            if not self.answer.done():
                raise  # of this thread: a signal that ends the run
            said = one_line(error)
            return f"error: {type(error).__name__}{f': {said[:200]}' if said else ''}", False


# ---- calls in a response --------------------------------------------------------------------------------------------


def parse_calls(text: str, form: str = "json") -> list[ToolCall]:
    """The calls that a response holds, in their order; what is written as a call and is none has a problem."""
    if form == "plain":
        return [plain_call(found[1], found[2].strip()) for found in LINE.finditer(text)]
    return [json_call(found[1].strip()) for found in MARKED.finditer(text)]


def json_call(text: str) -> ToolCall:
    """A call of {"name": ..., "arguments": {...}}; the arguments may be JSON text."""
    try:
        given = json.loads(text)
        name, arguments = given["name"], given.get("arguments", {})
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ToolCall("", {}, f'{cut(text)} is no call; expected {{"name": ..., "arguments": {{...}}}}')
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return ToolCall("", {}, f'{cut(text)} is no call; expected a text "name", and an object "arguments"')
    return ToolCall(name, arguments)


def plain_call(name: str, text: str) -> ToolCall:
    """A call of a line CALL name {...}."""
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        return ToolCall(name, {}, f"{name}: {cut(text)} is no JSON object of its arguments")
    return ToolCall(name, arguments)
