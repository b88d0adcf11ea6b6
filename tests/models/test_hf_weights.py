"""Hugging Face folders without torch: names, layouts, meshes and refusals. tests/parity compares with transformers."""

import dataclasses
import json
import re
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf import sharding
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.families import FAMILIES, Module
from jaxrlhf.models.files import hf_config, hf_folder, hf_headers, hf_layout, hf_weights
from jaxrlhf.models.parameters import Leaf, init, parameter_table, weight_spec
from jaxrlhf.models.rope import RopeScaling
from jaxrlhf.sharding import MeshConfig
from jaxrlhf.types import Head

LLAMA = resolve(
    ModelConfig(
        vocab_size=101,
        hidden_size=32,
        num_kv_heads=2,
        head_dim=16,
        mlp_size=48,
        max_positions=64,
        tie_embeddings=False,
        attention_bias=True,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
    )
)
GPT2 = resolve(ModelConfig(family="gpt2", vocab_size=101, hidden_size=32, max_positions=16))
OSS = resolve(ModelConfig("gpt_oss", vocab_size=101, hidden_size=32, mlp_size=24, num_experts=4))
IDS = hf_config.TokenIds(eos=(7, 9), bos=1, pad=0)


def random_params(cfg: ModelConfig, head: Head = "lm"):
    """Every leaf random, biases and norms too; the rows that pad the vocabulary are 0, as load makes them."""
    rng = np.random.default_rng(0)

    def one(leaf):
        value = rng.normal(size=leaf.shape).astype(np.float32)
        for axis, name in enumerate(leaf.axes):
            if name == "vocab":
                value[(slice(None),) * axis + (slice(cfg.vocab_size, None),)] = 0
        return jnp.asarray(value)

    return jax.tree.map(one, parameter_table(cfg, head), is_leaf=lambda x: isinstance(x, Leaf))


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def edit(folder, **changes):
    """Change fields of config.json; ... takes one out."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in raw.items() if value is not ...}))


def rewrite(folder, change):
    """Change the tensors of a folder's one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(pattern, call, *args, **kwargs):
    """``call`` raises a ValueError of one line that says ``pattern``."""
    with pytest.raises(ValueError, match=pattern) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path):
    hf_weights.save(random_params(LLAMA), LLAMA, "lm", tmp_path / "model", ids=IDS)
    return tmp_path / "model"


# ---- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [LLAMA, GPT2, dataclasses.replace(LLAMA, tie_embeddings=True, rope_scaling=None)])
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_round_trip(cfg, head, tmp_path):
    params = random_params(cfg, head)
    hf_weights.save(params, cfg, head, tmp_path, ids=IDS)
    assert hf_config.read_config(tmp_path) == (cfg, head)
    fresh = []
    equal(
        hf_weights.load(tmp_path, cfg, head, fresh=fresh),
        hf_weights.fold_score_bias(params) if head == "scalar" else params,
    )
    assert fresh == []


def test_a_score_s_bias_moves_into_the_last_norm(tmp_path):
    """By hand: w = (3, 4), bias 5, so the norm's bias grows by 5 w / 25; and any state has the score that it had."""
    head = {"kernel": np.array([[3.0], [4.0]], np.float32), "bias": np.array([5.0], np.float32)}
    params = {"final_norm": {"scale": np.ones(2), "bias": np.array([1.0, -1.0], np.float32)}, "head": head}
    folded = hf_weights.fold_score_bias(params)
    np.testing.assert_allclose(folded["final_norm"]["bias"], [1.6, -0.2], rtol=1e-6)
    assert folded["head"]["bias"] == 0
    state = np.array([0.3, 0.7])
    before = (state + params["final_norm"]["bias"]) @ head["kernel"] + 5
    np.testing.assert_allclose((state + folded["final_norm"]["bias"]) @ head["kernel"], before, rtol=1e-6)
    rms = {"final_norm": {"scale": np.ones(2)}, "head": head}
    assert hf_weights.fold_score_bias(rms) is rms
    said = hf_weights.save(random_params(LLAMA, "scalar"), LLAMA, "scalar", tmp_path / "llama")
    assert len(said) == 1 and "LlamaForSequenceClassification has no bias: its scores are ours less" in said[0]
    assert hf_weights.save(random_params(GPT2, "scalar"), GPT2, "scalar", tmp_path / "gpt2") == []


