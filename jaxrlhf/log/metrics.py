"""The written record of a run: rows of metrics, samples and histograms, TensorBoard events, and what a person sees."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import numpy as np
from etils import epath

from jaxrlhf.log.alarms import Alarms, AlarmsConfig
from jaxrlhf.log.progress import PlainLines, open_progress, silent, summary
from jaxrlhf.log.rows import JsonLines, plain, read_rows, row_files
from jaxrlhf.log.run_dir import is_local, keep_lock, lock_run_dir
from jaxrlhf.log.trackers import Tracker, TrackerName, open_trackers

BINS = 24  # of a histogram
TIMED = ("compiling", "saving")  # what goes on between iterations, and is in no metric
MEMORY, ELSEWHERE = "its rows are kept in memory", "its numbers are in metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is written down, and how often."""

    every: int = 1  # iterations between two lines of a log that is not a terminal
    samples: int = 4  # responses of one iteration that go to samples.jsonl
    samples_every: int = 10  # iterations between two such iterations
    trackers: tuple[TrackerName, ...] = ("tensorboard",)  # tensorboard, wandb, trackio: who else is given the numbers
    project: str = "jaxrlhf"  # of wandb and trackio, under which the run is named as its directory


class MetricsLog:
    """The written record of one run, from ``start`` (iterations done before) to ``total``.

    On resume, rows of steps after ``start`` are removed from its files of rows. The run directory is
    locked against a second writer until ``close`` (``lock``: what lock_run_dir returned, where it was taken earlier).
    ``main``: False on every process but the first, where nothing is written. ``progress``: what a person sees, where
    it was opened earlier; it is closed with the log. ``config``: what trackers show as the run's. Raises RunDirBusy.
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
        progress: PlainLines | None = None,
        alarms: AlarmsConfig = AlarmsConfig(),
        config: Mapping[str, Any] | None = None,
    ):
        self.main, self.run_dir = main, epath.Path(run_dir)
        self.nonfinite: dict[str, int] = {}  # metric -> how often it was NaN or infinite
        self.alarms = Alarms(alarms)  # of every process: they stop together
        if start:
            self.alarms.replay(row for row in read_rows(run_dir, "metrics") if row["step"] <= start)
        self.step = start  # of the newest row
        self.evaluated = False  # whether held-out responses are shown: then no others are
        if not main:
            self.progress = progress or silent()
            return
        path = self.run_dir
        self.lock = lock or lock_run_dir(path)
        self.progress = progress or open_progress(total, start, cfg.every)
        self.last_step = (
            start if start else -1
        )  # at step 0 nothing is done yet: not even the evaluation before training
        self.files: dict[str, JsonLines] = {}
        for name in ("metrics", "samples", *(["histograms"] if row_files(path, "histograms") else [])):
            self.open(name)
        self.trackers: dict[str, Tracker] = open_trackers(cfg.trackers, path, start, cfg.project, config or {})
        self.failing: dict[str, str] = {}  # file that can't be written -> why
        self.unseen = {*self.trackers}  # trackers that did not say yet where the run is seen

    def open(self, name: str) -> JsonLines:
        """NAME.jsonl, which is there from its first row on."""
        if name not in self.files:
            self.files[name] = JsonLines(self.run_dir, name, self.last_step, parts=not is_local(self.run_dir))
        return self.files[name]

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One row: ``step``, ``time`` (Unix seconds) and the metrics; NaN and infinity as null, counted, warned of."""
        told = self.alarms.see(step, metrics)
        if not self.main:
            return
        self.step = step
        values = {key: plain(value) for key, value in metrics.items()}
        finite = {key: value for key, value in values.items() if value is not None}
        for key in values.keys() - finite.keys():
            self.warn(step, key, metrics[key])
        self.files["metrics"].append({"step": step, "time": round(time.time(), 3), **values})
        for tracker in self.trackers.values():
            tracker.metrics(step, finite)
        self.tell_failures()
        self.progress.show(step, summary(finite))
        for alarm in told:
            self.say(f"warning: {alarm.name} at step {step}: {alarm.message}")

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows of samples.jsonl: prompt, response, score, split; ``step`` is put first."""
        rows = list(rows) if self.main else []
        for row in rows:
            self.files["samples"].append({"step": step, **row})
        if rows:
            for tracker in self.trackers.values():
                tracker.samples(step, rows)
            self.tell_failures()
        held_out = [row for row in rows if row.get("split") == "eval"]
        self.evaluated = self.evaluated or bool(held_out)
        self.progress.samples(held_out if self.evaluated else rows)

    def histogram(self, step: int, name: str, values: Iterable[float | None]) -> None:
        """A row of histograms.jsonl: step, name, edges of at most BINS equal bins, counts. Nothing of no values."""
        known = [value for value in values if value is not None]
        if self.main and known:
            counts, edges = np.histogram(known, min(BINS, math.isqrt(len(known)) + 1))
            row = {"step": step, "name": name, "edges": [float(f"{edge:.6g}") for edge in edges]}
            self.open("histograms").append(row | {"counts": counts.tolist()})
            self.tell_failures()

    def tell_places(self) -> None:
        """Says once of each tracker where the run is seen."""
        for name in sorted(self.unseen):
            if url := self.trackers[name].url:
                self.say(f"{name}: {url}")
                self.unseen.remove(name)

    def tell_failures(self) -> None:
        """Says once that a file can't be written, and once that it can be again; and once that a tracker failed."""
        self.tell_places()
        folder = f"{self.run_dir}/"
        found: dict[str, tuple[Exception | None, str]] = {}
        for name, file in self.files.items():
            found[f"{folder}{name}.jsonl"] = (file.error, MEMORY)
        for name, tracker in self.trackers.items():
            found[f"{folder}{name}" if name == "tensorboard" else name] = (tracker.error, ELSEWHERE)
        for name, (error, kept) in found.items():
            why = (getattr(error, "strerror", None) or str(error)) if error else ""
            if why and name not in self.failing:
                fails = f"{name} can't be written: {why}" if name.startswith(folder) else f"{name} is given up: {why}"
                self.say(f"warning: {fails}; {kept}" + " until the next try" * name.startswith(folder))
                self.failing[name] = why
            elif not why and self.failing.pop(name, None):
                self.say(f"{name} is written again")

    def flush(self) -> None:
        """Nothing is held back after this: call it where the steps so far will not be done again. Raises OSError where
        a file can't be written."""
        for file in self.files.values() if self.main else ():
            file.flush()

    def check_owner(self) -> None:
        """Raises RunDirBusy where another process writes to the run directory by now: its .lock was deleted."""
        if self.main:
            self.lock = keep_lock(self.run_dir, self.lock)

    def warn(self, step: int, key: str, value: Any) -> None:
        """Says once a metric that it isn't finite, and counts."""
        self.nonfinite[key] = self.nonfinite.get(key, 0) + 1
        if self.nonfinite[key] == 1:
            self.say(f"warning: {key} is {value} at step {step}; written as null")

    def say(self, text: str) -> None:
        """Prints a line, above the progress bar where there is one."""
        self.progress.say(text)

    @contextlib.contextmanager
    def doing(self, state: str) -> Iterator[None]:
        """Shows ``state`` ("evaluating") while it is open, in the place of the newest numbers; of TIMED it becomes a
        row of phases.jsonl: step, phase, seconds."""
        began = time.perf_counter()
        with self.progress.doing(state):
            yield
        if self.main and state in TIMED:
            seconds = round(time.perf_counter() - began, 4)
            self.open("phases").append({"step": self.step, "phase": state, "seconds": seconds})
            self.tell_failures()

    def close(self) -> None:
        """Flushes and closes the files, and lets the run directory go. Calling it again does nothing.

        Raises OSError, in one line, where rows are lost."""
        if not self.main:
            return
        self.main = False
        self.progress.close()  # what is said from here on is plain lines
        if self.nonfinite:
            counts = ", ".join(f"{key} x {count}" for key, count in sorted(self.nonfinite.items()))
            self.say(f"warning: values that were not finite: {counts}")
        lost = []
        for file in (*self.files.values(), *self.trackers.values(), self.lock):
            try:
                if file:
                    file.close()
            except OSError as error:
                lost.append(str(error))
        self.files.clear()  # what is lost of them is raised
        self.tell_failures()
        if lost:
            raise OSError("; ".join(lost))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except OSError as error:
            if kind is None:
                raise
            self.say(str(error))  # beside what ends the run
