"""The models that are compared with transformers: small, of every family, and different in every trait."""

import re
import zlib

import numpy as np

from jaxrlhf.models.families import FAMILIES

VOCAB, COLUMNS, NEW_TOKENS = 101, 9, 32

LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SCALED = {"rope_type": "yarn", "type": "yarn", "rope_theta": 1e3, "factor": 16.0, "beta_fast": 4.0, "beta_slow": 1.0}
SCALED |= {"original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0}
MISTRAL = {**LLAMA, "model_type": "mistral", "num_key_value_heads": 2}
QWEN2 = {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2}
QWEN3 = {**LLAMA, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16}
QWEN3_5 = {
    **QWEN3,
    "model_type": "qwen3_5_text",
    "rms_norm_eps": 1e-2,  # a state's first outputs are small: a norm without more would blow up their rounding
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
PHI3 = {**LLAMA, "model_type": "phi3", "num_key_value_heads": 2}
GEMMA = {**LLAMA, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 4}
GEMMA4 = {
    **LLAMA,
    "model_type": "gemma4_text",
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 4,
    "final_logit_softcapping": 5.0,
}
GPT2 = {"model_type": "gpt2", "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MOE = {**LLAMA, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 3}
MIXTRAL = {".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}
NEOX = {**LLAMA, "model_type": "gpt_neox", "rotary_pct": 0.5}

# family, or family and what is special; windows are shorter than the rows
CASES: dict[str, dict] = {
    # grouped queries, wide heads
    "llama": {**LLAMA, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "llama: linear": {
        **LLAMA,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_theta": 500.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    # wavelengths of 6, 20, 63, 200, ...: below 64 / 4, between, and above 64 / 1
    "llama: llama3": {
        **LLAMA,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64},
    },
    "llama: yarn": {**LLAMA, "head_dim": 16, "rope_theta": 100.0, "rope_scaling": {**YARN, "beta_fast": 4.0}},
    "llama: longrope": {
        **LLAMA,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 1.7],
            "long_factor": [1.5, 2.0, 3.0, 4.0],
            "factor": 4.0,
        },
    },
    "llama: SmolLM2": {  # 9 heads, 3 kv heads
        **LLAMA,
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_theta": 100000,
        "rope_interleaved": False,
        "is_llama_config": True,
        "tie_word_embeddings": True,
    },
    "mistral": {**MISTRAL, "sliding_window": 4, "head_dim": 16},
    "mistral: no window": {**MISTRAL, "sliding_window": None, "rope_theta": 1e6},
    # rows of several original contexts, which queries are scaled by
    "ministral3": {**MISTRAL, "model_type": "ministral3", "head_dim": 16, "rope_parameters": SCALED},
    "ministral3: windows": {
        **MISTRAL,
        "model_type": "ministral3",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "hidden_size": 36,
        "head_dim": 16,
        "sliding_window": 5,
        "rope_parameters": {**SCALED, "mscale": 1.5, "llama_4_scaling_beta": 0.5, "rope_theta": 1e4},
        "tie_word_embeddings": True,
    },
    "qwen2": {**QWEN2, "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen2: windows": {
        **QWEN2,
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen2: yarn": {
        **QWEN2,
        "rope_parameters": {**YARN, "rope_theta": 1e3, "truncate": False, "mscale": 1.5, "mscale_all_dim": 0.5},
    },
    "qwen3": {**QWEN3, "attention_bias": True},
    "qwen3: windows": {
        **QWEN3,
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "qwen3_5_text": {**QWEN3_5, "num_hidden_layers": 4},  # three linear layers and a full one
    "qwen3_5_text: odd": {  # 3 heads, an order of its own, biases, half of each head rotated
        **QWEN3_5,
        "hidden_size": 36,
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 3,
        "linear_conv_kernel_dim": 3,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        "tie_word_embeddings": True,
    },
    "phi3": {**PHI3, "sliding_window": 5},
    "phi3: longrope": {  # half of each head is rotated
        **PHI3,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.2], "long_factor": [2.0, 3.0]},
        "tie_word_embeddings": True,
    },
    "olmo2": {**LLAMA, "model_type": "olmo2", "num_key_value_heads": 2, "rope_theta": 5e5},
    "olmo3": {  # yarn of the global layer alone, in the spelling of published files
        **LLAMA,
        "model_type": "olmo3",
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "sliding_window": 4,
        "rope_theta": 5e5,
        "rope_scaling": {**YARN, "beta_fast": 4.0},
    },
    "olmo3: two thetas": {  # 3 heads, windows behind, biases
        **LLAMA,
        "model_type": "olmo3",
        "hidden_size": 36,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e3},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
        "tie_word_embeddings": True,
    },
    "smollm3": {**LLAMA, "model_type": "smollm3", "num_hidden_layers": 5, "num_key_value_heads": 2, "head_dim": 16},
    "smollm3: odd": {  # 3 heads, an order of its own, biases, stretched frequencies
        **LLAMA,
        "model_type": "smollm3",
        "hidden_size": 36,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "no_rope_layers": [0, 1, 1],
        "attention_bias": True,
        "mlp_bias": True,
        "rope_theta": 100.0,
        "rope_scaling": YARN,
        "tie_word_embeddings": False,
    },
    "gemma2": {
        **GEMMA,
        "model_type": "gemma2",
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma2: no caps": {
        **GEMMA,
        "model_type": "gemma2",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "layer_types": ["full_attention", "sliding_attention"],
        "tie_word_embeddings": False,
    },
    "gemma3_text": {**GEMMA, "model_type": "gemma3_text", "num_hidden_layers": 3, "sliding_window_pattern": 3},
    "gemma3_text: linear": {
        **GEMMA,
        "model_type": "gemma3_text",
        "final_logit_softcapping": 5.0,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e3},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "gemma4_text": {  # as the small ones: the last layers read keys and values, all have embeddings of their own
        **GEMMA4,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
    },
    "gemma4_text: keys are values": {  # as the large ones: one map for keys and values of global layers, 3 heads
        **GEMMA4,
        "hidden_size": 36,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "global_head_dim": 20,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "hidden_size_per_layer_input": 0,
        "use_bidirectional_attention": "vision",
        "final_logit_softcapping": None,
        "tie_word_embeddings": False,
    },
    "gemma4_text: odd": {  # an order of its own, biases, keys that are values beside shared ones
        **GEMMA4,
        "num_hidden_layers": 5,
        "attention_bias": True,
        "attention_k_eq_v": True,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 5,
        "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": 2,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.5,
                "factor": 2.0,
                "rope_theta": 1e3,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "gemma4_text: experts": {  # beside the mlp of every layer
        **GEMMA4,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    "gpt2": GPT2,
    "gpt2: untied": {**GPT2, "n_inner": 40, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
    "gpt_neox": {**NEOX, "rotary_emb_base": 1000},
    "gpt_neox: sequential": {
        **NEOX,
        "use_parallel_residual": False,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0},
    },
    "gpt_neox: odd": {**NEOX, "rotary_pct": 0.7},  # 5 of 8 features, of which transformers rotates 6
}
CASES |= {
    "mixtral": {**MOE, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral: windows": {
        **MOE,
        "model_type": "mixtral",
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "sliding_window": 4,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        **MOE,
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    },
    "olmoe": {
        **LLAMA,
        "model_type": "olmoe",
        "num_key_value_heads": 2,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe: plain weights": {
        **MOE,
        "model_type": "qwen3_moe",
        "hidden_size": 24,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "moe_intermediate_size": 40,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
    },
}
SHARED = {**QWEN3_5, "model_type": "qwen3_5_moe_text", "num_experts": 6, "num_experts_per_tok": 2}
SHARED |= {"rms_norm_eps": 3e-2}  # with 1e-2 one token is ill-conditioned: both differ by 1e-4 from float64
CASES |= {
    "qwen3_5_moe_text": {
        **SHARED,
        "num_hidden_layers": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_5_moe_text: odd": {  # 3 heads, an order of its own, biases, one expert a token
        **SHARED,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 3,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 12,
        "num_experts": 5,
        "num_experts_per_tok": 1,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
}
OSS = {**MOE, "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
CASES |= {
    # a window, everything, a window; positions as in published files, of which rows have several original contexts
    "gpt_oss": {
        **OSS,
        "rope_theta": 1e3,
        "rope_scaling": {**YARN, "original_max_position_embeddings": 4, "beta_fast": 4.0, "truncate": False},
    },
    "gpt_oss: odd": {  # 3 heads of more features than the stream has, a kind of layers in its own order
        **OSS,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "intermediate_size": 40,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention"],
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "tie_word_embeddings": True,
    },
}
TOKENS = np.random.default_rng(7).integers(0, VOCAB, (3, COLUMNS))
VALID = np.arange(COLUMNS) >= np.array([[0], [4], [7]])  # left-padded
POSITIONS = np.maximum(np.cumsum(VALID, 1) - 1, 0)


def law(name: str, shape: tuple[int, ...], family: str = "") -> np.ndarray:
    """The weights of every test here: normal numbers seeded by the tensor's name, about 1 for norms and 0 elsewhere."""
    # files have the first, transformers 5 the second: GPT-NeoX, Mixtral
    for file, theirs in (("embed_out.", "lm_head."), (".block_sparse_moe.", ".mlp."), *MIXTRAL.items()):
        name = name.replace(file, theirs)
    noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    center = 1.0 if len(shape) == 1 and name.endswith(("weight", "layer_scalar")) else 0.0
    # else a norm would divide by what is hardly more than rounding; no sink would weigh, and nothing be clamped
    wide = r"conv1d|sinks|experts\.gate_up_proj" if family == "gpt_oss" else r"conv1d"
    size = 1.0 if re.search(wide, name) else 0.2
    return (center + size * noise).astype(np.float32)


def law_of_parameter(family: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """``law`` of a parameter of transformers, which has one for all experts of a layer; the files of most families have
    one for each."""
    branch, _, rest = name.partition(".mlp.")
    kind = rest.removeprefix("experts.")
    if family in ("gpt_oss", "qwen3_5_moe_text", "gemma4_text") or kind not in ("gate_up_proj", "down_proj"):
        return law(name, shape, family)
    each = [f"{branch}.mlp.experts.{expert}" for expert in range(shape[0])]
    if kind == "down_proj":
        return np.stack([law(f"{expert}.down_proj.weight", shape[1:]) for expert in each])
    half = (shape[1] // 2, shape[2])
    pair = lambda expert: [law(f"{expert}.{part}_proj.weight", half) for part in ("gate", "up")]
    return np.stack([np.concatenate(pair(expert)) for expert in each])


def family_of(case: str) -> str:
    return CASES[case]["model_type"]


FIRST = {family_of(case): case for case in reversed(CASES)}  # of each family
FIRST = {family: FIRST[family] for family in map(family_of, CASES)}  # in their order


def heads_of(case: str) -> tuple[str, ...]:
    """Those that transformers has a class for."""
    return tuple(FAMILIES[family_of(case)].hf.classes)


def config_of(case: str, head: str) -> dict:
    """config.json of a case, with the class for the head."""
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    labels = {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}} if head == "scalar" else {}
    architecture = FAMILIES[family_of(case)].hf.classes[head]  # pyright: ignore[reportArgumentType]
    return {**CASES[case], **tokens, **labels, "architectures": [architecture]}
