"""Llama (and SmolLM2) and its near relatives: Mistral, Ministral 3, Qwen 2 and 3, Phi 3, OLMo 2 and 3, SmolLM3."""

from typing import Any

from jaxrlhf.models.families.traits import Family, HuggingFace, Module, Rope, Windows

FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", ...),
    "hidden_size": ("hidden_size", ...),
    "num_layers": ("num_hidden_layers", ...),
    "num_heads": ("num_attention_heads", ...),
    "num_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "mlp_size": ("intermediate_size", ...),
    "max_positions": ("max_position_embeddings", 2048),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tie_embeddings": ("tie_word_embeddings", False),
}
BIASES: dict[str, tuple[str, Any]] = {
    "attention_bias": ("attention_bias", False),
    "mlp_bias": ("mlp_bias", False),
}
SILU = {"hidden_act": ("silu", "swish")}

ENDS = {
    "embed.tokens": Module("model.embed_tokens", "vocab embed"),
    "final_norm": Module("model.norm", "embed"),
    "head": Module("lm_head", "vocab embed"),
}
MAPS = {
    "layers.attention.query": Module("model.layers.{layer}.self_attn.q_proj", "heads.head_dim embed"),
    "layers.attention.key": Module("model.layers.{layer}.self_attn.k_proj", "kv_heads.head_dim embed"),
    "layers.attention.value": Module("model.layers.{layer}.self_attn.v_proj", "kv_heads.head_dim embed"),
    "layers.attention.out": Module("model.layers.{layer}.self_attn.o_proj", "embed heads.head_dim"),
    "layers.mlp.gate": Module("model.layers.{layer}.mlp.gate_proj", "mlp embed"),
    "layers.mlp.up": Module("model.layers.{layer}.mlp.up_proj", "mlp embed"),
    "layers.mlp.down": Module("model.layers.{layer}.mlp.down_proj", "embed mlp"),
}
NORMS = {
    "layers.attention.norm": Module("model.layers.{layer}.input_layernorm", "embed"),
    "layers.mlp.norm": Module("model.layers.{layer}.post_attention_layernorm", "embed"),
}
HEAD_NORMS = {
    "layers.attention.query_norm": Module("model.layers.{layer}.self_attn.q_norm", "head_dim"),
    "layers.attention.key_norm": Module("model.layers.{layer}.self_attn.k_norm", "head_dim"),
}
POST_NORMS = {
    "layers.attention.post_norm": Module("model.layers.{layer}.post_attention_layernorm", "embed"),
    "layers.mlp.post_norm": Module("model.layers.{layer}.post_feedforward_layernorm", "embed"),
}
WHOLE_NORMS = {
    "layers.attention.query_norm": Module("model.layers.{layer}.self_attn.q_norm", "heads.head_dim"),
    "layers.attention.key_norm": Module("model.layers.{layer}.self_attn.k_norm", "kv_heads.head_dim"),
}
FUSED = {
    "layers.attention.query": Module("model.layers.{layer}.self_attn.qkv_proj", "part.heads.head_dim embed"),
    "layers.attention.key": Module("model.layers.{layer}.self_attn.qkv_proj", "part.kv_heads.head_dim embed"),
    "layers.attention.value": Module("model.layers.{layer}.self_attn.qkv_proj", "part.kv_heads.head_dim embed"),
    "layers.mlp.gate": Module("model.layers.{layer}.mlp.gate_up_proj", "part.mlp embed"),
    "layers.mlp.up": Module("model.layers.{layer}.mlp.gate_up_proj", "part.mlp embed"),
}


def joined_experts(branch: str) -> dict[str, Module]:
    """The maps of a layer's experts ``branch``, where one tensor holds those of all, and gate and up are one."""
    halves = Module(f"{branch}.gate_up_proj", "expert part.mlp embed_of_expert", weight="")
    down = Module(f"{branch}.down_proj", "expert embed_of_expert mlp", weight="")
    return {"layers.mlp.experts.gate": halves, "layers.mlp.experts.up": halves, "layers.mlp.experts.down": down}


LLAMA = HuggingFace(
    model_type="llama",
    classes={"lm": "LlamaForCausalLM", "scalar": "LlamaForSequenceClassification"},
    fields=FIELDS | BIASES,
    fixed=SILU | {"pretraining_tp": (1, None)},
    modules=ENDS | MAPS | NORMS,
    prefix="model.",
    ignored=r"\.rotary_emb\.inv_freq$",
)

