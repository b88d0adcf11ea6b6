"""Tiny GGUF files of each architecture that is read: made of a folder's weights as llama.cpp's converter makes them.

The names are the gguf package's own; what is done to the numbers is that converter's (convert_hf_to_gguf.py)."""

import functools
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from etils import epath

from jaxrlhf.data.tokenizer import train_bpe
from jaxrlhf.models.files import gguf as files
from tests.parity import cases
from tests.parity.both import compute, read, write_by_law
from tests.parity.cases import GPT2, MOE, YARN

TEXTS = ["the film is warm and its script bright", "a dull 1234 story, told  twice\n"] * 20
F32, MXFP4 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.MXFP4
TOKENS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": None, "torch_dtype": "float32"}
LLAMA = cases.LLAMA | {"intermediate_size": 64}  # blocks of 32 numbers
# what transformers does not read of a file, and sets to these
HEADS = {"num_key_value_heads": 2, "head_dim": 128}
GEMMA = {
    **LLAMA,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}
# architecture of the file -> config.json of the model
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 5e5},
    "qwen2": {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen3": {**LLAMA, "model_type": "qwen3", **HEADS, "rope_theta": 1e6},
    "qwen3moe": {
        **MOE,
        **HEADS,
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "gpt-oss": {
        **MOE,
        "model_type": "gpt_oss",
        "intermediate_size": 64,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
        "rope_theta": 1e3,
        "rope_scaling": {**YARN, "original_max_position_embeddings": 4, "truncate": False},
    },
    "phi3": {**LLAMA, "model_type": "phi3", "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "gpt2": {**GPT2, "n_positions": 1024, "tie_word_embeddings": False},
    "gemma2": {
        **GEMMA,
        "model_type": "gemma2",
        "sliding_window": 4,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {**GEMMA, "model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 4, "rope_theta": 1e6},
}
CLASSES = {"gpt2": "GPT2LMHeadModel", "gemma3": "Gemma3ForCausalLM", "gemma2": "Gemma2ForCausalLM"}
CLASSES |= {"qwen3moe": "Qwen3MoeForCausalLM", "gpt-oss": "GptOssForCausalLM"}
NORM_OFFSET = ("gemma2", "gemma3")
# family -> what llama.cpp calls its files (general.architecture)
FILES = {
    "llama": "llama",
    "mistral": "llama",
    "ministral3": "mistral3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "smollm3": "smollm3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "mixtral": "llama",  # with experts
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "gpt_oss": "gpt-oss",
}
READ_THERE = [name for name in MODELS if name != "gpt-oss"]  # by transformers


def config_of(name: str, **more: Any) -> dict[str, Any]:
    """config.json of the architecture's model."""
    own = {"architectures": [CLASSES.get(name, f"{name.capitalize()}ForCausalLM")]}
    return MODELS[name] | TOKENS | own | {"vocab_size": len(vocabulary()[0])} | more


@functools.cache
def vocabulary() -> tuple[list[str], list[str]]:
    """(tokens, merges) of a small byte-level BPE."""
    model = json.loads(train_bpe(TEXTS, 300).backend_tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(merge) for merge in model["merges"]]


def write(name: str, folder: Path, kind: Any = F32, leave_out: str = "", **more: Any) -> str:
    """folder/hf and, of the same weights, folder/m.gguf, whose matrices are of ``kind``. Returns the latter's name for
    init_from. ``more``: fields of config.json; ``leave_out``: part of the names of tensors that the file lacks."""
    from safetensors.numpy import load_file, save_file

    raw = config_of(name, **more)
    write_by_law(folder / "hf", raw)
    tensors = load_file(folder / "hf" / "model.safetensors")
    if name in NORM_OFFSET:  # numbers to which 1 is added without rounding
        short = {theirs: np.round(value * 1024) / 1024 for theirs, value in tensors.items() if value.ndim == 1}
        save_file(tensors := tensors | short, folder / "hf" / "model.safetensors")
    writer = gguf.GGUFWriter(str(folder / "m.gguf"), name)
    write_metadata(writer, name, raw)
    names = gguf.get_tensor_name_map(next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name), 64)
    for theirs, value in converted(name, raw, tensors).items():
        stem, _, ending = theirs.rpartition(".")
        ours = names.get_name(stem)
        assert ours is not None, theirs
        if leave_out and leave_out in ours:
            continue
        form = kind if value.ndim > 1 and ending == "weight" else F32
        writer.add_tensor(f"{ours}.{ending}", gguf.quants.quantize(np.ascontiguousarray(value), form), raw_dtype=form)
    close(writer)
    return f"gguf:{folder / 'm.gguf'}"


def write_metadata(writer: gguf.GGUFWriter, name: str, raw: dict[str, Any]) -> None:
    """What the converter says of a model, and a small vocabulary."""

    def get(*fields: str) -> Any:
        return next((raw[field] for field in fields if raw.get(field) is not None), None)

    heads = get("num_attention_heads", "n_head")
    writer.add_embedding_length(get("hidden_size", "n_embd"))
    writer.add_block_count(get("num_hidden_layers", "n_layer"))
    writer.add_context_length(get("max_position_embeddings", "n_positions"))
    writer.add_head_count(heads)
    writer.add_feed_forward_length(get("intermediate_size") or 4 * get("hidden_size", "n_embd"))
    add_eps = writer.add_layer_norm_eps if name == "gpt2" else writer.add_layer_norm_rms_eps
    add_eps(get("rms_norm_eps", "layer_norm_epsilon") or (1e-5 if name in ("gpt2", "gpt-oss") else 1e-6))
    if name != "gpt2":
        writer.add_head_count_kv(get("num_key_value_heads") or heads)
        writer.add_rope_freq_base(float(get("rope_theta") or 1e4))
    if get("head_dim"):
        writer.add_key_length(raw["head_dim"])
        writer.add_value_length(raw["head_dim"])
        if name == "llama":
            writer.add_rope_dimension_count(raw["head_dim"])
    if name == "phi3":
        rotated = raw.get("partial_rotary_factor", 1.0) * raw["hidden_size"] // heads
        writer.add_rope_dimension_count(int(rotated))
    if get("sliding_window"):
        writer.add_sliding_window(raw["sliding_window"])
    if get("layer_types"):
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in raw["layer_types"]])
    for field, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if get(field):
            add(raw[field])
    if experts := get("num_experts", "num_local_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(raw["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(get("moe_intermediate_size", "intermediate_size"))
    if scaling := get("rope_scaling"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
        if "original_max_position_embeddings" in scaling:
            writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    tokens, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_pad_token_id(0)


def converted(name: str, raw: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A folder's tensors as the file has them, by names that the gguf package knows."""
    found: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for theirs, value in tensors.items():
        if ".experts." in theirs and name == "qwen3moe":
            before, _, after = theirs.partition(".experts.")
            expert, _, ending = after.partition(".")
            stacks.setdefault(f"{before}.experts.{ending}", {})[int(expert)] = value
        elif ".experts." in theirs:
            found |= apart(theirs, value)
        elif theirs.endswith(".sinks"):
            found[f"{theirs}.weight"] = value
        elif name == "llama" and theirs.endswith(("q_proj.weight", "k_proj.weight")):
            heads = raw["num_attention_heads" if "q_proj" in theirs else "num_key_value_heads"]
            found[theirs] = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        elif name in NORM_OFFSET and theirs.endswith("norm.weight"):
            found[theirs] = value + np.float32(1)
        elif name == "gpt2" and theirs.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            found[theirs] = value.T
        else:
            found[theirs] = value
    return found | {theirs: np.stack([each[at] for at in range(len(each))]) for theirs, each in stacks.items()}


def apart(theirs: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """Weights [experts, inputs, outputs] or biases of gpt-oss's experts, outputs before inputs, gate and up apart."""
    ending = "bias" if theirs.endswith("_bias") else "weight"
    stem = theirs.removesuffix("_bias")
    value = value.swapaxes(1, 2) if ending == "weight" else value
    if not stem.endswith("gate_up_proj"):
        return {f"{stem}.{ending}": value}
    return {f"{stem.replace('gate_up', part)}.{ending}": value[:, at::2] for at, part in enumerate(("gate", "up"))}


def write_mxfp4(folder: Path) -> str:
    """folder/m.gguf of the gpt-oss in folder/hf, whose experts are in MXFP4: its blocks and scales, moved as llama.cpp
    moves them. A block of the file has its scale before it, and number 16 + i beside number i in a byte."""
    from safetensors.numpy import load_file

    raw, tensors = config_of("gpt-oss"), load_file(folder / "hf" / "model.safetensors")
    blocks = {theirs.removesuffix("_blocks"): value for theirs, value in tensors.items() if theirs.endswith("_blocks")}
    writer = gguf.GGUFWriter(str(folder / "m.gguf"), "gpt-oss")
    write_metadata(writer, "gpt-oss", raw)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT_OSS, 16)
    plain = {theirs: value for theirs, value in tensors.items() if not theirs.endswith(("_blocks", "_scales"))}
    for theirs, value in converted("gpt-oss", raw, plain).items():
        stem, _, ending = theirs.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{ending}", np.ascontiguousarray(value))
    for theirs, value in blocks.items():
        codes = np.stack([value & 15, value >> 4], -1).reshape(*value.shape[:-1], 32)
        bytes_ = (codes[..., :16] | codes[..., 16:] << 4).astype(np.uint8)
        moved = np.concatenate([tensors[f"{theirs}_scales"][..., None], bytes_], -1)
        for part, rows in apart(f"{theirs}_bias", moved.reshape(*moved.shape[:2], -1)).items():
            name = names.get_name(part.removesuffix(".bias"))
            writer.add_tensor(f"{name}.weight", np.ascontiguousarray(rows), raw_dtype=MXFP4)
    close(writer)
    return f"gguf:{folder / 'm.gguf'}"


def unpacked(name: str, folder: Path) -> epath.Path:
    """A new folder of what the file says, in ``folder``."""
    made = epath.Path(folder / "unpacked")
    made.mkdir()
    files.write_folder(name.removeprefix(files.PREFIX), made)
    return made


def write_empty(architecture: str, path: Path) -> str:
    """A file that says what it is, and nothing else. Returns its name for init_from."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    close(writer)
    return f"{files.PREFIX}{path}"


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compare(name: str, folder: Path, kind: Any = F32) -> None:
    """Logits of a file here and in transformers, at 1e-4."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")  # which transformers wants for GGUF files
    import transformers

    params, cfg, head = read(unpacked(write(name, folder, kind), folder))
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 9))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="m.gguf", dtype=torch.float32)
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(tokens)).logits.numpy()
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(compute(params, cfg, head, tokens, tokens >= 0), theirs, atol=1e-4, rtol=0)


def write_gemma4(path: Path) -> None:
    """What the converter says of layers of two kinds, and no tensors."""
    writer = gguf.GGUFWriter(str(path), "gemma4")
    write_metadata(writer, "gemma4", GEMMA | {"num_hidden_layers": 3, "head_dim": 16, "sliding_window": 4})
    writer.kv_data[0].pop("gemma4.attention.head_count_kv")
    writer.add_head_count_kv([2, 2, 1])
    writer.add_key_length_swa(8)
    writer.add_value_length_swa(8)
    writer.add_sliding_window_pattern([True, True, False])
    writer.add_shared_kv_layers(1)
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    close(writer)
