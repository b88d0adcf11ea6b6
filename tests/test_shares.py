"""The shares that nightly tests are run in."""

from collections import Counter

import pytest

from tests.support.shares import in_share


def test_each_test_is_in_one_share_and_shares_are_alike():
    names = [f"tests/test_{n % 20}.py::test_{n}" for n in range(500)]
    found = [[share for share in range(5) if in_share(name, f"{share}/5")] for name in names]
    assert {len(shares) for shares in found} == {1}
    assert min(Counter(share for shares in found for share in shares).values()) > 70


@pytest.mark.parametrize("share", ["", "5/5", "1", "a/b", "-1/5"])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(pytest.UsageError, match=r"^--share: .*: expected I/N with I from 0 to N - 1; nearest: 0/5$"):
        in_share("tests/test_a.py::test_b", share)