MISTRAL = LLAMA._replace(
    model_type="mistral",
    classes={"lm": "MistralForCausalLM", "scalar": "MistralForSequenceClassification"},
    fields=FIELDS | {"num_kv_heads": ("num_key_value_heads", 8), "max_positions": ("max_position_embeddings", 131072)},
    fixed=SILU | {"layer_types": (None,)},  # another class, Ministral, has those
    windows=Windows(size=4096, types=False),
)

MINISTRAL3 = MISTRAL._replace(
    model_type="ministral3",
    classes={"lm": "Ministral3ForCausalLM", "scalar": "Ministral3ForSequenceClassification"},
    fields=MISTRAL.fields
    | {
        "head_dim": ("head_dim", 128),
        "max_positions": ("max_position_embeddings", 262144),
        "norm_eps": ("rms_norm_eps", 1e-5),
    },
    rope=Rope(kinds=("yarn",), query_beta="llama_4_scaling_beta"),
    windows=Windows(size=None, types=False),
)

QWEN2 = LLAMA._replace(
    model_type="qwen2",
    classes={"lm": "Qwen2ForCausalLM", "scalar": "Qwen2ForSequenceClassification"},
    fields=FIELDS | {"num_kv_heads": ("num_key_value_heads", 32), "max_positions": ("max_position_embeddings", 32768)},
    fixed=SILU,
    windows=Windows(size=4096, switch="use_sliding_window", first_global=("max_window_layers", 28)),
)

QWEN3 = QWEN2._replace(
    model_type="qwen3",
    classes={"lm": "Qwen3ForCausalLM", "scalar": "Qwen3ForSequenceClassification"},
    fields=QWEN2.fields | {"head_dim": ("head_dim", 128), "attention_bias": ("attention_bias", False)},
    modules=LLAMA.modules | HEAD_NORMS,
)

PHI3 = LLAMA._replace(
    model_type="phi3",
    classes={"lm": "Phi3ForCausalLM", "scalar": "Phi3ForSequenceClassification"},
    fields=FIELDS | {"max_positions": ("max_position_embeddings", 4096), "norm_eps": ("rms_norm_eps", 1e-5)},
    fixed=SILU | {"layer_types": (None,)},
    modules=LLAMA.modules | FUSED,
    rope=Rope(
        kinds=("default", "longrope"),
        renamed={"su": "longrope", "yarn": "longrope"},
        fraction=("partial_rotary_factor", 1.0),
        original=4096,
    ),
    windows=Windows(size=None, types=False),
)

OLMO2 = LLAMA._replace(
    model_type="olmo2",
    classes={"lm": "Olmo2ForCausalLM", "scalar": "Olmo2ForSequenceClassification"},
    fields=FIELDS | {"norm_eps": ("rms_norm_eps", 1e-5), "attention_bias": ("attention_bias", False)},
    fixed=SILU,
    modules=ENDS | MAPS | POST_NORMS | WHOLE_NORMS,
)

OLMO3 = OLMO2._replace(
    model_type="olmo3",
    classes={"lm": "Olmo3ForCausalLM", "scalar": "Olmo3ForSequenceClassification"},
    # old files have one rope_theta for all layers, and rope_scaling for the global ones
    rope=Rope(theta=("rope_theta", 5e5), local_theta=("rope_theta", 5e5)),
    windows=Windows(size=4096, optional=False),
)

SMOLLM3 = LLAMA._replace(
    model_type="smollm3",
    classes={"lm": "SmolLM3ForCausalLM", "scalar": "SmolLM3ForSequenceClassification"},
    fields=FIELDS
    | BIASES
    | {
        "num_kv_heads": ("num_key_value_heads", 4),
        "max_positions": ("max_position_embeddings", 32768),
        "tie_embeddings": ("tie_word_embeddings", True),
    },
    fixed=SILU | {"use_sliding_window": (False,)},
    rope=Rope(theta=("rope_theta", 2e6)),
    nope=("no_rope_layers", "no_rope_layer_interval"),
)

PLAIN = Family(norm="rms", activation="silu", gated=True, positions="rope", hf=LLAMA)

FAMILIES = {
    "llama": PLAIN,
    "mistral": PLAIN._replace(hf=MISTRAL),
    "ministral3": PLAIN._replace(hf=MINISTRAL3),
    "qwen2": PLAIN._replace(attention_bias=True, out_bias=False, hf=QWEN2),
    "qwen3": PLAIN._replace(query_key_norm="head", hf=QWEN3),
    "phi3": PLAIN._replace(hf=PHI3),
    "olmo2": PLAIN._replace(norms="post", query_key_norm="all", hf=OLMO2),
    "olmo3": PLAIN._replace(norms="post", query_key_norm="all", global_every=4, hf=OLMO3),
    "smollm3": PLAIN._replace(nope_every=4, hf=SMOLLM3),
}
