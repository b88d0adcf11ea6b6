"""Several graders: the score that they make together, what a function may be, and what is said of one that fails on a
sample response before anything is compiled."""

import asyncio
import sys
import threading
import time

import numpy as np
import pytest

from jaxrlhf.cli.exits import raised_here
from jaxrlhf.rewards.calls import CallLimits
from jaxrlhf.rewards.functions import GraderConfig, RewardFunction, RewardsConfig, resolve
from jaxrlhf.rewards.graders import SAMPLE_DETAILS, GraderError, Graders, find_graders, grader_problems

MODULE = """
import functools

def length(responses, records, most=100):
    return [min(len(text), most) for text in responses]

def digits(responses, records):
    return [None if not text else sum(letter.isdigit() for letter in text) for text in responses]

class Share:
    made = 0
    def __init__(self, letter="a"):
        Share.made += 1
        self.letter = letter
    def __call__(self, responses, records):
        return [text.count(self.letter) for text in responses]

instance = Share("b")
short = functools.partial(length, most=2)
constant = lambda responses, records: [1] * len(responses)

async def later(responses, records):
    import asyncio
    await asyncio.sleep(0)
    return [len(text) for text in responses]

def of_trl(completions, answer, **kwargs):
    return [float(text == right) for text, right in zip(completions, answer)]

def of_trl_chat(prompts, completions, **kwargs):
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [len(completion[0]["content"]) for completion in completions]

def of_trl_bare(completions):
    return [len(text) for text in completions]

class OfTRL:
    def __call__(self, completions, answer):
        return [float(text == right) for text, right in zip(completions, answer)]

def needs_ids(completions, completion_ids, **kwargs):
    return [len(ids) for ids in completion_ids]

def needs_state(completions, trainer_state):
    return [trainer_state.step] * len(completions)

def column(responses, records):
    return [float(record["solution"] == text) for text, record in zip(responses, records)]

def total(responses, records):
    return sum(len(text) for text in responses)

def one(responses, records):
    return [1.0]

def words(responses, records):
    return ["good" for _ in responses]

def of_verl(data_source, solution_str, ground_truth):
    return 1.0
"""


