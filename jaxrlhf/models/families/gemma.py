"""Gemma 2, and the text models of Gemma 3."""

from jaxrlhf.models.families.gpt import GELU_TANH
from jaxrlhf.models.families.llama import ENDS, FIELDS, HEAD_NORMS, LLAMA, MAPS
from jaxrlhf.models.families.traits import Family, Module, Rope, Windows

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
}
