"""Caches of prepared data, compared with their checksums before they are read: a damaged one is made again."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

ASIDE = ".damaged"  # what is behind the name of a damaged cache
DIGEST = hashlib.sha256().digest_size


def checksums(folder: str) -> dict[str, str]:
    """Name -> SHA-256 of the files of a folder."""
    found = {}
    for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_file()):
        with open(os.path.join(folder, name), "rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def beside(folder: str) -> str:
    """The file with the checksums of a folder."""
    return f"{folder}.sha256.json"


def seal(folder: str) -> None:
    """Write the checksums of a folder that was just made, or that an older version made."""
    if not os.path.exists(beside(folder)):
        write_whole(beside(folder), json.dumps(checksums(folder), indent=1).encode())


def set_aside_damaged(folder: str) -> None:
    """Moves a folder away whose files aren't those that ``seal`` saw, and says so in one line."""
    try:
        with open(beside(folder), "rb") as file:
            kept = json.load(file)
    except FileNotFoundError:
        return
    except ValueError:
        kept = {}
    found = checksums(folder)
    if kept == found:
        return
    wrong = next((name for name in {**kept, **found} if kept.get(name) != found.get(name)), "")
    set_aside(folder, wrong)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(beside(folder))


def set_aside(path: str, wrong: str = "") -> None:
    """Gives a damaged cache another name, in the place of an earlier one, and says so."""
    where = os.path.join(path, wrong) if wrong else path
    print(f"{where}: prepared data were changed or damaged: set aside as {path}{ASIDE}, made again", file=sys.stderr)
    shutil.rmtree(path + ASIDE, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        os.replace(path, path + ASIDE)


def read_signed(path: str) -> bytes | None:
    """What ``write_signed`` wrote; None where nothing is, or it was damaged and is set aside."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return None
    if hashlib.sha256(data[DIGEST:]).digest() == data[:DIGEST]:
        return data[DIGEST:]
    set_aside(path)
    return None


def write_signed(path: str, data: bytes) -> None:
    """Write a file with its checksum in front."""
    write_whole(path, hashlib.sha256(data).digest() + data)


def write_whole(path: str, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    with renamed(path) as under_way, open(under_way, "wb") as file:
        file.write(data)


@contextlib.contextmanager
def renamed(path: str) -> Iterator[str]:
    """A file that takes the name ``path`` when the block ends without error, and else goes."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle, under_way = tempfile.mkstemp(dir=os.path.dirname(path))
    os.close(handle)
    try:
        yield under_way
        os.replace(under_way, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(under_way)
