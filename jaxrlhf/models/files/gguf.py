"""GGUF files of the llama architecture, shown to the rest of the house as Hugging Face folders.

``unpack`` writes beside each other, in a cache, what such a folder holds: config.json, generation_config.json and the
tokenizer, made from the file's metadata, and a list of where its tensors are. The weights stay in the file: they are
read from it, a slice at a time, and dequantised to float32 (models/hf.py does not know the difference).
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from jaxrlhf.errors import content_of
from jaxrlhf.models.files.gguf_tokenizer import ending_ids, write_tokenizer

PREFIX = "gguf:"
RECORD = "gguf.json"
FORMAT = 2  # of what unpack writes; raise it when the same file would give another folder
ROWS = 1024  # dequantised at once

# a tensor of the file -> the same in a Hugging Face folder
NAMES = {
    r"token_embd\.weight": "model.embed_tokens.weight",
    r"output_norm\.weight": "model.norm.weight",
    r"output\.weight": "lm_head.weight",
    r"blk\.(\d+)\.attn_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    r"blk\.(\d+)\.attn_(q|k|v)\.(weight|bias)": r"model.layers.\1.self_attn.\2_proj.\3",
    r"blk\.(\d+)\.attn_output\.(weight|bias)": r"model.layers.\1.self_attn.o_proj.\2",
    r"blk\.(\d+)\.ffn_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.(weight|bias)": r"model.layers.\1.mlp.\2_proj.\3",
}
ROPE_FACTORS = "rope_freqs.weight"  # by how much each rotary frequency is divided: llama3's scaling, already worked out
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


# ---- the file as a folder -------------------------------------------------------------------------------------------


def unpack(name: str) -> epath.Path:
    """The folder made from the GGUF file ``name``; made once for each state of the file.

    Raises ValueError, in one line, for a file that is not there, broken, or not a llama that we compute exactly."""
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
    kind = metadata.get("general.architecture")
    if kind != "llama":
        raise ValueError(f"{where}: general.architecture: {kind!r} is not supported; expected 'llama'")
    if metadata.get("split.count", 1) > 1 or re.search(r"-\d{5}-of-(?!00001)\d{5}\.gguf$", path):
        raise ValueError(f"{where}: is one part of several; expected one file: llama-gguf-split --merge makes it")
    places, factors = {}, None
    for tensor in tensors:
        if tensor.name == ROPE_FACTORS:
            factors = np.asarray(tensor.data, np.float32)
        else:
            places[hugging_face_name(tensor.name, where)] = place_of(tensor, metadata)
    config = make_config(metadata, places, factors, where)
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


def hugging_face_name(name: str, where: str) -> str:
    """Raises ValueError for a tensor that a llama does not have (experts, for one)."""
    for pattern, theirs in NAMES.items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, theirs, name)
    raise ValueError(f"{where}: tensor {name}: a llama has no such tensor")


def place_of(tensor: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Where a tensor's numbers are. ``heads``: of a query or key, whose rows the file has in another order."""
    heads = metadata["llama.attention.head_count"]
    count = {"attn_q": heads, "attn_k": metadata.get("llama.attention.head_count_kv", heads)}
    part = tensor.name.split(".")[-2]
    return {
        "kind": tensor.tensor_type.name,
        "shape": [int(size) for size in reversed(tensor.shape)],
        "offset": int(tensor.data_offset),
        "heads": int(count.get(part, 0)),
    }


# ---- its config -----------------------------------------------------------------------------------------------------


