"""Two processes of one run, or the launcher of both, are struck by a signal: nothing hangs, each ends with the exit
code that says what became of it, checkpoints stay, and the same command ends with the same bits."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import runs
from tests.support.strike import MOMENTS, STEP

START, LAST = 2, 6  # the step that each struck run goes on from, and its last one
BOUND = 60  # seconds from the strike to the end of everything, on a busy machine; heartbeat_timeout is 10
LOST = {1, -signal.SIGABRT}  # a process whose partner is gone: it says so, or JAX aborts it


class Case(NamedTuple):
    """What becomes of the processes, and what is done about it."""

    kind: str
    who: str  # "0", "1" or "launcher"
    when: str
    codes: dict[int, set[int]]  # process -> the exit codes that it may have; the launcher is process 0


def cases() -> Iterator[Case]:
    for when in MOMENTS:
        apart = when == "import"  # the processes have not met: the other one waits for init_timeout
        for process, other in ((0, 1), (1, 0)):
            alone = {1} if apart else LOST
            yield Case("SIGKILL", str(process), when, {process: {-signal.SIGKILL}, other: alone})
            yield Case("SIGTERM", str(process), when, {process: {75}, other: {1} if apart else {75}})
            yield Case("SIGINT", str(process), when, {process: {130}, other: {1} if apart else {75}})
            yield Case("SIGSTOP", str(process), when, {process: {1} if apart else LOST, other: alone})
        yield Case("SIGKILL", "launcher", when, {0: {-signal.SIGKILL}})
        yield Case("SIGTERM", "launcher", when, {0: {75}})
        yield Case("SIGINT", "launcher", when, {0: {75}})
        yield Case("SIGSTOP", "launcher", when, {0: {0}})


TWINS = {("SIGINT", "1", "compile"), ("SIGKILL", "0", "loop")}
PARAMETERS = [
    pytest.param(case, id="-".join(case[:3]), marks=() if case[:3] in TWINS else pytest.mark.nightly)
    for case in cases()
]


def command(root: Path, folder: Path) -> list[str]:
    """Trains sft in ``folder`` by two processes of one device each."""
    more = [f"iterations={LAST}", "eval.every=0", "mesh.fsdp=2", "checkpoint.keep=9"]
    times = ["distributed.heartbeat_timeout=10", "distributed.init_timeout=20"]
    return runs.train(*runs.overrides(runs.text(root), folder), *more, *times, configs=[runs.tiny_config("sft")])


def environment(folder: Path, strike: str) -> dict[str, str]:
    pids = folder / "pids"
    shutil.rmtree(pids, ignore_errors=True)
    pids.mkdir(parents=True)
    return runs.environment(1) | {"STRIKE": strike, "STRIKE_PIDS": str(pids)}


class Pair(NamedTuple):
    """Two processes under way, or their launcher."""

    started: list[subprocess.Popen]
    folder: Path

    def pids(self) -> list[int]:
        """Of all training processes."""
        return [int(path.read_text()) for path in sorted((self.folder / "pids").iterdir())]

    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("output*")))


@contextlib.contextmanager
def under_way(root: Path, folder: Path, strike: str = "", launcher: bool = False):
    """The pair; whatever is left of it at the end of the block is killed."""
    train, variables = command(root, folder), environment(folder, strike)
    strikes = [sys.executable, "-m", "tests.support.strike"]
    if launcher:
        script = folder / "jaxrlhf-command"
        script.write_text(f'#!/bin/sh\nexec {" ".join(strikes)} "$@"\n')
        script.chmod(0o755)
        variables |= {"JAXRLHF": str(script), "PROCESSES": "2", "GRACE_SECONDS": "30"}
        ends_with_this = [shutil.which("setpriv"), "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        commands = [[*ends_with_this, "bash", str(runs.ROOT / "launch" / "local.sh"), *train[1:]]]
    else:
        place = [f"distributed.coordinator=localhost:{runs.free_port()}", "distributed.num_processes=2"]
        commands = [[*strikes, *train, *place, f"distributed.process_id={number}"] for number in range(2)]
    started = []
    for number, words in enumerate(commands):
        with open(folder / f"output-{number}", "w") as output:
            started.append(subprocess.Popen(words, cwd=folder, env=variables, stdout=output, stderr=output))
    pair = Pair(started, folder)
    try:
        yield pair
    finally:
        for pid in {*(process.pid for process in started), *pair.pids()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in started:
            process.wait()


def wait_for(condition, seconds: float) -> None:
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


def whole(root: Path) -> Path:
    """The folder of the run that nothing struck."""
    folder = root / "struck" / "whole"

    def make() -> list[runs.Done]:
        with under_way(root, folder) as pair:
            ended = [process.wait(300) for process in pair.started]
            assert ended == [0, 0], pair.said()
        return []

    runs.once(root, "struck-whole", make)
    return folder


@pytest.mark.parametrize("case", PARAMETERS)
def test_a_struck_pair_ends_in_time_and_loses_nothing(root, case):
    expected = runs.read_state(whole(root) / "sft", LAST)
    folder = root / "struck" / "-".join(case[:3])
    runs.copy_run(whole(root) / "sft", folder / "sft", START)
    before = files(folder / "sft" / "checkpoints")
    with under_way(root, folder, " ".join(case[:3]), case.who == "launcher") as pair:
        codes = outcome(pair, case)
        said = pair.said()
    assert {number: codes[number] in expected for number, expected in case.codes.items()} == dict.fromkeys(
        case.codes, True
    ), (codes, said)
    assert "Traceback" not in said, said
    kept = runs.steps_kept(folder / "sft")
    assert kept[0] == START
    if case.when == "loop" and 75 in codes.values():
        assert kept[-1] >= STEP, said  # saved on the way out
    if kept == [START] and case.when != "loop":  # nothing began: the same command finds what it found before
        assert files(folder / "sft" / "checkpoints") == before
        assert runs.rows(folder / "sft") == runs.rows(whole(root) / "sft")[: len(runs.rows(folder / "sft"))]
        return
    with under_way(root, folder) as again:
        ended = [process.wait(300) for process in again.started]
        assert ended == [0, 0], again.said()
    found = runs.read_state(folder / "sft", LAST)
    assert expected.keys() == found.keys()
    assert [path for path in expected if expected[path].tobytes() != found[path].tobytes()] == []
    assert runs.rows(folder / "sft") == runs.rows(whole(root) / "sft")


def files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def outcome(pair: Pair, case: Case) -> dict[int, int]:
    """The exit codes, once all have ended. Fails where that takes longer than BOUND, seen from the strike."""
    victim = pair.started[0 if case.who == "launcher" else int(case.who)]
    pids = lambda: {*pair.pids(), *(one.pid for one in pair.started)}
    if case.kind == "SIGSTOP":
        wait_for(lambda: state(victim.pid) == "T", 300)
        # without its launcher a pair trains to its end
        wait_for(lambda: not any(state(pid) for pid in pids() - {victim.pid}), 300 if case.who == "launcher" else BOUND)
        victim.send_signal(signal.SIGCONT)
    else:
        wait_for(lambda: any(one.poll() is not None for one in pair.started), 300)
    wait_for(lambda: all(one.poll() is not None for one in pair.started), BOUND)
    wait_for(lambda: not any(map(state, pids())), BOUND)
    return {number: one.returncode for number, one in enumerate(pair.started)}
