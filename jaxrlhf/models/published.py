"""The shapes of well-known models, for planning where their config.json can't be reached: what it says, in our words.

The sizes are those that their makers publish; the tests count the parameters that come of them against the published
numbers of parameters.
"""

from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.rope import RopeScaling

PYTHIA_1B = ModelConfig(
    family="gpt_neox",
    vocab_size=50304,
    hidden_size=2048,
    num_layers=16,
    num_heads=8,
    mlp_size=8192,
    max_positions=2048,
    rotary_fraction=0.25,
    tie_embeddings=False,
)
PYTHIA_6_9B = ModelConfig(
    family="gpt_neox",
    vocab_size=50432,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    mlp_size=16384,
    max_positions=2048,
    rotary_fraction=0.25,
    tie_embeddings=False,
)
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


def qwen2_5(vocab: int, hidden: int, layers: int, heads: int, kv: int, mlp: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        family="qwen2",
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        mlp_size=mlp,
        max_positions=32768,
        norm_eps=1e-6,
        rope_theta=1e6,
        tie_embeddings=tied,
    )


def llama(vocab: int, hidden: int, layers: int, heads: int, kv: int, mlp: int, positions: int, **more) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        mlp_size=mlp,
        max_positions=positions,
        tie_embeddings=False,
        **more,
    )


LLAMA3_ROPE = RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
LLAMA_3_1_8B = llama(128256, 4096, 32, 32, 8, 14336, 131072, norm_eps=1e-5, rope_theta=5e5, rope_scaling=LLAMA3_ROPE)
LLAMA_3_1_70B = llama(128256, 8192, 80, 64, 8, 28672, 131072, norm_eps=1e-5, rope_theta=5e5, rope_scaling=LLAMA3_ROPE)
LLAMA_2_7B = llama(32000, 4096, 32, 32, 32, 11008, 4096, norm_eps=1e-5)
LLAMA_2_70B = llama(32000, 8192, 80, 64, 8, 28672, 4096, norm_eps=1e-5)
MISTRAL_7B = ModelConfig(
    family="mistral",
    vocab_size=32000,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    mlp_size=14336,
    max_positions=32768,
    sliding_window=4096,
    tie_embeddings=False,
)
QWEN_0_5B = qwen2_5(151936, 896, 24, 14, 2, 4864, tied=True)
QWEN_1_5B = qwen2_5(151936, 1536, 28, 12, 2, 8960, tied=True)
QWEN_7B = qwen2_5(152064, 3584, 28, 28, 4, 18944, tied=False)

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
    "Qwen/Qwen2.5-0.5B": QWEN_0_5B,
    "Qwen/Qwen2.5-0.5B-Instruct": QWEN_0_5B,
    "Qwen/Qwen2.5-1.5B": QWEN_1_5B,
    "Qwen/Qwen2.5-1.5B-Instruct": QWEN_1_5B,
    "Qwen/Qwen2.5-7B": QWEN_7B,
    "Qwen/Qwen2.5-7B-Instruct": QWEN_7B,
    "meta-llama/Llama-3.1-8B": LLAMA_3_1_8B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_3_1_8B,
    "meta-llama/Llama-3.1-70B": LLAMA_3_1_70B,
    "meta-llama/Llama-3.1-70B-Instruct": LLAMA_3_1_70B,
    "meta-llama/Llama-2-7b": LLAMA_2_7B,
    "meta-llama/Llama-2-7b-hf": LLAMA_2_7B,
    "mistralai/Mistral-7B-v0.1": MISTRAL_7B,
}


def published(name: str) -> ModelConfig | None:
    """The resolved shape of a model by its name on the hub; None where it is not in the table."""
    shape = SHAPES.get(name)
    return None if shape is None else resolve(shape)
