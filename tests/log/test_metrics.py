"""The written record of a run: rows, resuming, half-written lines, the lock, lines of a log."""

import contextlib
import io
import json
import math
import os
import struct
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest
from rich.console import Console

from jaxrlhf.log import events, rows
from jaxrlhf.log.metrics import LogConfig, MetricsLog
from jaxrlhf.log.progress import PlainLines
from jaxrlhf.log.rows import JsonLines, read_rows
from jaxrlhf.log.run_dir import RunDirBusy, lock_run_dir
from tests.support.disk import full_disk

QUIET = LogConfig(trackers=())
ROW = {"score/mean": 0.5, "kl/reference": 1.25, "loss/value": 9.0, "loss/policy": 0.3}


def open_log(run_dir, total=10, start=0, cfg=QUIET, **kwargs):
    """(log, the text that a person sees)."""
    screen = io.StringIO()
    progress = PlainLines(Console(file=screen, force_terminal=False, width=120), total, cfg.every)
    return MetricsLog(run_dir, cfg, total, start, progress=progress, **kwargs), screen


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_a_row_is_one_flat_json_object(tmp_path):
    before = time.time()
    log, _ = open_log(tmp_path)
    log.write(1, ROW | {"policy/entropy": jnp.float32(2.5)})
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert list(row)[:2] == ["step", "time"]
    assert before - 1 <= row.pop("time") <= time.time() + 1
    assert row == {"step": 1, **ROW, "policy/entropy": 2.5}
    assert read_rows(tmp_path, "metrics")[0]["kl/reference"] == 1.25


def test_non_finite_numbers_are_null_and_counted(tmp_path):
    log, screen = open_log(tmp_path)
    for step in (1, 2):
        log.write(step, {"loss/policy": math.nan, "kl/reference": math.inf if step == 2 else 0.0, "score/mean": 1.0})
    log.close()
    rows = read_rows(tmp_path, "metrics")
    assert [(row["loss/policy"], row["kl/reference"]) for row in rows] == [(None, 0.0), (None, None)]
    assert log.nonfinite == {"loss/policy": 2, "kl/reference": 1}
    text = screen.getvalue()
    assert text.count("warning: loss/policy is nan at step 1; written as null") == 1
    assert "warning: kl/reference is inf at step 2" in text
    assert "not finite: kl/reference x 1, loss/policy x 2" in text


def test_samples_keep_their_text(tmp_path):
    log, _ = open_log(tmp_path)
    texts = ["line\nbreak", "über \u2028 ☃", "half an emoji \ud83d", '"quoted"']
    log.samples(3, [{"prompt": "p", "response": text, "score": jnp.float32(0.5), "split": "train"} for text in texts])
    log.close()
    rows = read_rows(tmp_path, "samples")
    assert [row["response"] for row in rows] == [*texts[:2], "half an emoji ?", texts[3]]
    assert rows[0] == {"step": 3, "prompt": "p", "response": "line\nbreak", "score": 0.5, "split": "train"}


# ---- a disk that is full --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 100, 250])  # 100, 250: in the midst of a row
def test_rows_that_a_full_disk_refuses_are_written_later(tmp_path, room):
    log, screen = open_log(tmp_path, cfg=LogConfig())
    log.write(1, ROW)
    with full_disk(room):
        for step in (2, 3):
            log.write(step, ROW)
            log.samples(step, [{"prompt": "p", "response": str(step)}])
        with pytest.raises(OSError, match="File too large"):
            log.flush()
    log.write(4, ROW)
    log.flush()
    assert [row["step"] for row in read_rows(tmp_path, "metrics")] == [1, 2, 3, 4]
    assert [row["step"] for row in read_rows(tmp_path, "samples")] == [2, 3]
    log.close()
    said = screen.getvalue().replace(f"{tmp_path}/", "").splitlines()
    kept = "can't be written: File too large; its rows are kept in memory until the next try"
    assert said.count(f"warning: metrics.jsonl {kept}") == 1
    assert said.count("metrics.jsonl is written again") == 1
    assert len([line for line in said if not line.startswith("step")]) <= 6


@pytest.mark.parametrize("parts", [False, True])
def test_rows_that_are_lost_for_good_end_the_run_loudly(tmp_path, parts):
    file = JsonLines(tmp_path, "metrics", -1, parts)
    with full_disk(0):
        file.append(ROW)
        file.append(ROW)
        with pytest.raises(OSError, match=r"metrics.jsonl: 2 rows could not be written: File too large$"):
            file.close()


