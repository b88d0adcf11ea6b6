"""What a person sees of a run: a bar on a terminal, plain lines in a log."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


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
