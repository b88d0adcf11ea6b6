"""gpt-oss: attention sinks, clamped experts, its config.json and its weights in MXFP4, by hand.

tests/parity has the numbers of transformers."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf.models.attention.kernels import Hardware, choose_kernel, passed_over
from jaxrlhf.models.attention.products import attention, bias_of, by_head, merge_copies, split_copies
from jaxrlhf.models.attention.products import branches as attend_in_parts
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.feed_forward import clamped_swiglu
from jaxrlhf.models.files import hf_config, hf_weights, mxfp4
from jaxrlhf.models.rope import RopeScaling
from jaxrlhf.sharding import MeshConfig, make_mesh
from tests.support import tiny

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "mlp_size": 32}
MODEL = resolve(ModelConfig("gpt_oss", num_layers=3, num_experts=3, head_dim=16, sliding_window=3, **SIZES))
# what openai/gpt-oss-20b says
PUBLISHED = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201088,
}


# ---- attention sinks ------------------------------------------------------------------------------------------------


def test_sinks_against_a_loop():
    """Of grouped queries, in one part and in two; also the gradient of a sink, by a difference."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(2, 5, heads, 8)) for heads in (4, 2, 2))
    sinks, columns = np.array([-1.0, 0.0, 2.0, 30.0]), np.arange(5)
    expected = np.zeros_like(query)
    for row, s, head in np.ndindex(2, 5, 4):
        scores = key[row, : s + 1, head // 2] @ query[row, s, head] / np.sqrt(8)
        peak = max(scores.max(), sinks[head])
        share = np.exp(scores - peak) / (np.exp(scores - peak).sum() + np.exp(sinks[head] - peak))
        expected[row, s, head] = share @ value[row, : s + 1, head // 2]
    query, key, value = (jnp.asarray(x, jnp.float32) for x in (query, key, value))
    bias = bias_of(jnp.asarray(columns[:, None] >= columns)[None, None])
    found = attention(query, key, value, bias, sinks=jnp.asarray(sinks, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found[:, :, 3]).max() < 1e-9 < 0.1 < np.abs(found[:, :, 1]).max()

    keys, values = (by_head(x) for x in (key, value))
    parts = [
        (keys[:, :, :3], values[:, :, :3], bias[..., :3]),
        (keys[:, :, None, 3:], values[:, :, None, 3:], bias[..., 3:]),
    ]
    split = attend_in_parts(split_copies(query, 2, 1), parts, sinks=jnp.asarray(sinks, jnp.float32))
    np.testing.assert_allclose(merge_copies(split), expected, atol=1e-5)

    total = lambda sink: attention(query, key, value, bias, sinks=jnp.asarray(sinks, jnp.float32).at[1].set(sink)).sum()
    slope = (total(0.05) - total(-0.05)) / 0.1
    np.testing.assert_allclose(jax.grad(total)(0.0), slope, rtol=1e-2)
    assert abs(slope) > 0.05


def test_a_sink_is_a_key_whose_value_is_0():
    """One key more that every token reads, of an ordinary softmax."""
    rng = np.random.default_rng(1)
    query, key, value = (jnp.asarray(rng.normal(size=(1, 4, 1, 8)), jnp.float32) for _ in range(3))
    bias = bias_of(jnp.tril(jnp.ones((4, 4), bool)))[None, None]
    logits = jnp.einsum("bshd,bthd->bhst", query, key)[0, 0] + bias[0, 0]
    more = jnp.concatenate([logits, jnp.full((4, 1), 0.7)], axis=1)
    expected = jax.nn.softmax(more)[:, :4] @ value[0, :, 0]
    found = attention(query, key, value, bias, scale=1.0, sinks=jnp.array([0.7]))
    np.testing.assert_allclose(found[0, :, 0], expected, atol=1e-6)


def test_which_kernel_has_sinks():
    """splash, and XLA; cuDNN is named as lacking them."""
    h100 = Hardware("gpu", 9.0)
    assert choose_kernel("auto", Hardware("tpu"), MODEL, jnp.bfloat16) == "splash"
    assert choose_kernel("auto", h100, MODEL, jnp.bfloat16) == "xla"
    assert passed_over(h100, MODEL, jnp.bfloat16) == "not cudnn, which has no attention sinks, and a gpt_oss has"
    with pytest.raises(
        ValueError, match=r"^attention: cudnn: has no attention sinks, and a gpt_oss has; nearest: xla$"
    ):
        choose_kernel("cudnn", h100, MODEL, jnp.bfloat16)


# ---- experts --------------------------------------------------------------------------------------------------------


def test_the_clamped_swiglu_by_hand():
    """g sigmoid(1.702 g) (u + 1): the gate is clamped above alone, up on both sides."""
    gate, up = jnp.array([1.0, 9.0, -9.0, 2.0, 2.0, 0.0]), jnp.array([0.5, 2.0, 2.0, 20.0, -20.0, 3.0])
    sigmoid = lambda x: 1 / (1 + np.exp(-1.702 * x))
    expected = [1.5 * sigmoid(1), 21 * sigmoid(7), -27 * sigmoid(-9), 16 * sigmoid(2), -12 * sigmoid(2), 0]
    np.testing.assert_allclose(clamped_swiglu(gate, up), expected, rtol=1e-5)


# ---- its config -----------------------------------------------------------------------------------------------------


def test_the_published_config():
    cfg, head = hf_config.parse_config(PUBLISHED, "here")
    assert head == "lm" and (cfg.num_experts, cfg.experts_per_token, cfg.normalize_routing) == (32, 4, True)
    assert cfg.layer_types == ("local", "global") * 12 and cfg.sliding_window == 128
    assert (cfg.attention_bias, cfg.mlp_bias, cfg.head_dim, cfg.rope_theta) == (True, True, 64, 150000.0)
    yarn = RopeScaling("yarn", 32.0, original_max_positions=4096, truncate=False)
    assert cfg.rope_scaling == yarn
    # what transformers assumes where nothing is said
    bare = {name: x for name, x in PUBLISHED.items() if name not in ("rope_scaling", "rope_theta", "layer_types")}
    assert hf_config.parse_config(bare, "here")[0] == cfg
    assert hf_config.parse_config(bare | {"rope_parameters": {}}, "here")[0].rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"swiglu_limit": 5.0}, "swiglu_limit: 5.0 is not supported; expected 7.0"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha: 1.0 is not supported; expected 1.702"),
        ({"sliding_window": None}, "sliding_window: null is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: {'quant_method': 'fp8'} is not sup"),
        ({"num_experts": 8}, "num_experts: 8: num_local_experts is 32; expected the same"),
    ],
)
def test_what_is_not_supported_is_named(changes, line):
    with pytest.raises(ValueError, match="^here: " + line) as error:
        hf_config.parse_config(PUBLISHED | changes, "here")
    assert "\n" not in str(error.value)


