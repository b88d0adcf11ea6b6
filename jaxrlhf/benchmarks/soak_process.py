"""A process of a run that is soaked, and what can be seen of it from outside: which phase it is in."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

PHASES = ("import", "load", "compile", "loop", "save", "reward")
ENDED = "ended"
SAID = "\x1e"  # before what the reward function says: rows as JSON when a call begins, nothing when it ends
COMPILED = "compiled "  # how the line begins that training says before its loop
REFUSED = "could not be written"  # what it says where the disk is full
LOOK = 0.002  # seconds between two looks at a process
KEPT = 200  # lines of its output that are kept


class Process:
    """One process of the run in ``folder``, started now."""

    def __init__(self, command: Sequence[str], folder: Path, run_dir: Path, environment: Mapping[str, str]):
        self.run_dir, self.began = run_dir, time.time_ns()
        self.loops = self.scores = self.refused = False
        self.seen: list[str] = []  # what the reward function scored
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.running = subprocess.Popen(
            command, cwd=folder, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.running.stdout and self.running.stderr
        self.readers = [
            threading.Thread(target=read, args=(pipe, hear), daemon=True)
            for pipe, hear in ((self.running.stdout, self.hear), (self.running.stderr, self.hear_error))
        ]
        for reader in self.readers:
            reader.start()

    def hear(self, line: str) -> None:
        if line.startswith(SAID):
            self.scores = bool(line[len(SAID) :])
            self.seen += [line[len(SAID) :]] if self.scores else []
            return
        self.loops = self.loops or line.startswith(COMPILED)
        self.refused = self.refused or REFUSED in line
        self.lines = [*self.lines[-KEPT:], line]

    def hear_error(self, line: str) -> None:
        self.refused = self.refused or REFUSED in line
        self.errors = [*self.errors[-KEPT:], line]

    def phase(self) -> str:
        """One of PHASES, or ENDED."""
        if self.running.poll() is not None:
            return ENDED
        if not self.loops:
            if self.is_new(self.run_dir / "config.yaml"):
                return "compile"
            return "load" if self.is_new(self.run_dir / ".lock") else "import"
        if self.scores:
            return "reward"
        return "save" if is_saving(self.run_dir / "checkpoints") else "loop"

    def is_new(self, file: Path) -> bool:
        """Whether this process, or another one of its run, has written the file."""
        with contextlib.suppress(FileNotFoundError):
            return file.stat().st_mtime_ns > self.began
        return False

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.running.send_signal(number)

    def limit_disk(self, full: bool) -> None:
        """Makes the disk full, or empty again, for this process alone: it can't write a byte to a file (EFBIG)."""
        with contextlib.suppress(ProcessLookupError):
            _, hard = resource.prlimit(self.running.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(self.running.pid, resource.RLIMIT_FSIZE, (0 if full else hard, hard))

    def wait(self, seconds: float) -> int | None:
        """Its exit code, once all that it said is read; None where it goes on after ``seconds``."""
        try:
            code = self.running.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        for reader in self.readers:
            reader.join()
        return code


def read(pipe: IO[str], hear: Callable[[str], None]) -> None:
    for line in pipe:
        hear(line.rstrip("\n"))


def is_saving(checkpoints: Path) -> bool:
    """Whether a step is being written, or its manifest."""
    try:
        with os.scandir(checkpoints) as found:
            names = {entry.name for entry in found}
    except FileNotFoundError:
        return False
    if any("orbax-checkpoint-tmp" in name for name in names):
        return True
    newest = max((int(name) for name in names if name.isdecimal()), default=None)
    return newest is not None and not (checkpoints / str(newest) / "manifest.json").exists()


def start(folder: Path, config: str, run: str, environment: Mapping[str, str], count: int) -> list[Process]:
    """The processes of ``jaxrlhf train``: one, or ``count`` that act as hosts of one run, as launch/local.sh does."""
    command = [sys.executable, "-m", "jaxrlhf", "train", config]
    if count == 1:
        return [Process(command, folder, folder / run, environment)]
    joint = [f"distributed.coordinator=127.0.0.1:{free_port()}", f"distributed.num_processes={count}"]
    return [
        Process([*command, *joint, f"distributed.process_id={number}"], folder, folder / run, environment)
        for number in range(count)
    ]


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def finish(processes: Sequence[Process], seconds: float, grace: float = 60.0) -> list[int | None]:
    """The exit codes of all; None: it had to be killed. As launch/local.sh: the first that fails ends the others, by
    SIGTERM, and after ``grace`` by SIGKILL."""
    limit, told = time.monotonic() + seconds, False
    while any(process.phase() != ENDED for process in processes) and time.monotonic() < limit:
        failed = any(process.running.poll() not in (None, 0, 75) for process in processes)
        if failed and not told:
            told, limit = True, min(limit, time.monotonic() + grace)
            for process in processes:
                process.send(signal.SIGTERM)
        time.sleep(0.02)
    late = [process.phase() != ENDED for process in processes]
    for process in processes:
        process.send(signal.SIGKILL)
    codes: list[Any] = [process.wait(60.0) for process in processes]
    return [None if killed else code for killed, code in zip(late, codes)]
