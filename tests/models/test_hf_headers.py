"""Names and classes that public folders have: heads of reward models, code named in config.json, wrapped text models.

tests/parity/test_published_folders.py compares wrapped models with transformers."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.files import hf_config, hf_headers, hf_weights
from tests.models.test_hf_weights import MINIMAL, equal, random_params, refused, rewrite

SHAPE = resolve(ModelConfig(vocab_size=101, hidden_size=32, mlp_size=48, max_positions=64, tie_embeddings=False))


def edit(folder, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in raw.items() if value is not ...}))


def reward_model(folder, name: str, bias: bool):
    """The parameters of a reward model written with its head called ``name``."""
    params = random_params(SHAPE, "scalar")
    if not bias:
        params["head"]["bias"] = 0 * params["head"]["bias"]
    hf_weights.save(params, SHAPE, "scalar", folder)
    tensors = load_file(folder / "model.safetensors")
    assert ("score.bias" in tensors) == bias
    save_file(
        {key.replace("score.", f"{name}."): value for key, value in tensors.items()}, folder / "model.safetensors"
    )
    return params


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["score", "v_head", "v_head.summary", "value_head", "regression_head", "score_head"])
@pytest.mark.parametrize("named", [["LlamaForSequenceClassification"], ["LlamaForScore"], None])
def test_the_heads_of_public_reward_models(tmp_path, name, bias, named):
    """Under classes of transformers and others; nothing is drawn."""
    params = reward_model(tmp_path, name, bias)
    edit(tmp_path, architectures=named)
    cfg, head = hf_config.read_config(tmp_path)
    assert (cfg, head) == (SHAPE, "scalar")
    fresh = []
    equal(hf_weights.load(tmp_path, cfg, head, fresh=fresh), params)
    assert fresh == []


@pytest.mark.parametrize("apart", [False, True])
def test_a_value_head_beside_a_language_model(tmp_path, apart):
    """TRL's, and LLaMA-Factory's in a file of its own: either head is read, and a policy says what it leaves."""
    params = random_params(SHAPE)
    hf_weights.save(params, SHAPE, "lm", tmp_path)
    score = {"v_head.summary.weight": np.ones((1, 32), np.float32), "v_head.summary.bias": np.full(1, 3, np.float32)}
    tensors = load_file(tmp_path / "model.safetensors")
    if apart:
        save_file(score, tmp_path / "value_head.safetensors")
    else:
        tensors = {f"pretrained_model.{name}": tensor for name, tensor in tensors.items()} | score
        save_file(tensors, tmp_path / "model.safetensors")
    assert hf_config.read_config(tmp_path) == (SHAPE, "lm")
    equal(hf_weights.load(tmp_path, SHAPE, "lm"), params)
    assert hf_headers.kinds(hf_headers.examine(tmp_path, SHAPE, "lm").left) == "v_head (2 tensors)"
    head = hf_weights.load(tmp_path, SHAPE, "scalar")["head"]
    assert np.all(head["kernel"] == 1) and head["bias"] == 3


def test_heads_that_are_no_score_are_refused(tmp_path):
    reward_model(tmp_path, "score", True)
    rewrite(tmp_path, lambda tensors: tensors.update({"v_head.weight": np.ones((1, 32), np.float32)}))
    refused("holds 2 scalar heads: score, v_head; expected one", hf_weights.load, tmp_path, SHAPE, "scalar")
    rewrite(tmp_path, lambda tensors: [tensors.pop("score.weight"), tensors.pop("score.bias")])
    rewrite(tmp_path, lambda tensors: tensors.update({"v_head.weight": np.ones((19, 32), np.float32)}))
    refused(r"v_head.weight: has shape \(19, 32\)", hf_weights.load, tmp_path, SHAPE, "scalar")
    rewrite(tmp_path, lambda tensors: [tensors.pop("v_head.weight")])
    rewrite(tmp_path, lambda tensors: tensors.update({"score.0.weight": np.ones((32, 32), np.float32)}))
    refused("no place for: score.0.weight", hf_weights.load, tmp_path, SHAPE, "scalar")


PHI3 = MINIMAL | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
PHI_MAP = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}


def test_code_in_a_folder_is_never_run_and_may_name_what_transformers_has():
    """Phi-3, Phi-3.5, Phi-4-mini (which also names a tokenizer), and a fork that names its repository."""
    plain = hf_config.parse_config(PHI3, "here")
    for more in ({}, {"AutoTokenizer": ["mine.Mine", None]}, {"AutoModel": "owner/model--modeling_phi3.Phi3Model"}):
        assert hf_config.parse_config(PHI3 | {"auto_map": PHI_MAP | more}, "here") == plain
    other = PHI_MAP | {"AutoModelForCausalLM": "modeling_phi3.Phi3ForBidirectionalLM"}
    line = "here: auto_map: AutoModelForCausalLM: 'modeling_phi3.Phi3ForBidirectionalLM': remote code is never run"
    refused(line, hf_config.parse_config, PHI3 | {"auto_map": other}, "here")


# as the config.json of gemma-3-4b-it: most of the text part is left to transformers' defaults
GEMMA_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": {"model_type": "llama", "vocab_size": 32064},
}


def test_the_text_part_that_a_config_leaves_to_defaults():
    cfg, head = hf_config.parse_config(GEMMA_4B, "here")
    sizes = (cfg.vocab_size, cfg.hidden_size, cfg.num_layers, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim)
    assert (head, *sizes) == ("lm", 262208, 2560, 34, 8, 4, 256)
    assert cfg.tie_embeddings and cfg.sliding_window == 1024 and cfg.layer_types.count("global") == 5
    assert cfg.rope_scaling and cfg.rope_scaling.factor == 8.0 and cfg.local_rope_theta == 1e4
    cfg, _ = hf_config.parse_config(LLAVA, "here")
    assert (cfg.vocab_size, cfg.hidden_size, cfg.num_layers, cfg.tie_embeddings) == (32064, 4096, 32, False)
    assert hf_config.parse_config(LLAVA | {"tie_word_embeddings": True}, "here")[0].tie_embeddings


@pytest.mark.parametrize(
    "changes, pattern",
    [
        ({"text_config": None}, "here: text_config: None; expected an object"),
        ({"text_config": {"model_type": "mamba"}}, "here: text_config: model_type: 'mamba' is not supported"),
        ({"architectures": ["LlavaModel"]}, "architectures: .'LlavaModel'. is not supported; expected LlavaForCond"),
        ({"quantization_config": {"bits": 4}}, "here: text_config: quantization_config"),
        ({"text_config": {"model_type": "llama", "is_causal": False}}, "here: text_config: is_causal: False"),
        (
            {"text_config": {"model_type": "gemma3_text", "rope_scaling": {"type": "linear", "factor": 2.0}}},
            "text_config: rope_scaling.type: 'linear' is not read by transformers; expected rope_type",
        ),
    ],
)
def test_a_text_part_that_is_not_supported_is_named(changes, pattern):
    refused(pattern, hf_config.parse_config, LLAVA | changes, "here")


def test_an_untied_head_tells_what_the_config_leaves_open(tmp_path):
    """Mistral Small 3.1: neither config says whether embeddings are tied, and the file holds a head of its own."""
    mistral = dataclasses.replace(SHAPE, family="mistral", num_kv_heads=2)
    params = random_params(mistral)
    hf_weights.save(params, mistral, "lm", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["tie_word_embeddings"]
    wrapped = {"model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"], "text_config": raw}
    (tmp_path / "config.json").write_text(json.dumps(wrapped))
    tensors = {f"language_model.{name}": value for name, value in load_file(tmp_path / "model.safetensors").items()}
    tensors["vision_tower.patch_conv.weight"] = np.ones((2, 2), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    cfg, head = hf_config.read_config(tmp_path)
    assert (cfg, head) == (mistral, "lm")
    equal(hf_weights.load(tmp_path, cfg, head), params)
    assert hf_headers.kinds(hf_headers.examine(tmp_path, cfg, head).left) == "vision_tower (1 tensor)"


def test_other_parts_of_qwen3_5_are_left_and_named(tmp_path):
    """Its vision tower and its head for several tokens, in a model of text and images and in a plain one."""
    qwen = resolve(dataclasses.replace(SHAPE, family="qwen3_5_text", num_layers=4, linear_key_heads=2))
    params = random_params(qwen)
    hf_weights.save(params, qwen, "lm", tmp_path)
    raw, plain = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    other = {name: np.ones((2, 2), np.float32) for name in ("model.visual.blocks.0.norm1.weight", "mtp.fc.weight")}
    save_file(plain | other, tmp_path / "model.safetensors")
    for wrapped in (False, True):
        if wrapped:
            text = {name.replace("model.", "model.language_model.", 1): value for name, value in plain.items()}
            save_file(text | other, tmp_path / "model.safetensors")
            whole = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": raw}
            (tmp_path / "config.json").write_text(json.dumps(whole))
        cfg, head = hf_config.read_config(tmp_path)
        assert (cfg, head) == (qwen, "lm")
        equal(hf_weights.load(tmp_path, cfg, head), params)
        left = hf_headers.kinds(hf_headers.examine(tmp_path, cfg, head).left)
        assert sorted(left.split(", ")) == ["mtp (1 tensor)", "visual (1 tensor)"]


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "olmo3", "smollm3", "gemma2", "gemma3_text"]
)
@pytest.mark.parametrize("field, value", [("is_causal", False), ("is_causal", None), ("partial_rotary_factor", 2.0)])
def test_fields_that_no_model_here_computes_are_refused_in_every_family(kind, field, value):
    from jaxrlhf.models.families import FAMILIES

    raw = MINIMAL | {"model_type": kind, "architectures": [FAMILIES[kind].hf.classes["lm"]], field: value}
    refused("^here: ", hf_config.parse_config, raw, "here")
