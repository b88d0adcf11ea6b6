"""A process ends with the one that started it, also where a shell between the two stays."""

import os
import signal
import subprocess
import sys
import time

import pytest

from jaxrlhf.hosts import parent_death
from tests.support import runs

CHILD = """
import os, signal, time
from jaxrlhf.hosts import parent_death
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"SIGTERM "), os._exit(75)))
parent_death.ends_with_launcher()
assert parent_death.LAUNCHER not in os.environ
os.write(1, b"here ")
time.sleep(60)
"""


@pytest.mark.parametrize("between", ["", "; true"], ids=["child", "grandchild"])
def test_a_child_hears_of_the_end_of_its_launcher(between):
    """A shell with something left to do after the child stays; otherwise it becomes the child."""
    inner = f'"$1" -c "$2"{between}'
    launcher = f'export {parent_death.LAUNCHER}=$$; sh -c \'{inner}\' sh "$1" "$2" & wait'
    command = ["bash", "-c", launcher, "bash", sys.executable, CHILD]
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    assert process.stdout and process.stdout.read(5) == b"here "
    process.send_signal(signal.SIGKILL)
    assert process.wait(20) == -signal.SIGKILL
    assert process.stdout.read() == b"SIGTERM "  # to the end: nobody holds the pipe


def test_a_launcher_that_ended_before_is_noticed():
    gone = subprocess.Popen(["true"])
    gone.wait()
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("SIGTERM"))
    heard: list[str] = []
    try:
        parent_death.ends_with(gone.pid, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not heard:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_without_a_launcher_nothing_is_watched(monkeypatch):
    monkeypatch.delenv(parent_death.LAUNCHER, raising=False)
    monkeypatch.setattr(parent_death, "ends_with", lambda *_: pytest.fail("there is nobody to end with"))
    parent_death.ends_with_launcher()
