"""The manifest of a checkpoint: the size and the checksum of each of its files, written after the step is committed.

A manifest is a file in the step's directory: ``manifest.json`` of process 0, ``manifest.1.json`` of process 1, and so
on: each process describes the files that it wrote. On a file system a checksum is SHA-256 of what was read back from
the disk; an object store (gs://) keeps checksums itself, which are compared without reading an object.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from etils import epath

from jaxrlhf.errors import counted
from jaxrlhf.log.rows import replace_text

FORMAT = 1
OF_STORES = ("md5Hash", "crc32c")  # what gcsfs says of an object; one composed of several has no MD5
NAMES = re.compile(r"manifest(\.\d+)?\.(json|tmp)")  # .tmp: one under way, by replace_text
CHUNK = 2**22  # bytes that are read at a time
DESCRIBED: dict[str, dict[str, tuple[Any, dict[str, Any]]]] = {}  # folder -> file -> its Entry, and what is said of it
READERS = min(8, os.cpu_count() or 1)  # threads that hash: hashlib works outside Python's lock


class Entry(NamedTuple):
    """One file as a directory lists it."""

    size: int
    modified: Any  # changes when the file is written anew
    checksum: tuple[str, str] | None = None  # (name, value) that the store keeps


def name_of(process: int) -> str:
    return f"manifest.{process}.json" if process else "manifest.json"


def listing(folder: epath.Path) -> dict[str, Entry]:
    """Relative path -> Entry of all files in ``folder``, without manifests; {} where it is gone."""
    found = objects(os.fspath(folder)) if "://" in os.fspath(folder) else files(os.fspath(folder))
    return {name: entry for name, entry in sorted(found.items()) if not NAMES.match(os.path.basename(name))}


def files(folder: str) -> dict[str, Entry]:
    """``listing`` on a file system."""
    found = {}
    for top, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(top, name)
            try:
                state = os.stat(path)
            except FileNotFoundError:  # of a step that is being deleted
                continue
            found[os.path.relpath(path, folder)] = Entry(state.st_size, state.st_mtime_ns)
    return found


def objects(folder: str) -> dict[str, Entry]:
    """``listing`` in an object store, by one request."""
    import fsspec

    store, inside = fsspec.core.url_to_fs(folder)
    store.invalidate_cache()
    found = {}
    for path, info in store.find(inside, detail=True).items():
        kept = next(((name, str(info[name])) for name in OF_STORES if info.get(name)), None)
        modified = info.get("generation") or str(info.get("mtime") or info.get("updated"))
        found[path.removeprefix(f"{inside.rstrip('/')}/")] = Entry(int(info["size"]), modified, kept)
    return found


def checksum(path: epath.Path, kind: str = "sha256") -> str:
    """The checksum of what is read from ``path``, as a manifest says it. Raises Damaged for a kind that this machine
    can't compute."""
    total: Any
    if kind == "crc32c":
        try:
            import google_crc32c  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise Damaged(f"{path.name} has a crc32c checksum, which needs pip install google-crc32c") from None
        total = google_crc32c.Checksum()
    else:
        total = hashlib.sha256() if kind == "sha256" else hashlib.md5()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            total.update(chunk)
    return total.hexdigest() if kind == "sha256" else base64.b64encode(total.digest()).decode()


def checksums(folder: epath.Path, found: Mapping[str, Entry], kinds: Mapping[str, str]) -> dict[str, str]:
    """Relative path -> checksum of its kind: the store's own where it has that, else of what is read."""

    def one(name: str) -> str:
        kept = found[name].checksum
        return kept[1] if kept and kept[0] == kinds[name] else checksum(folder / name, kinds[name])

    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(kinds, pool.map(one, kinds)))


def described(folder: epath.Path, found: Mapping[str, Entry]) -> dict[str, dict[str, Any]]:
    """What a manifest says of these files: {"size": ..., "sha256": ...} each."""
    kinds = {name: entry.checksum[0] if entry.checksum else "sha256" for name, entry in found.items()}
    sums = checksums(folder, found, kinds)
    return {name: {"size": entry.size, kinds[name]: sums[name]} for name, entry in found.items()}


