"""What a GGUF file's general.architecture is here: the family, where its tensors are, and what its metadata say.

The names and layouts are llama.cpp's (gguf-py/gguf/constants.py, convert_hf_to_gguf.py); the names in a Hugging Face
folder are those of models/families.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.models.families import FAMILIES
from jaxrlhf.models.files.hf_fields import MOST_LAYERS

# a tensor's name between "blk.N." and ".weight" or ".bias" -> the path of the parameters that it holds
ENDS = {"token_embd": "embed.tokens", "output_norm": "final_norm", "output": "head"}
ATTENTION = {
    "attn_norm": "layers.attention.norm",
    "attn_q": "layers.attention.query",
    "attn_k": "layers.attention.key",
    "attn_v": "layers.attention.value",
    "attn_output": "layers.attention.out",
}
MLP = {
    "ffn_norm": "layers.mlp.norm",
    "ffn_gate": "layers.mlp.gate",
    "ffn_up": "layers.mlp.up",
    "ffn_down": "layers.mlp.down",
}
HEAD_NORMS = {"attn_q_norm": "layers.attention.query_norm", "attn_k_norm": "layers.attention.key_norm"}
POST_NORMS = {"post_attention_norm": "layers.attention.post_norm", "post_ffw_norm": "layers.mlp.post_norm"}
FUSED = {"attn_qkv": "layers.attention.query"}  # the tensor of query, key and value; of phi3 ffn_up is gate and up
EXPERTS = {
    "ffn_norm": "layers.mlp.norm",
    "ffn_gate_inp": "layers.mlp.router",
    "ffn_gate_exps": "layers.mlp.experts.gate",
    "ffn_up_exps": "layers.mlp.experts.up",
    "ffn_down_exps": "layers.mlp.experts.down",
}
DENSE = ENDS | ATTENTION | MLP
SINKS = "layers.attention.softmax"
ROPE_FACTORS = "rope_freqs.weight"  # by how much each rotary frequency is divided: llama3's scaling, already worked out
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# fields of ModelConfig that every file says -> behind the architecture's name
KEYS = {
    "hidden_size": "embedding_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "mlp_size": "feed_forward_length",
    "max_positions": "context_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
}
ROUTED = KEYS | {
    "mlp_size": "expert_feed_forward_length",
    "num_experts": "expert_count",
    "experts_per_token": "expert_used_count",
}
Config = dict[str, Any]  # fields of a config.json


class Metadata(NamedTuple):
    """What a file says under the name of its architecture."""

    fields: Mapping[str, Any]
    architecture: str
    where: str

    def get(self, key: str, default: Any = None) -> Any:
        """Raises ValueError for a key that is missing and has no ``default``."""
        value = self.fields.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise ValueError(f"{self.where}: {self.architecture}.{key}: is missing")
        return float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-05, not 9.99999974e-06

    def refuse(self, key: str, value: Any, expected: str) -> ValueError:
        return ValueError(f"{self.where}: {self.architecture}.{key}: {value!r} is not supported; expected {expected}")


class Architecture(NamedTuple):
    """A row of the table. The callables see the metadata and the config.json as far as it is made."""

    family: str
    tensors: Mapping[str, str] = DENSE
    keys: Mapping[str, str] = KEYS
    more: Callable[[Metadata, Config], Config] = lambda metadata, config: {}  # what no key alone says
    positions: Callable[[Metadata, Config, np.ndarray | None], Config] | None = None  # None: ``rope``
    heads: bool = False  # rows of queries and keys have ggml's order
    less: float = 0.0  # subtracted from norms
    transposed: tuple[str, ...] = ()  # weights whose last two axes are exchanged
    paired: tuple[str, str] | None = None  # two tensors that are one here, their features one after the other


# ---- fields of config.json ------------------------------------------------------------------------------------------


def rope(metadata: Metadata, config: Config, factors: np.ndarray | None) -> Config:
    """What stretches the rotary frequencies: nothing, one factor for all, or the factors of Llama 3.1 and 3.2."""
    theta, kind = metadata.get("rope.freq_base", 10000.0), metadata.get("rope.scaling.type", "none")
    scaling = None
    if factors is not None:
        factor = float(factors.max())
        expected = llama3_factors(theta, config["head_dim"], factor)
        if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
            what = f"tensor {ROPE_FACTORS}: holds no factors of Llama 3, which alone are supported"
            raise ValueError(f"{metadata.where}: {what}")
        scaling = {"rope_type": "llama3", "factor": factor, **LLAMA3}
    elif kind == "linear":
        scaling = {"rope_type": "linear", "factor": metadata.get("rope.scaling.factor")}
    elif kind != "none":
        raise metadata.refuse("rope.scaling.type", kind, "none or linear")
    return {"rope_theta": theta, "rope_scaling": scaling}


def llama3_factors(theta: float, width: int, factor: float) -> np.ndarray:
    """f32[width / 2]: what the frequencies of Llama 3.1 are divided by: long waves by ``factor``, short ones by 1."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, width, 2) / width)
    original, low, high = (
        LLAMA3[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def rope_of_gemma3(metadata: Metadata, config: Config, factors: np.ndarray | None) -> Config:
    """Global layers alone have the file's base and are stretched."""
    whole = rope(metadata, config, factors)
    scaling = whole["rope_scaling"] or {"rope_type": "default"}
    local = metadata.get("rope.freq_base_swa", 10000.0)
    kinds = {
        "full_attention": scaling | {"rope_theta": whole["rope_theta"]},
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
    return {"rope_parameters": kinds}


def rope_of_gpt_oss(metadata: Metadata, config: Config, factors: np.ndarray | None) -> Config:
    """YaRN as published: its correction range is not rounded to whole features."""
    if factors is not None or metadata.get("rope.scaling.type") != "yarn":
        raise metadata.refuse("rope.scaling.type", metadata.get("rope.scaling.type"), "yarn")
    scaling = {
        "rope_type": "yarn",
        "factor": metadata.get("rope.scaling.factor"),
        "original_max_position_embeddings": metadata.get("rope.scaling.original_context_length"),
        "beta_fast": metadata.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": metadata.get("rope.scaling.yarn_beta_slow", 1.0),
        "truncate": False,
    }
    return {"rope_theta": metadata.get("rope.freq_base", 10000.0), "rope_scaling": scaling}


def no_experts(metadata: Metadata, config: Config) -> Config:
    if count := metadata.get("expert_count", 0):
        raise metadata.refuse("expert_count", count, "0")
    return {}


def routing(metadata: Metadata, config: Config) -> Config:
    """The weights of a token's experts sum to 1, as llama.cpp computes them for every file."""
    return {"norm_topk_prob": metadata.get("expert_weights_norm", True)}


def window(metadata: Metadata, config: Config) -> Config:
    """The window, and where the file says it which layers have one: all but every n-th, or a list. The family's own
    order else."""
    found = {"sliding_window": metadata.get("attention.sliding_window")}
    pattern = metadata.get("attention.sliding_window_pattern", 0)
    if not pattern:
        return found
    layers = range(min(config["num_hidden_layers"], MOST_LAYERS))  # more are refused with config.json
    local = pattern if isinstance(pattern, list) else [(i + 1) % pattern != 0 for i in layers]
    return found | {"layer_types": ["sliding_attention" if one else "full_attention" for one in local]}


def optional_window(metadata: Metadata, config: Config) -> Config:
    return {"sliding_window": metadata.get("attention.sliding_window", 0) or None}


def gemma(largest: int) -> Callable[[Metadata, Config], Config]:
    """Windows, soft-caps, and what products of queries are divided by the root of: the features of a head, but for the
    model of ``largest`` layers (27B) hidden_size / heads, as llama.cpp has it."""

    def more(metadata: Metadata, config: Config) -> Config:
        size, heads = config["hidden_size"], config["num_attention_heads"]
        scalar = size // heads if config["num_hidden_layers"] == largest else config["head_dim"]
        caps = {
            field: metadata.fields.get(f"{metadata.architecture}.{field}ping")
            for field in ("attn_logit_softcap", "final_logit_softcap")
        }
        found = {f"{field}ping": float(cap) for field, cap in caps.items() if cap is not None}  # else the family's
        return window(metadata, config) | found | {"query_pre_attn_scalar": scalar}

    return more


GPT2_KEYS = {name: key for name, key in KEYS.items() if name != "norm_eps"} | {
    "norm_eps": "attention.layer_norm_epsilon"
}
ARCHITECTURES = {
    "llama": Architecture("llama", more=no_experts, heads=True),
    "qwen2": Architecture("qwen2", more=no_experts),
    "qwen3": Architecture("qwen3", DENSE | HEAD_NORMS, more=no_experts),
    "qwen3moe": Architecture("qwen3_moe", ENDS | ATTENTION | HEAD_NORMS | EXPERTS, ROUTED, routing),
    "gpt-oss": Architecture(
        "gpt_oss",
        ENDS | ATTENTION | EXPERTS | {"post_attention_norm": "layers.mlp.norm", "attn_sinks": SINKS},
        ROUTED,
        window,
        rope_of_gpt_oss,
        transposed=("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
        paired=("ffn_gate_exps", "ffn_up_exps"),
    ),
    "phi3": Architecture("phi3", DENSE | FUSED, more=optional_window),
    "gpt2": Architecture(
        "gpt2",
        DENSE | FUSED | {"position_embd": "embed.positions"},
        GPT2_KEYS,
        positions=lambda *_: {},
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
    "gemma2": Architecture("gemma2", DENSE | POST_NORMS, more=gemma(46), less=1.0),
    "gemma3": Architecture(
        "gemma3_text", DENSE | POST_NORMS | HEAD_NORMS, more=gemma(62), positions=rope_of_gemma3, less=1.0
    ),
}
# why others are refused, where there is more to say than that they are not in the table
REFUSED = {
    "gemma4": "transformers reads neither which of its layers are global nor the heads of local ones: take the folder"
}


def find_architecture(kind: Any, where: str) -> Architecture:
    """Raises ValueError for one that is not read."""
    if kind not in ARCHITECTURES:
        why = f" ({REFUSED[kind]})" if kind in REFUSED else ""
        raise ValueError(
            f"{where}: general.architecture: {kind!r} is not supported{why}; expected one of {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[kind]


# ---- tensors --------------------------------------------------------------------------------------------------------


def place_tensors(tensors: list[Any], architecture: Architecture, metadata: Metadata) -> dict[str, dict[str, Any]]:
    """Hugging Face name -> where its numbers are: what gguf_tensors.open_place reads. ``tensors``: the reader's.

    Raises ValueError for a tensor that such a model does not have, and for one of a pair without the other."""
    places: dict[str, dict[str, Any]] = {}
    halves: dict[str, dict[int, Any]] = {}
    for tensor in tensors:
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor.name)
        path = architecture.tensors.get(found[2]) if found else None
        module = FAMILIES[architecture.family].hf.modules.get(path) if path else None
        if found is None or path is None or module is None or (found[1] is None) == ("{layer}" in module.name):
            raise ValueError(f"{metadata.where}: tensor {tensor.name}: a {architecture.family} has no such tensor")
        layer, part, ending = found.groups()
        suffix = ".sinks" if path == SINKS else module.weight if ending == "weight" else module.bias
        place = place_of(tensor, part, ending, architecture, metadata)
        if architecture.paired and part in architecture.paired:
            name = module.name.format(layer=layer) + suffix
            halves.setdefault(name, {})[architecture.paired.index(part)] = place
        elif "{expert}" in module.name:
            for expert, one in enumerate(apart(place, tensor, metadata.where)):
                places[module.name.format(layer=layer, expert=expert) + suffix] = one
        else:
            places[module.name.format(layer=layer) + suffix] = place
    for name, pair in halves.items():
        if len(pair) < 2:
            raise ValueError(f"{metadata.where}: {name}: expected both {' and '.join(architecture.paired or ())}")
        places[name] = {"pair": [pair[0], pair[1]]}
    return places


def place_of(tensor: Any, part: str, ending: str, architecture: Architecture, metadata: Metadata) -> dict[str, Any]:
    """Where a tensor's numbers are, and what is done with them as they are read."""
    heads = 0
    if architecture.heads and part in ("attn_q", "attn_k"):
        heads = metadata.get("attention.head_count")
        heads = metadata.get("attention.head_count_kv", heads) if part == "attn_k" else heads
    return {
        "kind": tensor.tensor_type.name,
        "shape": [int(size) for size in reversed(tensor.shape)],
        "offset": int(tensor.data_offset),
        "heads": int(heads),
        "less": architecture.less if part.endswith("norm") else 0.0,
        "transposed": ending == "weight" and part in architecture.transposed,
    }


def apart(place: dict[str, Any], tensor: Any, where: str) -> list[dict[str, Any]]:
    """A stacked tensor as one for each expert, whose bytes follow each other."""
    count, *shape = place["shape"]
    size = int(tensor.n_bytes)
    if len(shape) != 2 or not 0 < count <= size or size % count:
        raise ValueError(f"{where}: tensor {tensor.name}: has shape {place['shape']}; expected a matrix an expert")
    return [place | {"shape": shape, "offset": place["offset"] + expert * (size // count)} for expert in range(count)]


# ---- config.json ----------------------------------------------------------------------------------------------------


def make_config(
    architecture: Architecture, metadata: Metadata, places: Mapping[str, Any], factors: np.ndarray | None
) -> Config:
    """config.json in the words of Hugging Face. Raises ValueError for what a model of the family cannot be."""
    family = FAMILIES[architecture.family]
    names, fields = family.hf, family.hf.fields
    named = lambda path, ending: f"{names.modules[path].name.format(layer=0)}.{ending}"
    config = {
        "architectures": [names.classes["lm"]],
        "model_type": names.model_type,
        "vocab_size": places[named("embed.tokens", "weight")]["shape"][0],
        "tie_word_embeddings": named("head", "weight") not in places,
    }
    config |= {fields[ours][0]: metadata.get(key) for ours, key in architecture.keys.items()}
    if family.positions == "rope":
        config |= head_sizes(metadata, family.hf.rope.fraction is not None)
    for ours, path in (("attention_bias", "layers.attention.query"), ("mlp_bias", "layers.mlp.up")):
        if ours in fields:
            config[fields[ours][0]] = named(path, "bias") in places
    config |= architecture.more(metadata, config)
    config |= (architecture.positions or rope)(metadata, config, factors)
    ids = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return config | {
        f"{ours}_token_id": metadata.fields.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in ids.items()
    }


def head_sizes(metadata: Metadata, partial: bool) -> Config:
    """Of heads of which all features are rotated, or with ``partial`` the first ones."""
    size, heads = metadata.get("embedding_length"), metadata.get("attention.head_count")
    rotated = metadata.get("rope.dimension_count", size // heads)
    width = metadata.get("attention.key_length", size // heads if partial else rotated)
    rotated = metadata.get("rope.dimension_count", width)
    wrong = metadata.get("attention.value_length", width) != width
    if wrong or (rotated != width and not partial):
        raise ValueError(
            f"{metadata.where}: {metadata.architecture}.rope.dimension_count: expected the size of a head, {width}"
        )
    own = {"partial_rotary_factor": rotated / width} if partial and rotated != width else {}
    return {"num_key_value_heads": metadata.get("attention.head_count_kv", heads), "head_dim": width} | own
