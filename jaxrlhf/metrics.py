"""What a run writes down: metrics.jsonl, samples.jsonl, TensorBoard events, and the line or bar that a person sees."""

import dataclasses
import fcntl
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from typing import IO, Any

from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PART_ROWS = 100  # rows of a part, where a path can't be appended to
PART_SECONDS = 10  # at least, between two writes of a part: an object may change about once a second


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is written down, and how often."""

    every: int = 1  # iterations between two lines of a log that is not a terminal
    samples: int = 4  # responses of one iteration that go to samples.jsonl
    samples_every: int = 10  # iterations between two such iterations
    tensorboard: bool = True  # event files in RUN_DIR/tensorboard (local run directories only)


class RunDirBusy(ValueError):
    """Another process writes to the run directory."""


def is_local(path: os.PathLike | str) -> bool:
    """Whether ``path`` is on a file system, which can append and lock, and not in an object store (gs://)."""
    return "://" not in os.fspath(path)


def lock_run_dir(run_dir: os.PathLike | str) -> IO | None:
    """Makes this process the only writer of ``run_dir`` (created if missing) until the returned file is closed.

    The lock belongs to the open file, so it ends with the process however that ends: there are no stale locks to clear.
    None for an object store, which has no locks: there a second writer is not noticed. Raises RunDirBusy, in one line,
    when another writer holds it.
    """
    path = epath.Path(run_dir)
    path.mkdir(parents=True, exist_ok=True)
    if not is_local(path):
        return None
    file = open(path / ".lock", "a+")  # noqa: SIM115 (open as long as the lock is held)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "unknown process"
        file.close()
        raise RunDirBusy(
            f"run_dir: {os.fspath(run_dir)}: already being written by {holder}; stop it or choose another run_dir"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file


def plain(value: Any) -> Any:
    """``value`` as JSON has it: numbers as int or float, non-finite ones as None, the rest untouched."""
    if value is None or isinstance(value, (str, bool, int, list, dict)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def up_to(text: str, last_step: int) -> str:
    """The lines of ``text`` whose ``step`` is at most ``last_step``; without those that aren't whole (a crash)."""
    kept = []
    for line in text.split("\n")[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("step", 0) <= last_step:
            kept.append(line + "\n")
    return "".join(kept)


def read_rows(run_dir: os.PathLike | str, name: str) -> list[dict]:
    """The rows of ``name`` ("metrics", "samples") of a run, in the order that they were written."""
    texts = [up_to(read_text(path), sys.maxsize) for path in row_files(run_dir, name)]
    return [json.loads(line) for text in texts for line in text.split("\n")[:-1]]


def row_files(run_dir: os.PathLike | str, name: str) -> list[epath.Path]:
    """The file, or the parts, that hold the rows of ``name``."""
    run_dir = epath.Path(run_dir)
    whole = run_dir / f"{name}.jsonl"
    return [whole] if whole.exists() else sorted(run_dir.glob(f"{name}-*.jsonl"))


class JsonLines:
    """Rows of JSON under a run directory: appended to NAME.jsonl, or, where nothing can be appended, written in parts
    NAME-000000.jsonl, NAME-000001.jsonl; the last one is written again as it grows, when PART_SECONDS have passed or
    ``flush`` is called. Rows of steps after ``last_step`` are removed: those steps will be redone.
    """

    def __init__(self, run_dir: epath.Path, name: str, last_step: int, parts: bool):
        self.run_dir, self.name = run_dir, name
        files = row_files(run_dir, name)
        for path in files:
            text = read_text(path)
            if (kept := up_to(text, last_step)) != text:
                replace_text(path, kept)
        self.part: list[str] = []
        self.written = time.monotonic()
        self.index = len(files)
        self.file = None if parts else open(run_dir / f"{name}.jsonl", "ab")  # noqa: SIM115 (open as long as the run)

    def append(self, row: Mapping[str, Any]) -> None:
        line = json.dumps({key: plain(value) for key, value in row.items()}, ensure_ascii=False) + "\n"
        if self.file:
            self.file.write(encode(line))
            self.file.flush()
            return
        self.part.append(line)
        if len(self.part) == PART_ROWS or time.monotonic() - self.written >= PART_SECONDS:
            self.flush()
        if len(self.part) == PART_ROWS:
            self.part, self.index = [], self.index + 1

    def flush(self) -> None:
        """Write the rows of the last part that are held back."""
        if self.part and not self.file:
            (self.run_dir / f"{self.name}-{self.index:06d}.jsonl").write_bytes(encode("".join(self.part)))
            self.written = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self.file:
            self.file.close()


def encode(text: str) -> bytes:
    """UTF-8; a lone surrogate (half an emoji at the end of a response) becomes a question mark, not a crash."""
    return text.encode("utf-8", errors="replace")


def read_text(path: epath.Path) -> str:
    """The text of a file that a crash may have cut inside a character."""
    return path.read_bytes().decode("utf-8", errors="replace")


def replace_text(path: epath.Path, text: str) -> None:
    """Writes ``text`` so that a crash leaves the old file or the new one."""
    if not is_local(path):
        path.write_bytes(encode(text))  # object stores replace whole objects
        return
    beside = path.with_suffix(".tmp")
    beside.write_bytes(encode(text))
    os.replace(beside, path)


def summary(metrics: Mapping[str, float]) -> str:
    """The few numbers that tell how training goes: "reward +0.53  kl 1.20  loss 0.312  1,840 tok/s"."""

    def first(*names: str) -> float | None:
        keys = [prefix + name for prefix in ("", "eval/") for name in names]
        return next((metrics[key] for key in keys if key in metrics), None)

    rows = [
        ("reward {:+.3f}", first("score/mean")),
        ("kl {:.3f}", first("kl/reference")),
        ("length {:.1f}", first("response/length_mean")),
        ("accuracy {:.3f}", first("reward/accuracy")),
        ("loss {:.4f}", first("loss/policy", "loss/reward")),
        ("{:,.0f} tok/s", first("throughput/response_tokens_per_second")),
    ]
    shown = [form.format(value) for form, value in rows if value is not None]
    held_out = ["held out:"] if metrics and all(key.startswith("eval/") for key in metrics) else []
    return "  ".join([*held_out, *shown])


class Bar:
    """A progress bar, on a terminal."""

    def __init__(self, console: Console, total: int, start: int):
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console)
        self.task = self.progress.add_task("train", total=total, completed=start, numbers="compiling")
        self.progress.start()

    def show(self, step: int, numbers: str) -> None:
        self.progress.update(self.task, completed=step, numbers=numbers)

    def close(self) -> None:
        self.progress.stop()


class Lines:
    """One plain line now and then, in a log."""

    def __init__(self, console: Console, total: int, start: int, every: int):
        self.console, self.total, self.start, self.every = console, total, start, every
        self.begin: tuple[float, int] | None = None  # time and step of the first line: compilation is before it

    def show(self, step: int, numbers: str) -> None:
        now = time.monotonic()
        self.begin = self.begin or (now, step)
        if step % self.every and step != self.total:
            return
        done = step - self.begin[1]
        left = ""
        if done:
            minutes, seconds = divmod(round((now - self.begin[0]) / done * (self.total - step)), 60)
            left = f"  {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
        self.console.print(f"step {step}/{self.total}  {numbers}{left}", markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        pass


class MetricsLog:
    """The written record of one run, from ``start`` (iterations done before) to ``total``.

    On resume, rows of steps after ``start`` are removed from metrics.jsonl and samples.jsonl. The run directory is
    locked against a second writer until ``close`` (``lock``: what lock_run_dir returned, where it was taken earlier).
    ``main``: False on every process but the first, where nothing is written. Raises RunDirBusy.
    """

    def __init__(
        self,
        run_dir: os.PathLike | str,
        cfg: LogConfig,
        total: int,
        start: int = 0,
        *,
        lock: IO | None = None,
        main: bool = True,
        console: Console | None = None,
    ):
        self.main, self.run_dir = main, epath.Path(run_dir)
        self.nonfinite: dict[str, int] = {}  # metric -> how often it was NaN or infinite
        if not main:
            return
        path = self.run_dir
        self.lock = lock or lock_run_dir(path)
        last_step = start if start else -1  # at step 0 nothing is done yet: not even the evaluation before training
        self.metrics = JsonLines(path, "metrics", last_step, parts=not is_local(path))
        self.sampled = JsonLines(path, "samples", last_step, parts=not is_local(path))
        self.events = event_writer(path, start) if cfg.tensorboard and is_local(path) else None
        self.console = console or Console()
        if self.console.is_terminal:
            self.progress = Bar(self.console, total, start)
        else:
            self.progress = Lines(self.console, total, start, cfg.every)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One row: ``step``, ``time`` (Unix seconds) and the metrics; NaN and infinity as null, counted, warned of."""
        if not self.main:
            return
        values = {key: plain(value) for key, value in metrics.items()}
        finite = {key: value for key, value in values.items() if value is not None}
        for key in values.keys() - finite.keys():
            self.warn(step, key, metrics[key])
        self.metrics.append({"step": step, "time": round(time.time(), 3), **values})
        for key, value in finite.items():
            if self.events:
                self.events.add_scalar(key, value, step)
        self.progress.show(step, summary(finite))

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows of samples.jsonl: prompt, response, score, split; ``step`` is put first."""
        for row in rows if self.main else ():
            self.sampled.append({"step": step, **row})

    def flush(self) -> None:
        """Nothing is held back after this: call it where the steps so far will not be done again."""
        for file in (self.metrics, self.sampled) if self.main else ():
            file.flush()

    def warn(self, step: int, key: str, value: Any) -> None:
        """Says once a metric that it isn't finite, and counts."""
        self.nonfinite[key] = self.nonfinite.get(key, 0) + 1
        if self.nonfinite[key] == 1:
            self.say(f"warning: {key} is {value} at step {step}; written as null")

    def say(self, text: str) -> None:
        """Prints a line, above the progress bar where there is one."""
        if self.main:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Flushes and closes the files, and lets the run directory go. Calling it again does nothing."""
        if not self.main:
            return
        self.main = False
        self.progress.close()
        if self.nonfinite:
            counts = ", ".join(f"{key} x {count}" for key, count in sorted(self.nonfinite.items()))
            self.console.print(f"warning: values that were not finite: {counts}", soft_wrap=True)
        for file in (self.metrics, self.sampled, self.events, self.lock):
            if file:
                file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def event_writer(run_dir: epath.Path, start: int):
    """A TensorBoard writer; what an earlier process wrote of steps after ``start`` is not shown.

    tensorboardX imports torch wherever it is installed, for features that are not used here: 2 s and 200 MB. It is told
    that there is none.
    """
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter(os.fspath(run_dir / "tensorboard"), purge_step=start + 1 if start else None)
