"""A user's reward function: how it is found, what it may answer, what is said where it can't be used."""

import itertools
import re
import sys
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import user_code
from jaxrlhf.rewards.functions import RewardFunction, resolve


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory that nothing was imported from yet; gives a function that writes a module there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    before = set(sys.modules)
    yield lambda name, text: (tmp_path / f"{name}.py").write_text(text)
    for name in set(sys.modules) - before:
        del sys.modules[name]


# ---- finding it -----------------------------------------------------------------------------------------------------

LENGTHS = "def lengths(responses, records):\n    return [len(text) for text in responses]\n"


def test_a_module_of_the_working_directory_is_found(here, tmp_path):
    here("my_rewards", LENGTHS)
    found = resolve("my_rewards:lengths")
    np.testing.assert_array_equal(found(["", "abc"], [{}, {}]), [0, 3])
    assert str(found) == "rewards.function: my_rewards:lengths"
    assert sys.path.count(str(tmp_path)) == 1
    resolve("my_rewards:lengths")
    assert sys.path.count(str(tmp_path)) == 1


def test_a_module_beside_the_config_is_found_behind_one_of_the_working_directory(here, tmp_path, monkeypatch):
    for name in ("theirs", "both"):
        (tmp_path / "configs").mkdir(exist_ok=True)
        (tmp_path / "configs" / f"{name}.py").write_text(LENGTHS)
    here("both", LENGTHS.replace("len(text)", "-1"))
    monkeypatch.setattr(user_code, "FOLDERS", [str(tmp_path / "configs")])
    assert [resolve(f"{name}:lengths")(["ab"], [{}])[0] for name in ("theirs", "both")] == [2, -1]


def test_a_module_of_a_package_is_found(here, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "short.py").write_text(LENGTHS)
    assert resolve("mine.short:lengths")(["ab"], [{}]) == 2


def test_an_installed_module_goes_first(here):
    """A file here that happens to have the name of a library's does not take the library's place."""
    here("wave", LENGTHS)
    with pytest.raises(ValueError, match="wave has no lengths"):
        resolve("wave:lengths")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("my_rewards", 'my_rewards: expected "package.module:name"'),
        ("my_rewards:", 'my_rewards:: expected "package.module:name"'),
        (":lengths", ':lengths: expected "package.module:name"'),
        (".my_rewards:lengths", '.my_rewards:lengths: expected "package.module:name"'),
        ("my-rewards:lengths", 'my-rewards:lengths: expected "package.module:name"'),
        ("my_rewards:a:b", 'my_rewards:a:b: expected "package.module:name"'),
        ("my_reward:lengths", "my_reward:lengths: no module my_reward; nearest: my_rewards"),
        ("zzz.qqq:f", 'zzz.qqq:f: no module zzz; expected "package.module:name", of an installed module or of one in '),
        ("my_rewards:length", "my_rewards:length: my_rewards has no length; nearest: lengths"),
        ("my_rewards:zzz", "my_rewards:zzz: my_rewards has no zzz; choices: lengths"),
        ("my_rewards:BEST", "my_rewards:BEST: 20 can't be called: expected a function"),
        ("needy:f", "needy:f: importing needy: No module named 'not_installed'"),
        ("stale:f", "stale:f: importing stale: cannot import name 'nothing' from 'my_rewards'"),
    ],
)
def test_what_is_not_there_is_one_line(here, name, line):
    here("my_rewards", "BEST = 20\n_hidden = print\n" + LENGTHS)
    here("needy", "import not_installed\n")
    here("stale", "from my_rewards import nothing\n")
    with pytest.raises(ValueError) as caught:
        resolve(name)
    assert str(caught.value).startswith(f"function: {line}")
    assert "\n" not in str(caught.value)


