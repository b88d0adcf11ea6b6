"""Where a run's numbers and samples go beside its own files: TensorBoard, Weights & Biases, Trackio."""

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal, Protocol

from etils import epath

from jaxrlhf.errors import ConfigError
from jaxrlhf.log.events import Events
from jaxrlhf.log.rows import encode, plain, read_text, replace_text
from jaxrlhf.log.run_dir import is_local
from jaxrlhf.log.tracker_process import SAID, SEEN_AT

TrackerName = Literal["tensorboard", "wandb", "trackio"]
IDS = "trackers.json"  # of a run directory: tracker -> the id under which it knows the run
CLOSE_SECONDS = 30.0  # that a tracker has for what it has not yet taken when the run ends
MOST_HELD = 2**24  # bytes that wait for a tracker


class Tracker(Protocol):
    """What takes a run's numbers. No call raises, and none waits: ``close`` alone, up to CLOSE_SECONDS."""

    @property
    def error(self) -> Exception | None:
        """Why it does not take what it is given; None again where it does."""
        ...

    @property
    def url(self) -> str:
        """Where the run is seen; "" where it is not, or that is not known yet."""
        ...

    def metrics(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def close(self) -> None: ...


def check_installed(names: Iterable[TrackerName], source: str = "config") -> None:
    """Raises ConfigError, in one line, where the library of a tracker is not installed."""
    for name in names:
        if name != "tensorboard" and find_spec(name) is None:
            raise ConfigError(f"{source}: log.trackers: {name}: not installed; expected: pip install 'jaxrlhf[{name}]'")


def open_trackers(
    names: Iterable[TrackerName], run_dir: epath.Path, start: int, project: str, config: Mapping[str, Any]
) -> dict[str, Tracker]:
    """The trackers of a run that goes on from ``start``. TensorBoard's files can be local alone."""
    trackers: dict[str, Tracker] = {}
    for name in dict.fromkeys(names):
        if name != "tensorboard":
            trackers[name] = TrackerProcess(name, run_dir, project, config)
        elif is_local(run_dir):
            trackers[name] = Events(run_dir, start)
    return trackers


def kept_id(run_dir: epath.Path, name: str) -> str:
    """The id of the run for a tracker: made once, kept in the run directory. Raises OSError or ValueError."""
    file = run_dir / IDS
    ids = json.loads(read_text(file)) if file.exists() else {}
    if name not in ids:
        ids[name] = secrets.token_hex(4)
        replace_text(file, json.dumps(ids) + "\n")
    return ids[name]


class TrackerProcess:
    """A tracker whose library runs in a process of its own: what it raises, holds up, or prints is not the run's.

    What the process has not read yet is held, and sent with the next row. It is given up when it ends, when
    MOST_HELD bytes wait, or when it is not done CLOSE_SECONDS after the run."""

    def __init__(self, name: str, run_dir: epath.Path, project: str, config: Mapping[str, Any]):
        self.error: Exception | None = None
        self.seen_at = ""
        self.held = bytearray()
        code = f"import sys; sys.path[:] = {sys.path!r}; from jaxrlhf.log.tracker_process import serve; serve()"
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the run)
        self.process: subprocess.Popen | None = None
        try:
            opening = {
                "tracker": name,
                "id": kept_id(run_dir, name),
                "name": run_dir.name,
                "project": project,
                "folder": os.path.abspath(run_dir) if is_local(run_dir) else None,
                "config": config,
            }
            # a session of its own: Ctrl-C on the terminal is for the run
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=self.output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            self.error = error
            return
        assert self.process.stdin
        self.pipe = self.process.stdin.fileno()
        os.set_blocking(self.pipe, False)
        self.send(opening)

    def metrics(self, step: int, scalars: Mapping[str, float]) -> None:
        self.send({"step": step, "metrics": dict(scalars)})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of the tracker: a column for each key of the rows."""
        self.send({"step": step, "samples": [{key: plain(value) for key, value in row.items()} for row in rows]})

    def send(self, message: Mapping[str, Any]) -> None:
        if self.error:
            return
        self.held += encode(json.dumps(message, ensure_ascii=False, default=str) + "\n")
        self.attempt()
        if not self.error and len(self.held) > MOST_HELD:
            self.give_up(f"it reads nothing, and {len(self.held) >> 20} MiB wait for it")

    def attempt(self) -> None:
        """Send as much as the process takes now."""
        assert self.process
        try:
            while self.held:
                del self.held[: os.write(self.pipe, self.held[: 2**16])]
        except BlockingIOError:
            pass
        except OSError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
            self.give_up(self.last_words())
            return
        if self.process.poll() is not None:
            self.give_up(self.last_words())

    @property
    def url(self) -> str:
        if not self.seen_at and not self.output.closed:
            file = self.output.fileno()  # whose place is the process's, too: it is not moved
            lines = os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace").split("\n")[:-1]
            self.seen_at = next((line.removeprefix(SEEN_AT) for line in lines if line.startswith(SEEN_AT)), "")
        return self.seen_at

    def last_words(self) -> str:
        """Why the process ended: what it said of an error, or the last line that it printed."""
        assert self.process
        self.output.seek(0)
        lines = [line for line in self.output.read().decode(errors="replace").splitlines() if line.strip()]
        said = [line.removeprefix(SAID) for line in lines if line.startswith(SAID)]
        code = f"its process ended with exit code {self.process.returncode}"
        return said[-1] if said else f"{code}: {lines[-1].strip()}" if lines else code

    def give_up(self, why: str) -> None:
        assert self.process
        self.error = RuntimeError(why)
        self.held.clear()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """Send what is held back and wait until the tracker has it."""
        if self.process and not self.error:
            deadline = time.monotonic() + CLOSE_SECONDS
            self.send({"end": True})  # a forked process may hold the pipe open
            while self.held and time.monotonic() < deadline:
                select.select([], [self.pipe], [], 0.1)
                self.attempt()
            try:
                if not self.error and self.process.wait(max(0.0, deadline - time.monotonic())):
                    self.give_up(self.last_words())
            except subprocess.TimeoutExpired:
                self.give_up(f"not done {CLOSE_SECONDS:g} s after the run")
        if self.process and self.process.stdin:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        self.seen_at = self.url
        self.output.close()