def test_no_other_family_reads_mxfp4():
    raw = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": {"quant_method": "mxfp4"},
    }
    with pytest.raises(ValueError, match=r"^here: quantization_config: "):
        hf_config.parse_config(PUBLISHED | raw, "here")


# ---- MXFP4 ----------------------------------------------------------------------------------------------------------


def test_blocks_by_hand():
    """Two experts of one output and 64 inputs: bytes hold the first number in their low bits; a scale of 127 is 1."""
    blocks = np.zeros((2, 1, 2, 16), np.uint8)
    blocks[0, 0, 0, :3] = 0x21, 0xF7, 0x08  # 0.5, 1; 6, -6; -0, 0
    blocks[1, 0, 1, 15] = 0x5A  # -1, 3
    scales = np.full((2, 1, 2), 127, np.uint8)
    scales[0, 0, 0], scales[1, 0, 1] = 129, 120  # times 4, times 1 / 128
    found = mxfp4.Mxfp4(Slice(blocks), Slice(scales))
    assert found.get_shape() == [2, 64, 1]
    whole = found[:, :, :]  # pyright: ignore[reportArgumentType]
    assert whole.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(whole[0, :6, 0].astype(float), [2, 4, 24, -24, 0, 0])
    assert np.signbit(whole[0, 4, 0]) and not whole[0, 6:].any() and not whole[1, :62].any()
    np.testing.assert_array_equal(whole[1, 62:, 0].astype(float), [-1 / 128, 3 / 128])
    np.testing.assert_array_equal(found[slice(1, 2), slice(61, 63), slice(0, 1)], whole[1:, 61:63])