def test_names_and_layouts(tmp_path):
    """Against loops written by hand: torch Linear [out, in] for llama, fused Conv1D [in, out] for GPT-2."""
    params = random_params(LLAMA)
    hf_weights.save(params, LLAMA, "lm", tmp_path / "llama")
    file = load_file(tmp_path / "llama" / "model.safetensors")
    assert len(file) == 3 + 2 * 13
    layer = jax.tree.map(lambda x: np.asarray(x[1]), params["layers"])
    query = file["model.layers.1.self_attn.q_proj.weight"]
    for head in range(4):
        for k in range(16):
            np.testing.assert_array_equal(query[16 * head + k], layer["attention"]["query"]["kernel"][:, head, k])
    np.testing.assert_array_equal(
        file["model.layers.1.self_attn.k_proj.bias"][16:], layer["attention"]["key"]["bias"][1]
    )
    out = file["model.layers.1.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(out[:, 16 * 3 + 2], layer["attention"]["out"]["kernel"][3, 2])
    np.testing.assert_array_equal(file["model.layers.1.mlp.down_proj.weight"], layer["mlp"]["down"]["kernel"].T)
    assert file["lm_head.weight"].shape == file["model.embed_tokens.weight"].shape == (101, 32)

    params = random_params(GPT2)
    hf_weights.save(params, GPT2, "lm", tmp_path / "gpt2")
    file = load_file(tmp_path / "gpt2" / "model.safetensors")
    attention = jax.tree.map(lambda x: np.asarray(x[0]), params["layers"]["attention"])
    for part, name in enumerate(("query", "key", "value")):
        columns = slice(32 * part + 8 * 3, 32 * part + 8 * 4)  # of head 3
        weight, bias = file["transformer.h.0.attn.c_attn.weight"], file["transformer.h.0.attn.c_attn.bias"]
        np.testing.assert_array_equal(weight[:, columns], attention[name]["kernel"][:, 3])
        np.testing.assert_array_equal(bias[columns], attention[name]["bias"][3])


@pytest.mark.parametrize("layout", ["part.{}.head_dim embed", "{}.part.head_dim embed"])
def test_fused_layouts_of_other_families(layout, tmp_path, monkeypatch):
    """Unequal parts one after the other, and parts interleaved in every head, on one device and on a mesh."""
    interleaved = layout.startswith("{}")
    cfg = dataclasses.replace(LLAMA, num_kv_heads=4) if interleaved else LLAMA
    heads = {"query": "heads", "key": "kv_heads", "value": "kv_heads"}
    fused = {
        f"layers.attention.{part}": Module("model.layers.{layer}.qkv", layout.format(axis))
        for part, axis in heads.items()
    }
    llama = FAMILIES["llama"]
    names = llama.hf._replace(modules=llama.hf.modules | fused)
    monkeypatch.setitem(FAMILIES, "llama", llama._replace(hf=names))
    params = random_params(cfg)
    hf_weights.save(params, cfg, "lm", tmp_path)
    parts = [np.asarray(params["layers"]["attention"][part]["kernel"][0]) for part in heads]  # [D, heads, K]
    if interleaved:
        expected = [part[:, head].T for head in range(4) for part in parts]
    else:
        expected = [part[:, head].T for part in parts for head in range(part.shape[1])]
    file = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(file["model.layers.0.qkv.weight"], np.concatenate(expected))
    equal(hf_weights.load(tmp_path, cfg, "lm"), params)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])):
        equal(hf_weights.load(tmp_path, cfg, "lm"), params)


