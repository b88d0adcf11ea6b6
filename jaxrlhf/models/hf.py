"""Hugging Face folders: read into arrays laid out on the mesh, and written back so that transformers loads them.

Weights go through safetensors alone, shard by shard; neither torch nor transformers is needed. What a family's tensors
and fields are called is in models/families.py; nothing here knows a family.
"""

import contextlib
import dataclasses
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from types import EllipsisType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxrlhf.models.families import FAMILIES
from jaxrlhf.models.transformer import Leaf, ModelConfig, RopeScaling, init, parameter_table, resolve, weight_spec
from jaxrlhf.sharding import explicit
from jaxrlhf.types import Array, Head, Params

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
HUB_FILES = ("*.json", "model*.safetensors", *(name for name in TOKENIZER_FILES if not name.endswith(".json")))
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SCORE = "score.weight"  # the scalar head, in every family; its bias, which Hugging Face lacks, is in config.json
FLOATS = ("F32", "BF16", "F16", "F64")
MAX_JSON_BYTES = 64 * 2**20
SHOWN = 3  # names that an error lists


class TokenIds(NamedTuple):
    """Special tokens that a folder's config names."""

    eos: tuple[int, ...] = ()
    bos: int | None = None
    pad: int | None = None


# ---- folders --------------------------------------------------------------------------------------------------------


def locate(name: str) -> epath.Path:
    """The folder that ``name`` says: one here (or gs://...), else a hub name, downloaded without pickles or code.

    Raises ValueError, in one line, where it is neither."""
    folder = epath.Path(name).expanduser()
    if "://" in name:
        if not folder.is_dir():
            raise ValueError(f"init_from: {name!r} is not a folder that can be read")
        return folder
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ValueError(f"init_from: {name!r}: there is no such folder, and it is no hub name (owner/model)")
    import huggingface_hub

    try:
        return epath.Path(
            huggingface_hub.snapshot_download(name, allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"])
        )
    except Exception as error:  # many kinds: offline, gated, unknown, disk full
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"init_from: {name!r}: there is no such folder, and the hub says: {why}") from error


def read_json(path: epath.Path) -> dict:
    """The object in a JSON file. Raises ValueError, in one line, where there is none or it is absurdly large."""
    if not path.exists():
        raise ValueError(f"{path}: there is no such file; a Hugging Face folder has config.json and {SINGLE}")
    if path.stat().length > MAX_JSON_BYTES:
        raise ValueError(f"{path}: {path.stat().length} bytes; at most {MAX_JSON_BYTES} are read")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {type(value).__name__}; expected an object")
    return value


# ---- config.json ----------------------------------------------------------------------------------------------------


def read_config(folder: epath.PathLike) -> tuple[ModelConfig, Head]:
    """The architecture (resolved) and the head that config.json names.

    Raises ValueError, in one line, for a family, class or field that changes the maths and is not supported."""
    path = epath.Path(folder) / "config.json"
    return parse_config(read_json(path), str(path))


def parse_config(raw: Mapping, where: str) -> tuple[ModelConfig, Head]:
    """read_config of an object already read; ``where`` is named in errors."""
    families = {family.hf.model_type: name for name, family in FAMILIES.items()}
    kind = raw.get("model_type")
    if kind not in families:
        raise ValueError(f"{where}: model_type: {kind!r} is not supported; expected {' or '.join(families)}")
    names = FAMILIES[families[kind]].hf
    refuse_unsupported(raw, names.fixed, where)
    found = {ours: read_field(raw, ours, *name, where) for ours, name in names.fields.items()}
    if found.get("head_dim") is None and found["hidden_size"] % found["num_heads"]:
        raise ValueError(f"{where}: hidden size {found['hidden_size']} is no multiple of {found['num_heads']} heads")
    if FAMILIES[families[kind]].positions == "rope":
        found |= read_rope(raw, where)
    try:
        cfg = resolve(ModelConfig(family=families[kind], **found))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return cfg, read_head(raw, names.classes, where)


def refuse_unsupported(raw: Mapping, fixed: Mapping[str, tuple], where: str) -> None:
    """Fields that change the maths must have a value that is supported."""
    if raw.get("auto_map"):
        raise ValueError(f"{where}: auto_map: code that comes with a model is never run; expected a plain {raw['model_type']}")
    common = {"quantization_config": (None,), "is_encoder_decoder": (False,), "partial_rotary_factor": (None, 1.0)}
    for name, allowed in {**common, **fixed}.items():
        value = raw.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{where}: {name}: {value!r} is not supported; expected {allowed[0]!r}")


def read_field(raw: Mapping, ours: str, theirs: str, default: Any, where: str) -> Any:
    """One field of ModelConfig, checked against its annotation: sizes are positive."""
    value = raw.get(theirs, default)
    if isinstance(value, EllipsisType):
        raise ValueError(f"{where}: {theirs}: is missing")
    kind = {field.name: field.type for field in dataclasses.fields(ModelConfig)}[ours]
    if value is None and value is default:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and kind is float:
        value = float(value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not isinstance(value, kind) or (number and not 0 < value < 2**40) or (isinstance(value, bool) and kind == int | None):  # type: ignore[arg-type]
        expected = "true or false" if kind in (bool, bool | None) else "a positive number"
        raise ValueError(f"{where}: {theirs}: {value!r}; expected {expected}")
    return value
