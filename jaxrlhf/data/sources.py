"""From a path or the name of a dataset to a random-access sequence of records."""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from jaxrlhf.data import files, hub, verified_cache
from jaxrlhf.data.chat import ChatConfig
from jaxrlhf.data.formats import check_columns, check_fields, recognise, take_fields
from jaxrlhf.data.record_kinds import BadRecord, find_kind, nearest
from jaxrlhf.paths import need_reachable

DEFAULT_CACHE_DIR = "~/.cache/jaxrlhf/data"
OWN_DATASETS = {"jaxrlhf_movie_reviews": "jaxrlhf.data.movie_reviews"}  # importing the module registers the dataset
# TFDS registers the datasets of these modules when they are imported, and not before
LAZY_MODULES = ("text", "summarization", "question_answering", "translate", "text_simplification", "structured")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where records come from: exactly one of ``path``, ``tfds`` and ``hf``."""

    path: str | None = None  # JSONL, JSON, CSV, TSV (also .gz) or Parquet; a file or a glob, local or remote (gs://)
    tfds: str | None = None  # a dataset that tensorflow-datasets knows: "name" or "name/config"
    hf: str | None = (
        None  # a Hugging Face data set: "owner/name" or "owner/name/config", or its folder here (extra: hf)
    )
    split: str = "train"  # slices work: "train[:90%]"; the files of ``path`` are one split, "train"
    fields: dict[str, str] = dataclasses.field(default_factory=dict)  # our word -> its column; "": it has none

    def wrong_origin(self) -> str | None:
        """What is wrong with where the records come from: None where it is exactly one place."""
        given = {name: getattr(self, name) for name in ("path", "tfds", "hf")}
        if sum(value is not None for value in given.values()) == 1:
            return None
        named = " and ".join(f"{name} is {value}" for name, value in given.items() if value is not None)
        return f"{named or 'none of path, tfds and hf is given'}; expected one of them"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run learns from and is evaluated on, and how text becomes rows of tokens."""

    demonstrations: SourceConfig | None = None  # prompt + response, or messages, or text
    preferences: SourceConfig | None = None  # chosen + rejected (prompt, margin, tie): text, messages; or segments
    unpaired: SourceConfig | None = None  # prompt + response + label (true: good), or messages + label
    trajectories: SourceConfig | None = None  # a response with reward or rewards (a token), or steps; truncated
    prompts: SourceConfig | None = None  # prompt or messages; the other columns go to the rewards
    eval_demonstrations: SourceConfig | None = None  # held-out rows, like the next four
    eval_preferences: SourceConfig | None = None  # what rm and dpo are evaluated on
    eval_unpaired: SourceConfig | None = None  # what kto is evaluated on
    eval_trajectories: SourceConfig | None = None  # what ilql, fqi, mc_returns and bc are evaluated on
    eval_prompts: SourceConfig | None = None  # what a policy is evaluated on: it answers them
    cache_dir: str | None = None  # local folder of prepared datasets; null: ~/.cache/jaxrlhf/data
    chat: ChatConfig | None = None  # chat template, system prompt; plain-text prompts become turns of a conversation
    loss_on: Literal["response", "assistant"] = "response"  # of messages: the last assistant turn, or each of them
    append_eos: bool = True  # behind responses without one; false where they are to end by generate.stop
    max_length: int = 512  # tokens in a row of demonstrations, responses or trajectories, or in one side of a pair
    keep_top: float = 1.0  # the share of the training trajectories, those with the highest returns, that is used
    pack: bool = True  # several demonstrations share a row, and don't see each other
    prompt_buckets: tuple[int, ...] = (
        64,
        128,
        256,
    )  # prompts are padded to the first that holds them all; each compiles
    too_long: Literal["drop", "truncate"] = "drop"  # truncate: the oldest exchanges go, then the start of the prompt
    skip_bad: bool = False  # count records that can't be used, instead of stopping at the first


