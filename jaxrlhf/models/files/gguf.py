"""GGUF files, shown to the rest of the house as Hugging Face folders. What is read is in gguf_families.py.

``unpack`` writes beside each other, in a cache, what such a folder holds: config.json, generation_config.json and the
tokenizer, made from the file's metadata, and a list of where its tensors are. The weights stay in the file: they are
read from it, a slice at a time, and dequantised to float32 (gguf_tensors.py; hf_weights.py does not know the
difference).
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from typing import Any

import numpy as np
from etils import epath

from jaxrlhf.errors import content_of
from jaxrlhf.models.files.gguf_families import ROPE_FACTORS, Metadata, find_architecture, make_config, place_tensors
from jaxrlhf.models.files.gguf_tensors import open_place
from jaxrlhf.models.files.gguf_tokenizer import ending_ids, write_tokenizer

PREFIX = "gguf:"
RECORD = "gguf.json"
FORMAT = 3  # of what unpack writes; raise it when the same file would give another folder


def unpack(name: str) -> epath.Path:
    """The folder made from the GGUF file ``name``; made once for each state of the file.

    Raises ValueError, in one line, for a file that is not there, broken, or of a model that is not computed exactly."""
    path = os.path.abspath(os.path.expanduser(name))
    if not os.path.isfile(path):
        raise ValueError(f"init_from: {PREFIX}{name}: there is no such file")
    stat = os.stat(path)
    key = json.dumps([FORMAT, path, stat.st_size, stat.st_mtime_ns])
    parent = epath.Path("~/.cache/jaxrlhf/models").expanduser()
    folder = parent / f"gguf-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if folder.exists():
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(dir=parent)
    try:
        write_folder(path, epath.Path(scratch))
        os.rename(scratch, folder)
    except OSError:
        if not folder.exists():  # else another process was quicker
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def write_folder(path: str, folder: epath.Path) -> None:
    """All that ``unpack`` promises, into an empty folder."""
    where = f"init_from: {PREFIX}{path}"
    with content_of(where):
        write_content(path, folder, where)


def write_content(path: str, folder: epath.Path, where: str) -> None:
    """``write_folder``, but for damage that nobody thought of."""
    metadata, tensors = read_header(path, where)
    kind: Any = metadata.get("general.architecture")
    architecture = find_architecture(kind, where)
    if metadata.get("split.count", 1) > 1 or re.search(r"-\d{5}-of-(?!00001)\d{5}\.gguf$", path):
        raise ValueError(f"{where}: is one part of several; expected one file: llama-gguf-split --merge makes it")
    known = Metadata(metadata, kind, where)
    factors = next((np.asarray(tensor.data, np.float32) for tensor in tensors if tensor.name == ROPE_FACTORS), None)
    places = place_tensors([tensor for tensor in tensors if tensor.name != ROPE_FACTORS], architecture, known)
    config = make_config(architecture, known, places, factors)
    write_tokenizer(metadata, folder, where)
    write = lambda name, value: (folder / name).write_text(json.dumps(value, indent=1) + "\n")
    write(RECORD, {"file": path, "tensors": places})
    write("generation_config.json", {"eos_token_id": ending_ids(metadata, where)})
    write("config.json", config)


def read_header(path: str, where: str) -> tuple[dict[str, Any], list[Any]]:
    """(metadata as plain Python, the reader's tensors)."""
    from gguf import GGUFReader

    class BoundedReader(GGUFReader):
        """Behind the end of a file GGUFReader reads nothing, as many times as a damaged length says."""

        def _get(self, offset, dtype, count=1, override_order=None):
            found = super()._get(offset, dtype, count, override_order)
            if len(found) < int(count):
                raise ValueError(f"it ends at byte {len(self.data)}, in the midst of what its header announces")
            return found

    try:
        reader = BoundedReader(path)
        return {name: field.contents() for name, field in reader.fields.items()}, list(reader.tensors)
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise ValueError(f"{where}: is not a GGUF file: {error}") from error


def open_tensors(folder: epath.Path) -> dict[str, Any]:
    """Hugging Face name -> lazy tensor, of a folder that ``unpack`` made."""
    record = json.loads((folder / RECORD).read_text())
    return {name: open_place(record["file"], place) for name, place in record["tensors"].items()}
