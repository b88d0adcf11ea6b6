"""Local files: parsed and checked once, kept as array_record by a small TFDS builder.

Whatever is wrong with a row is said with its file and line (Parquet and JSON: its row).
"""

import base64
import collections
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

from jaxrlhf.data.formats import recognise
from jaxrlhf.data.readers import READERS, NumberedRows, format_of
from jaxrlhf.data.record_kinds import BadRecord, nearest
from jaxrlhf.paths import need_reachable

FROM_TEXT = (".csv", ".tsv")  # formats whose values are all text
WILD = re.compile(r"[*?\[]")
FORMAT = 6  # of the cache; raise it when the same file would give other records


def find_files(pattern: str, where: str) -> list:
    """The files that a path or a glob names, sorted. Raises ValueError when there is none, or for an unknown format."""
    from etils import epath

    need_reachable(pattern, f"{where}.path")
    path = epath.Path(pattern).expanduser()
    if WILD.search(pattern) and not path.exists():
        if "**" in pattern:
            raise ValueError(f"{where}.path: {pattern!r}: ** is not supported; expected * for the files of a folder")
        parts = path.parts
        first = next(i for i, part in enumerate(parts) if WILD.search(part))
        root = epath.Path(*parts[:first]) if first else epath.Path(".")
        files = sorted(file for file in root.glob("/".join(parts[first:])) if not os.path.isdir(file))
    else:
        files = [path]
        if path.is_dir():
            raise ValueError(
                f"{where}.path: {pattern!r} is a folder: name its files, as in '{pattern.rstrip('/')}/*.jsonl', or use "
                "hf: for a data set of Hugging Face"
            )
        if not path.exists():
            there = path.parent.iterdir() if path.parent.is_dir() else []
            beside = [other.name for other in there if format_of(other) is not None]
            raise ValueError(f"{where}.path: {pattern!r} does not exist{nearest(path.name, beside, listed=False)}")
    if not files:
        raise ValueError(f"{where}.path: no file matches {pattern!r}")
    for file in files:
        if format_of(file) is None:
            raise ValueError(
                f"{where}.path: {str(file)!r} ends with {file.suffix!r}, expected one of {', '.join(READERS)}, "
                "or a text one of these with .gz"
            )
    return files


def content_hash(files: list, where: str) -> str:
    """sha256 of the files' bytes and formats. Raises ValueError for one that can't be read."""
    digest = hashlib.sha256()
    for file in files:
        content = hashlib.sha256()
        try:
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    content.update(chunk)
        except OSError as error:
            raise ValueError(f"{where}.path: {file}: {error.strerror or error}; expected a file to read") from error
        digest.update(str(format_of(file)).encode() + content.digest())
    return digest.hexdigest()


def records_hash(content: str, kind: str, fields: Mapping[str, str], skip_bad: bool) -> str:
    """sha256 of all that decides the records: the content that rows are read from, and how they are read."""
    return hashlib.sha256(json.dumps([FORMAT, content, kind, sorted(fields.items()), skip_bad]).encode()).hexdigest()


class Table(NamedTuple):
    """Rows from one place."""

    name: str  # for messages
    rows: Callable[[], NumberedRows]
    from_text: bool = False  # CSV, TSV: all values are text


def tables_of(files: list) -> list[Table]:
    """The rows of files, each read in its own format."""
    return [
        Table(str(file), functools.partial(READERS[str(format_of(file))], file), format_of(file) in FROM_TEXT)
        for file in files
    ]


class Parser:
    """Iterates over the records of tables as JSON text; afterwards it says how many rows were bad, why the
    first was, what the others were recognised as, and which of their columns nothing uses."""

    def __init__(
        self, tables: list[Table], kind: str, fields: Mapping[str, str], skip_bad: bool, where: str, key="path"
    ):
        self.key = key  # of the section ``where``: what named the tables
        self.tables, self.kind, self.fields, self.skip_bad, self.where = tables, kind, fields, skip_bad, where
        self.skipped, self.first_bad = 0, ""
        self.formats, self.unused = collections.Counter[str](), dict[str, None]()

    def __iter__(self) -> Iterator[str]:
        """Raises ValueError ("file:line: what is wrong") at the first bad row, unless skip_bad counts it."""
        for table in self.tables:
            for line, row in table.rows():
                try:
                    record = self._record(row, table.from_text)
                except BadRecord as error:
                    self.first_bad = self.first_bad or f"{table.name}:{line}: {error}"
                    if not self.skip_bad:
                        raise ValueError(self.first_bad) from None
                    self.skipped += 1
                else:
                    yield record
        if not self.formats:
            empty = f"{self.key} holds no rows" if self.key != "path" else "the files hold no rows"
            why = f"all {self.skipped} rows are bad; the first: {self.first_bad}" if self.first_bad else empty
            raise ValueError(f"{self.where}.{self.key}: no records: {why}")

    def _record(self, row: dict[str, Any] | str, from_text: bool) -> str:
        if isinstance(row, str):
            raise BadRecord(row)
        found = recognise(row, self.kind, self.fields, self.where, from_text)
        try:
            text = json.dumps(found.record, default=_plain)
        except (TypeError, ValueError) as error:
            raise BadRecord(f"has a value that can't be kept: {error}") from None
        self.formats[found.format] += 1
        self.unused.update(dict.fromkeys(found.unused))
        return text


def summary(parsers: Iterable[Parser]) -> dict[str, Any]:
    """What the parsers have found, as JSON."""
    parsers = list(parsers)
    formats = sum((parser.formats for parser in parsers), collections.Counter[str]())
    unused = dict.fromkeys(column for parser in parsers for column in parser.unused)
    return {
        "skipped": sum(parser.skipped for parser in parsers),
        "first_bad": next((parser.first_bad for parser in parsers if parser.first_bad), ""),
        "formats": dict(formats),
        "unused": list(unused),
    }


def _plain(value: Any) -> Any:
    """Parquet's dates, decimals and bytes as text."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


@contextmanager
def silence():
    """TFDS narrates what it does, several bars at once."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def records_builder(digest: str, data_dir: str, parsers: Mapping[str, Parser]):
    """A TFDS builder, outside TFDS's registry, that keeps under ``data_dir`` what the parser of each split yields, in
    its order."""
    import tensorflow_datasets as tfds

    class Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """One Text feature that holds the record as JSON, so that columns keep their types without being declared."""

        name = f"records_{digest[:32]}"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({"record": tfds.features.Text()}),
                disable_shuffling=True,  # keyed by index, and kept in that order
                metadata=tfds.core.MetadataDict(),
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in parsers}

        def _generate_examples(self, split):
            for index, record in enumerate(parsers[split]):
                yield index, {"record": record}
            metadata: Any = self.info.metadata  # written with the dataset, so that it outlives the parse
            metadata.update(summary(parsers.values()))

        def download_and_prepare(self, **options):
            with silence():
                super().download_and_prepare(**options)

    return Records(data_dir=data_dir)