@dataclasses.dataclass(frozen=True)
class Source:
    """A random-access sequence of records (dicts with our field names)."""

    read: Callable[[int], dict[str, Any]]  # may raise BadRecord
    size: int
    name: str  # for messages
    fingerprint: str  # changes when the records do
    skipped: int = 0  # bad rows left out while the files were parsed
    formats: Mapping[str, int] = dataclasses.field(default_factory=dict)  # what rows were recognised as -> how many
    unused: Sequence[str] = ()  # columns that nothing uses
    first_bad: str = ""  # where the first of them is, and why it is bad

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(f"{self.name}: record {index} of {self.size}")
        return self.read(index)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.read, range(self.size))

    def with_tools(self, tools: Sequence[Mapping[str, Any]] | None) -> "Source":
        """The records with a column of tools that they may call, JSON schemas, where they have none of their own."""
        if not tools:
            return self

        def read(index: int) -> dict[str, Any]:
            record = self.read(index)
            return record if record.get("tools") else {**record, "tools": list(tools)}

        return dataclasses.replace(self, read=read, fingerprint=_fingerprint(self.fingerprint, list(tools)))

    def usable(self, skip_bad: bool) -> Iterator[dict[str, Any]]:
        """The records in their order, without those that can't be used where ``skip_bad`` says so."""
        for index in range(self.size):
            with contextlib.suppress(*([BadRecord] if skip_bad else [])):
                yield self.read(index)

    def describe(self) -> str:
        """What the rows were recognised as, in one line: "messages; columns that are not used: id"."""
        several = len(self.formats) > 1
        found = [f"{name} ({count} rows)" if several else name for name, count in self.formats.items()]
        names = ", ".join(name or "one without a name" for name in self.unused)
        unused = f"; columns that are not used: {names}" if names else ""
        return f"{', '.join(found)}{unused}"


def cache_folder(cache_dir: str | None) -> str:
    """The local folder of prepared data. Raises ValueError for a remote one: records are read at random."""
    folder = DEFAULT_CACHE_DIR if cache_dir is None else cache_dir
    if "://" in folder:
        raise ValueError(f"data.cache_dir: {folder!r} is remote, expected a local folder (records are read at random)")
    need_reachable(folder, "data.cache_dir")
    return os.path.abspath(os.path.expanduser(folder))


