"""Trackers: what they are given, that a failing one costs the run nothing, and the real libraries, offline."""

import io
import json
import os
import signal
import sqlite3
import time

import pytest
from rich.console import Console

from jaxrlhf.errors import ConfigError
from jaxrlhf.log import trackers
from jaxrlhf.log.metrics import LogConfig, MetricsLog
from jaxrlhf.log.progress import PlainLines
from jaxrlhf.log.rows import read_rows

ROW = {"score/mean": 0.5, "kl/reference": 1.25}
SAMPLES = [
    {"prompt": "a", "response": "b ☃ \ud83d", "score": 0.5, "split": "train"},
    {"prompt": "c", "response": "d", "score": None, "split": "train", "costs": [1, 2]},
]
# As the library: a module, whose run notes what it is given. FAKE says how it fails.
FAKE = """
import json, os, sys, time
def note(*what):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps(what) + "\\n")
class Settings(dict):
    pass
class Table:
    def __init__(self, columns, data, allow_mixed_types):
        self.cells = [columns, data]
class Run:
    url = os.environ.get("SEEN_AT")
    def define_metric(self, name, step_metric=None):
        pass
    def log(self, row):
        if os.environ["FAKE"] == "raise" and row["step"] == 2:
            raise ValueError("no room\\nat all")
        if os.environ["FAKE"] == "hang":
            time.sleep(600)
        note("log", {key: getattr(value, "cells", value) for key, value in row.items()})
    def finish(self):
        note("finish")
def init(**given):
    print("wandb: hello")
    if os.environ["FAKE"] == "exit":
        sys.exit("not logged in")
    note("init", {key: given[key] for key in ("project", "id", "name", "config", "dir", "resume")}, os.getpid())
    return Run()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A function: the notes of what stands in for wandb, and fails as told."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("FAKE", "")
    return lambda: [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]


def open_log(run_dir, *names, start=0, **kwargs):
    """(log, the text that a person sees)."""
    screen = io.StringIO()
    progress = PlainLines(Console(file=screen, force_terminal=False, width=200), 10, 100)
    cfg = LogConfig(trackers=names, project="films")
    return MetricsLog(run_dir, cfg, 10, start, progress=progress, config={"seed": 3}, **kwargs), screen


def process_of(log):
    tracker = log.trackers["wandb"]
    assert isinstance(tracker, trackers.TrackerProcess) and tracker.process
    return tracker.process


def write(log, *steps):
    for step in steps:
        log.write(step, ROW)


def warnings(screen):
    return [line for line in screen.getvalue().splitlines() if "warning" in line]


def test_a_tracker_is_given_the_config_the_numbers_and_tables_of_samples(tmp_path, fake):
    log, screen = open_log(tmp_path / "run", "wandb")
    log.write(1, ROW | {"loss/policy": float("nan")})
    log.samples(1, SAMPLES)
    log.close()
    opened, *logged, finished = fake()
    kept = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    given = {"project": "films", "id": kept, "name": "run", "config": {"seed": 3}}
    assert opened[:2] == ["init", given | {"dir": str(tmp_path / "run"), "resume": "allow"}]
    assert opened[2] != os.getpid()
    cells = [["a", "b ☃ ?", 0.5, "train", None], ["c", "d", None, "train", [1, 2]]]
    table = [["prompt", "response", "score", "split", "costs"], cells]
    assert logged == [["log", ROW | {"step": 1}], ["log", {"samples": table, "step": 1}]]
    assert finished == ["finish"]
    assert screen.getvalue().splitlines() == ["warning: loss/policy is nan at step 1; written as null"] + [
        "warning: values that were not finite: loss/policy x 1"
    ]


def test_where_a_run_is_seen_is_one_line(tmp_path, fake, monkeypatch):
    """What else a library prints is not the run's; without an address there is no line."""
    monkeypatch.setenv("SEEN_AT", "https://example.org/films/run")
    log, screen = open_log(tmp_path / "run", "wandb", "tensorboard")
    write(log, 1, 2)
    log.close()
    assert screen.getvalue().splitlines() == ["wandb: https://example.org/films/run"]


def test_a_resumed_run_is_the_same_run_of_the_tracker(tmp_path, fake):
    for start in (0, 2):
        log, _ = open_log(tmp_path / "run", "wandb", start=start)
        write(log, start + 1, start + 2, start + 3)
        log.close()
    opened = [note[1] for note in fake() if note[0] == "init"]
    assert len(opened) == 2 and opened[0] == opened[1]
    assert [note[1]["step"] for note in fake() if note[0] == "log"] == [1, 2, 3, 3, 4, 5]


