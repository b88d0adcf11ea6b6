"""What configs of each family mean, and what is refused. tests/parity has the numbers of transformers."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf.models.config import ModelConfig, layer_types_of, resolve, row_limit
from jaxrlhf.models.decoding import prefill
from jaxrlhf.models.families import FAMILIES
from jaxrlhf.models.files import hf_config, hf_weights
from jaxrlhf.models.parameters import parameter_table
from jaxrlhf.models.rope import RopeScaling
from jaxrlhf.models.transformer import Runtime, forward
from jaxrlhf.run import saved_run
from tests.support import tiny

SMALL: dict[str, Any] = {"vocab_size": 101, "hidden_size": 32, "mlp_size": 48}
GEMMA4: dict[str, Any] = {"family": "gemma4_text", "layer_types": ("local", "global"), "sliding_window": 4}
COMMON: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
    "head_dim": 16,
}


def parse(family: str, **changes) -> ModelConfig:
    """The ModelConfig of a config.json that says little else; ... takes a field out."""
    raw = {"model_type": family, "architectures": [FAMILIES[family].hf.classes["lm"]], **COMMON, **changes}
    if family == "gpt_neox":
        raw |= {"hidden_size": 512, "head_dim": None}
    return hf_config.parse_config({name: value for name, value in raw.items() if value is not ...}, "here")[0]


def pattern(cfg: ModelConfig) -> str:
    """ "LG...": local and global layers; N: linear ones; O: without positions."""
    return "".join({"global": "G", "local": "L", "linear": "N", "nope": "O"}[kind] for kind in layer_types_of(cfg))


# ---- resolve --------------------------------------------------------------------------------------------------------


def test_resolve():
    cfg = resolve(ModelConfig(hidden_size=128, num_heads=4), vocab_size=300)
    assert (cfg.vocab_size, cfg.num_kv_heads, cfg.head_dim, cfg.mlp_size) == (300, 4, 32, 384)
    assert cfg.attention_bias is cfg.parallel_residual is False
    cfg = resolve(ModelConfig(family="gpt2", hidden_size=128, num_heads=4), vocab_size=300)
    assert (cfg.mlp_size, cfg.attention_bias, cfg.mlp_bias) == (512, True, True)
    assert resolve(ModelConfig(family="gpt_neox")).parallel_residual
    cfg = resolve(ModelConfig(family="qwen2"))
    assert (cfg.attention_bias, cfg.mlp_bias) == (True, False)
    assert "bias" not in parameter_table(cfg, "lm")["layers"]["attention"]["out"]


def test_windows_from_scratch():
    make = lambda family, **more: resolve(ModelConfig(family=family, num_layers=7, **more))
    assert pattern(make("gemma3_text")) == "GGGGGGG" and make("gemma3_text").layer_types == ()
    assert pattern(make("gemma3_text", sliding_window=8)) == "LLLLLGL"
    assert pattern(make("gemma2", sliding_window=8)) == "LGLGLGL"
    assert pattern(make("mistral", sliding_window=8)) == "LLLLLLL"
    cfg = make("gemma2", sliding_window=8, layer_types=("global",) * 7, local_rope_theta=5.0)
    assert (cfg.sliding_window, cfg.layer_types, cfg.local_rope_theta) == (0, (), None)  # one way of saying it
    assert all(resolve(found) == found for found in (cfg, make("gemma3_text", sliding_window=8)))


LONGROPE = RopeScaling("longrope", 4.0, original_max_positions=16, short_factor=(1.0,) * 8, long_factor=(2.0,) * 8)


@pytest.mark.parametrize(
    "fields, line",
    [
        ({"num_kv_heads": 3}, "num_heads: 4 is not a multiple of num_kv_heads: 3"),
        ({"layer_types": ("local",), "sliding_window": 2}, "layer_types: 1 of them; expected .* num_layers: 2"),
        ({"layer_types": ("local", "global")}, "layer_types: local layers need a window; expected sliding_window"),
        (
            {"rotary_fraction": 0.01},
            "rotary_fraction: 0.01 of head_dim: 32 is 0 features, rotated in pairs;",
        ),
        (
            {"rotary_fraction": 2.0},
            "rotary_fraction: 2 of head_dim: 32 is 64 features, .*; expected 1 to 32",
        ),
        ({"head_dim": 7}, "rotary_fraction: 1 of head_dim: 7 is 7 features"),
        ({"rope_scaling": LONGROPE}, "rope_scaling.short_factor: 8 numbers; expected one for each of 16 frequencies"),
        ({"layer_types": ("global", "nope")}, "layer_types: nope: a llama has no such layers; expected local or gl"),
        ({"family": "smollm3", "layer_types": ("global", "local")}, "layer_types: local: .* expected global or nope"),
        ({"family": "ministral3"}, "rope_scaling: null: of ministral3 it is yarn; nearest: yarn"),
        ({"per_layer_size": 8}, "per_layer_size: 8: a llama has no such layers; nearest: 0"),
        ({"keys_are_values": True}, "keys_are_values: True: a llama has no such layers; nearest: False"),
        (
            GEMMA4 | {"layer_types": ("global", "local")},
            "layer_types: local: the last layer of a gemma4_text is global",
        ),
        (GEMMA4 | {"shared_kv_layers": 1}, "shared_kv_layers: 1: each type .* keys and values; nearest: 0"),
        (GEMMA4 | {"wide_shared_mlp": True}, "wide_shared_mlp: true: of layers that share keys and values"),
        (GEMMA4 | {"global_kv_heads": 1}, "global_kv_heads: 1: needs keys_are_values: true; nearest: 4"),
        (
            GEMMA4 | {"global_kv_heads": 3, "keys_are_values": True},
            "num_heads: 4 is not a multiple of global_kv_heads: 3",
        ),
        (GEMMA4 | {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar: 16: a gemma4_text does not divide products"),
        (GEMMA4 | {"rope_scaling": RopeScaling("linear", 2.0)}, "rope_scaling.kind: linear: not of gemma4_text"),
        ({"rope_scaling": RopeScaling("proportional")}, "rope_scaling.kind: proportional: not of llama"),
        (  # nor does transformers compute it
            GEMMA4 | {"rope_scaling": RopeScaling("proportional"), "global_head_dim": 17, "rotary_fraction": 0.25},
            "global_head_dim: 17: a proportional law has a frequency for each pair of features; nearest: 18",
        ),
        ({"family": "smollm3", "sliding_window": 4}, "sliding_window: 4: a smollm3 has no local layers; nearest: 0"),
    ],
)
def test_what_does_not_fit_together(fields, line):
    with pytest.raises(ValueError, match="^" + line) as error:
        resolve(ModelConfig(**fields))
    assert "\n" not in str(error.value)


def test_rows_that_a_model_does_not_compute_are_refused():
    """Of longrope in the forward pass and in a cache; never with the wrong factors."""
    cfg = resolve(ModelConfig(**SMALL, num_heads=2, rope_scaling=LONGROPE))
    params = tiny.parameters(cfg, "lm", 0)
    tokens = lambda size: jnp.ones((1, size), jnp.int32)
    assert np.isfinite(jax.jit(lambda params: forward(params, cfg, tokens(16), tokens(16), Runtime()))(params)).all()
    with pytest.raises(ValueError, match=r"^rows of 17 columns: more than this llama model computes; nearest: 16$"):
        forward(params, cfg, tokens(17), tokens(17), Runtime())
    unstacked = params | {"layers": []}
    with pytest.raises(ValueError, match="rows of 17 columns"):
        prefill(unstacked, cfg, tokens(8), tokens(8) > 0, 1, 9, Runtime())
    assert row_limit(resolve(ModelConfig(family="gpt2", max_positions=9))) == 9
    assert row_limit(resolve(ModelConfig(max_positions=9))) is None


def test_records_of_older_checkpoints():
    """ModelConfig as it was saved before it had most fields, and as it is saved now: through JSON."""
    old = {**SMALL, "family": "gpt2", "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_dim": 8}
    old |= {"max_positions": 16, "norm_eps": 1e-5, "rope_theta": 1e4, "rope_scaling": None, "attention_bias": True}
    cfg, head = saved_run.model_of({"head": "lm", "config": {**old, "mlp_bias": True, "tie_embeddings": True}})
    assert (cfg, head) == (resolve(ModelConfig(**SMALL, family="gpt2", max_positions=16)), "lm")
    window: dict[str, Any] = {"num_layers": 3, "sliding_window": 4, "layer_types": ("local", "global", "local")}
    new = resolve(ModelConfig(**SMALL, family="gemma2", num_heads=2, rope_scaling=LONGROPE, **window))
    record = json.loads(json.dumps(saved_run.models_record({"policy": new}, {"policy": "lm"}, {})))
    assert saved_run.model_of(record["policy"]) == (new, "lm")
    hash(saved_run.model_of(record["policy"])[0])


# ---- config.json ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, changes, expected",
    [
        ("mistral", {}, (4096, "LLLLLL")),
        ("mistral", {"sliding_window": None}, (0, "GGGGGG")),  # null is not absent
        ("phi3", {}, (0, "GGGGGG")),
        ("phi3", {"sliding_window": 7}, (7, "LLLLLL")),
        ("qwen2", {"sliding_window": 7}, (0, "GGGGGG")),
        ("qwen2", {"use_sliding_window": True}, (0, "GGGGGG")),  # from layer 28 on
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 4}, (4096, "GGGGLL")),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 7}, (7, "LLLLLL")),
        ("gemma2", {}, (4096, "LGLGLG")),
        ("gemma3_text", {}, (4096, "LLLLLG")),
        ("gemma3_text", {"sliding_window_pattern": 2, "sliding_window": 7}, (7, "LGLGLG")),
        ("gemma2", {"layer_types": ["full_attention"] * 6}, (0, "GGGGGG")),
        ("gemma4_text", {}, (512, "LLLLLG")),
        ("gemma4_text", {"num_hidden_layers": 8, "sliding_window": 7}, (7, "LLLLLGLG")),  # the last is global
        ("gemma4_text", {"layer_types": ["full_attention"] * 6}, (0, "GGGGGG")),
        ("olmo3", {}, (4096, "LLLGLL")),
        ("gpt_oss", {}, (128, "LGLGLG")),
        ("gpt_oss", {"layer_types": ["full_attention"] * 6}, (0, "GGGGGG")),
        ("smollm3", {}, (0, "GGGOGG")),
        ("smollm3", {"no_rope_layer_interval": 2, "sliding_window": 7}, (0, "GOGOGO")),  # use_sliding_window: false
        ("smollm3", {"no_rope_layers": [0, 1, 1, 1, 1, 0, 0, 0]}, (0, "OGGGGO")),
        ("qwen3_5_text", {}, (0, "NNNGNN")),
        ("qwen3_5_text", {"full_attention_interval": 2}, (0, "NGNGNG")),
        ("qwen3_5_text", {"layer_types": ["full_attention", *["linear_attention"] * 5]}, (0, "GNNNNN")),
    ],
)
def test_windows(family, changes, expected):
    cfg = parse(family, **changes)
    assert (cfg.sliding_window, pattern(cfg)) == expected


def test_absent_fields_are_what_transformers_assumes():
    cfg = parse("gemma2", head_dim=...)
    assert (cfg.num_kv_heads, cfg.head_dim, cfg.query_pre_attn_scalar) == (4, 256, 0)  # 256, as head_dim
    assert (cfg.attention_softcap, cfg.logit_softcap, cfg.tie_embeddings, cfg.norm_eps) == (50.0, 30.0, True, 1e-6)
    cfg = parse("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None, query_pre_attn_scalar=144)
    assert (cfg.attention_softcap, cfg.logit_softcap, cfg.query_pre_attn_scalar) == (None, None, 144)
    cfg = parse("gemma3_text")
    assert (cfg.rope_theta, cfg.local_rope_theta, cfg.attention_softcap, cfg.logit_softcap) == (1e6, 1e4, None, None)
    cfg = parse("gpt_neox")
    assert (cfg.rotary_fraction, cfg.rope_theta, cfg.parallel_residual, cfg.attention_bias) == (0.25, 1e4, True, True)
    assert parse("mistral").num_kv_heads == 8 and parse("mistral", num_key_value_heads=None).num_kv_heads == 32
    assert (parse("qwen3", head_dim=...).head_dim, parse("qwen2").num_kv_heads, parse("olmo2").norm_eps) == (
        128,
        32,
        1e-5,
    )


def test_heads_of_global_layers():
    """In the fields of published files, and in the object a layer that transformers writes since version 5."""
    cfg = parse("gemma4_text")
    assert (cfg.global_head_dim, cfg.global_kv_heads, cfg.per_layer_size, cfg.query_pre_attn_scalar) == (512, 4, 256, 1)
    assert (cfg.rope_theta, cfg.local_rope_theta, cfg.rotary_fraction) == (1e6, 1e4, 0.25)
    assert parse("gemma4_text", num_global_key_value_heads=2) == cfg  # it counts where keys are values
    both = {"attention_k_eq_v": True, "global_head_dim": 24, "num_global_key_value_heads": 2}
    old = parse("gemma4_text", **both)
    assert (old.global_head_dim, old.global_kv_heads, old.keys_are_values) == (24, 2, True)
    each = {"attention_k_eq_v": True, "per_layer_config": {"5": {"head_dim": 24, "num_key_value_heads": 2}}}
    assert parse("gemma4_text", **each) == old
    assert parse("gemma4_text", per_layer_config={}).global_head_dim == cfg.head_dim


def test_rope_spellings():
    """Old and new, and the names that families have of their own."""
    new = parse("gpt_neox", rope_parameters={"rope_type": "default", "rope_theta": 5e2, "partial_rotary_factor": 0.5})
    assert new == parse("gpt_neox", rotary_emb_base=500, rotary_pct=0.5)
    old = parse(
        "gemma3_text", rope_theta=7e5, rope_local_base_freq=3e3, rope_scaling={"rope_type": "linear", "factor": 8}
    )
    layers = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 7e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e3},
    }
    assert old == parse("gemma3_text", rope_parameters=layers)
    assert (old.rope_scaling, old.local_rope_theta) == (RopeScaling("linear", 8.0), 3e3)
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    expected = RopeScaling("yarn", 4.0, original_max_positions=32768)
    assert parse("qwen2", rope_parameters=yarn).rope_scaling == expected
    mscale = parse("qwen2", rope_parameters=yarn | {"mscale": 2.0, "mscale_all_dim": 1.0}).rope_scaling
    assert (
        mscale
        and mscale.attention_factor
        and np.isclose(mscale.attention_factor, (0.2 * np.log(4) + 1) / (0.1 * np.log(4) + 1))
    )


def test_a_null_fraction_is_the_whole_head():
    """transformers has a default where the field is absent."""
    found = [parse("qwen3_5_text", **given).rotary_fraction for given in ({}, {"partial_rotary_factor": None})]
    assert found == [0.25, 1.0]


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])  # names that it had
def test_longrope_of_phi3(kind):
    """The factor is the ratio of contexts, and the original context stands outside, by default 4096."""
    rope = {"type": kind, "short_factor": [1, 1.5, 2], "long_factor": [2.0, 4, 5]}
    more = {"rope_scaling": rope, "partial_rotary_factor": 0.375, "max_position_embeddings": 16384}
    scaling = parse("phi3", **more).rope_scaling
    assert scaling == RopeScaling(
        "longrope", 4.0, original_max_positions=4096, short_factor=(1.0, 1.5, 2.0), long_factor=(2.0, 4.0, 5.0)
    )
    assert row_limit(parse("phi3", **more, original_max_position_embeddings=1024)) == 1024


@pytest.mark.parametrize(
    "family, changes, line",
    [
        ("mistral", {"layer_types": ["full_attention"] * 6}, "layer_types: .* is not supported; expected None"),
        ("olmo2", {"sliding_window": 7}, "sliding_window: 7 is not supported; expected None"),
        ("mistral", {"sliding_window": 0}, "sliding_window: 0; expected a positive whole number"),
        ("gemma2", {"sliding_window": None}, "sliding_window: null is not supported"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation: 'gelu' is not supported"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping: 0; expected a positive number"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0 is not supported"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1.0}}, "expected full_attention and sliding_attention"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters.sliding_attention: rope_type: 'linear' is not supported; expected 'default'",
        ),
        ("gemma3_text", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not supported; .* llama3"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not supported; .* longrope"),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": 2.0}},
            "short_factor: 2.0; expected a list of numbers",
        ),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [0]}}, "short_factor: 0; expected a positive number"),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
            "rope_scaling.short_factor: 1 numbers; expected one for each of 8 frequencies",
        ),
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window: 1; expected true or false"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers: -1"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 6}, "layer_types: local layers need a window"),
        ("qwen2", {"layer_types": ["full_attention"] * 5}, "layer_types: 5 of them; expected .* num_layers: 6"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 6}, "layer_types: 'chunked_attention' is not supported"),
        ("qwen3", {"layer_types": ["linear_attention"] * 6}, "'linear_attention' is not supported; expected sliding_"),
        ("qwen3_5_text", {"layer_types": ["sliding_attention"] * 6}, "expected linear_attention or full_attention"),
        ("qwen3_5_text", {"layer_types": ["linear_attention"] * 6}, "layer_types: linear: expected .* one global"),
        ("qwen3_5_text", {"linear_num_value_heads": 24}, "linear_value_heads: 24 is not a multiple of linear_key_hea"),
        ("qwen3_5_text", {"sliding_window": 7}, "sliding_window: 7 is not supported; expected None"),
        ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate: False is not supported"),
        ("qwen3_5_text", {"full_attention_interval": 0}, "full_attention_interval: 0; expected a positive whole"),
        ("ministral3", {}, "rope_parameters.rope_type: 'default' is not supported; expected yarn"),
        (
            "ministral3",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_parameters.llama_4_scaling_beta: None; expected a positive number",
        ),
        ("gemma4_text", {"enable_moe_block": 1}, "enable_moe_block: 1; expected true or false"),
        ("gemma4_text", {"enable_moe_block": True}, "num_experts: 0: enable_moe_block is true; expected 1 or more"),
        ("gemma4_text", {"enable_moe_block": True, "num_experts": 4}, "top_k_experts: 0: enable_moe_block is true"),
        ("gemma4_text", {"enable_moe_block": ""}, "enable_moe_block: ''; expected true or false"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention: 'all' is not supported"),
        (
            "gemma4_text",
            {"vocab_size_per_layer_input": 7},
            "vocab_size_per_layer_input: 7 is not supported; expected 100",
        ),
        ("gemma4_text", {"num_kv_shared_layers": -1}, "num_kv_shared_layers: -1; expected a whole number"),
        ("gemma4_text", {"num_kv_shared_layers": 1}, "shared_kv_layers: 1: each type of layers needs one before them"),
        ("gemma4_text", {"layer_types": ["sliding_attention"] * 6}, "layer_types: local: the last layer .* is global"),
        ("gemma4_text", {"global_head_dim": 0}, "global_head_dim: 0; expected a positive whole number"),
        (
            "gemma4_text",
            {"per_layer_config": {"1": {"head_dim": 8}}},
            "per_layer_config: .* each layer of full_attention",
        ),
        ("gemma4_text", {"per_layer_config": {"5": {"sliding_window": 8}}}, "per_layer_config: sliding_window: is not"),
        (
            "gemma4_text",
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "'default' is not .* proportional",
        ),
        (
            "olmo3",
            {"rope_theta": 1e6},
            "rope_theta: 1000000.0 is not read alike .*; expected 500000, or rope_parameters",
        ),
        ("olmo3", {"sliding_window": None}, "sliding_window: null is not supported"),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window: True is not supported; expected False"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 6}, "layer_types: .* expected full_attention alone"),
        ("smollm3", {"no_rope_layers": [1, 1, 0]}, "no_rope_layers: 3 of them; expected one for each of 6 layers"),
        ("smollm3", {"no_rope_layers": [1, 1, 2] * 2}, "no_rope_layers: .* expected a list of 1 .* and 0"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval: 0; expected a positive whole number"),
        ("qwen3", {"layer_types": "full_attention"}, "layer_types: 'full_attention'; expected a list"),
        ("gpt_neox", {"hidden_act": "gelu_fast"}, "hidden_act: 'gelu_fast' is not supported; expected 'gelu'"),
        ("gpt_neox", {"rotary_pct": 0}, "partial_rotary_factor: 0; expected a positive number"),
        ("olmo2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type: 'dynamic'"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}}, "truncate: 1; expected true or"),
    ],
)
def test_what_is_not_supported_is_named(family, changes, line):
    with pytest.raises(ValueError, match="^here.*" + line) as error:
        parse(family, **changes)
    assert "\n" not in str(error.value)


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "head"), [(name, head) for name in FAMILIES for head in FAMILIES[name].hf.classes])
def test_a_model_from_scratch_comes_back_from_its_folder(family, head, tmp_path):
    """Whatever the family's defaults are; norms and all other weights to the bit."""
    window: dict[str, Any] = {"sliding_window": 4} if FAMILIES[family].hf.windows else {}
    local: dict[str, Any] = {"local_rope_theta": 50.0} if family == "gemma3_text" else {}
    if family == "ministral3":
        local = {"rope_scaling": RopeScaling("yarn", 2.0, original_max_positions=64, query_beta=0.1)}
    experts: dict[str, Any] = {"num_experts": 3} if FAMILIES[family].experts else {}
    experts |= {"expert_size": 12} if FAMILIES[family].experts_beside else {}
    cfg = resolve(ModelConfig(family=family, num_layers=3, tie_embeddings=False, **SMALL, **window, **local, **experts))
    rng = np.random.default_rng(0)
    params = tiny.parameters(cfg, head, 0)
    query = params["layers"]["attention"]["query"]
    query["kernel"] = jnp.asarray(rng.normal(size=query["kernel"].shape), jnp.float32)
    hf_weights.save(params, cfg, head, tmp_path)
    assert hf_config.read_config(tmp_path) == (cfg, head)
    assert tiny.equal_trees(cut(hf_weights.load(tmp_path, cfg, head), cfg), cut(params, cfg))