def make_cache(folder: str) -> None:
    """Raises ValueError where there is no such folder, and none can be made."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        why = "a file" if isinstance(error, FileExistsError) else error.strerror
        raise ValueError(f"data.cache_dir: {folder!r}: {why}; expected a folder that can be written") from error


def open_source(
    cfg: SourceConfig,
    kind: str,
    *,
    cache_dir: str | None = None,
    skip_bad: bool = False,
    path_in_config: str = "data.prompts",
) -> Source:
    """Opens (the first time: parses or downloads, and prepares) the records that ``cfg`` names.

    Args:
        kind: a row of KINDS, which says what fields a record needs.
        cache_dir: local folder that prepared datasets are kept in.
        skip_bad: leave out rows of local files that can't be used, and count them in ``Source.skipped``.
        path_in_config: the prefix of error messages.

    Raises:
        ValueError: nothing is there, or (unless ``skip_bad``) a row can't be used: "file:line: what is wrong".
    """
    find_kind(kind)
    wrong = cfg.wrong_origin()
    if wrong:
        raise ValueError(f"{path_in_config}: {wrong}")
    check_fields(cfg.fields, kind, path_in_config)
    folder = cache_folder(cache_dir)
    make_cache(folder)
    if cfg.tfds is not None:
        return _open_tfds(cfg, cfg.tfds, kind, folder, path_in_config)
    read_as = {"kind": kind, "fields": cfg.fields, "skip_bad": skip_bad}
    if cfg.path is not None:
        found = files.find_files(cfg.path, path_in_config)
        digest = files.records_hash(files.content_hash(found, path_in_config), **read_as)
        parsers = {"train": files.Parser(files.tables_of(found), **read_as, where=path_in_config)}
        return _open_parsed(cfg, cfg.path, digest, parsers, folder, path_in_config)
    name = str(cfg.hf)
    splits = hub.find_splits(name, cfg.split, path_in_config)
    digest = files.records_hash(hub.content_hash(splits), **read_as)
    tables = {split: [hub.table_of(name, split, dataset)] for split, dataset in splits.items()}
    parsers = {split: files.Parser(table, **read_as, where=path_in_config, key="hf") for split, table in tables.items()}
    return _open_parsed(cfg, name, digest, parsers, folder, path_in_config)


def _open_parsed(
    cfg: SourceConfig, name: str, digest: str, parsers: dict[str, files.Parser], folder: str, where: str
) -> Source:
    """Rows that are parsed and checked once, and kept in ``folder``."""
    builder = _prepared(lambda: files.records_builder(digest, os.path.join(folder, "files"), parsers), folder)
    rows = _data_source(builder, cfg.split, name, where)
    return Source(
        read=lambda index: json.loads(rows[index]["record"]),
        size=len(rows),
        name=name,
        fingerprint=_fingerprint("files", digest, cfg.split),
        **builder.info.metadata,
    )


def _open_tfds(cfg: SourceConfig, name: str, kind: str, folder: str, where: str) -> Source:
    try:
        builder = _prepared(lambda: _find_builder(name, folder, where), folder)
    except Exception as error:  # whatever a builder or a download raises; its first line says enough
        message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(message if message.startswith(where) else f"{where}.tfds: {name}: {message}") from error
    rows = _data_source(builder, cfg.split, name, where)
    label = f"{builder.info.full_name}[{cfg.split}]"
    with _said_by(f"{where}.tfds: {label}"):
        columns = take_fields(dict.fromkeys(builder.info.features or {}), cfg.fields, where)
        check_columns(columns, kind, cfg.fields, where)

    def read(index: int) -> dict[str, Any]:
        with _said_by(f"{label}:{index}"):
            return recognise(to_python(rows[index]), kind, cfg.fields, where).record

    formats, unused = {}, ()
    with contextlib.suppress(BadRecord):  # said, or counted, when the records are measured
        first = recognise(to_python(rows[0]), kind, cfg.fields, where)
        formats, unused = {first.format: len(rows)}, first.unused

    sizes = [[split.name, split.num_examples, split.num_bytes] for split in builder.info.splits.values()]
    fingerprint = _fingerprint(
        "tfds", files.FORMAT, builder.info.full_name, cfg.split, sizes, kind, sorted(cfg.fields.items())
    )
    return Source(read, len(rows), label, fingerprint, formats=formats, unused=unused)


@contextlib.contextmanager
def _said_by(prefix: str):
    """Puts the place in front of what a BadRecord says."""
    try:
        yield
    except BadRecord as error:
        raise BadRecord(f"{prefix}: {error}") from None


def _fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _prepared(make: Callable[[], Any], ours: str | None = None) -> Any:
    """A builder with its data on disk. Another process may be preparing the same: TFDS writes to a folder of its own
    and renames it, so that the second finds the name taken, and reads the data of the first. Data in the folder
    ``ours`` are compared with their checksums, and made again where they are damaged."""
    import tensorflow_datasets as tfds

    builder = make()
    own = ours is not None and os.fspath(builder.data_path).startswith(os.path.join(ours, ""))
    if own and _has_data(builder):
        verified_cache.set_aside_damaged(os.fspath(builder.data_path))
        builder = make()
    if not _has_data(builder):
        # not from Google's copies: their format can't be read at random
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        try:
            builder.download_and_prepare(file_format="array_record", download_config=config)
        except Exception:
            if not _has_data(make()):
                raise
    if own:
        verified_cache.seal(os.fspath(builder.data_path))
    # a builder knows the splits that were there when it was made, and another process may have been faster
    return make()


def _has_data(builder: Any) -> bool:
    return (builder.data_path / "dataset_info.json").exists()  # builder.is_prepared() says the same, and warns if not


@contextlib.contextmanager
def _tidy() -> Iterator[None]:
    """Removes the temporary folders that TFDS makes for a builder without data, and leaves behind."""
    given = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="jaxrlhf-") as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = given


def _find_builder(name: str, folder: str, where: str) -> Any:
    """The builder of a registered dataset: prepared in our folder or else in TFDS's own, or to be prepared in ours."""
    import tensorflow_datasets as tfds

    base = name.split("/")[0].split(":")[0]
    _register(base)
    try:
        with _tidy():
            ours = tfds.builder(name, data_dir=os.path.join(folder, "tfds"))
            if _has_data(ours):
                return ours
            theirs = tfds.builder(name)
    except tfds.core.DatasetNotFoundError:
        known = {*tfds.list_builders(with_community_datasets=False), *OWN_DATASETS}
        raise ValueError(f"{where}.tfds: {base!r} is unknown{nearest(base, known)}") from None
    usable = _has_data(theirs) and theirs.info.file_format and theirs.info.file_format.value == "array_record"
    return theirs if usable else ours