@pytest.mark.parametrize(
    "how, why", [("raise", "ValueError: no room"), ("exit", "SystemExit: not logged in")], ids=["raise", "exit"]
)
def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(tmp_path, fake, monkeypatch, how, why):
    monkeypatch.setenv("FAKE", how)
    log, screen = open_log(tmp_path / "run", "wandb")
    process = process_of(log)
    write(log, 1, 2, 3)
    process.wait(60)
    write(log, 4, 5)
    log.close()
    assert warnings(screen) == [f"warning: wandb is given up: {why}; its numbers are in metrics.jsonl"]
    assert [row["step"] for row in read_rows(tmp_path / "run", "metrics")] == [1, 2, 3, 4, 5]


def test_a_tracker_that_hangs_holds_nothing_up(tmp_path, fake, monkeypatch):
    """Neither while it is given more than a pipe takes, nor at the end."""
    monkeypatch.setenv("FAKE", "hang")
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.5)
    log, screen = open_log(tmp_path / "run", "wandb")
    process, began = process_of(log), time.monotonic()
    log.samples(1, [{"prompt": "p", "response": "x" * 2**18}])
    write(log, 1, 2)
    log.close()
    assert time.monotonic() - began < 20
    assert warnings(screen) == [
        "warning: wandb is given up: not done 0.5 s after the run; its numbers are in metrics.jsonl"
    ]
    assert process.returncode == -signal.SIGKILL


def test_a_tracker_that_reads_nothing_is_given_up(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("FAKE", "hang")
    monkeypatch.setattr(trackers, "MOST_HELD", 2**20)
    log, screen = open_log(tmp_path / "run", "wandb")
    for step in (1, 2, 3):  # it may read the first before it hangs
        log.samples(step, [{"prompt": "p", "response": "x" * 2**21}])
    assert process_of(log).returncode == -signal.SIGKILL
    write(log, 1)
    log.close()
    assert len(warnings(screen)) == 1 and "it reads nothing, and " in warnings(screen)[0]


def test_an_id_that_can_not_be_kept_is_told(tmp_path, fake):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trackers.json").write_text('{"wandb"')
    log, screen = open_log(tmp_path / "run", "wandb")
    write(log, 1)
    log.close()
    assert len(warnings(screen)) == 1 and "wandb is given up: Expecting ':' delimiter" in warnings(screen)[0]


def test_only_the_first_process_has_trackers(tmp_path, fake):
    log, _ = open_log(tmp_path / "run", "wandb", main=False)
    write(log, 1)
    log.close()
    assert not (tmp_path / "run").exists() and not (tmp_path / "notes").exists()


def test_a_library_that_is_missing_is_a_mistake_in_the_config(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    trackers.check_installed(("tensorboard",))
    text = r"^config: log.trackers: wandb: not installed; expected: pip install 'jaxrlhf\[wandb\]'$"
    with pytest.raises(ConfigError, match=text):
        trackers.check_installed(("tensorboard", "wandb"))


# ---- the real libraries, offline ------------------------------------------------------------------------------------


def resumed(run_dir, name):
    """A run of three steps, of which the last is done again by the next process. No warning."""
    for start in (0, 2):
        log, screen = open_log(run_dir, "tensorboard", name, start=start)
        write(log, start + 1, start + 2, start + 3)
        log.samples(start + 3, SAMPLES)
        log.close()
        assert warnings(screen) == []
    return json.loads((run_dir / "trackers.json").read_text())[name]


@pytest.mark.nightly
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    kept = resumed(tmp_path / "run", "wandb")
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{kept}/run-{kept}.wandb"))
    assert len(files) == 2, "two parts of one run, which wandb sync puts together"
    for file in files:
        data = file.read_bytes()
        assert b"score/mean" in data and b"table-file" in data and b"films" in data
    tables = list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/table/*.json"))
    assert len(tables) == 2
    table = json.loads(tables[0].read_text())
    assert table["columns"] == ["prompt", "response", "score", "split", "costs"] and table["data"][1][1] == "d"


@pytest.mark.nightly
def test_trackio_offline(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    kept = resumed(tmp_path / "run", "trackio")
    with sqlite3.connect(tmp_path / "trackio" / "films.db") as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, *_ in rows} == {f"run-{kept}"}
    numbers = [(step, json.loads(text)) for _, step, text in rows]
    assert [step for step, row in numbers if "score/mean" in row] == [1, 2, 3, 3, 4, 5]
    assert [step for step, row in numbers if "samples" in row] == [3, 5]