def test_an_error_that_ends_the_run_is_not_hidden_by_lost_rows(tmp_path):
    log, screen = open_log(tmp_path)
    with full_disk(0), pytest.raises(KeyError), log:
        log.write(1, ROW)
        raise KeyError("x")
    assert "metrics.jsonl: 1 row could not be written: File too large" in screen.getvalue()


def test_tensorboard_goes_on_in_another_file(tmp_path, monkeypatch):
    """tensorboardX's own writer blocks after ten events."""
    log, screen = open_log(tmp_path, cfg=LogConfig())
    monkeypatch.setattr(events, "FLUSH", 0.0)
    with full_disk(0):
        for step in range(1, 30):
            log.write(step, ROW)
    monkeypatch.setattr(events, "AGAIN", 0.0)
    monkeypatch.setattr("socket.gethostname", lambda: "another-second")  # both are part of a file's name
    log.write(30, ROW)
    log.close()
    files = [file.read_bytes() for file in (tmp_path / "tensorboard").iterdir()]
    assert sum(b"score/mean" in file for file in files) == 1
    assert "tensorboard can't be written: File too large; its numbers are in metrics.jsonl" in screen.getvalue()


# ---- resuming -------------------------------------------------------------------------------------------------------


def write_steps(run_dir, steps, **kwargs):
    log, _ = open_log(run_dir, **kwargs)
    for step in steps:
        log.write(step, ROW)
        log.samples(step, [{"prompt": "p", "response": str(step)}])
    log.close()


def test_resuming_drops_what_comes_after_the_checkpoint(tmp_path):
    write_steps(tmp_path, [1, 2, 3, 4, 5])
    write_steps(tmp_path, [4], start=3)
    for name in ("metrics", "samples"):
        assert [row["step"] for row in read_rows(tmp_path, name)] == [1, 2, 3, 4]


def test_what_takes_time_between_iterations_has_a_row(tmp_path):
    """At the step of the newest row; what is evaluated is a metric already; what is raised has none."""
    log, _ = open_log(tmp_path)
    with log.doing("compiling"):
        time.sleep(0.05)
    for step in (1, 2):
        log.write(step, ROW)
        with log.doing("evaluating"), log.doing("saving"):
            pass
    with contextlib.suppress(OSError), log.doing("saving"):
        raise OSError("a full disk")
    log.close()
    with log.doing("saving"):  # it is closed
        pass
    found = read_rows(tmp_path, "phases")
    assert [(row["step"], row["phase"]) for row in found] == [(0, "compiling"), (1, "saving"), (2, "saving")]
    assert 0.05 <= found[0]["seconds"] < 5 and all(row["seconds"] < 0.05 for row in found[1:])
    log, _ = open_log(tmp_path, start=1)
    with log.doing("compiling"):
        pass
    log.close()
    rows = read_rows(tmp_path, "phases")
    assert [(row["step"], row["phase"]) for row in rows] == [(0, "compiling"), (1, "saving"), (1, "compiling")]