def test_a_module_that_breaks_shows_where(here):
    """It is the user's code: a line of ours would hide it."""
    here("broken", "1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        resolve("broken:f")


# ---- what it answers ------------------------------------------------------------------------------------------------


def answer(scores, count=3):
    return RewardFunction("my:f", lambda responses, records: scores)([""] * count, [{}] * count)


@pytest.mark.parametrize(
    "scores",
    [
        [1, 0.75, -2],
        (True, 0.75, -2.0),
        np.array([1, 0.75, -2]),
        [np.int64(1), np.float16(0.75), np.float32(-2)],
        [np.bool_(True), np.array(0.75), -2],
        jnp.array([1, 0.75, -2]),
        iter([1, 0.75, -2]),
    ],
    ids=lambda scores: type(scores).__name__,
)
def test_numbers_of_any_sort_are_float32(scores):
    found = answer(scores)
    assert found.dtype == np.float32 and found.shape == (3,)
    np.testing.assert_array_equal(found, np.array([1, 0.75, -2], np.float32))


def test_a_fraction_after_integers_stays_one():
    """An array typed by its first score would turn 0.7 into 0."""
    np.testing.assert_array_equal(answer([1, 0, 0.7]), np.array([1, 0, 0.7], np.float32))
    assert answer([0, 1, 1]).dtype == np.float32


NUMBERS = "expected a list of 3 numbers, one a response"


@pytest.mark.parametrize(
    ("scores", "line"),
    [
        (None, f"returned None: {NUMBERS}"),
        (1.0, f"returned 1.0: {NUMBERS}"),
        (np.float32(1), f"returned 1.0: {NUMBERS}"),
        ("123", f"returned '123': {NUMBERS}"),
        ({1: 0, 2: 0, 3: 0}, f"returned {{1: 0, 2: 0, 3: 0}}: {NUMBERS}"),
        ({1, 2, 3}, f"returned {{1, 2, 3}}: {NUMBERS}"),
        ([1, 2], "returned 2 scores: expected 3, one a response"),
        ([1, 2, 3, 4], "returned 4 scores: expected 3, one a response"),
        ([], "returned 0 scores: expected 3, one a response"),
        ([1, 2, "3"], "score 2 is '3': expected a finite number, or None"),
        ([1, 2, 1j], "score 2 is 1j: expected a finite number, or None"),
        ([[1], [2], [3]], "score 0 is [1]: expected a finite number, or None"),
        (np.ones((3, 1)), "score 0 is array([1.]): expected a finite number, or None"),
        ([1, np.float32("-inf"), 3], "score 1 is -inf: expected a finite number, or None"),
        ([1, 1e39, 3], "score 1 is 1e+39: expected a finite number, or None"),
        ([1, Fraction(1, 2), 3], "score 1 is Fraction(1, 2): expected a finite number, or None"),
        ([10**400, 1, 3], "score 0 is 1000000000"),
        (["a\n" * 99, 1, 3], "score 0 is 'a\\na\\n"),
    ],
)
def test_what_is_no_score_is_one_line(scores, line):
    with pytest.raises(ValueError) as caught:
        answer(scores)
    text = str(caught.value)
    assert text.startswith(f"rewards.function: my:f: {line}")
    assert "\n" not in text and len(text) < 300


def test_a_score_that_is_no_number_names_response_and_record():
    line = "score 1 is inf: expected a finite number, or None; response: 'no'; record: {'answer': '4'}"
    with pytest.raises(ValueError, match=re.escape(line)):
        RewardFunction("my:f", lambda responses, records: [1.0, float("inf")])(["yes", "no"], [{}, {"answer": "4"}])


@pytest.mark.parametrize("none", [None, float("nan"), np.float32("nan"), np.array(np.nan)], ids=repr)
def test_none_and_nan_are_no_score(none):
    np.testing.assert_array_equal(answer([1, none, 3]), np.array([1, np.nan, 3], np.float32))


def test_what_the_function_raises_goes_through():
    def broken(responses, records):
        return [record["answer"] for record in records]

    with pytest.raises(KeyError, match="answer"):
        RewardFunction("my:f", broken)(["a"], [{}])


def test_it_gets_responses_and_records_as_they_are():
    seen = []
    function = RewardFunction("my:f", lambda responses, records: seen.append((responses, records)) or [0.0])
    function(["four"], [{"prompt": "2 + 2", "answer": "4"}])
    assert seen == [(["four"], [{"prompt": "2 + 2", "answer": "4"}])]


# ---- what it can do to what it is given -----------------------------------------------------------------------------


def test_a_function_that_shortens_its_lists_gives_too_few():
    """Counted before the call: one score is not that of all responses."""

    def shorten(responses, records):
        del responses[1:], records[1:]
        return [7.0]

    with pytest.raises(ValueError, match="returned 1 scores: expected 3, one a response"):
        RewardFunction("my:f", shorten)(["a", "b", "c"], [{}] * 3)


def test_what_a_function_changes_in_its_lists_reaches_nobody():
    """Neither the other samples of a prompt, nor graders that come after it, nor the next evaluation of the record."""

    def spoil(responses, records):
        records[0]["messages"].append("more")
        assert records[1]["messages"] == ["hi"]
        responses[0] = ""
        return [0.0] * len(responses)

    record = {"messages": ["hi"]}
    responses = ["a", "b"]
    RewardFunction("my:f", spoil)(responses, [record, record])
    assert record == {"messages": ["hi"]} and responses == ["a", "b"]


def test_a_masked_number_is_none():
    masked = np.ma.array([1.0, 2.0, 3.0], mask=[False, True, False])
    np.testing.assert_array_equal(answer(masked), np.array([1, np.nan, 3], np.float32))
    np.testing.assert_array_equal(answer([1.0, np.ma.masked, np.ma.array(3.0, mask=False)]), answer(masked))


def test_scores_without_an_end_are_too_many():
    with pytest.raises(ValueError, match="returned more than 3 scores: expected 3, one a response"):
        answer(itertools.count())