def cut(params, cfg: ModelConfig):
    """Without the rows that pad the vocabulary."""
    params = params | {"embed": params["embed"] | {"tokens": {"embedding": 0}}}
    return params | ({"head": 0} if "bias" not in params.get("head", {"bias": 0}) else {})


def test_names_and_layouts_of_fused_tensors(tmp_path):
    """GPT-NeoX: query, key, value a head; Phi 3: all queries, all keys, all values, and the gate before the rest."""
    neox = resolve(ModelConfig(family="gpt_neox", **SMALL, tie_embeddings=False))
    params = tiny.parameters(neox, "lm", 0)
    hf_weights.save(params, neox, "lm", tmp_path / "neox")
    file = load_file(tmp_path / "neox" / "model.safetensors")
    fused = file["gpt_neox.layers.1.attention.query_key_value.weight"]
    for head in range(4):
        for place, part in enumerate(("query", "key", "value")):
            rows = fused[24 * head + 8 * place : 24 * head + 8 * (place + 1)]
            np.testing.assert_array_equal(rows, params["layers"]["attention"][part]["kernel"][1, :, head].T)
    assert file["embed_out.weight"].shape == (101, 32)
    phi = resolve(ModelConfig(family="phi3", **SMALL, num_kv_heads=2))
    params = tiny.parameters(phi, "lm", 0)
    hf_weights.save(params, phi, "lm", tmp_path / "phi")
    file = load_file(tmp_path / "phi" / "model.safetensors")
    gate, up = np.split(file["model.layers.0.mlp.gate_up_proj.weight"], 2)
    np.testing.assert_array_equal(gate, params["layers"]["mlp"]["gate"]["kernel"][0].T)
    np.testing.assert_array_equal(up, params["layers"]["mlp"]["up"]["kernel"][0].T)
    key = file["model.layers.0.self_attn.qkv_proj.weight"][32 + 8 : 32 + 16]
    np.testing.assert_array_equal(key, params["layers"]["attention"]["key"]["kernel"][0, :, 1].T)


