"""What a person sees of a run: a bar on a terminal, plain lines in a log."""

import contextlib
import errno
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOG_WIDTH = 80  # columns of a line of numbers in a log
MARGIN = 6  # columns that the bar leaves free: "^C" of the keyboard must not wrap it, or its first line stays
SHOWN_SAMPLES = 2  # responses of an evaluation that stay above the bar
GAP = "  "

# the most telling numbers, in the order in which they are shown: a form, and the metrics of which the first is taken
TELLING = (
    ("reward {:+.3f}", "score/mean"),
    ("cost {:+.3f}", "cost/mean"),
    ("{:.0f} unscorable", "score/unscorable"),
    ("kl {:.3f}", "kl/reference"),
    ("divergence {:.4f}", "teacher/divergence", "kl/teacher"),
    ("length {:.1f}", "response/length_mean"),
    ("win rate {:.3f}", "win_rate/reward", "win_rate/judge"),
    ("accuracy {:.3f}", "implicit_reward/accuracy", "reward/accuracy"),
    ("margin {:+.3f}", "implicit_reward/margin", "reward/margin"),
    ("loss {:.4f}", "loss/policy", "loss/reward"),
    ("explained {:.2f}", "value/explained_variance"),
    ("zero-variance {:.2f}", "group/zero_variance"),
    ("{:,.0f} tok/s", "throughput/response_tokens_per_second"),
    ("epoch {:.2f}", "data/epoch"),
    ("lr {:.2g}", "policy/learning_rate", "reward/learning_rate"),
)
RARE = ("score/unscorable",)  # those that are shown where they are not 0


def summary(metrics: Mapping[str, float]) -> list[str]:
    """The few numbers that tell how training goes, the most telling first: "reward +0.530", "kl 1.200", ..."""
    held_out = bool(metrics) and all(key.startswith("eval/") for key in metrics)
    found = {key.removeprefix("eval/") if held_out else key: value for key, value in metrics.items()}
    shown = []
    for form, *names in TELLING:
        name = next((name for name in names if name in found), None)
        if name is not None and (found[name] or name not in RARE):
            shown.append(form.format(found[name]))
    return ["held out:", *shown] if held_out else shown


def fitting(parts: Iterable[str], room: int) -> str:
    """The first of ``parts``, and those behind it as far as they fit into ``room`` columns."""
    line = ""
    for part in filter(None, parts):
        longer = line + GAP * bool(line) + part
        if line and cell_len(longer) > room:
            break
        line = longer
    return line


def one_line(text: str) -> str:
    """``text`` without line breaks and without what would move the cursor or reverse the direction of writing."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def sample_line(row: Mapping[str, Any], width: int) -> str:
    """A response in ``width`` columns: the end of its prompt, the start of the response, its score."""
    prompt, response = one_line(row.get("prompt", "")), one_line(row.get("response", ""))
    score = "" if row.get("score") is None else f"{GAP}({float(row['score']):+.3f})"
    room = max(width - cell_len(f"{GAP} -> {score}"), 8)
    if (limit := room // 3) < cell_len(prompt):
        while cell_len(prompt) > limit - 1:
            prompt = prompt[1:]
        prompt = "…" + prompt
    if (limit := room - cell_len(prompt)) < cell_len(response):
        response = set_cell_size(response, limit - 1).rstrip() + "…"
    return f"{GAP}{prompt} -> {response}{score}"


class Pace:
    """The time left, by the mean time of an iteration since the first that was seen; compilation comes before it."""

    def __init__(self, total: int):
        self.total = total
        self.begin: tuple[float, int] | None = None
        self.last: tuple[float, int] = (0.0, 0)

    def saw(self, step: int) -> None:
        self.last = (time.monotonic(), step)
        self.begin = self.begin or self.last

    def left(self, now: float | None = None) -> str:
        """ "0:01:30 left"; nothing before two iterations, or after the last. ``now``: seconds of time.monotonic()."""
        if self.begin is None or self.last[1] == self.begin[1] or self.last[1] >= self.total:
            return ""
        (began, first), (seen, step) = self.begin, self.last
        seconds = (seen - began) / (step - first) * (self.total - step) - (0.0 if now is None else now - seen)
        minutes, seconds = divmod(max(round(seconds), 0), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"


class PlainLines:
    """One plain line now and then, in a log. ``every``: iterations between two of them; ``unit``: what is counted."""

    def __init__(self, console: Console, total: int, every: int = 1, unit: str = "step"):
        self.console, self.total, self.every, self.unit = console, total, every, unit
        self.pace = Pace(total)

    def expect(self, total: int) -> None:
        """The number of iterations, where it was 0 (not known) so far."""
        self.total = self.pace.total = total

    def doing(self, state: str) -> contextlib.AbstractContextManager:
        """What goes on while this is open, between iterations."""
        return contextlib.nullcontext()

    def now(self, state: str) -> None:
        """What goes on from here on, until the next numbers: shown by a bar alone."""

    def show(self, step: int, numbers: list[str]) -> None:
        """The numbers of a finished iteration, or of an evaluation after it, as far as they fit."""
        self.pace.saw(step)
        if step % self.every == 0 or step == self.total:
            left = self.pace.left()
            room = LOG_WIDTH - cell_len(GAP + left) * bool(left)
            self.say(GAP.join(filter(None, [fitting([f"{self.unit} {step}/{self.total}", *numbers], room), left])))

    def samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Responses: those of a log are in samples.jsonl."""

    def say(self, text: str) -> None:
        """A line. What a full disk refuses of a log comes with a later line: training goes on."""
        try:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        except OSError as error:
            if error.errno not in FULL:
                raise

    def close(self) -> None:
        """Nothing is shown any more. Calling it again does nothing."""


