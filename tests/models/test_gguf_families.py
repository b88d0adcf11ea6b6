"""GGUF files of every architecture that is read: the weights are those of the folder that they were made of, and
transformers computes the same from the same file."""

import dataclasses
import re
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrlhf.models.files import gguf as ours
from jaxrlhf.models.files import gguf_tensors, hf_config, hf_folder, hf_weights
from jaxrlhf.models.files.gguf_families import ARCHITECTURES, Metadata, window
from jaxrlhf.sharding import MeshConfig, make_mesh
from tests.models.test_gpt_oss import packed
from tests.support import ggufs, tiny

Q8_0 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Folders are unpacked below it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def read(folder):
    """(parameters, config)."""
    cfg, head = hf_config.read_config(folder)
    return hf_weights.load(folder, cfg, head), cfg


def test_every_architecture_has_a_file():
    assert ggufs.MODELS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_is_the_folder_that_it_was_made_of(name, tmp_path):
    found, cfg = read(hf_folder.locate(ggufs.write(name, tmp_path)))
    expected, model = read(tmp_path / "hf")
    assert cfg == model
    assert tiny.equal_trees(found, expected)


def test_soft_caps_that_metadata_leave_out_are_those_of_the_family(tmp_path):
    """As in llama.cpp, and in transformers: older files say none."""
    none: dict[str, Any] = {"final_logit_softcapping": None, "attn_logit_softcapping": None}
    cfg, _ = hf_config.read_config(hf_folder.locate(ggufs.write("gemma2", tmp_path, **none)))
    assert (cfg.attention_softcap, cfg.logit_softcap) == (50.0, 30.0)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("phi3", {"sliding_window": 5}),
        ("qwen2", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
        ("gemma2", {"num_hidden_layers": 46, "query_pre_attn_scalar": 16}),  # hidden_size / heads, of the largest alone
        ("gemma2", {"final_logit_softcapping": 20.0, "attn_logit_softcapping": 40.0}),
        ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),  # of global layers alone
        ("gemma3", {"layer_types": ["sliding_attention", "full_attention"] * 3 + ["full_attention"]}),
        ("gpt-oss", {"tie_word_embeddings": True, "sliding_window": 7}),
    ],
)
def test_what_metadata_say(name, more, tmp_path):
    folder = hf_folder.locate(ggufs.write(name, tmp_path, **more))
    assert hf_config.read_config(folder) == hf_config.read_config(tmp_path / "hf")
    plain = ggufs.write(name, tmp_path / "plain")
    assert hf_config.read_config(folder) != hf_config.read_config(hf_folder.locate(plain))


def test_every_third_layer_is_global():
    fields = {"gemma3.attention.sliding_window": 4, "gemma3.attention.sliding_window_pattern": 3}
    said = window(Metadata(fields, "gemma3", "file"), {"num_hidden_layers": 4})
    assert said["layer_types"] == ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"]
    assert len(window(Metadata(fields, "gemma3", "file"), {"num_hidden_layers": 10**12})["layer_types"]) == 2**16


def test_part_of_a_head_is_rotated(tmp_path):
    folder = hf_folder.locate(ggufs.write("phi3", tmp_path, partial_rotary_factor=0.5))
    assert hf_config.read_config(folder)[0].rotary_fraction == 0.5


def test_experts_in_mxfp4(tmp_path):
    """The published blocks, in the file's order: the same numbers."""
    ggufs.write("gpt-oss", tmp_path)
    packed(tmp_path / "hf")
    found, cfg = read(hf_folder.locate(ggufs.write_mxfp4(tmp_path)))
    expected, model = read(tmp_path / "hf")
    assert cfg == model
    assert tiny.equal_trees(found, expected)
    assert float(abs(found["layers"]["mlp"]["experts"]["gate"]["kernel"]).max()) > 0.1


@pytest.mark.parametrize(("name", "kind"), [("gpt-oss", ggufs.MXFP4), ("qwen3moe", Q8_0)])
def test_a_device_s_part_of_experts(name, kind, tmp_path):
    folder = hf_folder.locate(ggufs.write(name, tmp_path, kind))
    alone, _ = read(folder)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, expert=1), jax.devices()[:4])):
        split, _ = read(folder)
    assert tiny.equal_trees(alone, split)
    exact, _ = read(tmp_path / "hf")
    kernels = [tree["layers"]["mlp"]["experts"]["down"]["kernel"] for tree in (alone, exact)]
    assert 0 < np.abs(kernels[0] - kernels[1]).max() < 0.2 * np.abs(kernels[1]).max()


def test_any_slice_of_interleaved_experts(tmp_path):
    """With a step of 2 one of the tensors is not read."""
    tensors = ours.open_tensors(hf_folder.locate(ggufs.write("gpt-oss", tmp_path)))
    both = tensors["model.layers.1.mlp.experts.gate_up_proj"]
    whole = both[:]
    np.testing.assert_array_equal(
        whole, load_file(tmp_path / "hf" / "model.safetensors")["model.layers.1.mlp.experts.gate_up_proj"]
    )
    for last in (slice(3, 9), slice(4, 7), slice(0, 12, 2), slice(5, 13, 2), slice(1, None, 2)):
        index = slice(1, 3), slice(2, 31), last
        np.testing.assert_array_equal(both[index], whole[index])
    gone = dataclasses.replace(both.second.tensor, file=str(tmp_path / "gone"))
    half = dataclasses.replace(both, second=gguf_tensors.Transposed(gone))
    with pytest.raises(FileNotFoundError):
        half[:]
    np.testing.assert_array_equal(half[:, :, ::2], whole[..., ::2])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt-oss", {"leave_out": "ffn_up_exps"}, "gate_up_proj: expected both ffn_gate_exps and ffn_up_exps"),
        ("qwen3moe", {"leave_out": "ffn_down_exps"}, "lacks tensors: model.layers.0.mlp.experts.0.down_proj.weight"),
        ("gemma3", {"leave_out": "blk.3.attn_q_norm"}, "lacks tensors: model.layers.3.self_attn.q_norm.weight"),
        (
            "gpt-oss",
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            "gpt-oss.rope.scaling.type: 'linear' is not supported; expected yarn",
        ),
        (
            "qwen3",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
            "qwen3.rope.scaling.type: 'yarn' is not supported; expected none or linear",
        ),
    ],
)
def test_refusals(name, change, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(hf_folder.locate(ggufs.write(name, tmp_path, **change)))
    assert "\n" not in str(caught.value)


# ---- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("kind", [ggufs.F32, Q8_0])
@pytest.mark.parametrize("name", ggufs.READ_THERE)
def test_transformers_reads_the_same(name, kind, tmp_path):
    ggufs.compare(name, tmp_path, kind)


@pytest.mark.torch
def test_transformers_cannot_read_gpt_oss(tmp_path):
    """Ours is held to the folder that the file was made of; this fails when transformers can be asked."""
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    import transformers

    ggufs.write("gpt-oss", tmp_path)
    with pytest.raises(TypeError, match="0-dimensional"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")


@pytest.mark.torch
def test_what_transformers_does_not_read_of_gemma4(tmp_path):
    """Why it is refused: of layers of two kinds it knows the heads of one, and not which they are."""
    pytest.importorskip("torch")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    ggufs.write_gemma4(tmp_path / "m.gguf")
    found = load_gguf_checkpoint(str(tmp_path / "m.gguf"))["config"]
    assert found["global_head_dim"] == 16 and found["num_key_value_heads"] == [2, 2, 1]
    assert not {"head_dim", "layer_types", "num_kv_shared_layers", "hidden_size_per_layer_input"} & found.keys()