def test_starting_over_drops_everything(tmp_path):
    write_steps(tmp_path, [0, 1, 2])
    write_steps(tmp_path, [0], start=0)
    assert [row["step"] for row in read_rows(tmp_path, "metrics")] == [0]


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b'{"step": 3}', b"{\xc3", b"\x00\x00\n", b'"text"\n', b"\n"])
def test_a_half_written_line_is_dropped(tmp_path, tail):
    write_steps(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(tail)
    assert [row["step"] for row in read_rows(tmp_path, "metrics")] == [1, 2]  # while another process still writes
    write_steps(tmp_path, [3], start=2)
    assert [row["step"] for row in read_rows(tmp_path, "metrics")] == [1, 2, 3]
    assert not (tmp_path / "metrics.tmp").exists()


def test_rows_are_written_in_parts_where_nothing_can_be_appended(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "PART_ROWS", 3)

    def write(steps, last_step):
        written = JsonLines(rows.epath.Path(tmp_path), "metrics", last_step, parts=True)
        for step in steps:
            written.append({"step": step})
        written.close()

    write(range(1, 8), -1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"metrics-{i:06d}.jsonl" for i in range(3)]
    write([6, 7], 5)  # resumes: steps 6 and 7 are dropped from their parts and written to a new one
    assert [row["step"] for row in read_rows(tmp_path, "metrics")] == [1, 2, 3, 4, 5, 6, 7]


# ---- one writer -----------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from jaxrlhf.log.run_dir import lock_run_dir
lock = lock_run_dir(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RunDirBusy) as caught:
            open_log(tmp_path)
        line = str(caught.value)
        assert line.startswith(f"run_dir: {tmp_path}: already being written by process {holder.pid} on ")
        assert "\n" not in line and line.endswith("choose another run_dir")
        assert not (tmp_path / "metrics.jsonl").exists()
    finally:
        holder.kill()  # no chance to tidy up
        holder.wait()
    write_steps(tmp_path, [1])
    assert len(read_rows(tmp_path, "metrics")) == 1


def test_the_lock_can_be_taken_before_the_log_is_made(tmp_path):
    lock = lock_run_dir(tmp_path / "new")
    with pytest.raises(RunDirBusy):
        open_log(tmp_path / "new")
    log, _ = open_log(tmp_path / "new", lock=lock)
    log.close()
    lock_run_dir(tmp_path / "new").close()  # type: ignore[union-attr]


def test_other_processes_of_a_run_write_nothing(tmp_path, capsys):
    first, _ = open_log(tmp_path)
    other = MetricsLog(tmp_path, QUIET, 10, main=False)
    other.write(1, ROW)
    other.samples(1, [{"prompt": "p"}])
    other.say("hello")
    other.close()
    first.close()
    assert capsys.readouterr().out == "" and read_rows(tmp_path, "metrics") == []


# ---- what a person sees ---------------------------------------------------------------------------------------------


def test_a_log_gets_plain_lines_now_and_then(tmp_path):
    log, screen = open_log(tmp_path, total=5, cfg=LogConfig(every=2, trackers=()))
    for step in range(1, 6):
        log.write(step, {"score/mean": float(step)})
    log.close()
    lines = screen.getvalue().splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        ["step 2/5", "reward +2.000"],
        ["step 4/5", "reward +4.000"],
        ["step 5/5", "reward +5.000"],
    ]
    assert all("\x1b" not in line for line in lines)
    assert len(read_rows(tmp_path, "metrics")) == 5


# ---- TensorBoard ----------------------------------------------------------------------------------------------------

EVENTS = """
import sys
from jaxrlhf.log.metrics import LogConfig, MetricsLog
with MetricsLog(sys.argv[1], LogConfig(), 3) as log:
    log.write(1, {"score/mean": 0.25, "loss/policy": float("nan")})
print(sorted({"torch", "tensorflow"} & set(sys.modules)))
"""


def test_tensorboard_events_without_torch(tmp_path):
    command = [sys.executable, "-c", EVENTS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    (file,) = (tmp_path / "tensorboard").iterdir()
    data = file.read_bytes()
    assert b"score/mean" in data and b"loss/policy" not in data


def events_of(run_dir):
    """The events of the one file: a record is its length, a checksum, the event, a checksum."""
    (file,) = (run_dir / "tensorboard").iterdir()
    data, found = file.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        found.append(events.protos()["Event"].FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


def test_tensorboard_shows_samples_as_text(tmp_path):
    """A table for each split, of the first rows; what a text has of Markdown or HTML is shown as it is."""
    log, _ = open_log(tmp_path, cfg=LogConfig())
    rows = [{"prompt": "*a*|<b>", "response": "c\nd \ud83d", "score": 0.123456, "split": "eval"}]
    log.samples(7, rows + [{"prompt": str(i), "score": None, "costs": [1], "split": "train"} for i in range(20)])
    log.close()
    (event,) = [event for event in events_of(tmp_path) if event.step == 7]
    shown, train = event.summary.value
    assert [shown.tag, shown.metadata.plugin_data.plugin_name] == ["samples/eval", "text"]
    assert shown.tensor.string_val[0].decode().splitlines() == [
        "| prompt | response | score |",
        "| --- | --- | --- |",
        "| &#42;a&#42;&#124;&lt;b&gt; | c<br>d ? | 0.1235 |",
    ]
    lines = train.tensor.string_val[0].decode().splitlines()
    assert train.tag == "samples/train" and lines[2] == "| 0 |  | &#91;1&#93; |"
    assert len(lines) == 2 + events.SHOWN


def test_tensorboard_can_be_turned_off(tmp_path):
    write_steps(tmp_path, [1])
    assert sorted(os.listdir(tmp_path)) == [".lock", "metrics.jsonl", "samples.jsonl"]
