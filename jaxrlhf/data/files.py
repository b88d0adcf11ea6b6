"""Local JSONL, CSV and Parquet: parsed and checked once, kept as array_record by a small TFDS builder.

Each file is read row by row, and whatever is wrong with a row is said with its file and line (Parquet: its row).
"""

import base64
import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from jaxrlhf.data.kinds import FROM_TEXT, KINDS, BadRecord, check_record, nearest, take_fields

FORMAT = 1  # of the cache; raise it when the same file would give other records
BOM = b"\xef\xbb\xbf"
Rows = Iterator[tuple[int, dict[str, Any] | str]]  # line number, and the row or what is wrong with it


def read_jsonl(path) -> Rows:
    """One JSON object a line. Blank lines are nothing."""
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            raw = (raw.removeprefix(BOM) if line == 1 else raw).rstrip()
            if raw:
                yield line, _parse_json(raw)


def _parse_json(raw: bytes) -> dict[str, Any] | str:
    if b"\0" in raw:
        return "holds a NUL byte"
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte {error.start} of the line)"
    except json.JSONDecodeError as error:
        return f"is not JSON: {error.msg} at column {error.pos + 1}"
    except RecursionError:
        return "is not usable JSON: nested too deeply"
    return row if isinstance(row, dict) else f"is not a JSON object: {raw[:40].decode(errors='replace').strip()}"


def read_csv(path) -> Rows:
    """Comma-separated, quoted with ", the first row names the columns; a quoted cell may hold line breaks."""
    with path.open("rb") as file, _wide_cells():
        # surrogateescape: a byte that is not UTF-8 is reported with its own row, by the check of the text
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(lines, strict=True)  # not strict, an open quote swallows the rest of the file
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, f"is not CSV: {error}"
                continue
            if header is None and cells:
                header = _check_header(cells, path)
            elif cells and header is not None:
                yield line, _row_of(header, cells)


def _check_header(header: list[str], path) -> list[str]:
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}:1: two columns are named {twice!r}")
    return header


def _row_of(header: list[str], cells: list[str]) -> dict[str, Any] | str:
    if len(cells) != len(header):
        return f"has {len(cells)} cells, the header has {len(header)}"
    return dict(zip(header, cells))


@contextmanager
def _wide_cells():
    """Cells of any length; csv stops at 128 KiB by default, which a long document passes."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def read_parquet(path) -> Rows:
    """The rows of a Parquet file, counted from 1."""
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file:
            row = 0
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    row += 1
                    yield row, values
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not Parquet that can be read: {str(error).splitlines()[0]}") from None


READERS: dict[str, Callable[[Any], Rows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def find_files(pattern: str, where: str) -> list:
    """The files that a path or a glob names, sorted. Raises ValueError when there is none, or for an unknown format."""
    from etils import epath

    path = epath.Path(pattern).expanduser()
    if re.search(r"[*?\[]", pattern) and not path.exists():
        parts = path.parts
        first = next(i for i, part in enumerate(parts) if re.search(r"[*?\[]", part))
        root = epath.Path(*parts[:first]) if first else epath.Path(".")
        files = sorted(root.glob("/".join(parts[first:])))
    else:
        files = [path]
        if path.is_dir():
            raise ValueError(
                f"{where}.path: {pattern!r} is a folder: name its files, as in '{pattern.rstrip('/')}/*.jsonl'"
            )
        if not path.exists():
            beside = [other.name for other in path.parent.iterdir()] if path.parent.exists() else []
            raise ValueError(f"{where}.path: {pattern!r} does not exist{nearest(path.name, beside)}")
    if not files:
        raise ValueError(f"{where}.path: no file matches {pattern!r}")
    for file in files:
        if file.suffix.lower() not in READERS:
            raise ValueError(
                f"{where}.path: {str(file)!r} ends with {file.suffix!r}, expected one of {', '.join(READERS)}"
            )
    return files


def content_hash(files: list, kind: str, fields: Mapping[str, str], skip_bad: bool) -> str:
    """sha256 of all that decides the records: the files' bytes and formats, and how they are read."""
    digest = hashlib.sha256(json.dumps([FORMAT, kind, sorted(fields.items()), skip_bad]).encode())
    for file in files:
        content = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                content.update(chunk)
        digest.update(file.suffix.lower().encode() + content.digest())
    return digest.hexdigest()


class Parser:
    """Iterates over the records of files as JSON text; afterwards ``skipped`` says how many rows were bad."""

    def __init__(self, files: list, kind: str, fields: Mapping[str, str], skip_bad: bool, where: str):
        self.files, self.kind, self.fields, self.skip_bad, self.where = files, kind, fields, skip_bad, where
        self.skipped = 0

    def __iter__(self) -> Iterator[str]:
        """Raises ValueError ("file:line: what is wrong") at the first bad row, unless skip_bad counts it."""
        first_bad, used = "", 0
        for file in self.files:
            for line, row in READERS[file.suffix.lower()](file):
                try:
                    record = self._record(row, from_text=file.suffix.lower() == ".csv")
                except BadRecord as error:
                    first_bad = first_bad or f"{file}:{line}: {error}"
                    if not self.skip_bad:
                        raise ValueError(first_bad) from None
                    self.skipped += 1
                else:
                    used += 1
                    yield record
        if not used:
            why = f"all {self.skipped} rows are bad; the first: {first_bad}" if first_bad else "the files hold no rows"
            raise ValueError(f"{self.where}.path: no records: {why}")

    def _record(self, row: dict[str, Any] | str, from_text: bool) -> str:
        if isinstance(row, str):
            raise BadRecord(row)
        record = take_fields(row, self.fields, KINDS[self.kind], self.where)
        if from_text:
            record = {name: _cell(name, value) for name, value in record.items()}
        check_record(record, KINDS[self.kind], self.where)
        try:
            return json.dumps(record, default=_plain)
        except (TypeError, ValueError) as error:
            raise BadRecord(f"has a value that can't be kept: {error}") from None


def _cell(name: str, value: str) -> Any:
    try:
        return FROM_TEXT[name](value) if name in FROM_TEXT else value
    except ValueError:
        raise BadRecord(f"{name} is {value[:40]!r}, which can't be read as {name}") from None


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


def records_builder(digest: str, data_dir: str, parser: Parser):
    """A TFDS builder, outside TFDS's registry, that keeps what ``parser`` yields under ``data_dir``, in its order."""
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
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for index, record in enumerate(parser):
                yield index, {"record": record}
            metadata: Any = self.info.metadata  # written with the dataset, so that the number outlives the parse
            metadata["skipped"] = parser.skipped

        def download_and_prepare(self, **options):
            with silence():
                super().download_and_prepare(**options)

    return Records(data_dir=data_dir)
