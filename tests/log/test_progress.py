"""What a person sees: lines in a log, one line at the bottom of a terminal at any width."""

import errno
import io
import os
import re
import sys

import pytest
from rich.cells import cell_len
from rich.console import Console

from jaxrlhf.log import progress
from jaxrlhf.log.metrics import LogConfig, MetricsLog
from jaxrlhf.log.progress import MARGIN, Bar, PlainLines, open_progress, sample_line, summary

ROW = {"score/mean": 0.5, "kl/reference": 1.25, "response/length_mean": 31.0, "loss/value": 9.0, "loss/policy": 0.3}
WIDTHS = (60, 80, 120)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def terminal(width: int, total: int = 1400, start: int = 0) -> tuple[Bar, io.StringIO]:
    screen = io.StringIO()
    bar = open_progress(total, start, console=Console(file=screen, force_terminal=True, width=width, _environ={}))
    assert isinstance(bar, Bar)
    return bar, screen


def bottom(bar: Bar) -> str:
    """The line at the bottom now, as plain text."""
    lines = bar.console.render_lines(bar, bar.console.options, pad=False)
    assert len(lines) == 1
    return "".join(segment.text for segment in lines[0] if not segment.control).rstrip()


# ---- numbers --------------------------------------------------------------------------------------------------------

PAIRS = {"implicit_reward/accuracy": 0.75, "implicit_reward/margin": 0.0312, "loss/policy": 0.6771}


@pytest.mark.parametrize(
    "metrics, shown",
    [
        (
            ROW | {"throughput/response_tokens_per_second": 1840.4, "time/iteration": 3.0},
            ["reward +0.500", "kl 1.250", "length 31.0", "loss 0.3000", "1,840 tok/s"],
        ),
        (
            {"loss/reward": 0.69, "reward/accuracy": 0.5, "reward/margin": 0.1},
            ["accuracy 0.500", "margin +0.100", "loss 0.6900"],
        ),
        (PAIRS | {"logprobs/chosen": -30.0}, ["accuracy 0.750", "margin +0.031", "loss 0.6771"]),
        (
            {"loss/policy": 2.0, "policy/entropy": 3.0, "data/epoch": 0.5, "policy/learning_rate": 5e-3},
            ["loss 2.0000", "epoch 0.50", "lr 0.005"],
        ),
        (
            {"group/zero_variance": 0.25, "score/mean": 1.0, "loss/policy": 0.0},
            ["reward +1.000", "loss 0.0000", "zero-variance 0.25"],
        ),
        ({"score/mean": 1.0, "score/unscorable": 3.0}, ["reward +1.000", "3 unscorable"]),
        ({"score/mean": 1.0, "score/unscorable": 0.0}, ["reward +1.000"]),
        (
            {"eval/score/mean": 2.0, "eval/win_rate/reward": 0.625},
            ["held out:", "reward +2.000", "win rate 0.625"],
        ),
        ({}, []),
    ],
)
def test_the_summary_shows_the_few_numbers_that_matter(metrics, shown):
    assert summary(metrics) == shown


# ---- the bar --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [20, 40, *WIDTHS, 200])
def test_step_and_time_left_are_visible_at_any_width(clock, width):
    bar, _ = terminal(width)
    for step in range(1, 8):
        clock[0] += 2.0
        bar.show(step, summary(ROW | {"throughput/response_tokens_per_second": 123456.0, "policy/learning_rate": 1e-5}))
    line = bottom(bar)
    bar.close()
    assert cell_len(line) <= width - MARGIN  # so that "^C" never wraps it
    assert "step 7/1400" in line
    assert "…" not in line and not re.search(r"\d\.$", line)  # whole numbers or none
    if width >= 40:
        assert "0:46:26 left" in line  # 1393 x 2 s
    if width >= 80:
        assert "reward +0.500" in line
    if width >= 120:
        assert "kl 1.250  length 31.0  loss 0.3000" in line


def test_time_left_goes_down_while_an_iteration_runs_and_survives_slow_ones(clock):
    bar, _ = terminal(80, total=10)
    for step in (1, 2, 3):
        bar.show(step, ["x"])
        clock[0] += 600.0 if step < 3 else 100.0
    assert "1:08:20 left" in bottom(bar)  # 7 x 600 s - 100 s
    clock[0] += 1e6
    assert "0:00:00 left" in bottom(bar)
    bar.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_state_is_shown_while_it_is_true(width):
    bar, _ = terminal(width, total=44)
    assert bottom(bar).endswith("step 0/44  training")
    with bar.doing("loading"):
        assert bottom(bar).endswith("step 0/44  loading")
    bar.show(1, ["reward +0.5"])
    with pytest.raises(RuntimeError), bar.doing("evaluating"):
        with bar.doing("compiling"):
            assert bottom(bar).endswith("step 1/44  compiling")
        assert bottom(bar).endswith("step 1/44  evaluating")
        raise RuntimeError
    assert bottom(bar).endswith("step 1/44  reward +0.5")
    bar.close()


def test_a_resumed_run_starts_where_it_was():
    bar, _ = terminal(80, total=44, start=22)
    assert "step 22/44" in bottom(bar)
    bar.close()


