"""The text models of Qwen 3.5, 3.6 and 3.8: gated delta nets, and gated attention in every fourth layer."""

from jaxrlhf.models.families.llama import ENDS, FIELDS, HEAD_NORMS, LLAMA, MAPS, NORMS
from jaxrlhf.models.families.traits import Family, Module, Rope

NET = "model.layers.{layer}.linear_attn"
QKV, TAPS = f"{NET}.in_proj_qkv", f"{NET}.conv1d"
MODULES = {
    "layers.delta.norm": NORMS["layers.attention.norm"],
    "layers.delta.delta_query": Module(QKV, "part.kv_heads.head_dim embed"),
    "layers.delta.delta_key": Module(QKV, "part.kv_heads.head_dim embed"),
    "layers.delta.delta_value": Module(QKV, "part.heads.head_dim embed"),
    "layers.delta.delta_convolution.query": Module(TAPS, "part.kv_heads.head_dim 1 taps"),
    "layers.delta.delta_convolution.key": Module(TAPS, "part.kv_heads.head_dim 1 taps"),
    "layers.delta.delta_convolution.value": Module(TAPS, "part.heads.head_dim 1 taps"),
    "layers.delta.delta_decay": Module(f"{NET}.in_proj_a", "heads embed"),
    "layers.delta.delta_beta": Module(f"{NET}.in_proj_b", "heads embed"),
    "layers.delta.delta_rate": Module(NET, "heads"),
    "layers.delta.delta_gate": Module(f"{NET}.in_proj_z", "heads.head_dim embed"),
    "layers.delta.delta_norm": Module(f"{NET}.norm", "head_dim"),
    "layers.delta.delta_out": Module(f"{NET}.out_proj", "embed heads.head_dim"),
}

QWEN3_5 = LLAMA._replace(
    model_type="qwen3_5_text",
    classes={"lm": "Qwen3_5ForCausalLM", "scalar": "Qwen3_5TextForSequenceClassification"},
    fields=FIELDS
    | {
        "num_kv_heads": ("num_key_value_heads", 4),
        "head_dim": ("head_dim", 256),
        "max_positions": ("max_position_embeddings", 32768),
        "attention_bias": ("attention_bias", False),
        "linear_key_heads": ("linear_num_key_heads", 16),
        "linear_value_heads": ("linear_num_value_heads", 32),
        "linear_key_dim": ("linear_key_head_dim", 128),
        "linear_value_dim": ("linear_value_head_dim", 128),
        "convolution_size": ("linear_conv_kernel_dim", 4),
    },
    # attn_output_gate stands in published files; transformers does not look at it
    fixed={"hidden_act": ("silu", "swish"), "attn_output_gate": (None, True)},
    modules=ENDS | MAPS | NORMS | HEAD_NORMS | MODULES,
    rope=Rope(fraction=("partial_rotary_factor", 0.25)),
    linear_every="full_attention_interval",
    left=r"mtp\.|model\.visual\.",
)

FAMILIES = {
    "qwen3_5_text": Family(
        norm="rms",
        activation="silu",
        gated=True,
        positions="rope",
        norm_offset=True,
        query_key_norm="head",
        has_linear=True,
        output_gate=True,
        global_every=4,
        hf=QWEN3_5,
    )
}
