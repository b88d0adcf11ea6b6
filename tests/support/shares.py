"""Nightly tests a share at a time: which tests are in the share that a change runs."""

import zlib

import pytest


def in_share(name: str, share: str) -> bool:
    """Whether the test function ``name`` (FILE::FUNCTION: its cases stay together) is in the share "I/N" of all."""
    index, _, count = share.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise pytest.UsageError(f"--share: {share}: expected I/N with I from 0 to N - 1; nearest: 0/5")
    return zlib.crc32(name.encode()) % int(count) == int(index)
