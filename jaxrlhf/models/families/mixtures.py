"""Mixtures of experts: Mixtral, the mixtures of Qwen 3 and Qwen 3.5 (3.6), OLMoE, and gpt-oss."""

from jaxrlhf.models.families import qwen3_5
from jaxrlhf.models.families.llama import FIELDS, HEAD_NORMS, LLAMA, MAPS, PLAIN, SILU, WHOLE_NORMS, joined_experts
from jaxrlhf.models.families.traits import Module, Rope, Windows


def expert_modules(branch: str, gate: str, up: str, down: str) -> dict[str, Module]:
    """The router, and the three maps of each expert, whose layers call their mlp ``branch``."""
    expert = f"model.layers.{{layer}}.{branch}.experts.{{expert}}"
    return {
        "layers.mlp.router": Module(f"model.layers.{{layer}}.{branch}.gate", "routes embed"),
        "layers.mlp.experts.gate": Module(f"{expert}.{gate}", "mlp embed_of_expert"),
        "layers.mlp.experts.up": Module(f"{expert}.{up}", "mlp embed_of_expert"),
        "layers.mlp.experts.down": Module(f"{expert}.{down}", "embed_of_expert mlp"),
    }


DENSE = ("layers.mlp.gate", "layers.mlp.up", "layers.mlp.down")
AROUND = {path: module for path, module in LLAMA.modules.items() if path not in DENSE}  # the experts

MIXTRAL = LLAMA._replace(
    model_type="mixtral",
    classes={"lm": "MixtralForCausalLM", "scalar": "MixtralForSequenceClassification"},
    fields=FIELDS
    | {
        "num_kv_heads": ("num_key_value_heads", 8),
        "max_positions": ("max_position_embeddings", 131072),
        "norm_eps": ("rms_norm_eps", 1e-5),
        "num_experts": ("num_local_experts", 8),
        "experts_per_token": ("num_experts_per_tok", 2),
    },
    fixed=SILU | {"router_jitter_noise": (0.0, None), "layer_types": (None,)},
    modules=AROUND | expert_modules("block_sparse_moe", "w1", "w3", "w2"),
    aliases={"num_experts": "num_local_experts"},
    rope=LLAMA.rope._replace(theta=("rope_theta", 1e6)),
    windows=Windows(size=None, types=False),
)

QWEN3_MOE = LLAMA._replace(
    model_type="qwen3_moe",
    classes={"lm": "Qwen3MoeForCausalLM", "scalar": "Qwen3MoeForSequenceClassification"},
    fields=FIELDS
    | {
        "num_kv_heads": ("num_key_value_heads", 4),
        "max_positions": ("max_position_embeddings", 32768),
        "attention_bias": ("attention_bias", False),
        "mlp_size": ("moe_intermediate_size", 768),
        "num_experts": ("num_experts", 128),
        "experts_per_token": ("num_experts_per_tok", 8),
        "normalize_routing": ("norm_topk_prob", False),
    },
    # layers without experts
    fixed=SILU | {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None), "layer_types": (None,)},
    modules=AROUND | HEAD_NORMS | expert_modules("mlp", "gate_proj", "up_proj", "down_proj"),
    aliases={"num_local_experts": "num_experts"},
    windows=Windows(size=4096, switch="use_sliding_window", types=False),
)

