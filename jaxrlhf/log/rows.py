"""Rows of JSON under a run directory: written, read, and cut back to a checkpoint."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from jaxrlhf.errors import counted
from jaxrlhf.log.run_dir import is_local

PART_ROWS = 100  # rows of a part, where a path can't be appended to
PART_SECONDS = 10  # at least, between two writes of a part: an object may change about once a second


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

    Rows that can't be written (a full disk) are kept, and written at the next try: the next row, or ``flush``.
    """

    def __init__(self, run_dir: epath.Path, name: str, last_step: int, parts: bool):
        self.run_dir, self.name = run_dir, name
        files = row_files(run_dir, name)
        for path in files:
            text = read_text(path)
            if (kept := up_to(text, last_step)) != text:
                replace_text(path, kept)
        self.part: list[str] = []
        self.held = bytearray()  # what is not written of NAME.jsonl: rows, the first of them perhaps in part
        self.error: OSError | None = None  # why the last try failed
        self.written = time.monotonic()
        self.index = len(files)
        path = run_dir / f"{name}.jsonl"
        self.file = None if parts else open(path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)

    def append(self, row: Mapping[str, Any]) -> None:
        line = json.dumps({key: plain(value) for key, value in row.items()}, ensure_ascii=False) + "\n"
        if self.file:
            self.held += encode(line)
            self.attempt()
            return
        self.part.append(line)
        if len(self.part) >= PART_ROWS or time.monotonic() - self.written >= PART_SECONDS:
            self.attempt()
        if len(self.part) >= PART_ROWS and not self.error:
            self.part, self.index = [], self.index + 1

    def attempt(self) -> None:
        """``flush``, whose error is kept in ``error``."""
        self.error = None
        try:
            self.flush()
        except OSError as error:
            self.error = error

    def flush(self) -> None:
        """Write the rows that are held back. Raises OSError where that is not possible."""
        if self.part and not self.file:
            (self.run_dir / f"{self.name}-{self.index:06d}.jsonl").write_bytes(encode("".join(self.part)))
            self.written = time.monotonic()
        while self.file and self.held:
            del self.held[: self.file.write(self.held)]

    def close(self) -> None:
        """Write the rows that are held back, and close the file. Raises OSError, in one line, where they are lost."""
        self.attempt()
        if self.file:
            self.file.close()
            self.file = None
        if self.error:
            rows = self.held.count(b"\n") or len(self.part)
            why = self.error.strerror or str(self.error)
            raise OSError(f"{self.run_dir}/{self.name}.jsonl: {counted(rows, 'row')} could not be written: {why}")


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
    with open(beside, "wb") as file:
        file.write(encode(text))
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
