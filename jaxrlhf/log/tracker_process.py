"""The process in which a tracker's library runs: it reads lines of JSON, and ends where they end.

The first line opens the tracker; then come rows of metrics and of samples."""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

SAID = "jaxrlhf: "  # begins the line that says why the process ends
SEEN_AT = "jaxrlhf at: "  # begins the line that says where the run is seen
Rows = Sequence[Mapping[str, Any]]


def columns_of(rows: Rows) -> tuple[list[str], list[list[Any]]]:
    """(columns, cells) of a table: every key of the rows; None where a row has no such key."""
    columns = [*dict.fromkeys(key for row in rows for key in row)]
    return columns, [[row.get(column) for column in columns] for row in rows]


class Wandb:
    """Weights & Biases. The step is a metric: its own count cannot go back to steps that are done again."""

    def __init__(self, opening: Mapping[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]

        self.table = wandb.Table
        self.run = wandb.init(
            project=opening["project"],
            id=opening["id"],
            name=opening["name"],
            config=dict(opening["config"]),
            dir=opening["folder"] or tempfile.mkdtemp(prefix="jaxrlhf-wandb-"),
            resume="allow",
            allow_val_change=True,
            save_code=False,
            settings=wandb.Settings(console="off"),
        )
        self.url = self.run.url or ""  # None where it is offline
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def metrics(self, step: int, scalars: Mapping[str, float]) -> None:
        self.run.log({**scalars, "step": step})

    def samples(self, step: int, rows: Rows) -> None:
        columns, cells = columns_of(rows)
        self.run.log({"samples": self.table(columns=columns, data=cells, allow_mixed_types=True), "step": step})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """Trackio, which knows a run by its name: the id is part of it."""

    def __init__(self, opening: Mapping[str, Any]):
        import trackio  # pyright: ignore[reportMissingImports]

        self.table = trackio.Table
        self.run = trackio.init(
            project=opening["project"],
            name=f"{opening['name']}-{opening['id']}",
            config=dict(opening["config"]),
            resume="allow",
            embed=False,
        )
        place = self.run.url or ""  # a server's address, or the name of a Space; None where it is local
        self.url = f"https://huggingface.co/spaces/{place}" if place and "://" not in place else place

    def metrics(self, step: int, scalars: Mapping[str, float]) -> None:
        self.run.log(dict(scalars), step=step)

    def samples(self, step: int, rows: Rows) -> None:
        import pandas as pd

        columns, cells = columns_of(rows)
        self.run.log({"samples": self.table(dataframe=pd.DataFrame(cells, columns=columns))}, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS = {"wandb": Wandb, "trackio": Trackio}


def messages() -> Iterator[dict[str, Any]]:
    """The lines of standard input, which the library does not see."""
    with os.fdopen(os.dup(0), "rb") as lines:
        with open(os.devnull, "rb") as null:
            os.dup2(null.fileno(), 0)
        for line in lines:
            if not line.endswith(b"\n"):  # the run was killed in the midst of it
                return
            message = json.loads(line)
            if "end" in message:
                return
            yield message


def serve() -> NoReturn:
    """Until the run is over. Exit code 1, and a line that says why, where the library raises."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the run saves first, and then ends this process
        signal.signal(number, signal.SIG_IGN)
    code = 0
    try:
        given = messages()
        opening = next(given)
        tracker = TRACKERS[opening["tracker"]](opening)
        if tracker.url:
            print(f"\n{SEEN_AT}{tracker.url}", flush=True)
        for message in given:
            if "metrics" in message:
                tracker.metrics(message["step"], message["metrics"])
            else:
                tracker.samples(message["step"], message["samples"])
        tracker.close()
    except BaseException as error:
        text = (str(error).strip().splitlines() or [""])[0]
        print(f"\n{SAID}{type(error).__name__}: {text}", file=sys.stderr, flush=True)
        code = 1
    sys.stdout.flush()
    os._exit(code)  # what a library does at exit may wait for its server
