"""The rows of local files, each with its line: JSONL, JSON, CSV, TSV and Parquet, the text ones also with gzip."""

import contextlib
import csv
import decimal
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from jaxrlhf.data.record_kinds import text, type_name

BOM = b"\xef\xbb\xbf"
NumberedRows = Iterator[tuple[int, dict[str, Any] | str]]  # line number, and the row or what is wrong with it


def load_json(content: str | bytes) -> Any:
    """The value of a JSON text. Raises JSONDecodeError and UnicodeDecodeError, or ValueError for what can't be used:
    nested too deeply, a key twice in an object, an integer that Python refuses to read."""
    try:
        return json.loads(content, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        if "integer string conversion" in str(error):  # Python's own limit: longer ones take quadratic time
            raise ValueError("an integer of more than 4,300 digits") from None
        raise


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    keys = [key for key, _ in pairs]
    raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)[:40]!r} appears twice in an object")


def read_jsonl(path) -> NumberedRows:
    """One JSON object a line. Blank lines are nothing."""
    with _opened(path) as file:
        yield from _json_lines(file)


def _json_lines(lines: Iterable[bytes]) -> NumberedRows:
    for line, raw in enumerate(lines, start=1):
        raw = (raw.removeprefix(BOM) if line == 1 else raw).rstrip()
        if raw:
            yield line, _parse_json(raw)


def _parse_json(raw: bytes) -> dict[str, Any] | str:
    if b"\0" in raw:
        return "holds a NUL byte"
    try:
        row = load_json(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte {error.start} of the line)"
    except json.JSONDecodeError as error:
        return f"is not JSON: {error.msg} at column {error.pos + 1}"
    except ValueError as error:
        return f"is not usable JSON: {error}"
    return row if isinstance(row, dict) else f"is not a JSON object: {raw[:40].decode(errors='replace').strip()}"


def read_json(path) -> NumberedRows:
    """A list of objects, or {"data": [...]}, its rows counted from 1; or one object a line, as in JSONL."""
    with _opened(path) as file:
        content = file.read().removeprefix(BOM)
    try:
        whole = load_json(content)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError among them
        extra = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        if extra and content.lstrip()[:1] == b"{":
            yield from _json_lines(content.split(b"\n"))
            return
        raise ValueError(f"{path}: is not JSON: {' '.join(str(error).split())}") from None
    rows = whole.get("data") if isinstance(whole, dict) else whole
    if not isinstance(rows, list):
        if isinstance(whole, dict) and b"\n" not in content.strip():
            rows = [whole]  # JSONL of one line
        else:
            found = (
                f"an object with {', '.join(map(repr, list(whole)[:5]))}"
                if isinstance(whole, dict)
                else type_name(whole)
            )
            raise ValueError(f'{path}: is {found}, expected a list of objects, {{"data": [...]}} or an object a line')
    for number, row in enumerate(rows, start=1):
        yield number, row if isinstance(row, dict) else f"is {type_name(row)}, expected a JSON object"


def read_csv(path, separator: str = ",") -> NumberedRows:
    """Quoted with ", the first row names the columns; a quoted cell may hold line breaks."""
    with _opened(path) as file, _wide_cells():
        # surrogateescape: a byte that is not UTF-8 is reported with its own row, by the check of the text
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        # not strict, an open quote swallows the rest of the file
        reader = csv.reader(lines, delimiter=separator, strict=True)
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
                header = _check_header(cells, path, separator)
            elif cells and header is not None:
                yield line, _row_of(header, cells)


def _check_header(header: list[str], path, separator: str) -> list[str]:
    wrong = next((wrong for name in header if (wrong := text(name))), None)
    if wrong is not None:
        raise ValueError(f"{path}:1: the name of a column {wrong}; expected UTF-8 text, columns split by {separator!r}")
    other = next((mark for mark in ";\t|," if mark in header[0]), None) if len(header) == 1 else None
    if other is not None:
        raise ValueError(f"{path}:1: the columns are split by {other!r}, expected {separator!r}")
    check_twice(header, f"{path}:1")
    return header


def _row_of(header: list[str], cells: list[str]) -> dict[str, Any] | str:
    if len(cells) != len(header):
        return f"has {len(cells)} cells, the header has {len(header)}"
    return dict(zip(header, cells))


@contextlib.contextmanager
def _wide_cells():
    """Cells of any length; csv stops at 128 KiB by default, which a long document passes."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def read_parquet(path) -> NumberedRows:
    """The rows of a Parquet file, counted from 1."""
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file:
            row = 0
            table = pyarrow.parquet.ParquetFile(file)
            check_twice(table.schema_arrow.names, path)
            for batch in table.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    row += 1
                    yield row, from_arrow(values)
    # OSError, MemoryError, ValueError: what pyarrow raises for pages that are damaged
    except (pyarrow.ArrowException, OSError, MemoryError, OverflowError, UnicodeDecodeError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: is not Parquet that can be read: {why}") from None


def check_twice(names: list[str], where: Any) -> None:
    """Raises ValueError where two columns have one name: either could be meant."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{where}: two columns are named {twice!r}")


def from_arrow(row: dict[str, Any]) -> dict[str, Any]:
    """A row of Arrow as JSON would have it: keys that only other rows have, which Arrow fills with null, are left out
    of nested objects (but not a message's content), and decimals are numbers."""
    return {name: _bare(value) for name, value in row.items()}


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _bare(item) for key, item in value.items() if item is not None or key == "content"}
    if isinstance(value, list):
        return [_bare(item) for item in value]
    return float(value) if isinstance(value, decimal.Decimal) else value


@contextlib.contextmanager
def _opened(path) -> Iterator[IO[bytes]]:
    """The file's bytes, without gzip where its name ends with .gz."""
    with path.open("rb") as raw:
        if path.suffix.lower() != ".gz":
            yield raw
            return
        try:
            with gzip.GzipFile(fileobj=raw) as file:
                yield file  # type: ignore[misc]
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: is not gzip that can be read: {error}") from None


READERS: dict[str, Callable[[Any], NumberedRows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": lambda path: read_csv(path, "\t"),
    ".parquet": read_parquet,
}
PACKED = tuple(f"{name}.gz" for name in READERS if name != ".parquet")


def format_of(path) -> str | None:
    """The key in READERS of a file's name, None where there is none."""
    name = path.name.lower()
    if name.endswith(PACKED):
        name = name.removesuffix(".gz")
    return next((ending for ending in READERS if name.endswith(ending)), None)