def test_pythia_files_of_old_versions(tmp_path):
    """No prefix but for the head, and causal masks and frequencies among the weights."""
    cfg = resolve(ModelConfig(family="gpt_neox", **SMALL, tie_embeddings=False))
    params = tiny.parameters(cfg, "lm", 0)
    hf_weights.save(params, cfg, "lm", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("gpt_neox."): value for name, value in tensors.items()}
    for name in ("bias", "masked_bias", "rotary_emb.inv_freq"):
        tensors[f"layers.0.attention.{name}"] = np.ones(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    assert tiny.equal_trees(cut(hf_weights.load(tmp_path, cfg, "lm"), cfg), cut(params, cfg))


@pytest.mark.parametrize(
    "family, changes, what",
    [
        ("mistral", {"sliding_window": 4, "layer_types": ("local", "global")}, "layer_types: .* cannot be said"),
        ("llama", {"sliding_window": 4}, "sliding_window: 4 cannot be said in the config.json of llama"),
        ("llama", {"parallel_residual": True}, "parallel_residual: True cannot be said"),
        ("llama", {"logit_softcap": 3.0}, "logit_softcap: 3.0 cannot be said"),
        ("gpt_neox", {"num_kv_heads": 2}, "num_kv_heads: 2 cannot be said"),
        ("olmo2", {"rotary_fraction": 0.5}, "rotary_fraction: 0.5 cannot be said"),
        ("phi3", {"rope_scaling": RopeScaling("linear", 2.0)}, "'linear' is not supported"),
        (
            "ministral3",
            {"rope_scaling": RopeScaling("yarn", 2.0)},
            "rope_scaling.llama_4_scaling_beta: 0.0; expected a positive number",
        ),
        ("mistral", {"rope_scaling": RopeScaling("yarn", 2.0, query_beta=0.1)}, "rope_scaling: .* cannot be said"),
    ],
)
def test_what_a_family_cannot_say(family, changes, what, tmp_path):
    cfg = resolve(ModelConfig(family=family, **SMALL, **changes))
    with pytest.raises(ValueError, match=f"^export: .*{what}|^export.*{what}"):
        hf_weights.save(tiny.parameters(cfg, "lm", 0), cfg, "lm", tmp_path)
    assert not list(tmp_path.iterdir())


def test_offset_norms_start_at_nothing():
    """Gemma multiplies by 1 + scale: in files and here the scale is what is kept, so it comes back to the bit."""
    table = parameter_table(resolve(ModelConfig(family="gemma2", **SMALL)), "lm")
    assert table["final_norm"]["scale"].init == table["layers"]["mlp"]["post_norm"]["scale"].init == "zeros"
    plain = parameter_table(resolve(ModelConfig(family="olmo2", **SMALL, num_kv_heads=2)), "lm")
    assert plain["final_norm"]["scale"].init == "ones"
    assert {name for name in plain["layers"]["attention"] if "norm" in name} == {"post_norm", "query_norm", "key_norm"}
    assert plain["layers"]["attention"]["key_norm"]["scale"].shape == (2, 2, 8)
    assert dataclasses.replace(resolve(ModelConfig(family="qwen3")), num_layers=1).head_dim == 32
