"""Graders that compare a response with its record, by hand."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxrlhf.rewards.answers import JsonSchema, Regex, exact_match, numeric
from jaxrlhf.rewards.built_in import BUILT_IN
from jaxrlhf.rewards.functions import Details, resolve


def rows(*answers, column="answer"):
    return [{column: answer} for answer in answers]


# ---- the same text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ignore", "response", "answer", "score"),
    [
        (["blanks"], " two  words\n", "two words", 1),
        (["blanks"], "Two words", "two words", 0),
        (["case", "blanks"], "Two words", "two words", 1),
        ([], " two", "two", 0),
        (["punctuation"], "it's «ok».", "its ok", 1),
        (["case", "punctuation", "articles", "blanks"], "The Cat, a dog!", "cat dog", 1),
        (["case", "articles", "blanks"], "theatre", "atre", 0),
        (["accents", "blanks"], "café", "cafe", 1),
        (["blanks"], "café", "cafe", 0),
        (["blanks"], "b", ["a", "b"], 1),
        (["blanks"], "c", ["a", "b"], 0),
        (["blanks"], "5", 5, 1),
        (["blanks"], "x", None, None),
    ],
)
def test_exact_match(ignore, response, answer, score):
    assert exact_match([response], rows(answer), ignore=ignore) == [score]


def test_exact_match_of_another_column():
    assert exact_match(["a", "b"], rows("a", "c", column="label"), column="label") == [1, 0]


# ---- the same number ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "response", "answer", "score"),
    [
        ({}, "so it is 41, no: 42.", 42, 1),
        ({}, "so it is 42, no: 41.", 42, 0),
        ({}, r"\boxed{42} of 100", "42", 1),
        ({}, "#### 1,200\n7", "1200.0", 1),
        ({}, "3/4", 0.75, 1),
        ({}, "50%", "0.5", 1),
        ({}, "none", 42, 0),
        ({}, r"\boxed{x} 42", 42, 0),
        ({}, "-5", "-5", 1),
        ({}, "5", "-5", 0),
        ({}, "it is 8", "4 + 4 = 8\n#### 8", 1),
        ({}, "7", [5, 7], 1),
        ({}, "3.14", 3.1416, 0),
        ({"tolerance": 0.01}, "3.14", 3.1416, 1),
        ({"tolerance": 0.001}, "3.14", 3.1416, 0),
        ({"relative": 0.01}, "-198", -200, 1),
        ({"relative": 0.01}, "-197.9", -200, 0),
        ({"tolerance": 0.1}, "0.1", "0.2", 1),  # exactly, not in floating point
        ({"find": "marked"}, "it is 42", 42, 0),
        ({"find": "marked"}, "#### 42", 42, 1),
        ({}, "42", None, None),
    ],
)
def test_numeric(arguments, response, answer, score):
    assert numeric([response], rows(answer), **arguments) == [score]


# ---- a pattern ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "response", "score"),
    [
        ({"pattern": "<think>.*</think>"}, "so <think>a</think> b", 1),
        ({"pattern": "<think>.*</think>"}, "<think>a\nb</think>", 0),
        ({"pattern": "(?s)<think>.*</think>"}, "<think>a\nb</think>", 1),
        ({"pattern": "a+", "whole": True}, "aaa", 1),
        ({"pattern": "a+", "whole": True}, "aaab", 0),
        ({"pattern": "answer: (\\w+)", "column": "answer"}, "answer: no, answer: yes", 1),
        ({"pattern": "answer: (\\w+)", "column": "answer"}, "answer: yes, answer: no", 0),
        ({"pattern": "answer: (\\w+)", "column": "answer"}, "yes", 0),
        ({"pattern": "(?P<it>\\w+) it is", "column": "answer", "group": "it"}, "yes it is", 1),
        ({"pattern": "(a)?(yes)", "column": "answer", "group": 1}, "yes", 0),
        ({"pattern": "yes ?", "column": "answer", "group": 0}, "yes yes ", 1),
    ],
)
def test_regex(arguments, response, score):
    assert Regex(**arguments)([response], rows("yes")) == [score]


def test_regex_of_a_record_without_an_answer():
    assert Regex("(.+)", column="answer")(["a", "b"], rows(None, ["c", "b"])) == [None, 1]


# ---- a JSON schema --------------------------------------------------------------------------------------------------

POINT = {"type": "object", "properties": {"x": {"type": "integer", "maximum": 9}}, "required": ["x"]}


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ('{"x": 3}', 1),
        (' {"x": 3, "y": null}\n', 1),
        ('{"x": 10}', 0),
        ('{"x": "3"}', 0),
        ("{}", 0),
        ("[]", 0),
        ('{"x": 3', 0),
        ("", 0),
        ('Here:\n```json\n{"x": 10}\n```\nor\n```\n{"x": 1}\n```\n', 1),
        ('Here: {"x": 3}', 0),
        ("[" * 100_000, 0),
        ("9" * 10_000, 0),
    ],
)
def test_json_schema(response, score):
    assert JsonSchema(POINT)([response], [{}]) == [score]


def test_json_schema_of_the_records():
    schemas = rows(POINT, '{"type": "array"}', None, column="schema")
    assert JsonSchema(column="schema")(["[1]", "[1]", "[1]"], schemas) == [0, 1, None]
    assert JsonSchema({})(["NaN", "1"], [{}, {}]) == [0, 1]
    assert JsonSchema({}, fenced=False)(["```\n1\n```"], [{}]) == [0]


def test_a_reference_of_a_schema_is_not_downloaded():
    elsewhere = {"$ref": "http://127.0.0.1:9/schema.json"}
    with pytest.raises(Exception, match=r"Unresolvable|NoSuchResource"):
        JsonSchema(elsewhere)(["1"], [{}])


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: exact_match(["a"], [{"text": 1}]), "exact_match: answer: missing among text"),
        (lambda: exact_match(["a"], rows("a"), ignore=["cases"]), 'exact_match: ignore: "cases": nearest: case'),
        (lambda: numeric(["a"], rows("none")), 'numeric: answer: "none": expected a number'),
        (lambda: numeric(["a"], rows(1), find="first"), "numeric: find:"),  # type: ignore[arg-type]
        (lambda: Regex("(a"), 'regex: pattern: "\\(a": missing \\)'),
        (lambda: Regex("a", column="answer"), "regex: group: 1: no group of"),
        (lambda: JsonSchema(), "json_schema: expected either schema, or column"),
        (lambda: JsonSchema({"type": "objekt"}), "json_schema: schema: .*: no JSON schema: 'objekt' is not valid"),
    ],
)
def test_mistakes_are_one_line(call, line):
    with pytest.raises(ValueError, match=f"^{line}") as caught:
        call()
    assert "\n" not in str(caught.value)


# ---- their names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_each_has_a_short_name_and_a_sentence(name):
    function = resolve(name)
    assert function.name == name
    module, _, attribute = BUILT_IN[name].partition(":")
    assert getattr(__import__(module, fromlist=[attribute]), attribute).__doc__


def test_the_nearest_short_name_is_said():
    with pytest.raises(ValueError, match=r"^function: exact_mach: nearest: exact_match$"):
        resolve("exact_mach")
    with pytest.raises(ValueError, match=r'^function: qqq: expected "package\.module:name"$'):
        resolve("qqq")
    assert resolve("exact_match", {"column": "label"})(["a"], [{"label": "a"}]).tolist() == [1]


# ---- whatever a policy writes ---------------------------------------------------------------------------------------

ARGUMENTS = {
    "exact_match": {"ignore": ["case", "punctuation", "articles", "accents", "blanks"]},
    "numeric": {"relative": 0.1},
    "chrf": {"word_order": 2},
    "regex": {"pattern": r"(\w+)\s*$", "column": "answer"},
    "json_schema": {"schema": {"type": "object"}},
    "length": {"unit": "words"},
    "length_drift": {"target": 3},
    "soft_overlong": {"buffer": 4},
    "language": {"language": "en"},
    **{key: {} for key in ("ended", "repetition", "distinct", "self_bleu", "unlike_others", "agreement")},
}
ODD = st.text(max_size=40) | st.text("0123456789.,/%$-e#\\boxed{}[] \n`", max_size=60)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    responses=st.lists(ODD, min_size=1, max_size=6),
    answer=st.integers() | st.floats(allow_nan=False, allow_infinity=False, width=32),
)
def test_every_response_has_a_finite_number_or_none(responses, answer):
    count = len(responses)
    details = Details([[*text.encode(errors="replace")] for text in responses], [True] * count, [0] * count, 64)
    for name, arguments in ARGUMENTS.items():
        records = [{"answer": answer if name == "numeric" else str(answer)} for _ in responses]
        function = resolve(name, arguments)
        found = function(responses, records, details)
        assert not np.isinf(found).any(), name
        np.testing.assert_array_equal(found, function(responses, records, details))
