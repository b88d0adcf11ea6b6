"""A user's environment of text: what it may answer, and what is said where it answers otherwise."""

import asyncio
import time

import numpy as np
import pytest

from jaxrlhf.cli.exits import raised_here
from jaxrlhf.rewards.environments import EnvironmentConfig
from jaxrlhf.rewards.graders import GraderError
from jaxrlhf.rewards.turns import TextEnvironment, Turn, find_environment

RECORDS = [{"prompt": "a", "n": [1]}, {"prompt": "b", "n": [2]}]


class Counts:
    def __init__(self, to: int = 2):
        self.to = to

    def reset(self, records):
        records[0]["n"].append(9)  # copies of its own
        return [{"n": 0} for _ in records]

    def step(self, states, responses):
        for state in states:
            state["n"] += 1
        return [Turn(f"{text}!", state["n"], state["n"] >= self.to) for state, text in zip(states, responses)]


def environment(reset=None, step=None, timeout=None, **more) -> TextEnvironment:
    """One whose two methods answer as Counts, or as they are told to."""
    counts = Counts()
    methods: dict = {"reset": lambda self, records: reset(records) if reset else counts.reset(records)}
    methods["step"] = lambda self, states, responses: step(states) if step else counts.step(states, responses)
    return TextEnvironment("my:Env", type("Env", (), methods | more)(), timeout)


def test_states_and_turns_go_in_and_out():
    found = environment()
    states = found.reset(RECORDS)
    assert RECORDS[0]["n"] == [1], "the run's own record was changed"
    assert found.step(states, ["x", "y"]) == [Turn("x!", 1.0, False), Turn("y!", 1.0, False)]
    assert found.step(states[1:], ["z"]) == [Turn("z!", 2.0, True)], "a state is the object that was given"
    assert found.metrics(states) == {} and found.tools is None


def test_methods_may_be_async_and_numbers_numpys():
    async def step(states):
        await asyncio.sleep(0)
        return [("", np.float32(0.5), np.bool_(True)), Turn([{"role": "tool", "content": "4"}], None, False)]

    one, two = environment(step=step).step([{}, {}], ["", ""])
    assert one == Turn("", 0.5, True) and type(one.reward) is float
    assert two.reward is None and two.observation == [{"role": "tool", "content": "4"}]


MESSAGES = r'expected a text, or messages: \[\{"role": "user", "content": "..."\}\]'


@pytest.mark.parametrize(
    ("found", "line"),
    [
        ("text", "step: returned 'text': expected a list of 2 turns"),
        (None, "step: returned None: expected a list of 2 turns"),
        (Turn("x"), r"step: returned Turn\(.*: expected a list of 2 turns"),
        ([Turn("x")], "step: returned 1 turns: expected 2, one an episode"),
        ((Turn() for _ in range(9)), "step: returned more than 2 turns: expected 2, one an episode"),
        ([Turn(), 1.0], r"step: turn 1 is 1.0: expected Turn\(observation, reward, done\)"),
        ([Turn(), ("x", 1.0)], r"step: turn 1 is \('x', 1.0\): expected Turn\(observation, reward, done\)"),
        ([(4, 0.0, True), Turn()], f"step: turn 0: observation is 4: {MESSAGES}"),
        ([Turn([{"role": "user"}]), Turn()], f"step: turn 0: observation is .*: {MESSAGES}"),
        ([Turn([{"role": "assistant", "content": "x"}]), Turn()], f"step: turn 0: observation is .*: {MESSAGES}"),
        ([("", "1", True), Turn()], "step: turn 0: reward is '1': expected a finite number, or None"),
        ([Turn("", float("nan")), Turn()], "step: turn 0: reward is nan: expected a finite number, or None"),
        ([Turn("", 1e39), Turn()], r"step: turn 0: reward is 1e\+39: expected a finite number, or None"),
        ([("", 0.0, "no"), Turn()], "step: turn 0: done is 'no': expected True or False"),
    ],
)
def test_what_is_no_turn_is_one_line(found, line):
    with pytest.raises(ValueError, match=f"^environment.function: my:Env: {line}$") as caught:
        environment(step=lambda states: found).step([{}, {}], ["", ""])
    assert raised_here(caught.value)


def test_states_that_are_too_few_are_one_line():
    with pytest.raises(ValueError, match=r"^environment.function: my:Env: reset: returned 1 states: expected 2, one"):
        environment(reset=lambda records: [{}]).reset(RECORDS)
    with pytest.raises(ValueError, match=r"metrics: returned {'a b': 1}: expected a number by name"):
        environment(metrics=lambda self, states: {"a b": 1}).metrics([{}])


def test_what_it_raises_and_how_long_it_takes_is_told():
    def fails(states):
        raise KeyError("secret")

    with pytest.raises(
        GraderError, match=r"^environment.function: my:Env: step: raised KeyError: 'secret' \(.*:\d+\)$"
    ):
        environment(step=fails).step([{}], [""])
    with pytest.raises(GraderError, match=r"^environment.function: my:Env: step: no answer within 0.1 s to 1 episode$"):
        environment(step=lambda states: time.sleep(30), timeout=0.1).step([{}], [""])
    with pytest.raises(ValueError, match=r"step: raised KeyError.* on a sample response to a record of data.prompts$"):
        environment(step=fails).try_on(RECORDS, "data.prompts")
    assert len(environment().try_on(RECORDS[:1], "data.prompts")) == 2


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("Counts", 'function: Counts: expected "package.module:NAME"'),
        ("no_such:Counts", "function: no_such:Counts: no module no_such"),
        ("tests.rewards.test_turns:Count", "has no Count; nearest: Counts"),
        ("tests.rewards.test_turns:RECORDS", "has no reset: expected a class with reset and step"),
    ],
)
def test_one_that_is_not_there_is_one_line(name, line):
    with pytest.raises(ValueError, match=line):
        find_environment(EnvironmentConfig(function=name))


def test_a_class_is_made_with_arguments():
    name = "tests.rewards.test_turns:Counts"
    made = find_environment(EnvironmentConfig(function=name, arguments={"to": 1}))
    assert made is not None and made.step(made.reset(RECORDS), ["", ""])[0].done
    with pytest.raises(ValueError, match=rf"^function: {name}: raised TypeError: .*unexpected keyword argument 'two'"):
        find_environment(EnvironmentConfig(function=name, arguments={"two": 1}))
    assert find_environment(EnvironmentConfig()) is None
