"""TensorBoard's event files, beside the rows of metrics.jsonl."""

import contextlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

FLUSH = 60.0  # seconds between two writes to the disk
AGAIN = 60.0  # seconds after a failure before the next file is tried


class Events:
    """Scalars of the steps after ``start`` in RUN_DIR/tensorboard; what an earlier process wrote of them is not shown.

    A file that can't be written is given up for a new one, AGAIN seconds later: what lies between is in metrics.jsonl
    alone. tensorboardX's own SummaryWriter has a thread that dies then, and blocks whoever adds to its full queue."""

    def __init__(self, run_dir: epath.Path, start: int):
        self.folder, self.start = os.fspath(run_dir / "tensorboard"), start
        self.file: Any = None
        self.flushed = self.failed = -float("inf")
        self.error: OSError | None = None  # why the last file was given up

    def metrics(self, step: int, scalars: Mapping[str, float]) -> None:
        """One event of all ``scalars``."""
        now = time.monotonic()
        if self.file is None and now - self.failed < AGAIN:
            return
        proto = protos()
        values = [proto["Summary"].Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
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

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Not among the events: they are in samples.jsonl."""

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


def protos() -> dict[str, Any]:
    """What an event file is made of. tensorboardX imports torch wherever it is installed, for features that are not
    used here: 2 s and 200 MB. It is told that there is none."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        if hide:
            del sys.modules["torch"]
    return {"EventsWriter": EventsWriter, "Event": Event, "SessionLog": SessionLog, "Summary": Summary}
