"""Tools that a policy calls: schemas, calls in a response, results, errors that are told to it, limits."""

import json
import time

import pytest

from jaxrlhf.rewards.environments import EnvironmentConfig
from jaxrlhf.rewards.tools import ToolCall, ToolEnvironment, parse_calls
from jaxrlhf.rewards.turns import Turn, find_environment

HERE = "tests.rewards.test_tools"


def add(first: float, second: float = 0.0) -> float:
    """Adds two numbers.

    Args:
        first: one of them.
        second: the other.
    """
    return first + second


async def words(text: str) -> dict:
    """Counts words.

    Args:
        text: where.
    """
    return {"words": len(text.split())}


def nap(seconds: float) -> str:
    """Waits.

    Args:
        seconds: how long.
    """
    time.sleep(seconds)
    return "x" * 50


def fails() -> int:
    """Raises."""
    raise SystemExit("broken\nfor good")


def untyped(x):
    """Has no type hints.

    Args:
        x: what.
    """


def environment(*names: str, **more) -> ToolEnvironment:
    names = names or ("add", "words", "nap", "fails")
    return ToolEnvironment([f"{HERE}:{name}" for name in names], "exact_match", **more)


def call(name: str, **arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def contents(turn: Turn) -> list[str]:
    """What each message of an observation says."""
    assert isinstance(turn.observation, list)
    return [message["content"] for message in turn.observation]


def test_calls_are_found_in_a_response():
    text = f"I add. {call('add', first=1)} and\n{call('words', text='</b>')} done"
    assert parse_calls(text) == [ToolCall("add", {"first": 1}), ToolCall("words", {"text": "</b>"})]
    assert parse_calls("4") == []
    assert parse_calls('<tool_call>{"name": "add", "arguments": "{\\"first\\": 2}"}') == [ToolCall("add", {"first": 2})]
    for wrong in ("{", "[]", '{"arguments": {}}', '{"name": "add", "arguments": [1]}', '{"name": 1}', "", "[" * 9999):
        (found,) = parse_calls(f"<tool_call>{wrong}</tool_call>")
        assert "is no call; expected" in found.problem, wrong


def test_calls_of_the_plain_form_are_lines():
    text = 'so\nCALL add {"first": 1, "second": 2}\nCALL fails\nCALL words text\nNOCALL add'
    add, fails, words = parse_calls(text, "plain")
    assert add == ToolCall("add", {"first": 1, "second": 2}) and fails == ToolCall("fails", {})
    assert words.problem == "words: text is no JSON object of its arguments"


def test_schemas_are_made_of_type_hints_and_docstrings():
    (schema,) = environment("add").tools
    assert schema["function"]["name"] == "add" and schema["function"]["description"] == "Adds two numbers."
    properties = schema["function"]["parameters"]["properties"]
    assert properties["first"] == {"type": "number", "description": "one of them."}
    assert schema["function"]["parameters"]["required"] == ["first"]


def test_results_are_messages_and_an_answer_is_scored():
    found = environment()
    states = found.reset([{"answer": "3"}, {"answer": "3"}, {"answer": None}])
    asked = [f"{call('add', first=1, second=2)}{call('words', text='a b')}", "3", "no idea"]
    first, right, unknown = found.step(states, asked)
    assert (right, unknown) == (Turn("", 1.0, True), Turn("", None, True)), "None: the record has no answer"
    assert first == Turn(
        [
            {"role": "tool", "name": "add", "content": "3"},
            {"role": "tool", "name": "words", "content": '{"words": 2}'},
        ],
        0.0,
        False,
    )
    assert found.step(states[:1], ["4"]) == [Turn("", 0.0, True)]
    assert found.metrics(states) == {"tool_calls": 2 / 3, "tool_errors": 0.0, "tool_used": 1 / 3}


def test_results_of_the_plain_form_are_text():
    found = environment(form="plain")
    turns = found.step(found.reset([{"answer": "3"}]), ['CALL add {"first": 1, "second": 2}'])
    assert turns == [Turn("\nRESULT 3\n", 0.0, False)]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (call("ad", first=1), "error: no tool ad; nearest: add"),
        (call("add"), "error: add: missing a required argument: 'first'"),
        (call("add", first=1, third=2), "error: add: got an unexpected keyword argument 'third'"),
        (call("add", first="x", second=1), 'error: TypeError: can only concatenate str (not "int") to str'),
        (call("fails"), "error: SystemExit: broken for good"),
        (call("nap", seconds=9), "error: no result within 0.2 s"),
        (call("nap", seconds=0), "xxxxxxxxxx... (40 characters more)"),
        ("<tool_call>{</tool_call>", 'error: { is no call; expected {"name": ..., "arguments": {...}}'),
    ],
)
def test_what_goes_wrong_is_told_to_the_policy(asked, said):
    found = environment(timeout=0.2, max_characters=10)
    found.max_characters = 10 if said.startswith("x") else 2000
    states = found.reset([{"answer": ""}])
    (turn,) = found.step(states, [asked])
    assert not turn.done and contents(turn) == [said]
    assert found.metrics(states)["tool_errors"] == float(said.startswith("error"))


def test_calls_run_at_the_same_time_and_are_limited():
    found = environment(timeout=5, max_calls=2)
    states, began = found.reset([{"answer": ""}] * 40), time.monotonic()
    turns = found.step(states, [call("nap", seconds=0.2)] * 40)
    assert time.monotonic() - began < 4, "8 s, one after the other"
    assert all(contents(turn) == ["x" * 50] for turn in turns)
    (turn,) = found.step(states[:1], [call("add", first=1) * 2])
    left = "error: no calls are left of 2; answer without one"
    assert contents(turn) == ["1.0", left]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"tools": [f"{HERE}:ad"]}, rf"^arguments: tools: {HERE}:ad: {HERE} has no ad; nearest: add$"),
        ({"tools": [f"{HERE}:HERE"]}, r"^arguments: tools: .*: expected a function$"),
        ({"tools": []}, r'^arguments: tools: \[\]: expected at least one "package.module:function"$'),
        ({"tools": [f"{HERE}:untyped"]}, r"^arguments: tools: untyped: Argument x is missing a type hint"),
        ({"grader": "exact_mach"}, r"^arguments: grader: exact_mach: nearest: exact_match$"),
        ({"form": "xml"}, r"^arguments: form: xml: expected json or plain$"),
        ({"max_calls": 0}, r"^arguments: max_calls: 0: expected more than 0$"),
    ],
)
def test_a_mistake_in_its_arguments_is_one_line(arguments, line):
    given = {"tools": [f"{HERE}:add"], "grader": "exact_match"} | arguments
    with pytest.raises(ValueError, match=line):
        find_environment(EnvironmentConfig(function="jaxrlhf.rewards.tools:ToolEnvironment", arguments=given))