@pytest.mark.parametrize("stored", [np.float16, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_number_formats(folder, stored, wanted):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value.astype(stored) for name, value in tensors.items()}, folder / "model.safetensors")
    loaded = hf_weights.load(folder, LLAMA, "lm", wanted)
    cast = lambda x: np.asarray(x).astype(stored).astype(wanted)
    equal(loaded, jax.tree.map(cast, random_params(LLAMA)))
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype(wanted)}


def test_shards_and_index(tmp_path):
    params = random_params(LLAMA)
    hf_weights.save(params, LLAMA, "lm", tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [path.name for path in files]
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    sizes = [{name: x.nbytes for name, x in load_file(path).items()} for path in files]
    assert all(sum(size.values()) <= 20_000 or len(size) == 1 for size in sizes)
    assert index["metadata"]["total_size"] == sum(sum(size.values()) for size in sizes)
    equal(hf_weights.load(tmp_path, LLAMA, "lm"), params)

    hf_weights.save(params, LLAMA, "lm", tmp_path)  # an export in one file leaves no shard of the old one behind
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("there", [True, False])
def test_an_export_that_fails_leaves_what_was_there(tmp_path, monkeypatch, there):
    folder = tmp_path / "model"
    if there:
        hf_weights.save(random_params(LLAMA), LLAMA, "lm", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if there else None
    write, written = hf_weights.write_weights, []

    def fail(path, values):
        if written:
            raise OSError(28, "No space left on device")
        written.append(write(path, values))

    monkeypatch.setattr(hf_weights, "write_weights", fail)
    with pytest.raises(OSError, match="No space left"):
        hf_weights.save(random_params(LLAMA), LLAMA, "lm", folder, max_shard_bytes=20_000)
    assert ({path.name: path.read_bytes() for path in folder.iterdir()} if there else None) == before
    assert folder.exists() == there


# ---- meshes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cfg", "shape"),
    [
        (LLAMA, (2, 2, 2)),
        (dataclasses.replace(LLAMA, num_kv_heads=1), (1, 4, 2)),
        (OSS, (1, 2, 2, 1, 1, 2)),  # gate and up interleaved, of all experts in one tensor
        pytest.param(GPT2, (8, 1, 1), marks=pytest.mark.nightly),
    ],
)
def test_mesh_equals_one_device(cfg, shape, tmp_path):
    params = random_params(cfg)
    hf_weights.save(params, cfg, "lm", tmp_path / "one")
    with jax.set_mesh(sharding.make_mesh(MeshConfig(*shape), jax.devices()[:8])):
        loaded = hf_weights.load(tmp_path / "one", cfg, "lm")
        specs = jax.tree.map(weight_spec, parameter_table(cfg, "lm"), is_leaf=lambda x: isinstance(x, Leaf))
        hf_weights.save(loaded, cfg, "lm", tmp_path / "mesh")
    equal(loaded, params)
    hf_weights.save(loaded, cfg, "lm", tmp_path / "outside")  # without the mesh in force
    jax.tree.map(lambda x, spec: np.testing.assert_equal(x.sharding.spec, spec), loaded, specs)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "mesh", "outside")]
    assert files[0] == files[1] == files[2]


class Recorder:
    """A lazy tensor that counts the numbers read from it."""

    def __init__(self, inner):
        self.inner, self.reads = inner, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __getitem__(self, index):
        value = self.inner[index]
        self.reads.append(value.size)
        return value


def test_sharded_reading_touches_only_its_slices(folder, monkeypatch):
    """Each of the four parts of a matrix is read once, though two devices of (2, 2, 2) hold it; none is read whole."""
    tensors = {
        name: Recorder(tensor) for name, tensor in hf_headers.open_weights(hf_weights.epath.Path(folder)).items()
    }
    monkeypatch.setattr(hf_headers, "open_weights", lambda folder: tensors)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])):
        hf_weights.load(folder, LLAMA, "lm")
    for name, tensor in tensors.items():
        size = np.prod(tensor.get_shape())
        assert sum(tensor.reads) == size, name
        if len(tensor.get_shape()) == 2:
            assert len(tensor.reads) == 4 and max(tensor.reads) <= size / 4 * (128 / 101), name


