"""Hugging Face folders as files: found here, in a bucket or on the hub, and what in them is read, copied, replaced."""

import contextlib
import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator
from typing import Any

from etils import epath

from jaxrlhf.errors import one_line
from jaxrlhf.models.files import gguf
from jaxrlhf.paths import need_reachable

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
VALUE_HEAD = "value_head.safetensors"  # where LLaMA-Factory puts the head of a reward model
READ_FILES = ("*.json", "model*.safetensors", VALUE_HEAD, "merges.txt", "tokenizer.model", "chat_template.jinja")
UNFINISHED = ".unfinished"  # in an export's folder, until all of it is written
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OWN_FILES = ("config.json", "generation_config.json", SINGLE, INDEX, "model-?????-of-?????.safetensors")
MAX_JSON_BYTES = 64 * 2**20


def locate(name: str) -> epath.Path:
    """The local folder that ``name`` says: a folder here, gs://... (copied), gguf:FILE, or a hub name (downloaded).

    Only configs, tokenizers and safetensors are fetched. Raises ValueError, in one line, where there is no such thing.
    """
    if name.startswith(gguf.PREFIX):
        return gguf.unpack(name.removeprefix(gguf.PREFIX))
    need_reachable(name, "init_from")
    folder = epath.Path(name).expanduser()
    if "://" in name and folder.is_dir():
        return mirror(folder)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise ValueError(f"init_from: {name!r}: there is no such folder, and hub names are owner/model")
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(name, allow_patterns=list(READ_FILES), ignore_patterns=["*/*"])
    except Exception as error:  # of many kinds: offline, gated, unknown, disk full
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"init_from: {name!r}: there is no such folder, and the hub answers: {why}") from error
    return epath.Path(found)


def mirror(remote: epath.Path) -> epath.Path:
    """A copy of a remote folder under ~/.cache/jaxrlhf/models (safetensors maps local files); old copies are reused."""
    local = epath.Path("~/.cache/jaxrlhf/models").expanduser() / hashlib.sha256(str(remote).encode()).hexdigest()[:16]
    local.mkdir(parents=True, exist_ok=True)
    sources = {path.name: path for path in remote.iterdir() if any(fnmatch.fnmatch(path.name, p) for p in READ_FILES)}
    for stale in [path for path in local.iterdir() if not path.name.startswith((".", *sources))]:
        stale.unlink()
    for name, source in sources.items():
        target, want = local / name, source.stat()
        if target.exists() and target.stat().length == want.length and target.stat().mtime >= (want.mtime or 0):
            continue
        unfinished = local / f".{name}.{os.getpid()}"
        source.copy(unfinished, overwrite=True)
        unfinished.replace(target)
    return local


def read_json(folder: epath.PathLike, name: str) -> dict[str, Any] | None:
    """The object in a JSON file of the folder; None where there is no such file.

    Raises ValueError, in one line, where it is broken or absurdly large."""
    path = epath.Path(folder) / name
    if not path.exists():
        return None
    if path.stat().length > MAX_JSON_BYTES:
        raise ValueError(f"{path}: {path.stat().length} bytes; expected at most {MAX_JSON_BYTES}")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}; expected an object")
    return value


def write_json(path: epath.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def tokenizer_files(folder: epath.PathLike | None) -> list[epath.Path]:
    """The tokenizer's files in a folder. Raises ValueError where it has none."""
    if folder is None:
        return []
    files = [epath.Path(folder) / name for name in TOKENIZER_FILES]
    present = [path for path in files if path.exists()]
    if not present:
        raise ValueError(f"export: {folder}: holds no tokenizer; expected tokenizer.json")
    return present


def clear(folder: epath.Path, tokenizer: Collection[str]) -> None:
    """Make the folder; remove an earlier export, whose weights, or files of whose tokenizer that are not among the new
    ones, could be read in place of the new ones."""
    folder.mkdir(parents=True, exist_ok=True)
    others = [name for name in TOKENIZER_FILES if tokenizer and name not in tokenizer]
    for path in list(folder.iterdir()) if folder.exists() else []:  # an object store makes no empty folder
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in (*OWN_FILES, *others)):
            path.unlink()


@contextlib.contextmanager
def written_whole(folder: epath.Path, tokenizer: Collection[str]) -> Iterator[epath.Path]:
    """A new folder to write an export to, with these files of a tokenizer. At the end of the block its files take the
    place of an earlier export's in ``folder``, config.json last; where the block raises, that one stays as it is. In an
    object store, which renames nothing, it is ``folder`` itself, cleared first."""
    if "://" in os.fspath(folder):
        clear(folder, tokenizer)
        yield folder
        return
    made, new = not folder.exists(), folder / UNFINISHED
    if new.exists():  # of an export that was killed
        new.rmtree()
    new.mkdir(parents=True)
    try:
        yield new
        clear(folder, tokenizer)
        for path in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(folder / path.name)
        made = False
    finally:
        (folder if made else new).rmtree()