@pytest.fixture(autouse=True)
def graders_here(tmp_path, monkeypatch):
    """The module my_graders in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "my_graders.py").write_text(MODULE)
    sys.modules.pop("my_graders", None)
    yield
    sys.modules.pop("my_graders", None)


# ---- the score ------------------------------------------------------------------------------------------------------

NONE = np.nan


def combined(grades, weights, required) -> np.ndarray:
    count = len(weights)
    graders = Graders((RewardFunction("my:f", len),) * count, tuple("abcd"[:count]), tuple(weights), tuple(required))
    return graders.combine(np.array(grades, np.float32))


@pytest.mark.parametrize(
    ("weights", "required", "scores"),
    [
        ([1, 1, 1], [True, True, True], [6, NONE, NONE, NONE]),
        ([1, 0.5, -2], [True, True, True], [1 + 1 - 6, NONE, NONE, NONE]),
        ([1, 1, 1], [True, False, False], [6, 5, 3, NONE]),
        ([1, 1, 1], [False, False, False], [6, 5, 3, NONE]),
        ([1, 1, 0], [True, True, True], [3, NONE, NONE, NONE]),
        ([0, 1, 1], [True, False, False], [5, 4, NONE, NONE]),
    ],
)
def test_the_score_by_hand(weights, required, scores):
    """A required grader that gives none: no score. Weight 0: no say, not even by giving none."""
    rows = [[1, 2, 3], [1, NONE, 4], [3, NONE, NONE], [NONE, NONE, NONE]]
    np.testing.assert_array_equal(combined(rows, weights, required), np.array(scores, np.float32))


@pytest.mark.parametrize("seed", range(3))
def test_the_score_is_a_loop(seed):
    rng = np.random.default_rng(seed)
    grades = np.where(rng.random((50, 3)) < 0.3, np.nan, rng.normal(size=(50, 3))).astype(np.float32)
    weights, required = rng.choice([0.0, 1.0, -0.5, 2.0], 3), rng.random(3) < 0.5
    expected = []
    for row in grades:
        total, number, lost = 0.0, 0, False
        for grade, weight, needed in zip(row, weights, required):
            if weight and np.isnan(grade):
                lost = lost or needed
            elif weight:
                total, number = total + weight * float(grade), number + 1
        expected.append(np.nan if lost or not number else total)
    np.testing.assert_allclose(combined(grades, weights, required), expected, rtol=1e-6)


def test_each_grader_has_its_own_copies():
    def greedy(responses, records):
        responses.clear()
        return [record.pop("answer") for record in records]

    graders = Graders((RewardFunction("a", greedy), RewardFunction("b", greedy)), ("a", "b"), (1, 1), (True, True))
    records = [{"answer": 3}, {"answer": 4}]
    np.testing.assert_array_equal(graders.grade(["x", "y"], records).grades, [[3, 3], [4, 4]])
    assert records == [{"answer": 3}, {"answer": 4}]


# ---- what a function may be -----------------------------------------------------------------------------------------

RECORDS = [{"prompt": "1 + 1", "answer": "2"}, {"prompt": "3", "answer": "bb"}]
CHAT = [{"messages": [{"role": "user", "content": "?"}]}, {"prompt": [{"role": "user", "content": "?"}]}]


@pytest.mark.parametrize(
    ("name", "arguments", "records", "expected"),
    [
        ("my_graders:length", {}, RECORDS, [1, 4]),
        ("my_graders:length", {"most": 3}, RECORDS, [1, 3]),
        ("my_graders:short", {}, RECORDS, [1, 2]),
        ("my_graders:constant", {}, RECORDS, [1, 1]),
        ("my_graders:instance", {}, RECORDS, [0, 2]),
        ("my_graders:Share", {}, RECORDS, [0, 2]),
        ("my_graders:Share", {"letter": "b"}, RECORDS, [0, 2]),
        ("my_graders:later", {}, RECORDS, [1, 4]),
        ("trl:my_graders:of_trl", {}, RECORDS, [1, 0]),
        ("trl:my_graders:of_trl_bare", {}, RECORDS, [1, 4]),
        ("trl:my_graders:needs_ids", {}, RECORDS, [26, 25]),  # of the details
        ("trl:my_graders:of_trl_chat", {}, CHAT, [1, 4]),
        ("trl:my_graders:OfTRL", {}, RECORDS, [1, 0]),
    ],
)
def test_what_a_function_may_be(name, arguments, records, expected):
    function = resolve(name, arguments)
    for _ in range(2):
        found = function(["2", "abba"], records, SAMPLE_DETAILS)
        np.testing.assert_array_equal(found, np.array(expected, np.float32))


def test_a_class_becomes_an_instance_once_and_not_while_a_config_is_checked():
    function = resolve("my_graders:Share", {"letter": "a"})
    made = sys.modules["my_graders"].Share.made
    function(["a"], [{}])
    function(["a"], [{}])
    assert (made, sys.modules["my_graders"].Share.made) == (1, 2)  # my_graders.instance was the first


def test_an_async_function_runs_where_a_loop_is_running():
    """As in a notebook, and with one loop for all calls."""
    loops = []

    async def noting(responses, records):
        loops.append(asyncio.get_running_loop())
        return [threading.current_thread() is not threading.main_thread()] * len(responses)

    async def notebook():
        return RewardFunction("my:f", noting)(["a"], [{}])

    assert asyncio.run(notebook()).tolist() == RewardFunction("my:f", noting)(["a"], [{}]).tolist() == [1]
    assert loops[0] is loops[1]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "my_graders:of_trl",
            "takes (completions, answer, **kwargs), as TRL calls it; expected (responses, records), or the name "
            "trl:my_graders:of_trl",
        ),
        (
            "trl:my_graders:length",
            "takes (responses, records, most=100); expected TRL's completions; nearest: my_graders:length",
        ),
        ("trl:my_graders", 'expected "package.module:name"'),
        ("trl:my_graders:of_tlr", "my_graders has no of_tlr; nearest: of_trl"),
        ("trl:my_grader:of_trl", "no module my_grader; nearest: my_graders"),
        ("my_graders:functools", "<module 'functools' from"),
        ("builtins:int", "<class 'int'> can't be called: expected a function"),
    ],
)
def test_what_can_t_be_one_is_one_line(name, line):
    with pytest.raises(ValueError) as caught:
        resolve(name)
    assert str(caught.value).startswith(f"function: {name}: {line}") and "\n" not in str(caught.value)


# ---- tried before anything is compiled ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("my_graders:column", {}, "raised KeyError: 'solution' ({module}:48)"),
        ("my_graders:total", {}, "returned 51: expected a list of 2 numbers, one a response"),
        ("my_graders:one", {}, "returned 1 scores: expected 2, one a response"),
        ("my_graders:words", {}, "score 0 is 'good': expected a finite number, or None"),
        (
            "my_graders:of_verl",
            {},
            "raised TypeError: of_verl() missing 1 required positional argument: 'ground_truth'",
        ),
        ("my_graders:length", {"least": 3}, "raised TypeError: length() got an unexpected keyword argument 'least'"),
        ("trl:my_graders:needs_state", {}, "raised TypeError: needs_state() missing 1 required positional argument"),
        (
            "jaxrlhf.rewards.math_answer:strict",
            {"column": "solution"},
            "math_answer: solution: missing among prompt, answer",
        ),
    ],
)
def test_a_function_that_fails_on_a_sample_response_is_one_line(name, arguments, line):
    graders = find_graders(RewardsConfig(functions={"mine": GraderConfig(name, arguments=arguments)}))
    assert graders is not None
    with pytest.raises(ValueError) as caught:
        graders.try_on(RECORDS[:1], "data.prompts")
    text = str(caught.value)
    if "{module}" in line:
        line = line.replace("{module}", str(sys.modules["my_graders"].__file__))
    assert text.startswith(f"rewards.functions.mine.function: {name}: {line}") and "\n" not in text
    if "raised" in line:
        assert text.endswith(" on a sample response to a record of data.prompts")


@pytest.mark.parametrize(
    ("raised", "what"),
    [
        (KeyError("answer"), "KeyError: 'answer'"),
        (ValueError("of two\n lines"), "ValueError: of two lines"),
        (ConnectionError(), "ConnectionError"),
        (SystemExit(3), "SystemExit: 3"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_what_a_function_raises_later_is_one_line_with_its_place(raised, what):
    def broken(responses, records):
        raise raised

    graders = Graders((RewardFunction("my:f", broken),))
    with pytest.raises(GraderError) as caught:
        graders.grade([""], [{}])
    place = f"{__file__}:{broken.__code__.co_firstlineno + 1}"
    assert str(caught.value) == f"rewards.function: my:f: raised {what} ({place})"
    assert caught.value.__cause__ is raised and raised_here(caught.value)


def test_one_that_scores_nothing_of_the_sample_is_no_mistake():
    graders = Graders((RewardFunction("my:f", lambda responses, records: [None, float("nan")]),))
    graders.try_on(RECORDS, "data.prompts")


# ---- the config -----------------------------------------------------------------------------------------------------


def problems(**given) -> list[str]:
    functions = {name: GraderConfig(**grader) for name, grader in given.pop("functions", {}).items()}
    return [*grader_problems(RewardsConfig(functions=functions, **given))]


LENGTH = {"function": "my_graders:length"}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            {"function": "my_graders:length", "functions": {"a": LENGTH}},
            "rewards.function: my_graders:length: functions are given too",
        ),
        (
            {"functions": {"mean": LENGTH}},
            "rewards.functions.mean: score/mean is a metric of its own; expected another name",
        ),
        (
            {"functions": {"a/b": LENGTH}},
            "rewards.functions.a/b: no name for the metric score/NAME; expected another name",
        ),
        ({"functions": {"a": LENGTH | {"weight": 0.0}}}, "rewards.functions: the weight of each is 0"),
        ({"arguments": {"most": 3}, "functions": {"a": LENGTH}}, "rewards.arguments: there is no rewards.function"),
        (
            {"functions": {"a": {"function": "my_graders:lengt"}}},
            "rewards.functions.a.function: my_graders:lengt: my_graders has no lengt; nearest: length",
        ),
    ],
)
def test_mistakes_in_the_config_are_one_line(given, line):
    found = problems(**given)
    assert len(found) == 1 and found[0].startswith(line)


def test_a_config_without_a_mistake():
    assert problems(functions={"a": LENGTH, "b": {"function": "trl:my_graders:of_trl", "weight": 0.5}}) == []
    assert find_graders(RewardsConfig()) is None
    found = find_graders(RewardsConfig(functions={"a": GraderConfig("my_graders:length", 2.0, False)}))
    assert found is not None and (found.names, found.weights, found.required) == (("a",), (2.0,), (False,))


def test_a_call_that_takes_too_long_names_the_first_record():
    """In the main thread, where signal.alarm works too."""
    function = RewardFunction("my:f", lambda responses, records: time.sleep(30))
    graders = Graders((function,), limits=CallLimits((0.1,), (0,)))
    line = (
        r"^rewards\.function: my:f: no answer within 0\.1 s to 2 responses, the first of them to the record "
        r'\{"prompt": "why\?"\}$'
    )
    with pytest.raises(GraderError, match=line) as caught:
        graders.grade(["a", "b"], [{"prompt": "why?"}] * 2)
    assert raised_here(caught.value)
    assert find_graders(RewardsConfig("builtins:len", timeout=2.5)).limits.timeouts == (2.5,)  # type: ignore[union-attr]
