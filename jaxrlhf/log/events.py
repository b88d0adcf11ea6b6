"""TensorBoard's event files: scalars, and some samples as text, beside the rows of metrics.jsonl and samples.jsonl."""

import contextlib
import html
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

FLUSH = 60.0  # seconds between two writes to the disk
SHOWN = 8  # samples of a step and split
AGAIN = 60.0  # seconds after a failure before the next file is tried


class Events:
    """Numbers and samples of the steps after ``start`` in RUN_DIR/tensorboard; what an earlier process wrote of them is
    not shown.

    A file that can't be written is given up for a new one, AGAIN seconds later: what lies between is in metrics.jsonl
    alone. tensorboardX's own SummaryWriter has a thread that dies then, and blocks whoever adds to its full queue."""

    url = ""  # TensorBoard is started by whoever looks

    def __init__(self, run_dir: epath.Path, start: int):
        self.folder, self.start = os.fspath(run_dir / "tensorboard"), start
        self.file: Any = None
        self.flushed = self.failed = -float("inf")
        self.error: OSError | None = None  # why the last file was given up

    def metrics(self, step: int, scalars: Mapping[str, float]) -> None:
        """One event of all ``scalars``."""
        self.write(step, lambda proto: [proto["Summary"].Value(tag=tag, simple_value=x) for tag, x in scalars.items()])

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A text of each split, "samples/eval" say: a Markdown table of its first SHOWN rows; samples.jsonl has all."""
        splits: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            splits.setdefault(row.get("split", "train"), []).append(row)
        texts = {f"samples/{split}": table_of(some[:SHOWN]) for split, some in splits.items()}
        self.write(step, lambda proto: [text_value(proto, tag, text) for tag, text in texts.items()])

    def write(self, step: int, values_of: Callable[[Mapping[str, Any]], list[Any]]) -> None:
        """One event of the values that are made of ``protos``."""
        now = time.monotonic()
        if self.file is None and now - self.failed < AGAIN:
            return
        proto = protos()
        values = values_of(proto)
        try:
            self.file = self.file or self.open(proto)
            event = proto["Event"](wall_time=time.time(), step=step, summary=proto["Summary"](value=values))
            self.file.write_event(event)
            if now - self.flushed >= FLUSH:
                self.file.flush()
                self.flushed = now
            self.error = None
        except OSError as error:
            # without its frames, which hold the file open: what it still buffers would be written at some later time
            self.failed, self.error = now, error.with_traceback(None)
            self.drop()

    def open(self, proto: Mapping[str, Any]) -> Any:
        """A new file, which says that steps after ``start`` are written anew."""
        os.makedirs(self.folder, exist_ok=True)
        file = proto["EventsWriter"](os.path.join(self.folder, "events"))
        if self.start:
            again = proto["SessionLog"](status=proto["SessionLog"].START)
            file.write_event(proto["Event"](step=self.start + 1, session_log=again))
        return file

    def drop(self) -> None:
        """Let the file go, whatever of it could be written."""
        file, self.file = self.file, None
        with contextlib.suppress(OSError):
            if file:
                file.close()

    def close(self) -> None:
        """Write what is held back."""
        try:
            if self.file:
                self.file.flush()
        except OSError as error:
            self.error = error
        self.drop()


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of rows, with a column for each of their keys but the split."""
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "split"]
    lines = [columns, ["---"] * len(columns), *([cell(row.get(key)) for key in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """``value`` as it is read in a cell: a text's own markup is shown, not followed."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = html.escape(text.encode(errors="replace").decode(), quote=False)
    for mark in "\\`*_[]|~":
        text = text.replace(mark, f"&#{ord(mark)};")
    return "<br>".join(text.splitlines())


def text_value(proto: Mapping[str, Any], tag: str, text: str) -> Any:
    """A value that TensorBoard's text plugin shows."""
    data = proto["SummaryMetadata"].PluginData(plugin_name="text")
    tensor = proto["TensorProto"](
        dtype="DT_STRING",
        string_val=[text.encode()],
        tensor_shape=proto["TensorShapeProto"](dim=[proto["TensorShapeProto"].Dim(size=1)]),
    )
    return proto["Summary"].Value(tag=tag, metadata=proto["SummaryMetadata"](plugin_data=data), tensor=tensor)


def protos() -> dict[str, Any]:
    """What an event file is made of. tensorboardX imports torch wherever it is installed, for features that are not
    used here: 2 s and 200 MB. It is told that there is none."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.proto.summary_pb2 import (
            Summary,  # pyright: ignore[reportAttributeAccessIssue]
            SummaryMetadata,  # pyright: ignore[reportAttributeAccessIssue]
        )
        from tensorboardX.proto.tensor_pb2 import TensorProto  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.proto.tensor_shape_pb2 import TensorShapeProto  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        if hide:
            del sys.modules["torch"]
    made = (EventsWriter, Event, SessionLog, Summary, SummaryMetadata, TensorProto, TensorShapeProto)
    return {kind.__name__: kind for kind in made}
