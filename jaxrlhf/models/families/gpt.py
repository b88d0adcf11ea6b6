"""GPT-2, and GPT-NeoX (Pythia)."""

from jaxrlhf.models.families.traits import Family, HuggingFace, Module, Rope

GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")  # three names of the tanh formula

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
        "activation_function": ("gelu_new", *GELU_TANH),
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

QKV = "gpt_neox.layers.{layer}.attention.query_key_value"
GPT_NEOX = HuggingFace(
    model_type="gpt_neox",
    classes={"lm": "GPTNeoXForCausalLM", "scalar": "GPTNeoXForSequenceClassification"},
    fields={
        "vocab_size": ("vocab_size", ...),
        "hidden_size": ("hidden_size", ...),
        "num_layers": ("num_hidden_layers", ...),
        "num_heads": ("num_attention_heads", ...),
        "mlp_size": ("intermediate_size", ...),
        "max_positions": ("max_position_embeddings", 2048),
        "norm_eps": ("layer_norm_eps", 1e-5),
        "attention_bias": ("attention_bias", True),
        "tie_embeddings": ("tie_word_embeddings", False),
        "parallel_residual": ("use_parallel_residual", True),
    },
    fixed={"hidden_act": ("gelu",), "head_dim": (None,)},
    modules={
        "embed.tokens": Module("gpt_neox.embed_in", "vocab embed"),
        "layers.attention.norm": Module("gpt_neox.layers.{layer}.input_layernorm", "embed"),
        "layers.attention.query": Module(QKV, "heads.part.head_dim embed"),
        "layers.attention.key": Module(QKV, "kv_heads.part.head_dim embed"),
        "layers.attention.value": Module(QKV, "kv_heads.part.head_dim embed"),
        "layers.attention.out": Module("gpt_neox.layers.{layer}.attention.dense", "embed heads.head_dim"),
        "layers.mlp.norm": Module("gpt_neox.layers.{layer}.post_attention_layernorm", "embed"),
        "layers.mlp.up": Module("gpt_neox.layers.{layer}.mlp.dense_h_to_4h", "mlp embed"),
        "layers.mlp.down": Module("gpt_neox.layers.{layer}.mlp.dense_4h_to_h", "embed mlp"),
        "final_norm": Module("gpt_neox.final_layer_norm", "embed"),
        "head": Module("embed_out", "vocab embed"),
    },
    prefix="gpt_neox.",
    ignored=r"\.attention\.(masked_)?bias$|\.rotary_emb\.inv_freq$",
    rope=Rope(theta=("rotary_emb_base", 10000.0), fraction=("rotary_pct", 0.25)),
)

PLAIN = Family(
    norm="layer",
    activation="gelu_tanh",
    gated=False,
    positions="learned",
    attention_bias=True,
    mlp_bias=True,
    hf=GPT2,
)

FAMILIES = {
    "gpt2": PLAIN,
    "gpt_neox": PLAIN._replace(activation="gelu", positions="rope", parallel_residual=True, hf=GPT_NEOX),
}
