"""Two processes of one run, of one device each, or the launcher of both; and the runs that they share."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from tests.support import runs

START, LAST = 2, 8  # the step that other runs go on from, and the last one
PATIENT = 300.0  # seconds for what takes its time


class Pair(NamedTuple):
    """What was started, with its output in files of ``folder``."""

    started: list[subprocess.Popen]
    folder: Path

    def pids(self) -> list[int]:
        """Of all that was started, and of all training processes."""
        training = [int(path.read_text()) for path in sorted((self.folder / "pids").iterdir())]
        return [*(one.pid for one in self.started), *training]

    def output(self, number: int) -> str:
        """What one that was started has printed."""
        return (self.folder / f"output-{number}").read_text()

    def said(self) -> str:
        """What all have printed, errors too."""
        files = [path for path in sorted(self.folder.iterdir()) if path.name.startswith(("output-", "errors-"))]
        return "".join(path.read_text() for path in files)

    def ended(self, seconds: float = PATIENT) -> dict[int, int]:
        """The exit codes, once all of it has ended; fails where that takes longer."""
        wait_for(lambda: all(one.poll() is not None for one in self.started), seconds)
        wait_for(lambda: not any(map(state, self.pids())), seconds)
        return {number: one.returncode for number, one in enumerate(self.started)}


@contextlib.contextmanager
def under_way(
    folder: Path,
    train: Sequence[str],
    strike: str = "",
    launcher: bool = False,
    more: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Pair]:
    """A pair that runs the command ``train``; what is left of it at the end of the block is killed.

    Args:
        strike: as tests.support.strike takes it.
        launcher: launch/local.sh starts the pair, and is all that is started here.
        more: of the environment.
    """
    shutil.rmtree(folder / "pids", ignore_errors=True)
    (folder / "pids").mkdir(parents=True)
    variables = {**runs.environment(1), "STRIKE": strike, "STRIKE_PIDS": str(folder / "pids"), **more}
    jaxrlhf = [sys.executable, "-m", "tests.support.strike"]
    if launcher:
        script = folder / "jaxrlhf-command"
        script.write_text(f'#!/bin/sh\nexec {" ".join(jaxrlhf)} "$@"\n')
        script.chmod(0o755)
        variables |= {"JAXRLHF": str(script), "PROCESSES": "2", "GRACE_SECONDS": "30"}
        ends_with_this = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        commands = [[*ends_with_this, "bash", str(runs.ROOT / "launch" / "local.sh"), *train[1:]]]
    else:
        place = [f"distributed.coordinator=localhost:{runs.free_port()}", "distributed.num_processes=2"]
        commands = [[*jaxrlhf, *train, *place, f"distributed.process_id={number}"] for number in range(2)]
    started = []
    for number, words in enumerate(commands):
        with open(folder / f"output-{number}", "w") as out, open(folder / f"errors-{number}", "w") as errors:
            started.append(subprocess.Popen(words, cwd=folder, env=variables, stdout=out, stderr=errors))
    pair = Pair(started, folder)
    try:
        yield pair
    finally:
        for pid in pair.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in started:
            process.wait()


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def state(pid: int) -> str:
    """The letter of the kernel for what a process does: "T" where SIGSTOP holds it; "" where it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return letter.replace("Z", "")  # a zombie has ended; its parent has not waited for it
    return ""


# ---- runs -----------------------------------------------------------------------------------------------------------


def command(root: Path, folder: Path, *names: str, more: Sequence[str] = (), origin: Path | None = None) -> list[str]:
    """Trains ``names`` (sft, and grpo from it, or from ``origin``, with a reward function) in ``folder``."""
    origin = origin or root / "pair" / "whole" / "sft"
    every = ["checkpoint.keep=9", "distributed.heartbeat_timeout=10", "distributed.init_timeout=20"]
    own = [
        f"sft:iterations={LAST}",
        "sft:eval.every=0",
        "sft:mesh.fsdp=2",
        "grpo:rewards.function=tests.support.runs:praise",
    ]
    own += ["grpo:iterations=4", "grpo:mesh.fsdp=2", f"grpo:models={{policy: {{init_from: {origin}}}}}"]
    given = [text for text in runs.overrides(runs.text(root), folder) if not text.startswith("grpo:models.")]
    return runs.train(*given, *every, *own, *more, configs=[runs.tiny_config(name) for name in names])


def whole(root: Path) -> Path:
    """The folder of the runs sft and grpo that a pair trained without a break, with what it printed."""
    folder = root / "pair" / "whole"

    def make() -> list[runs.Done]:
        with under_way(folder, command(root, folder, "sft", "grpo")) as pair:
            assert pair.ended() == {0: 0, 1: 0}, pair.said()
        return []

    runs.once(root, "pair-whole", make)
    return folder


def begun(root: Path, name: str, run: str = "sft") -> Path:
    """The folder ``name`` with that run as it was at START."""
    folder = root / "pair" / name
    runs.copy_run(whole(root) / run, folder / run, START)
    return folder


def same_bits(root: Path, folder: Path, run: str = "sft") -> None:
    """Fails where the run in ``folder`` has not ended as the one without a break: its state, its place in the data and
    its rows, but for those of evaluations, which a shorter run has at its end."""
    mine, other = folder / run, whole(root) / run
    last = runs.steps_kept(other)[-1]
    expected, found = (runs.read_state(side, last) for side in (other, mine))
    assert expected.keys() == found.keys()
    assert [path for path in expected if expected[path].tobytes() != found[path].tobytes()] == []
    assert place(mine, last) == place(other, last)
    assert trained(mine) == trained(other)


def place(run: Path, step: int) -> dict:
    """Of a checkpoint in the data."""
    return json.loads((run / "checkpoints" / str(step) / "extra" / "metadata").read_text())["data"]


def trained(run: Path) -> list[dict]:
    """The rows of the iterations."""
    return [row for row in runs.rows(run) if not any(key.startswith("eval/") for key in row)]


# ---- rewards --------------------------------------------------------------------------------------------------------

calls = itertools.count(1)  # of refuse


def refuse(responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """A reward function that does, in the second process and on its fourth call, what JAXRLHF_TEST_JUDGE says."""
    call = next(calls)
    if jax.process_index() == 1 and call == 4:
        if os.environ["JAXRLHF_TEST_JUDGE"] == "raises":
            raise RuntimeError("the judge is gone")
        if os.environ["JAXRLHF_TEST_JUDGE"] == "is stopped":
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1000)
    return runs.praise(responses, records)