QWEN3_5, BRANCH = qwen3_5.FAMILIES["qwen3_5_text"], "model.layers.{layer}.mlp"
QWEN3_5_MOE = qwen3_5.QWEN3_5._replace(
    model_type="qwen3_5_moe_text",
    classes={"lm": "Qwen3_5MoeForCausalLM"},
    fields=qwen3_5.QWEN3_5.fields
    | {
        "num_kv_heads": ("num_key_value_heads", 2),
        "mlp_size": ("moe_intermediate_size", 512),
        "num_experts": ("num_experts", 256),
        "experts_per_token": ("num_experts_per_tok", 8),
        "shared_expert_size": ("shared_expert_intermediate_size", 512),
    },
    modules={path: module for path, module in qwen3_5.QWEN3_5.modules.items() if path not in DENSE}
    | {
        "layers.mlp.router": Module(f"{BRANCH}.gate", "routes embed"),
        "layers.mlp.shared.share": Module(f"{BRANCH}.shared_expert_gate", "score embed"),
    }
    | joined_experts(f"{BRANCH}.experts")
    | {
        f"layers.mlp.shared.{name}": Module(f"{BRANCH}.shared_expert.{name}_proj", MAPS[f"layers.mlp.{name}"].layout)
        for name in ("gate", "up", "down")
    },
    # as transformers writes them; the published files and ours have one tensor for all experts
    split={
        path: module
        for path, module in expert_modules("mlp", "gate_proj", "up_proj", "down_proj").items()
        if path != "layers.mlp.router"
    },
)

OLMOE = QWEN3_MOE._replace(
    model_type="olmoe",
    classes={"lm": "OlmoeForCausalLM"},
    fields={name: field for name, field in FIELDS.items() if name != "head_dim"}
    | {
        "max_positions": ("max_position_embeddings", 4096),
        "norm_eps": ("rms_norm_eps", 1e-5),
        "attention_bias": ("attention_bias", False),
        "num_experts": ("num_experts", 64),
        "experts_per_token": ("num_experts_per_tok", 8),
        "normalize_routing": ("norm_topk_prob", False),
    },
    fixed=SILU | {"clip_qkv": (None,), "head_dim": (None,)},
    modules=AROUND | WHOLE_NORMS | expert_modules("mlp", "gate_proj", "up_proj", "down_proj"),
    windows=None,
)

EXPERTS = "model.layers.{layer}.mlp.experts"
GATE_UP, DOWN = (
    Module(f"{EXPERTS}.{name}_proj", layout, weight="", bias="_bias")
    for name, layout in (("gate_up", "expert embed_of_expert mlp.part"), ("down", "expert mlp embed_of_expert"))
)
GPT_OSS = LLAMA._replace(
    model_type="gpt_oss",
    classes={"lm": "GptOssForCausalLM", "scalar": "GptOssForSequenceClassification"},
    fields=FIELDS
    | {
        "num_kv_heads": ("num_key_value_heads", 8),
        "head_dim": ("head_dim", 64),
        "max_positions": ("max_position_embeddings", 131072),
        "norm_eps": ("rms_norm_eps", 1e-5),
        "attention_bias": ("attention_bias", True),
        "num_experts": ("num_local_experts", 128),
        "experts_per_token": ("num_experts_per_tok", 4),
    },
    fixed=SILU | {"swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
    modules=AROUND
    | {
        "layers.attention.softmax": Module("model.layers.{layer}.self_attn", "heads"),
        "layers.mlp.router": Module("model.layers.{layer}.mlp.router", "routes embed"),
        "layers.mlp.experts.gate": GATE_UP,
        "layers.mlp.experts.up": GATE_UP,
        "layers.mlp.experts.down": DOWN,
    },
    aliases={"num_experts": "num_local_experts"},
    rope=Rope(
        theta=("rope_theta", 150000.0),
        absent={
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
    windows=Windows(size=128, optional=False),
    quantized=("mxfp4",),
)

FAMILIES = {
    "mixtral": PLAIN._replace(experts="normalized", hf=MIXTRAL),
    "qwen3_moe": PLAIN._replace(query_key_norm="head", experts="plain", hf=QWEN3_MOE),
    "olmoe": PLAIN._replace(query_key_norm="all", experts="plain", hf=OLMOE),
    # the softmax over the logits of the chosen experts is that over all, divided by what the chosen have of it
    "gpt_oss": PLAIN._replace(
        activation="clamped",
        attention_bias=True,
        mlp_bias=True,
        sinks=True,
        global_every=2,
        experts="normalized",
        hf=GPT_OSS,
    ),
    "qwen3_5_moe_text": QWEN3_5._replace(experts="normalized", shared_expert=True, hf=QWEN3_5_MOE),
}
