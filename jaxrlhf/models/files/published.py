"""The shapes of well-known models, for planning where their config.json can't be reached: what it says, in our words.

The sizes are those that their makers publish; the tests count the parameters that come of them against the published
numbers of parameters.
"""

from typing import Any

from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.rope import RopeScaling

GEMMA_2_2B = ModelConfig(
    family="gemma2",
    vocab_size=256000,
    hidden_size=2304,
    num_layers=26,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    mlp_size=9216,
    max_positions=8192,
    norm_eps=1e-6,
    sliding_window=4096,
    query_pre_attn_scalar=256,
    attention_softcap=50.0,
    logit_softcap=30.0,
)


def shape(
    family,
    vocab: int,
    hidden: int,
    layers: int,
    heads: int,
    kv: int,
    mlp: int,
    positions: int,
    tied: bool = False,
    **more,
) -> ModelConfig:
    """A ModelConfig by its sizes; ``tied``: the head is the embeddings."""
    return ModelConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        mlp_size=mlp,
        max_positions=positions,
        tie_embeddings=tied,
        **more,
    )


PYTHIA_1B = shape("gpt_neox", 50304, 2048, 16, 8, 8, 8192, 2048, rotary_fraction=0.25)
PYTHIA_6_9B = shape("gpt_neox", 50432, 4096, 32, 32, 32, 16384, 2048, rotary_fraction=0.25)
LLAMA3_ROPE = RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
LLAMA3: dict[str, Any] = {"norm_eps": 1e-5, "rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}
LLAMA_3_1_8B = shape("llama", 128256, 4096, 32, 32, 8, 14336, 131072, **LLAMA3)
LLAMA_3_1_70B = shape("llama", 128256, 8192, 80, 64, 8, 28672, 131072, **LLAMA3)
LLAMA_2_7B = shape("llama", 32000, 4096, 32, 32, 32, 11008, 4096, norm_eps=1e-5)
LLAMA_2_70B = shape("llama", 32000, 8192, 80, 64, 8, 28672, 4096, norm_eps=1e-5)
MISTRAL_7B = shape("mistral", 32000, 4096, 32, 32, 8, 14336, 32768, sliding_window=4096)
QWEN2_5: dict[str, Any] = {"norm_eps": 1e-6, "rope_theta": 1e6}
QWEN_0_5B = shape("qwen2", 151936, 896, 24, 14, 2, 4864, 32768, tied=True, **QWEN2_5)
QWEN_1_5B = shape("qwen2", 151936, 1536, 28, 12, 2, 8960, 32768, tied=True, **QWEN2_5)
QWEN_7B = shape("qwen2", 152064, 3584, 28, 28, 4, 18944, 32768, **QWEN2_5)
QWEN3_1_7B = shape("qwen3", 151936, 2048, 28, 16, 8, 6144, 40960, tied=True, head_dim=128, **QWEN2_5)
QWEN3_30B_A3B = shape(
    "qwen3_moe",
    151936,
    2048,
    48,
    32,
    4,
    768,
    40960,
    head_dim=128,
    num_experts=128,
    experts_per_token=8,
    normalize_routing=True,
    **QWEN2_5,
)
MIXTRAL: dict[str, Any] = {"num_experts": 8, "experts_per_token": 2, "norm_eps": 1e-5, "rope_theta": 1e6}
MIXTRAL_8X7B = shape("mixtral", 32000, 4096, 32, 32, 8, 14336, 32768, **MIXTRAL)
GPT_OSS: dict[str, Any] = {"head_dim": 64, "experts_per_token": 4, "norm_eps": 1e-5, "sliding_window": 128}
GPT_OSS |= {
    "rope_theta": 150000.0,
    "rope_scaling": RopeScaling("yarn", 32.0, original_max_positions=4096, truncate=False),
}
GPT_OSS_20B = shape("gpt_oss", 201088, 2880, 24, 64, 8, 2880, 131072, num_experts=32, **GPT_OSS)
GPT_OSS_120B = shape("gpt_oss", 201088, 2880, 36, 64, 8, 2880, 131072, num_experts=128, **GPT_OSS)
QWEN3_5: dict[str, Any] = {"norm_eps": 1e-6, "rope_theta": 1e7, "rotary_fraction": 0.25, "head_dim": 256}
QWEN3_5 |= {"linear_key_heads": 16, "linear_key_dim": 128, "linear_value_dim": 128, "convolution_size": 4}
QWEN3_5_0_8B = shape("qwen3_5_text", 248320, 1024, 24, 8, 2, 3584, 262144, tied=True, linear_value_heads=16, **QWEN3_5)
QWEN3_5_4B = shape("qwen3_5_text", 248320, 2560, 32, 16, 4, 9216, 262144, tied=True, linear_value_heads=32, **QWEN3_5)
QWEN3_5_35B_A3B = shape(
    "qwen3_5_moe_text",
    248320,
    2048,
    40,
    16,
    2,
    512,
    262144,
    num_experts=256,
    experts_per_token=8,
    shared_expert_size=512,
    linear_value_heads=32,
    **QWEN3_5,
)
GEMMA4: dict[str, Any] = {"norm_eps": 1e-6, "rope_theta": 1e6, "local_rope_theta": 1e4, "rotary_fraction": 0.25}
GEMMA4 |= {"tied": True, "head_dim": 256, "global_head_dim": 512, "logit_softcap": 30.0}
E2B: dict[str, Any] = {"sliding_window": 512, "per_layer_size": 256, "shared_kv_layers": 20, "wide_shared_mlp": True}
E2B |= {"layer_types": (*("local",) * 4, "global") * 7}
E4B: dict[str, Any] = {"sliding_window": 512, "per_layer_size": 256, "shared_kv_layers": 18}
GEMMA4_E2B = shape("gemma4_text", 262144, 1536, 35, 8, 1, 6144, 131072, **GEMMA4, **E2B)
GEMMA4_E4B = shape("gemma4_text", 262144, 2560, 42, 8, 2, 10240, 131072, **GEMMA4, **E4B)
MIXED: dict[str, Any] = {"sliding_window": 1024, "keys_are_values": True, "global_kv_heads": 2, "expert_size": 704}
MIXED |= {"num_experts": 128, "experts_per_token": 8}
GEMMA4_26B_A4B = shape("gemma4_text", 262144, 2816, 30, 16, 8, 2112, 262144, **GEMMA4, **MIXED)
LARGE: dict[str, Any] = {"sliding_window": 1024, "keys_are_values": True, "global_kv_heads": 4}
GEMMA4_31B = shape("gemma4_text", 262144, 5376, 60, 32, 16, 21504, 262144, **GEMMA4, **LARGE)
SMOLLM2_135M = shape("llama", 49152, 576, 30, 9, 3, 1536, 8192, tied=True, norm_eps=1e-5, rope_theta=1e5)
SMOLLM3_3B = shape("smollm3", 128256, 2048, 36, 16, 4, 11008, 65536, tied=True, norm_eps=1e-6, rope_theta=5e6)

SHAPES: dict[str, ModelConfig] = {
    "EleutherAI/pythia-1b": PYTHIA_1B,
    "EleutherAI/pythia-1b-deduped": PYTHIA_1B,
    "EleutherAI/pythia-6.9b": PYTHIA_6_9B,
    "EleutherAI/pythia-6.9b-deduped": PYTHIA_6_9B,
    "cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr": PYTHIA_1B,
    "cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr": PYTHIA_1B,
    "cleanrl/EleutherAI_pythia-6.9b-deduped__sft__tldr": PYTHIA_6_9B,
    "cleanrl/EleutherAI_pythia-6.9b-deduped__reward__tldr": PYTHIA_6_9B,
    "google/gemma-2-2b": GEMMA_2_2B,
    "google/gemma-2-2b-it": GEMMA_2_2B,
    "google/gemma-4-E2B": GEMMA4_E2B,
    "google/gemma-4-E2B-it": GEMMA4_E2B,
    "google/gemma-4-E4B": GEMMA4_E4B,
    "google/gemma-4-E4B-it": GEMMA4_E4B,
    "google/gemma-4-26B-A4B": GEMMA4_26B_A4B,
    "google/gemma-4-26B-A4B-it": GEMMA4_26B_A4B,
    "google/gemma-4-31B": GEMMA4_31B,
    "google/gemma-4-31B-it": GEMMA4_31B,
    "Qwen/Qwen2.5-0.5B": QWEN_0_5B,
    "Qwen/Qwen2.5-0.5B-Instruct": QWEN_0_5B,
    "Qwen/Qwen2.5-1.5B": QWEN_1_5B,
    "Qwen/Qwen2.5-1.5B-Instruct": QWEN_1_5B,
    "Qwen/Qwen2.5-7B": QWEN_7B,
    "Qwen/Qwen2.5-7B-Instruct": QWEN_7B,
    "Qwen/Qwen3-1.7B": QWEN3_1_7B,
    "Qwen/Qwen3-30B-A3B": QWEN3_30B_A3B,
    "mistralai/Mixtral-8x7B-v0.1": MIXTRAL_8X7B,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": MIXTRAL_8X7B,
    "openai/gpt-oss-20b": GPT_OSS_20B,
    "openai/gpt-oss-120b": GPT_OSS_120B,
    "Qwen/Qwen3.5-0.8B": QWEN3_5_0_8B,
    "Qwen/Qwen3.5-0.8B-Base": QWEN3_5_0_8B,
    "Qwen/Qwen3.5-4B": QWEN3_5_4B,
    "Qwen/Qwen3.5-4B-Base": QWEN3_5_4B,
    "Qwen/Qwen3.5-35B-A3B": QWEN3_5_35B_A3B,
    "Qwen/Qwen3.5-35B-A3B-Base": QWEN3_5_35B_A3B,
    "meta-llama/Llama-3.1-8B": LLAMA_3_1_8B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_3_1_8B,
    "meta-llama/Llama-3.1-70B": LLAMA_3_1_70B,
    "meta-llama/Llama-3.1-70B-Instruct": LLAMA_3_1_70B,
    "meta-llama/Llama-2-7b": LLAMA_2_7B,
    "meta-llama/Llama-2-7b-hf": LLAMA_2_7B,
    "mistralai/Mistral-7B-v0.1": MISTRAL_7B,
    "HuggingFaceTB/SmolLM2-135M": SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2_135M,
    "HuggingFaceTB/SmolLM3-3B": SMOLLM3_3B,
    "HuggingFaceTB/SmolLM3-3B-Base": SMOLLM3_3B,
}


def published(name: str) -> ModelConfig | None:
    """The resolved shape of a model by its name on the hub; None where it is not in the table."""
    found = SHAPES.get(name)
    return None if found is None else resolve(found)


def published_file(name: str) -> str | None:
    """The model of the table that a GGUF file is called after: SmolLM2-135M-Instruct.Q4_1.gguf; None: of none."""
    stem = name.rpartition("/")[2].removesuffix(".gguf").rpartition(".")[0]
    return next((model for model in SHAPES if model.rpartition("/")[2].lower() == stem.lower()), None)
