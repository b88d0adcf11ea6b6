"""One row a model family: what distinguishes its blocks, and what Hugging Face calls its config fields and weights.

To add a family whose block is one of these: a row here. models/hf*.py read and write by these tables alone.
"""

from typing import Any, Literal, NamedTuple

from jaxrlhf.types import Head


class Module(NamedTuple):
    """What one of our modules (linear map, norm, embedding) is in a safetensors file: <name>.weight and <name>.bias.

    ``layout`` says how the weight's dimensions are made of our axes (``layers`` apart: files have a tensor a layer).
    Dimensions are separated by blanks, and axes that share one dimension are joined by dots, the slowest first:
    "heads.head_dim embed" is a torch Linear [H * K, D], "embed heads.head_dim" its transpose. A bias has those of
    these dimensions that our bias has.

    Modules with the same name are parts of one fused tensor, in the order of the table, laid one after the other where
    the layout says ``part``: "part.heads.head_dim embed" is all queries, all keys, all values (they may differ in
    size), "heads.part.head_dim embed" is query, key, value of head 0, then of head 1, ...
    """

    name: str  # {layer} stands for the layer's number
    layout: str


class HuggingFace(NamedTuple):
    """A family in the words of Hugging Face."""

    model_type: str
    classes: dict[Head, str]  # the name in "architectures"
    fields: dict[str, tuple[str, Any]]  # of ModelConfig -> (in config.json, value where absent; ...: required)
    fixed: dict[str, tuple]  # config.json fields that change the maths -> the values supported (the first where absent)
    modules: dict[str, Module]  # path in our parameters -> the same in the file
    prefix: str  # that base-model files leave out of the names
    ignored: str = "(?!)"  # regular expression: tensors that are no weights (buffers of old versions)


class Family(NamedTuple):
    """The traits of a family's decoder block, and its names."""

    norm: Literal["rms", "layer"]
    activation: Literal["silu", "gelu_tanh"]
    gated: bool  # mlp: down(act(gate(x)) * up(x)), else down(act(up(x)))
    positions: Literal["rope", "learned"]
    bias: bool  # whether linear maps have biases unless the config says
    hf: HuggingFace


LLAMA = HuggingFace(
    model_type="llama",
    classes={"lm": "LlamaForCausalLM", "scalar": "LlamaForSequenceClassification"},
    fields={
        "vocab_size": ("vocab_size", ...),
        "hidden_size": ("hidden_size", ...),
        "num_layers": ("num_hidden_layers", ...),
        "num_heads": ("num_attention_heads", ...),
        "num_kv_heads": ("num_key_value_heads", None),
        "head_dim": ("head_dim", None),
        "mlp_size": ("intermediate_size", ...),
        "max_positions": ("max_position_embeddings", 2048),
        "norm_eps": ("rms_norm_eps", 1e-6),
        "attention_bias": ("attention_bias", False),
        "mlp_bias": ("mlp_bias", False),
        "tie_embeddings": ("tie_word_embeddings", False),
    },
    fixed={"hidden_act": ("silu", "swish"), "pretraining_tp": (1, None)},
    modules={
        "embed.tokens": Module("model.embed_tokens", "vocab embed"),
        "layers.attention.norm": Module("model.layers.{layer}.input_layernorm", "embed"),
        "layers.attention.query": Module("model.layers.{layer}.self_attn.q_proj", "heads.head_dim embed"),
        "layers.attention.key": Module("model.layers.{layer}.self_attn.k_proj", "kv_heads.head_dim embed"),
        "layers.attention.value": Module("model.layers.{layer}.self_attn.v_proj", "kv_heads.head_dim embed"),
        "layers.attention.out": Module("model.layers.{layer}.self_attn.o_proj", "embed heads.head_dim"),
        "layers.mlp.norm": Module("model.layers.{layer}.post_attention_layernorm", "embed"),
        "layers.mlp.gate": Module("model.layers.{layer}.mlp.gate_proj", "mlp embed"),
        "layers.mlp.up": Module("model.layers.{layer}.mlp.up_proj", "mlp embed"),
        "layers.mlp.down": Module("model.layers.{layer}.mlp.down_proj", "embed mlp"),
        "final_norm": Module("model.norm", "embed"),
        "head": Module("lm_head", "vocab embed"),
    },
    prefix="model.",
    ignored=r"\.rotary_emb\.inv_freq$",
)

GPT2 = HuggingFace(
    model_type="gpt2",
    classes={"lm": "GPT2LMHeadModel", "scalar": "GPT2ForSequenceClassification"},
    fields={
        "vocab_size": ("vocab_size", ...),
        "hidden_size": ("n_embd", ...),
        "num_layers": ("n_layer", ...),
        "num_heads": ("n_head", ...),
        "mlp_size": ("n_inner", None),
        "max_positions": ("n_positions", 1024),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", True),
    },
    fixed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),  # three names of the tanh formula
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    modules={
        "embed.tokens": Module("transformer.wte", "vocab embed"),
        "embed.positions": Module("transformer.wpe", "positions embed"),
        "layers.attention.norm": Module("transformer.h.{layer}.ln_1", "embed"),
        "layers.attention.query": Module("transformer.h.{layer}.attn.c_attn", "embed part.heads.head_dim"),
        "layers.attention.key": Module("transformer.h.{layer}.attn.c_attn", "embed part.kv_heads.head_dim"),
        "layers.attention.value": Module("transformer.h.{layer}.attn.c_attn", "embed part.kv_heads.head_dim"),
        "layers.attention.out": Module("transformer.h.{layer}.attn.c_proj", "heads.head_dim embed"),
        "layers.mlp.norm": Module("transformer.h.{layer}.ln_2", "embed"),
        "layers.mlp.up": Module("transformer.h.{layer}.mlp.c_fc", "embed mlp"),
        "layers.mlp.down": Module("transformer.h.{layer}.mlp.c_proj", "mlp embed"),
        "final_norm": Module("transformer.ln_f", "embed"),
        "head": Module("lm_head", "vocab embed"),
    },
    prefix="transformer.",
    ignored=r"\.attn\.(masked_)?bias$",
)

FAMILIES: dict[str, Family] = {
    "llama": Family(norm="rms", activation="silu", gated=True, positions="rope", bias=False, hf=LLAMA),
    "gpt2": Family(norm="layer", activation="gelu_tanh", gated=False, positions="learned", bias=True, hf=GPT2),
}