def _register(base: str) -> None:
    """Imports the modules that may register the dataset, if it isn't yet."""
    import tensorflow_datasets as tfds

    if base in OWN_DATASETS:
        importlib.import_module(OWN_DATASETS[base])
    elif base not in tfds.list_builders(with_community_datasets=False):
        for module in LAZY_MODULES:
            with contextlib.suppress(ImportError):
                importlib.import_module(f"tensorflow_datasets.{module}")


def _data_source(builder: Any, split: str, name: str, where: str) -> Any:
    splits = builder.info.splits
    try:
        size = splits[split].num_examples
    except (ValueError, KeyError, AssertionError) as error:
        base = split.split("[")[0]
        message = str(error).splitlines()[0] if base in splits else f"is unknown{nearest(base, splits)}"
        raise ValueError(f"{where}.split: {split!r} of {name}: {message}") from None
    if empty := _empty_part(split, splits):
        raise ValueError(f"{where}.split: {split!r} of {name}: {empty}")
    if not size:
        raise ValueError(f"{where}.split: {split!r} of {name} holds no records")
    return builder.as_data_source(split=split)


def _empty_part(split: str, splits: Mapping[str, Any]) -> str:
    """What is wrong with a slice that holds nothing, or ends before it begins: TFDS counts less than no records in it,
    and takes them off the other slices."""
    import tensorflow_datasets as tfds

    if split == "all":
        return ""
    for part in tfds.core.ReadInstruction.from_spec(split).to_absolute(dict(splits)):
        rows = splits[part.splitname].num_examples
        first, end = part.from_ or 0, rows if part.to is None else part.to
        if first >= end:
            return f"no records from {first} to {end}; expected FIRST < END"
    return ""


def to_python(value: Any) -> Any:
    """What TFDS returns, as plain Python: bytes are decoded, NumPy scalars and arrays become numbers and lists.

    A TFDS sequence of messages comes as {"role": [...], "content": [...]} and becomes a list of messages.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="surrogateescape")  # reported by the check of the text
    if isinstance(value, Mapping):
        plain = {key: to_python(item) for key, item in value.items()}
        if {"role", "content"} <= plain.keys() and all(isinstance(item, list) for item in plain.values()):
            return [dict(zip(plain, turn)) for turn in zip(*plain.values())]
        return plain
    if isinstance(value, list | tuple):
        return [to_python(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy
        return (
            to_python(value.tolist())
            if getattr(value, "ndim", 0) or isinstance(value.tolist(), bytes)
            else value.tolist()
        )
    return value