def make_config(
    metadata: Mapping[str, Any], places: Mapping[str, Any], factors: np.ndarray | None, where: str
) -> dict[str, Any]:
    """config.json in the words of Hugging Face. Raises ValueError for what a llama there cannot be."""

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if value is None:
            raise ValueError(f"{where}: llama.{key}: is missing")
        return float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-05, not 9.99999974e-06

    if get("expert_count", 0):
        raise ValueError(f"{where}: llama.expert_count: {get('expert_count')} is not supported; expected 0")
    size, heads = get("embedding_length"), get("attention.head_count")
    width = get("attention.key_length", get("rope.dimension_count", size // heads))
    if get("rope.dimension_count", width) != width or get("attention.value_length", width) != width:
        raise ValueError(f"{where}: llama.rope.dimension_count: expected the size of a head, {width}")
    biased = lambda part: f"model.layers.0.{part}.bias" in places
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": places["model.embed_tokens.weight"]["shape"][0],
        "hidden_size": size,
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": width,
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "attention_bias": biased("self_attn.q_proj"),
        "mlp_bias": biased("mlp.up_proj"),
        "tie_word_embeddings": "lm_head.weight" not in places,
        "rope_theta": get("rope.freq_base", 10000.0),
        "rope_scaling": rope_scaling(get, factors, width, where),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def rope_scaling(get, factors: np.ndarray | None, width: int, where: str) -> dict[str, Any] | None:
    """What stretches the rotary frequencies: nothing, one factor for all, or the factors of Llama 3.1 and 3.2."""
    kind = get("rope.scaling.type", "none")
    if factors is not None:
        factor = float(factors.max())
        expected = llama3_factors(get("rope.freq_base", 10000.0), width, factor)
        if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
            raise ValueError(f"{where}: tensor {ROPE_FACTORS}: holds no factors of Llama 3, which alone are supported")
        return {"rope_type": "llama3", "factor": factor, **LLAMA3}
    if kind == "linear":
        return {"rope_type": "linear", "factor": get("rope.scaling.factor")}
    if kind != "none":
        raise ValueError(f"{where}: llama.rope.scaling.type: {kind!r} is not supported; expected none or linear")
    return None


def llama3_factors(theta: float, width: int, factor: float) -> np.ndarray:
    """f32[width / 2]: what the frequencies of Llama 3.1 are divided by: long waves by ``factor``, short ones by 1."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, width, 2) / width)
    original, low, high = (
        LLAMA3[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


# ---- its weights ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the file, as lazy as a safetensors slice; what is read of it is float32."""

    file: str
    kind: str  # of ggml: F32, F16, Q4_1, ...
    shape: tuple[int, ...]
    offset: int  # bytes into the file
    heads: int  # of a query or key; else 0

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: Any) -> np.ndarray:
        rows, *rest = index if isinstance(index, tuple) else (index,)
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1, index
        unit = self.shape[0] // self.heads if self.heads else 1  # rows of a head change places among themselves
        first, last = start // unit * unit, -(-stop // unit) * unit
        value = self.read(first, last)
        if self.heads:
            value = unturn(value, (last - first) // unit)
        return value[(slice(start - first, stop - first), *rest)]

    def read(self, first: int, last: int) -> np.ndarray:
        """Rows first to last as they are in the file. A piece at a time: dequantising takes twice its result."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[self.kind]
        out = np.empty((last - first, *self.shape[1:]), np.float32)
        width = row_bytes(kind, self.shape[1] if len(self.shape) > 1 else 1)
        with open(self.file, "rb") as file:
            for at in range(first, last, ROWS):
                count = min(ROWS, last - at)
                file.seek(self.offset + at * width)
                data = np.fromfile(file, np.uint8, count * width)
                part = out[at - first : at - first + count]
                part[...] = dequantize(data.reshape(count, width), kind).reshape(part.shape)
        return out


@functools.cache
def row_bytes(kind: Any, numbers: int) -> int:
    """Bytes that a row of so many numbers takes."""
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    return numbers // block * size


def unturn(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys from ggml's order to that of Hugging Face: there the two numbers that a rotation turns
    are next to each other, here they are half a head apart."""
    size, *rest = rows.shape
    pairs = rows.reshape(heads, size // heads // 2, 2, *rest)
    return pairs.swapaxes(1, 2).reshape(size, *rest)


def open_tensors(folder: epath.Path) -> dict[str, Tensor]:
    """Hugging Face name -> Tensor, of a folder that ``unpack`` made."""
    record = json.loads((folder / RECORD).read_text())
    file = record["file"]
    return {name: Tensor(file, **place | {"shape": tuple(place["shape"])}) for name, place in record["tensors"].items()}
