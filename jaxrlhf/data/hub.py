"""Data sets of the Hugging Face hub, and folders of the same, through the ``datasets`` library (the extra ``hf``)."""

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jaxrlhf.data.files import Table, silence
from jaxrlhf.data.readers import NumberedRows, from_arrow
from jaxrlhf.data.record_kinds import nearest

SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves, of several splits and of one
BATCH = 1000  # rows read at a time


def find_splits(name: str, split: str, where: str) -> dict[str, Any]:
    """The ``datasets.Dataset`` of each split that ``split`` names, as "train[:90%]" names train.

    Args:
        name: "name", "owner/name" or "owner/name/config" of the hub; or a local folder, of files or of save_to_disk.
        where: the config's section, for messages.

    Raises:
        ValueError: in one line, where the library, the data set or the split is not to be had.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(f'{where}.hf: {name!r} needs the datasets library: pip install "jaxrlhf[hf]"') from None
    place, config = _locate(name, where)
    try:
        found = _load(datasets, place, config)
    except Exception as error:  # the library and what it calls raise many kinds
        raise ValueError(f"{where}.hf: {name!r} can't be loaded: {_reason(error, place, config)}") from None
    if not isinstance(found, Mapping):
        found = {str(found.split or "train"): found}
    splits = list(dict.fromkeys(part.strip().split("[")[0] for part in split.split("+")))
    for base in splits:
        if base not in found:
            raise ValueError(f"{where}.split: {base!r} of {name} is unknown{nearest(base, map(str, found))}")
    return {base: found[base] for base in splits}


def content_hash(splits: Mapping[str, Any]) -> str:
    """sha256 of the splits' columns and rows: the same wherever the same data are loaded."""
    import pyarrow

    digest = hashlib.sha256()
    for split, dataset in splits.items():
        digest.update(f"{split} {dataset.features}".encode())
        for table in dataset.with_format("arrow").iter(batch_size=BATCH):
            sink = io.BytesIO()
            with pyarrow.ipc.new_stream(sink, table.schema.remove_metadata()) as stream:
                stream.write_table(table.replace_schema_metadata(None).combine_chunks())
            digest.update(sink.getvalue())
    return digest.hexdigest()


def table_of(name: str, split: str, dataset: Any) -> Table:
    """The rows of one split, counted from 0 as the library counts them."""
    return Table(f"{name}[{split}]", lambda: _rows(dataset))


def _rows(dataset: Any) -> NumberedRows:
    number = 0
    for table in dataset.with_format("arrow").iter(batch_size=BATCH):
        for row in table.to_pylist():
            yield number, from_arrow(row)
            number += 1


def _locate(name: str, where: str) -> tuple[str, str | None]:
    """(folder or name on the hub, config). Raises ValueError for what can be neither."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return path, None
    parent, _, last = path.rstrip("/").rpartition("/")
    if parent and os.path.isdir(parent) and any(os.scandir(parent)) and name.count("/") != 1:
        return parent, last
    if "://" in name or name.startswith((".", "/", "~")) or name.count("/") > 2 or not re.fullmatch(r"[\w./-]+", name):
        raise ValueError(
            f"{where}.hf: {name!r} is no folder; expected one, or owner/name or owner/name/config of the hub"
        )
    owner, _, config = name.rpartition("/") if name.count("/") == 2 else (name, "", "")
    return owner, config or None


def _load(datasets: Any, place: str, config: str | None) -> Any:
    if not os.path.isdir(place):
        return datasets.load_dataset(place, config)
    with silence(), _no_bars(datasets):
        if any(os.path.exists(os.path.join(place, name)) for name in SAVED):
            return datasets.load_from_disk(place)
        return datasets.load_dataset(place, config)


@contextlib.contextmanager
def _no_bars(datasets: Any) -> Iterator[None]:
    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _reason(error: Exception, place: str, config: str | None) -> str:
    """What went wrong, and what to do about it."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ConnectionError | OSError) and "Hub" in text:
        return (
            f"{text}; expected access to huggingface.co, a data set that was loaded here before (then HF_HUB_OFFLINE=1 "
            "skips the attempt), or a local folder of its files"
        )
    missing = re.search(r"available configs: (\[.*?\])", text)
    if missing:
        return f"it has several configs; expected {place}/CONFIG with one of {missing[1]}"
    unknown = re.search(r"BuilderConfig '.*?' not found. Available: (\[.*\])", text)
    if unknown:
        known = re.findall(r"'(.*?)'", unknown[1])
        return f"no config {config!r}{nearest(str(config), known)}"
    return text[:300]
