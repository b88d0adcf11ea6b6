"""Graders of lengths, by hand."""

import numpy as np
import pytest

from jaxrlhf.rewards.functions import Details, resolve

TEXTS = ["one two", "abc", ""]
DETAILS = Details([[5, 6, 7], [8], []], [True, False, True], [0, 0, 1], 10)


def grade(name: str, details: Details = DETAILS, **given) -> list[float]:
    texts = [""] * len(details.token_ids) if details is not DETAILS else TEXTS
    return resolve(name, given)(texts, [{}] * len(texts), details).tolist()


@pytest.mark.parametrize(("unit", "expected"), [("tokens", [3, 1, 0]), ("words", [2, 1, 0]), ("characters", [7, 3, 0])])
def test_length(unit, expected):
    assert grade("length", unit=unit) == expected


def test_length_drift():
    np.testing.assert_allclose(grade("length_drift", target=2), [-0.5, -0.5, -1])
    np.testing.assert_allclose(grade("length_drift", target=2, unit="words"), [0, -0.5, -1])
    np.testing.assert_allclose(grade("length_drift", target=1), [-1, 0, -1])


def of_lengths(*lengths: int, most: int = 100) -> Details:
    count = len(lengths)
    return Details([[1] * length for length in lengths], [True] * count, [0] * count, most)


def test_soft_overlong_by_the_equation_of_dapo():
    """Numbers of TRL's function for the same case."""
    found = grade("soft_overlong", of_lengths(50, 80, 81, 90, 100, 110), buffer=20)
    np.testing.assert_allclose(found, [0, 0, -0.05, -0.5, -1, -1], rtol=1e-6)
    found = grade("soft_overlong", of_lengths(50, 110, 115, 121, most=900), buffer=10, limit=120)
    np.testing.assert_allclose(found, [0, 0, -0.5, -1], rtol=1e-6)
    paper = grade("soft_overlong", of_lengths(16384, 18432, 20480, most=20480), buffer=4096)
    np.testing.assert_allclose(paper, [0, -0.5, -1], rtol=1e-6)


def test_ended():
    assert grade("ended") == [1, 0, 1]


@pytest.mark.parametrize(
    ("name", "given", "line"),
    [
        ("length", {"unit": "token"}, 'length: unit: "token": nearest: tokens'),
        ("length_drift", {"target": 0}, "length_drift: target: 0: expected a number above 0"),
        ("soft_overlong", {"buffer": 11}, "soft_overlong: buffer: 11: expected 1 to the limit, which is 10"),
        ("soft_overlong", {"buffer": 0}, "soft_overlong: buffer: 0: expected 1 to the limit, which is 10"),
    ],
)
def test_mistakes_are_one_line(name, given, line):
    with pytest.raises(ValueError, match=f"^{line}$"):
        grade(name, **given)