class Bar(PlainLines):
    """One line at the bottom of a terminal: step, time left, what goes on or the newest numbers, as far as they fit.

    Held-out numbers, samples and messages stay above it, and all numbers where something else than steps is counted.
    At the end it gives way to the newest numbers."""

    def __init__(self, console: Console, total: int, start: int, unit: str = "step"):
        super().__init__(console, total, unit=unit)
        self.step, self.state, self.numbers = start, "", ["training"]
        self.last = ""  # line of the newest iteration
        self.live = Live(self, console=console, transient=True, refresh_per_second=2)
        self.live.start()

    @contextlib.contextmanager
    def doing(self, state: str) -> Iterator[None]:
        before, self.state = self.state, state
        self.live.refresh()
        try:
            yield
        finally:
            self.state = before

    def now(self, state: str) -> None:
        self.state = state

    def show(self, step: int, numbers: list[str]) -> None:
        self.pace.saw(step)
        self.step = step
        line = GAP.join([f"{self.unit} {step}/{self.total}", *numbers])
        if numbers[:1] == ["held out:"] or self.unit != "step":
            self.say(line)
        else:
            self.last, self.numbers = line, numbers
        self.live.refresh()

    def samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in list(rows)[:SHOWN_SAMPLES]:
            self.say(sample_line(row, self.console.width))

    def close(self) -> None:
        self.live.stop()
        if self.last:
            self.say(self.last)
            self.last = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.max_width - MARGIN
        width = options.max_width // 6 if options.max_width >= 60 else 0
        parts = [f"{self.unit} {self.step}/{self.total or '?'}", self.pace.left(time.monotonic())]
        parts += [self.state] if self.state else self.numbers
        line = fitting(parts, room - width - 1)
        table = Table.grid(padding=(0, 1, 0, 0))
        bar = [ProgressBar(total=self.total, completed=self.step, width=width)] if width else []
        table.add_row(*bar, Text(set_cell_size(line, min(cell_len(line), room)), no_wrap=True))
        yield table


def open_progress(
    total: int, start: int = 0, every: int = 1, console: Console | None = None, unit: str = "step"
) -> PlainLines:
    """A bar where standard output is a terminal that can move its cursor; else lines, without control characters
    whatever FORCE_COLOR says, so that logs of CI stay plain."""
    console = console or Console(force_terminal=sys.stdout.isatty(), force_jupyter=False)
    return Bar(console, total, start, unit) if console.is_interactive else PlainLines(console, total, every, unit)


def silent() -> PlainLines:
    """Of a process that does not speak."""
    return PlainLines(Console(quiet=True), 0)