def screen_after(text: str, width: int = 80) -> list[str]:
    """What stands on a terminal that got ``text``: of control sequences those that the bar uses."""
    rows, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]", text):
        if piece == "\r":
            column = 0
        elif piece == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif piece == "\x1b[2K":
            rows[row] = ""
        elif re.fullmatch(r"\x1b\[\d*A", piece):
            row -= int(piece[2:-1] or 1)
        elif piece.startswith("\x1b"):
            assert piece[-1] in "mhl", piece
        else:
            if column == width:
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            rows[row] = rows[row].ljust(column)[:column] + piece + rows[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in rows]


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_of_the_bar_stays_after_ctrl_c(width):
    """The terminal writes ^C where the cursor is, at the end of the bar."""
    bar, screen = terminal(width, total=44)
    bar.show(1, summary(ROW | {"throughput/response_tokens_per_second": 1840.4}))
    screen.write("^C")
    bar.show(2, summary(ROW | {"throughput/response_tokens_per_second": 1840.4}))
    screen.write("^C")
    bar.close()
    lines = [line for line in screen_after(screen.getvalue(), width) if line]
    assert len([line for line in lines if "/44" in line]) == 1
    assert "━" not in "".join(lines) and "^C" not in "".join(lines)
    assert "".join(lines) == "step 2/44  reward +0.500  kl 1.250  length 31.0  loss 0.3000  1,840 tok/s"


def test_held_out_rows_and_samples_stay_above(tmp_path):
    bar, screen = terminal(80, total=4)
    log = MetricsLog(tmp_path, LogConfig(trackers=()), 4, progress=bar)
    rows = [{"prompt": f"the film {n}", "response": " is\nwarm", "score": 1.25} for n in range(4)]
    log.write(1, ROW)
    log.samples(1, [row | {"split": "train"} for row in rows])
    log.write(2, {"eval/score/mean": 2.0})
    log.samples(2, [row | {"split": "eval"} for row in rows])
    log.say("a line above it")
    log.samples(3, [row | {"split": "train", "prompt": "not this"} for row in rows])
    log.write(4, ROW)
    log.close()
    assert screen_after(screen.getvalue()) == [
        "  the film 0 -> is warm  (+1.250)",
        "  the film 1 -> is warm  (+1.250)",
        "step 2/4  held out:  reward +2.000",
        "  the film 0 -> is warm  (+1.250)",
        "  the film 1 -> is warm  (+1.250)",
        "a line above it",
        "step 4/4  reward +0.500  kl 1.250  length 31.0  loss 0.3000",
        "",
    ]


@pytest.mark.parametrize("width", [20, *WIDTHS])
@pytest.mark.parametrize(
    "text", ["the film " * 40, "映画は面白い" * 30, "\x1b[2J\x1b]0;x\x07", "\u202eabc", "[bold]x", ""]
)
def test_a_sample_is_one_line_without_control_characters(width, text):
    for row in ({"prompt": text, "response": text, "score": -0.5}, {"prompt": "p", "response": text}):
        line = sample_line(row, width)
        assert line.isprintable() and cell_len(line) <= max(width, 28)


# ---- logs -----------------------------------------------------------------------------------------------------------


def test_time_left_counts_from_the_first_update(clock):
    screen = io.StringIO()
    lines = PlainLines(Console(file=screen), total=2000)
    for step, after in ((1, 0.0), (2, 2.0), (7, 10.0)):  # the first update comes after compilation
        clock[0] += after
        lines.show(step, ["x"])
    ends = [line.rpartition("  ")[2] for line in screen.getvalue().splitlines()]
    assert ends == ["x", "1:06:36 left", "1:06:26 left"]  # 2 s an update x 1998, then x 1993


def test_a_line_of_a_log_has_80_columns_and_the_time_left(clock):
    screen = io.StringIO()
    lines = PlainLines(Console(file=screen), total=9)
    numbers = [f"number {at} is {at}" for at in range(9)]
    for step in (1, 2, 9):
        clock[0] += 1.0
        lines.show(step, numbers)
    first, second, last = screen.getvalue().splitlines()
    assert second == f"step 2/9  {'  '.join(numbers[:3])}  0:00:07 left"
    assert first == last.replace("9/9", "1/9") == f"step 1/9  {'  '.join(numbers[:4])}" and len(first) <= 80
    lines.show(9, ["x" * 90])  # a number is not cut: it is left out
    assert screen.getvalue().splitlines()[-1] == "step 9/9"


@pytest.mark.parametrize("environ", [{}, {"FORCE_COLOR": "1"}, {"CLICOLOR_FORCE": "1"}, {"TTY_COMPATIBLE": "1"}])
def test_a_log_that_is_no_terminal_is_plain_whatever_the_environment_says(monkeypatch, capsys, environ):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    shown = open_progress(3)
    for step in (1, 2, 3):
        with shown.doing("saving"):
            shown.show(step, summary(ROW))
    shown.samples([{"prompt": "p", "response": "r"}])
    shown.close()
    out = capsys.readouterr().out
    assert out.count("\n") == 3 and all(letter.isprintable() or letter == "\n" for letter in out)
    assert "left" not in out.splitlines()[-1]  # nothing is


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("environ, bar", [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False)])
def test_a_bar_needs_a_terminal_that_moves_its_cursor(monkeypatch, environ, bar):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", Terminal())
    shown = open_progress(3)
    shown.show(1, ["x"])
    shown.close()
    assert isinstance(shown, Bar) == bar
    assert bar or "\x1b" not in sys.stdout.getvalue()  # type: ignore[attr-defined]


def test_no_color_is_heard(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", Terminal())
    shown = open_progress(3)
    shown.show(1, ["x"])
    shown.close()
    text = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert "step 1/3" in text and not re.search(r"\x1b\[[0-9;]*(3[0-9]|4[0-9]|38|48)[0-9;]*m", text)


def test_a_log_on_a_full_disk_ends_nothing():
    class Disk(io.StringIO):
        code = errno.ENOSPC

        def write(self, text):
            if self.code:
                raise OSError(self.code, os.strerror(self.code))
            return super().write(text)

    disk = Disk()
    lines = PlainLines(Console(file=disk, force_terminal=False), 3)
    lines.say("first")
    disk.code = 0
    lines.say("second")
    assert disk.getvalue() == "first\nsecond\n"
    disk.code = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        lines.say("third")