class Slice:
    """An array as safetensors shows one that it has not read."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def get_shape(self) -> list[int]:
        return list(self.array.shape)

    def get_dtype(self) -> str:
        return {"uint8": "U8", "float32": "F32"}[self.array.dtype.name]

    def __getitem__(self, index) -> np.ndarray:
        return self.array[index]


def packed(folder, seed: int = 0) -> dict[str, np.ndarray]:
    """Make the weights of experts in ``folder`` random blocks and scales, in place; returns what they stand for, by
    another way: a number at a time."""
    file, rng, found = folder / "model.safetensors", np.random.default_rng(seed), {}
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("_proj")]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16)).astype(np.uint8)
        scales = rng.integers(120, 126, blocks.shape[:3]).astype(np.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(experts, outputs, inputs)
        size = np.where(codes & 7 < 2, (codes & 1) * 0.5, (1 + 0.5 * (codes & 1)) * 2.0 ** ((codes >> 1 & 3) - 1.0))
        numbers = np.where(codes & 8, -size, size) * 2.0 ** (scales.repeat(32, -1) - 127.0)
        found[name] = numbers.swapaxes(1, 2)
    save_file(tensors, file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": PUBLISHED["quantization_config"]}))
    return found


def test_each_number_is_dequantised_once(tmp_path, monkeypatch):
    """Gate and up are one tensor: each is read without the other."""
    hf_weights.save(tiny.parameters(MODEL, "lm", 0), MODEL, "lm", tmp_path)
    expected = packed(tmp_path)
    read, sizes = mxfp4.Mxfp4.__getitem__, []

    def counted(self, index):
        value = read(self, index)
        sizes.append(value.size)
        return value

    monkeypatch.setattr(mxfp4.Mxfp4, "__getitem__", counted)
    hf_weights.load(tmp_path, MODEL, "lm")
    assert sum(sizes) == sum(value.size for value in expected.values())


def test_a_folder_in_mxfp4(tmp_path):
    """Gate and up are the even and the odd outputs; what is exported is plain, and reads as the same."""
    hf_weights.save(tiny.parameters(MODEL, "lm", 0), MODEL, "lm", tmp_path / "first")
    expected = packed(tmp_path / "first")
    assert hf_config.read_config(tmp_path / "first") == (MODEL, "lm")
    params = hf_weights.load(tmp_path / "first", MODEL, "lm")
    experts = params["layers"]["mlp"]["experts"]
    for layer in range(3):
        at = f"model.layers.{layer}.mlp.experts"
        for part, numbers in {
            "gate": expected[f"{at}.gate_up_proj"][..., ::2],
            "up": expected[f"{at}.gate_up_proj"][..., 1::2],
            "down": expected[f"{at}.down_proj"],
        }.items():
            np.testing.assert_array_equal(experts[part]["kernel"][layer], numbers)
    assert np.abs(experts["gate"]["kernel"]).max() > 0.1
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])):  # halves of blocks
        split = hf_weights.load(tmp_path / "first", MODEL, "lm")
    jax.tree.map(np.testing.assert_array_equal, split, params)
    hf_weights.save(params, MODEL, "lm", tmp_path / "second", "bfloat16")
    assert "quantization_config" not in json.loads((tmp_path / "second" / "config.json").read_text())
    plain = hf_weights.load(tmp_path / "second", MODEL, "lm")["layers"]["mlp"]["experts"]
    assert tiny.equal_trees(plain, experts)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda x: x.pop("down_proj_scales"), "down_proj_blocks: has no scales; expected "),
        (lambda x: x.update(down_proj_scales=np.zeros((3, 32, 2), np.uint8)), r"down_proj_blocks, _scales: U8 \(3, 32"),
        (lambda x: x.update(down_proj_blocks=np.zeros((3, 32, 1, 16), np.float32)), "down_proj_blocks, .*: F32, U8 "),
        (
            lambda x: x.update(
                down_proj_blocks=np.zeros((3, 64, 1, 16), np.uint8), down_proj_scales=np.zeros((3, 64, 1), np.uint8)
            ),
            r"down_proj: has shape \(3, 32, 64\); config.json says \(3, 32, 32\)",
        ),
        (lambda x: x["down_proj_scales"].fill(255), "down_proj: holds weights that are NaN or infinite"),
    ],
)
def test_damaged_blocks_are_refused(change, line, tmp_path):
    hf_weights.save(tiny.parameters(MODEL, "lm", 0), MODEL, "lm", tmp_path)
    packed(tmp_path)
    tensors, at = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp.experts."
    mine = {name.removeprefix(at): x for name, x in tensors.items() if name.startswith(at)}
    change(mine)
    rest = {name: x for name, x in tensors.items() if not name.startswith(at)}
    save_file(rest | {at + name: x for name, x in mine.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf".*: {at}{line}") as error:
        hf_weights.load(tmp_path, MODEL, "lm")
    assert "\n" not in str(error.value)