def test_a_part_of_nothing_but_padding(folder):
    """Over 8 devices the last one's rows of the vocabulary, 112 to 128, are beyond the file's 101."""
    tensors, source = (
        hf_headers.open_weights(hf_weights.epath.Path(folder)),
        hf_layout.find_sources(LLAMA, "lm")["head.kernel"],
    )
    read = lambda columns: hf_weights.read_shard(source, tensors, (32, 128), (slice(0, 16), columns), jnp.float32, "")
    kernel = np.asarray(random_params(LLAMA)["head"]["kernel"])
    np.testing.assert_array_equal(read(slice(96, 112)), kernel[:16, 96:112])
    np.testing.assert_array_equal(read(slice(112, 128)), np.zeros((16, 16)))


# ---- scalar heads ---------------------------------------------------------------------------------------------------


def test_fresh_scalar_head(folder):
    """A language model asked for scores gets the head of parameters.init; everything else is the file's."""
    fresh = []
    loaded = hf_weights.load(folder, LLAMA, "scalar", key=jax.random.key(5), fresh=fresh)
    assert fresh == ["head.bias", "head.kernel"]
    drawn = jax.jit(lambda key: init(LLAMA, "scalar", key)["head"])(jax.random.key(5))
    np.testing.assert_allclose(loaded["head"]["kernel"], drawn["kernel"], rtol=1e-6)
    assert np.std(drawn["kernel"]) > 0.05
    expected = random_params(LLAMA)
    equal(loaded["layers"], expected["layers"])
    equal(loaded["embed"], expected["embed"])
    other = hf_weights.load(folder, LLAMA, "scalar")["head"]["kernel"]
    assert not np.array_equal(other, drawn["kernel"])


def test_score_bias_comes_back(tmp_path):
    params = random_params(LLAMA, "scalar")
    hf_weights.save(params, LLAMA, "scalar", tmp_path)
    assert load_file(tmp_path / "model.safetensors")["score.weight"].shape == (1, 32)
    np.testing.assert_array_equal(hf_weights.load(tmp_path, LLAMA, "scalar")["head"]["bias"], params["head"]["bias"])
    assert (hf_folder.read_json(tmp_path, "config.json") or {})["score_bias"] == params["head"]["bias"][0]
    rewrite(tmp_path, lambda tensors: tensors.pop("score.bias"))
    edit(tmp_path, score_bias=...)
    assert hf_weights.load(tmp_path, LLAMA, "scalar")["head"]["bias"] == 0
    edit(tmp_path, score_bias=2.5)  # as older exports have it
    assert hf_weights.load(tmp_path, LLAMA, "scalar")["head"]["bias"] == 2.5
    edit(tmp_path, score_bias=[1.0])
    refused("score_bias: .1.0.; expected a number", hf_weights.load, tmp_path, LLAMA, "scalar")


def test_language_model_from_scores(tmp_path):
    """A tied model has its head in its embeddings; another lacks it, and it is never made up."""
    tied = dataclasses.replace(LLAMA, tie_embeddings=True)
    for cfg, name in ((tied, "tied"), (LLAMA, "untied")):
        hf_weights.save(random_params(cfg, "scalar"), cfg, "scalar", tmp_path / name)
    assert "head" not in hf_weights.load(tmp_path / "tied", tied, "lm")
    refused("lacks tensors: lm_head.weight$", hf_weights.load, tmp_path / "untied", LLAMA, "lm")


# ---- config.json ----------------------------------------------------------------------------------------------------

MINIMAL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_absent_fields_are_what_transformers_assumes():
    cfg, head = hf_config.parse_config(MINIMAL, "here")
    assert head == "lm"
    assert (cfg.norm_eps, cfg.max_positions, cfg.tie_embeddings, cfg.rope_theta) == (1e-6, 2048, False, 10000.0)
    assert (cfg.num_kv_heads, cfg.head_dim, cfg.attention_bias, cfg.rope_scaling) == (4, 8, False, None)
    small = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 9, "n_embd": 8, "n_layer": 1}
    cfg, _ = hf_config.parse_config(small | {"n_head": 2, "attn_pdrop": 0.1, "n_ctx": 16}, "here")
    assert (cfg.mlp_size, cfg.max_positions, cfg.norm_eps, cfg.tie_embeddings) == (32, 1024, 1e-5, True)