def described_once(folder: epath.Path) -> dict[str, dict[str, Any]]:
    """``described`` of a folder that every checkpoint has beside it: a file is read again only where it was written
    since (frozen weights may be larger than all that a checkpoint holds)."""
    found, seen = listing(folder), DESCRIBED.get(os.fspath(folder), {})
    new = described(folder, {name: entry for name, entry in found.items() if seen.get(name, (None,))[0] != entry})
    seen = {name: (entry, new[name] if name in new else seen[name][1]) for name, entry in found.items()}
    DESCRIBED[os.fspath(folder)] = seen
    return {name: what for name, (_, what) in seen.items()}


def writer_of(name: str, processes: int) -> int:
    """The process that wrote a file of a step: orbax has a folder for each, and process 0 writes what they share."""
    part = re.search(r"ocdbt\.process_(\d+)/", name)
    return int(part[1]) if part and int(part[1]) < processes else 0


# ---- writing --------------------------------------------------------------------------------------------------------


def write(step: epath.Path, about: Mapping[str, Any], beside: Iterable[str] = (), process=0, processes=1) -> None:
    """Write the manifest of the files that ``process`` wrote of a committed ``step``.

    Args:
        about: what else it says of the step, as JSON.
        beside: folders of the run directory whose files belong to the checkpoint too (the tokenizer's).
    """
    own = {name: entry for name, entry in listing(step).items() if writer_of(name, processes) == process}
    content: dict[str, Any] = {"format": FORMAT, **about, "processes": processes, "files": described(step, own)}
    run_dir = step.parent.parent
    content["beside"] = {
        f"{folder}/{name}": entry
        for folder in (beside if process == 0 else ())
        for name, entry in described_once(run_dir / folder).items()
    }
    replace_text(step / name_of(process), json.dumps(content | {"digest": digest(content)}, indent=1))


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's own content, so that a damaged manifest is noticed."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---- reading --------------------------------------------------------------------------------------------------------


class Damaged(OSError):
    """A checkpoint, or a file that belongs to it, isn't what was saved."""


def exists(step: epath.Path) -> bool:
    """Whether any process has written its manifest."""
    return (step / name_of(0)).exists()


def is_missing(step: epath.Path) -> bool:
    """Whether a process has not written its manifest yet. False for damaged ones."""
    if not exists(step):
        return True
    with contextlib.suppress(Damaged):
        return not all((step / name_of(process)).exists() for process in range(1, read(step)["processes"]))
    return False


def complete(step: epath.Path) -> bool:
    """Whether all processes have written theirs."""
    with contextlib.suppress(Damaged):
        read_all(step)
        return True
    return False


def read(step: epath.Path, process: int = 0) -> dict[str, Any]:
    """A manifest. Raises Damaged, with what is wrong, where it isn't whole."""
    path = step / name_of(process)
    try:
        content = json.loads(path.read_bytes())
        signed = content.pop("digest")
        if content["format"] != FORMAT:
            raise Damaged(f"{path.name} has format {content['format']}; expected {FORMAT}")
        whole = signed == digest(content) and {"processes", "files", "beside"} <= content.keys()
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise Damaged(f"{path.name} is damaged")
    return content


def read_all(step: epath.Path) -> dict[str, Any]:
    """The manifests of all processes as one. Raises as ``read``."""
    first = read(step)
    more = [read(step, process)["files"] for process in range(1, first["processes"])]
    return first | {"files": {name: entry for one in (first["files"], *more) for name, entry in one.items()}}


def wrong_sizes(expected: Mapping[str, Any], found: Mapping[str, Entry]) -> str | None:
    """What the listing alone shows to be wrong: files missing or of another size; None where nothing is."""
    missing = [name for name in expected if name not in found]
    if missing:
        more = f", and {counted(len(missing) - 1, 'more file')}" if len(missing) > 1 else ""
        return f"{missing[0]} is missing{more}"
    for name, entry in expected.items():
        if found[name].size != entry["size"]:
            return f"{name} has {found[name].size} bytes; expected {entry['size']}"
    return None


def wrong_content(folder: epath.Path, expected: Mapping[str, Any], found: Mapping[str, Entry]) -> str | None:
    """What the checksums of all files of ``expected`` show to be wrong; None where nothing is."""
    kinds = {name: next(kind for kind in entry if kind != "size") for name, entry in expected.items()}
    for name, value in checksums(folder, found, kinds).items():
        if expected[name][kinds[name]] != value:
            return f"{name} has another {kinds[name]} checksum than when it was saved"
    return None
