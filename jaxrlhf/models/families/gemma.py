"""Gemma 2, and the text models of Gemma 3 and 4."""

from jaxrlhf.models.families.gpt import GELU_TANH
from jaxrlhf.models.families.llama import ENDS, FIELDS, HEAD_NORMS, LLAMA, MAPS, joined_experts
from jaxrlhf.models.families.traits import Family, Module, Rope, Uneven, Windows

GEMMA2 = LLAMA._replace(
    model_type="gemma2",
    classes={"lm": "Gemma2ForCausalLM", "scalar": "Gemma2ForSequenceClassification"},
    fields=FIELDS
    | {
        "num_kv_heads": ("num_key_value_heads", 4),
        "head_dim": ("head_dim", 256),
        "max_positions": ("max_position_embeddings", 8192),
        "tie_embeddings": ("tie_word_embeddings", True),
        "attention_bias": ("attention_bias", False),
        "query_pre_attn_scalar": ("query_pre_attn_scalar", 256),
        "attention_softcap": ("attn_logit_softcapping", 50.0),
        "logit_softcap": ("final_logit_softcapping", 30.0),
    },
    fixed={"hidden_activation": GELU_TANH, "use_bidirectional_attention": (None, False)},
    modules=ENDS
    | MAPS
    | {
        "layers.attention.norm": Module("model.layers.{layer}.input_layernorm", "embed"),
        "layers.attention.post_norm": Module("model.layers.{layer}.post_attention_layernorm", "embed"),
        "layers.mlp.norm": Module("model.layers.{layer}.pre_feedforward_layernorm", "embed"),
        "layers.mlp.post_norm": Module("model.layers.{layer}.post_feedforward_layernorm", "embed"),
    },
    windows=Windows(size=4096, optional=False),
)

GEMMA3 = GEMMA2._replace(
    model_type="gemma3_text",
    classes={"lm": "Gemma3ForCausalLM", "scalar": "Gemma3TextForSequenceClassification"},
    fields={name: field for name, field in GEMMA2.fields.items() if name != "attention_softcap"}
    | {
        "max_positions": ("max_position_embeddings", 131072),
        "logit_softcap": ("final_logit_softcapping", None),
    },
    # transformers has a field for the soft-cap of attention, and never reads it
    fixed=GEMMA2.fixed | {"use_bidirectional_attention": (False, None), "attn_logit_softcapping": (None,)},
    modules=GEMMA2.modules | HEAD_NORMS,
    rope=Rope(
        kinds=("default", "linear", "llama3"),
        theta=("rope_theta", 1e6),
        local_theta=("rope_local_base_freq", 1e4),
    ),
    windows=Windows(size=4096, optional=False, global_every="sliding_window_pattern"),
)

LAYER = "model.layers.{layer}"
PER_LAYER = {
    # two tensors for all layers
    "layers.per_layer.per_layer_tokens": Module("model.embed_tokens_per_layer", "vocab_of_layer part.layers.per_layer"),
    "layers.per_layer.per_layer_context": Module("model.per_layer_model_projection", "part.layers.per_layer embed"),
    "layers.per_layer.per_layer_gate": Module(f"{LAYER}.per_layer_input_gate", "per_layer embed"),
    "layers.per_layer.per_layer_out": Module(f"{LAYER}.per_layer_projection", "embed per_layer"),
    "layers.per_layer.post_norm": Module(f"{LAYER}.post_per_layer_input_norm", "embed"),
    "layers.output": Module(LAYER, "1"),
}
BESIDE = {
    "layers.mlp.mlp_norm": Module(f"{LAYER}.post_feedforward_layernorm_1", "embed"),
    "layers.mlp.expert_norm": Module(f"{LAYER}.pre_feedforward_layernorm_2", "embed"),
    "layers.mlp.expert_post_norm": Module(f"{LAYER}.post_feedforward_layernorm_2", "embed"),
    "layers.mlp.router": Module(f"{LAYER}.router.proj", "routes embed"),
    "layers.mlp.router_scale": Module(f"{LAYER}.router.scale", "embed", weight=""),
    "layers.mlp.expert_scale": Module(f"{LAYER}.router.per_expert_scale", "routes", weight=""),
} | joined_experts(f"{LAYER}.experts")


def of_stacks(modules: dict[str, Module]) -> dict[str, Module]:
    """``modules`` of the layers of all stacks: attention of global layers, and all parts of layers that read keys."""
    wide = {path.replace(".attention.", ".global_attention."): module for path, module in modules.items()}
    reader = {path.replace("layers.", "layers.reader_", 1): module for path, module in (modules | wide).items()}
    return modules | wide | {path: module for path, module in reader.items() if path.startswith("layers.")}


GEMMA4 = GEMMA3._replace(
    model_type="gemma4_text",
    classes={"lm": "Gemma4ForCausalLM"},
    fields={name: field for name, field in GEMMA3.fields.items() if name != "query_pre_attn_scalar"}
    | {
        "keys_are_values": ("attention_k_eq_v", False),
        "wide_shared_mlp": ("use_double_wide_mlp", False),
    },
    counts={
        "shared_kv_layers": ("num_kv_shared_layers", 0),
        "per_layer_size": ("hidden_size_per_layer_input", 256),
        "num_experts": ("num_experts", 0),
        "experts_per_token": ("top_k_experts", 0),
        "expert_size": ("moe_intermediate_size", 0),
    },
    beside="enable_moe_block",
    # between tokens of images alone: text is causal
    fixed={
        "hidden_activation": GELU_TANH,
        "use_bidirectional_attention": (None, "vision"),
    },
    modules=of_stacks(GEMMA3.modules | PER_LAYER | BESIDE)
    | {"embed.per_layer_norm": Module("model.per_layer_projection_norm", "per_layer")},
    rope=Rope(
        kinds=("proportional",),
        theta=("rope_theta", 1e6),
        local_theta=("rope_theta", 1e4),
        fraction=("partial_rotary_factor", 1.0),
        old=False,
        absent={
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    windows=Windows(size=512, optional=False, last_global=True),
    uneven=Uneven(
        head_dim=("global_head_dim", 512),
        kv_heads="num_global_key_value_heads",
        each="per_layer_config",
        vocabulary="vocab_size_per_layer_input",
        unread=r"model\.layers\.(\d+)\.self_attn\.[kv]_(proj|norm)\.",
    ),
)

PLAIN = Family(
    norm="rms",
    activation="gelu_tanh",
    gated=True,
    positions="rope",
    norms="sandwich",
    norm_offset=True,
    scaled_embeddings=True,
    global_every=2,
    hf=GEMMA2,
)

FAMILIES = {
    "gemma2": PLAIN,
    "gemma3_text": PLAIN._replace(query_key_norm="head", global_every=6, hf=GEMMA3),
    "gemma4_text": PLAIN._replace(
        norm_offset=False,
        query_key_norm="head",
        global_every=6,
        value_norm=True,
        scaled_products=False,
        layer_scalar=True,
        uneven=True,
        experts="normalized",
        experts_beside=True,
        hf=GEMMA4,
    ),
}