def test_both_spellings_of_rope():
    stretch = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    old = {"rope_theta": 500.0, "rope_scaling": {**stretch, "original_max_position_embeddings": 32}}
    new = {"rope_parameters": {**stretch, "rope_theta": 500.0, "original_max_position_embeddings": 32}}
    configs = [hf_config.parse_config(MINIMAL | spelling, "here")[0] for spelling in (old, new)]
    assert configs[0] == configs[1]
    assert configs[0].rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    assert configs[0].rope_theta == 500.0
    linear = hf_config.parse_config(MINIMAL | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "here")[0]
    assert linear.rope_scaling == RopeScaling("linear", 2.0)


GPT2_FIELDS = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_layer": 2, "n_head": 4}


@pytest.mark.parametrize(
    "changes, pattern",
    [
        ({"model_type": "mamba"}, "model_type: 'mamba' is not supported; expected one of llama, mistral, .*gpt2"),
        ({"model_type": None}, "model_type: None"),
        ({"architectures": ["LlamaForQuestionAnswering"]}, "architectures: .*expected LlamaForCausalLM or LlamaForSeq"),
        ({"architectures": None}, "architectures: None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "num_labels: 2 is not supported; expected 1"),
        ({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}, "num_labels: 2"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported; expected 'silu'"),
        ({"pretraining_tp": 2}, "pretraining_tp: 2"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "x.Other"}}, "auto_map: AutoModel: 'x.Other': remote code is never run; expected"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_scaling.rope_type: 'dynamic'.*default or linear",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor: None; expected a positive number"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "expected one flat object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5"),
        ({"rope_theta": "big"}, "rope_theta: 'big'"),
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"hidden_size": -1}, "hidden_size: -1; expected a positive whole number"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers: 2.0"),
        ({"vocab_size": True}, "vocab_size: True"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps: inf"),
        ({"mlp_bias": 1}, "mlp_bias: 1; expected true or false"),
        ({"num_attention_heads": 5}, "hidden size 32 is not a multiple of 5 heads"),
        ({"num_key_value_heads": 3}, "num_heads: 4 is not a multiple of num_kv_heads: 3"),
        ({**GPT2_FIELDS, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True"),
        ({**GPT2_FIELDS, "scale_attn_weights": False}, "scale_attn_weights: False"),
        ({**GPT2_FIELDS, "activation_function": "relu"}, "activation_function: 'relu'.*'gelu_new'"),
        ({**GPT2_FIELDS, "add_cross_attention": True}, "add_cross_attention: True"),
    ],
)
def test_unsupported_configs_are_named(changes, pattern):
    refused("^here.*" + pattern, hf_config.parse_config, MINIMAL | changes, "here")


@pytest.mark.parametrize("text, pattern", [("{", "is not JSON"), ("[1]", "holds a list"), ("[" * 10**5, "is not JSON")])
def test_broken_config_file(tmp_path, text, pattern):
    (tmp_path / "config.json").write_text(text)
    refused(f"config.json: {pattern}", hf_config.read_config, tmp_path)


def test_absent_config_and_absurd_size(tmp_path, monkeypatch):
    refused("config.json: there is no such file; expected a Hugging", hf_config.read_config, tmp_path)
    (tmp_path / "config.json").write_text("{}" + " " * 100)
    monkeypatch.setattr(hf_folder, "MAX_JSON_BYTES", 50)
    refused("102 bytes; expected at most 50", hf_config.read_config, tmp_path)


# ---- weights that are refused ---------------------------------------------------------------------------------------


def drop(tensors):
    del tensors["model.norm.weight"]


def swap_shape(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy()


def add(tensors):
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(16, np.float32)


def poison(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan


def overflow(tensors):
    tensors["model.embed_tokens.weight"][100, 0] = np.inf


def widen(tensors):
    """A float64 file whose numbers fit in no float32."""
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)
    tensors["model.norm.weight"][3] = -1e39


def quantise(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)


@pytest.mark.parametrize(
    "change, pattern",
    [
        (drop, "lacks tensors: model.norm.weight$"),
        (swap_shape, r"lm_head.weight: has shape \(32, 101\); config.json says \(101, 32\)"),
        (add, "no place for: model.layers.0.self_attn.q_norm.weight"),
        (poison, "model.layers.1.mlp.up_proj.weight: holds weights that are NaN or infinite"),
        (overflow, "model.embed_tokens.weight: holds weights that are NaN"),
        (widen, r"model.norm.weight: holds 1e\+39; expected weights that fit in float32$"),
        (quantise, "model.norm.weight: holds I8; expected one of F32"),
    ],
)
def test_wrong_tensors_are_named(folder, change, pattern):
    rewrite(folder, change)
    refused(re.escape(str(folder)) + ".*" + pattern, hf_weights.load, folder, LLAMA, "lm")


def test_a_config_that_claims_too_many_layers(folder):
    """Refused at the first missing names, before anything of that size is made."""
    refused("lacks tensors: .*and others", hf_weights.load, folder, dataclasses.replace(LLAMA, num_layers=2**30), "lm")


def test_tied_head_in_the_file(tmp_path):
    tied = dataclasses.replace(LLAMA, tie_embeddings=True)
    hf_weights.save(random_params(tied), tied, "lm", tmp_path)

    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    rewrite(tmp_path, repeat)
    equal(hf_weights.load(tmp_path, tied, "lm"), random_params(tied))
    rewrite(tmp_path, lambda tensors: tensors["lm_head.weight"].__setitem__((50, 3), 0.5))
    refused("lm_head.weight: differs from the embeddings", hf_weights.load, tmp_path, tied, "lm")


def test_base_model_names_and_old_buffers(tmp_path):
    """GPT-2's own file: no "transformer." in front, and causal masks among the weights."""
    params = random_params(GPT2)
    hf_weights.save(params, GPT2, "lm", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    tensors["h.0.attn.bias"] = np.ones((1, 1, 16, 16), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    equal(hf_weights.load(tmp_path, GPT2, "lm"), params)


def header(text, size=8):
    return struct.pack("<Q", len(text)) + text + b"\0" * size


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**60) + b"{}",  # a header larger than the file
        header(b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}'),
        header(
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
            b' "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}',
            12,
        ),
        header(b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'),
        b"",
    ],
    ids=["header", "claimed size", "overlap", "shape", "empty"],
)
def test_broken_safetensors(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refused("model.safetensors: is not a safetensors file: ", hf_weights.load, folder, LLAMA, "lm")


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    refused("there are no weights; expected model.safetensors", hf_weights.load, folder, LLAMA, "lm")
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused("pytorch_model.bin: pickled weights can run code", hf_weights.load, folder, LLAMA, "lm")


@pytest.mark.parametrize(
    "index, pattern",
    [
        ({"a": "../model.safetensors"}, r"\.\./model.safetensors: there is no such file"),
        ({"a": "absent.safetensors"}, "absent.safetensors: there is no such file"),
        ({"a": "part.safetensors"}, "part.safetensors does not hold a"),
        ({"a": 3}, "weight_map: expected an object"),
        (None, "weight_map: expected an object"),
    ],
)
def test_broken_index(folder, index, pattern):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    refused(pattern, hf_weights.load, folder, LLAMA, "lm")


# ---- exports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cfg, pattern",
    [
        (dataclasses.replace(GPT2, num_kv_heads=2), "num_kv_heads: 2 cannot be said in the config.json of gpt2"),
        (dataclasses.replace(GPT2, attention_bias=False), "attention_bias: False cannot be said"),
        (dataclasses.replace(LLAMA, num_heads=6), "hidden_size: 32 is not a multiple of num_heads: 6"),
    ],
)
def test_what_a_family_cannot_say(cfg, pattern, tmp_path):
    refused(f"export: .*{pattern}", hf_weights.save, random_params(cfg), cfg, "lm", tmp_path)
    assert not list(tmp_path.iterdir())


def test_parameters_of_another_config(tmp_path):
    refused(
        "embed.positions.embedding: .16, 32., expected absent",
        hf_weights.save,
        random_params(GPT2),
        LLAMA,
        "lm",
        tmp_path,
    )
    lora = random_params(LLAMA)
    lora["layers"]["attention"]["query"]["lora_a"] = jnp.zeros((2, 32, 4))
    refused(r"query.lora_a: \(2, 32, 4\), expected absent", hf_weights.save, lora, LLAMA, "lm", tmp_path)
    refused(
        "eos token 101 is outside the vocabulary of 101",
        hf_weights.save,
        random_params(LLAMA),
        LLAMA,
        "lm",
        tmp_path,
        ids=hf_config.TokenIds(eos=(101,)),
    )


def test_tokenizer_files_are_copied(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    save = lambda: hf_weights.save(random_params(LLAMA), LLAMA, "lm", target, tokenizer_folder=source)
    refused("holds no tokenizer", save)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "notes.txt", "model.safetensors"):
        (source / name).write_text(name)
    save()
    written = {path.name for path in target.iterdir()}
    assert written == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
        "config.json",
    }
    assert (target / "tokenizer.json").read_text() == "tokenizer.json"
    hf_weights.save(
        random_params(LLAMA), LLAMA, "lm", source, tokenizer_folder=source
    )  # into the tokenizer's own folder
    assert (source / "tokenizer.json").read_text() == "tokenizer.json"


def test_token_ids(folder, tmp_path):
    """Null, one or several; null is written out, since transformers has numbers of its own for what is absent."""
    expected = {"eos_token_id": [7, 9], "bos_token_id": 1, "pad_token_id": 0}
    assert hf_folder.read_json(folder, "generation_config.json") == expected
    assert (hf_folder.read_json(folder, "config.json") or {}).items() >= expected.items()
    hf_weights.save(random_params(LLAMA), LLAMA, "lm", folder)
    assert hf_folder.read_json(folder, "generation_config.json") is None  # the earlier export's
    config = hf_folder.read_json(folder, "config.json") or {}
    assert [config[name] for name in expected] == [None, None, None]


# ---- folders --------------------------------------------------------------------------------------------------------


def test_locate(folder, monkeypatch):
    assert hf_folder.locate(str(folder)) == hf_weights.epath.Path(folder)
    refused("init_from: '/no/such/folder': there is no such folder", hf_folder.locate, "/no/such/folder")
    refused(r"init_from: '\./here': there is no such folder", hf_folder.locate, "./here")
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(folder)

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hf_folder.locate("owner/model-1.5") == hf_weights.epath.Path(folder)
    assert asked["name"] == "owner/model-1.5"
    assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in asked["allow_patterns"])

    def fail(name, **options):
        raise OSError("401 Unauthorized\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused("init_from: 'owner/model': .*the hub answers: 401 Unauthorized$", hf_folder.locate, "owner/model")


def test_mirror_follows_the_remote_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (folder / "code.py").write_text("")
    local = hf_folder.mirror(hf_weights.epath.Path(folder))
    equal(hf_weights.load(local, LLAMA, "lm"), random_params(LLAMA))
    assert not (local / "code.py").exists()
    before = (local / "model.safetensors").stat().mtime
    (folder / "generation_config.json").unlink()
    edit(folder, pad_token_id=5)
    assert hf_folder.mirror(hf_weights.epath.Path(folder)) == local
    assert (hf_folder.read_json(local, "config.json") or {})["pad_token_id"] == 5
    assert not (local / "generation_config.json").exists()
    assert (local / "model.safetensors").stat().mtime == before


def test_no_heavy_imports():
    """Reading and writing need neither torch nor transformers, and importing this needs no safetensors either."""
    heavy = ("torch", "transformers", "safetensors", "huggingface_hub")
    code = f"import sys, jaxrlhf.models.files.hf_weights; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
