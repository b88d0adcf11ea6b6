"""GGUF files: tiny llamas written with the gguf package, against the arrays that they were made of."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import sharding
from jaxrlhf.data.tokenizer import load_tokenizer, train_bpe
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.files import gguf as ours
from jaxrlhf.models.files import hf_config, hf_folder, hf_weights
from jaxrlhf.models.files.gguf_tokenizer import merges_of
from jaxrlhf.models.rope import RopeScaling
from jaxrlhf.sharding import MeshConfig

HIDDEN, HEADS, KV_HEADS, WIDTH, MLP, LAYERS = 64, 4, 2, 32, 96, 2
TEXTS = ["the film is warm and its script bright", "a dull 1234 story, told  twice\n"] * 20
Q8_0, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32
PARTS = {
    "attn_q": (HEADS * WIDTH, HIDDEN),
    "attn_k": (KV_HEADS * WIDTH, HIDDEN),
    "attn_v": (KV_HEADS * WIDTH, HIDDEN),
    "attn_output": (HIDDEN, HEADS * WIDTH),
    "ffn_gate": (MLP, HIDDEN),
    "ffn_up": (MLP, HIDDEN),
    "ffn_down": (HIDDEN, MLP),
    "attn_norm": (HIDDEN,),
    "ffn_norm": (HIDDEN,),
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Folders are unpacked below it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def vocabulary():
    """(tokens, merges, ids) of a small byte-level BPE."""
    tokenizer = train_bpe(TEXTS, 300)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(merge) for merge in model["merges"]]


def arrays(tied=True):
    """Every tensor of the file, in ggml's order of rows."""
    rng = np.random.default_rng(0)
    size = len(vocabulary()[0])
    shapes = {"token_embd": (size, HIDDEN), "output_norm": (HIDDEN,)} | ({} if tied else {"output": (size, HIDDEN)})
    shapes |= {f"blk.{layer}.{part}": shape for layer in range(LAYERS) for part, shape in PARTS.items()}
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(path, tensors, kind: Any = F32, arch: Any = "llama", leave_out: Any = (), pre: Any = "gpt-2", **more) -> str:
    """A GGUF file, its matrices as ``kind``. Returns its name for init_from."""
    writer = gguf.GGUFWriter(str(path), arch)
    numbers = {
        "block_count": LAYERS,
        "context_length": 64,
        "embedding_length": HIDDEN,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "rope.dimension_count": WIDTH,
        "attention.key_length": WIDTH,
        "attention.value_length": WIDTH,
    }
    for key, value in (numbers | more).items():
        if key not in leave_out:
            add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}[type(value)]
            add(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    tokens, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, value in tensors.items():
        form = kind if value.ndim == 2 else F32
        writer.add_tensor(name, gguf.quants.quantize(value, form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return f"gguf:{path}"


def load(name, **options):
    folder = hf_folder.locate(name)
    cfg, head = hf_config.read_config(folder)
    return hf_weights.load(folder, cfg, head, **options), cfg


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [F32, Q8_0, gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.F16])
@pytest.mark.parametrize("tied", [True, False])
def test_weights(tmp_path, kind, tied):
    """Against loops written by hand; what is quantised equals the gguf package's own dequantised whole tensors."""
    tensors = arrays(tied)
    params, cfg = load(write(tmp_path / "m.gguf", tensors, kind))
    quants = gguf.quants
    near = lambda x: quants.dequantize(quants.quantize(x, kind), kind) if kind != F32 and x.ndim == 2 else x
    tensors = {name: near(value) for name, value in tensors.items()}
    assert (cfg.num_layers, cfg.head_dim, cfg.num_kv_heads, cfg.tie_embeddings) == (LAYERS, WIDTH, KV_HEADS, tied)
    assert cfg.norm_eps == 1e-5  # not 9.99999974e-06, its nearest float32
    rows = len(vocabulary()[0])
    np.testing.assert_array_equal(params["embed"]["tokens"]["embedding"][:rows], tensors["token_embd.weight"])
    np.testing.assert_array_equal(params["final_norm"]["scale"], tensors["output_norm.weight"])
    if not tied:
        np.testing.assert_array_equal(params["head"]["kernel"][:, :rows], tensors["output.weight"].T)
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    for layer in range(LAYERS):
        for part, heads in (("query", HEADS), ("key", KV_HEADS)):
            rows_there = tensors[f"blk.{layer}.attn_{part[0]}.weight"]
            for head in range(heads):
                for k in range(WIDTH):  # ggml turns 2i and 2i + 1 together, and here i and i + WIDTH / 2
                    row = head * WIDTH + (2 * k if k < WIDTH // 2 else 2 * (k - WIDTH // 2) + 1)
                    np.testing.assert_array_equal(attention[part]["kernel"][layer, :, head, k], rows_there[row])
        value = tensors[f"blk.{layer}.attn_v.weight"].reshape(KV_HEADS, WIDTH, HIDDEN)
        np.testing.assert_array_equal(attention["value"]["kernel"][layer], value.transpose(2, 0, 1))
        out = tensors[f"blk.{layer}.attn_output.weight"].reshape(HIDDEN, HEADS, WIDTH)
        np.testing.assert_array_equal(attention["out"]["kernel"][layer], out.transpose(1, 2, 0))
        for name in ("gate", "up", "down"):
            np.testing.assert_array_equal(mlp[name]["kernel"][layer], tensors[f"blk.{layer}.ffn_{name}.weight"].T)
        np.testing.assert_array_equal(mlp["norm"]["scale"][layer], tensors[f"blk.{layer}.ffn_norm.weight"])


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4)])
def test_mesh_equals_one_device(tmp_path, shape):
    """Also where a device's part of the heads is less than all of them."""
    name = write(tmp_path / "m.gguf", arrays(), Q8_0)
    alone, _ = load(name)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(*shape), jax.devices()[:8])):
        split, _ = load(name)
    jax.tree.map(np.testing.assert_array_equal, alone, split)


def test_slices_read_like_arrays(tmp_path):
    """Any slice of a lazy tensor is the slice of the whole, also one that cuts through a head."""
    folder = hf_folder.locate(write(tmp_path / "m.gguf", arrays(), Q8_0))
    tensor = ours.open_tensors(folder)["model.layers.1.self_attn.q_proj.weight"]
    whole = tensor[:]
    assert whole.shape == tuple(tensor.get_shape()) == (HEADS * WIDTH, HIDDEN)
    for index in (slice(5, 70), (slice(33, 34), slice(3, 9)), (slice(0, 128), slice(0, 1))):
        np.testing.assert_array_equal(tensor[index], whole[index])


def test_export_to_hugging_face(tmp_path):
    params, cfg = load(write(tmp_path / "m.gguf", arrays(), Q8_0))
    hf_weights.save(params, cfg, "lm", tmp_path / "hf")
    again = hf_weights.load(tmp_path / "hf", *hf_config.read_config(tmp_path / "hf"))
    jax.tree.map(np.testing.assert_array_equal, params, again)


# ---- config ---------------------------------------------------------------------------------------------------------


def test_config(tmp_path):
    more = {"rope.freq_base": 5e5, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    _, cfg = load(write(tmp_path / "m.gguf", arrays(), **more))
    expected = ModelConfig(
        vocab_size=len(vocabulary()[0]),
        hidden_size=HIDDEN,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=WIDTH,
        mlp_size=MLP,
        max_positions=64,
        rope_theta=5e5,
        rope_scaling=RopeScaling("linear", 4.0),
    )
    assert cfg == resolve(expected)


def test_llama3_rope_factors(tmp_path):
    """The factors in the file are those that our frequencies are divided by under rope_scaling llama3."""
    from jaxrlhf.models.rope import rope_frequencies

    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    factors = np.asarray(rope_frequencies(WIDTH, 5e5, None) / rope_frequencies(WIDTH, 5e5, scaling))
    assert len(np.unique(np.round(factors, 3))) > 2
    tensors = arrays() | {"rope_freqs.weight": factors}
    _, cfg = load(write(tmp_path / "m.gguf", tensors, **{"rope.freq_base": 5e5}))
    assert cfg.rope_scaling == scaling
    bent = arrays() | {"rope_freqs.weight": factors * np.linspace(1, 2, WIDTH // 2, dtype=np.float32)}
    with pytest.raises(ValueError, match=r"rope_freqs.*Llama 3"):
        load(write(tmp_path / "bent.gguf", bent, **{"rope.freq_base": 5e5}))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"arch": "bloom"},
            "general.architecture: 'bloom' is not supported; expected one of llama, qwen2, qwen3, ",
        ),
        ({"arch": "gemma4"}, "general.architecture: 'gemma4' is not supported (transformers reads neither"),
        ({"expert_count": 8}, "llama.expert_count: 8 is not supported; expected 0"),
        ({"rope.scaling.type": "yarn"}, "llama.rope.scaling.type: 'yarn' is not supported; expected none or linear"),
        ({"rope.dimension_count": 16}, "llama.rope.dimension_count: expected the size of a head, 32"),
        ({"leave_out": ("block_count",)}, "llama.block_count: is missing"),
        ({"pre": "superbpe"}, "tokenizer.ggml.pre: 'superbpe' is not supported; expected one of a.x-4.0"),
    ],
)
def test_refusals(tmp_path, options, message):
    name = write(tmp_path / "m.gguf", arrays(), **options)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        hf_folder.locate(name)
    assert "\n" not in str(caught.value) and str(tmp_path / "m.gguf") in str(caught.value)
    assert not list(Path(tmp_path / "home" / ".cache" / "jaxrlhf" / "models").iterdir())  # nothing half-made


def test_a_part_of_several_files(tmp_path):
    name = write(tmp_path / "m-00001-of-00002.gguf", arrays())
    with pytest.raises(ValueError, match=r"is one part of several; expected one file"):
        hf_folder.locate(name)


def test_a_tensor_too_many_or_too_few(tmp_path):
    extra = arrays() | {"blk.0.ffn_gate_exps.weight": np.ones((2, HIDDEN), np.float32)}
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_gate_exps\.weight: a llama has no such tensor"):
        hf_folder.locate(write(tmp_path / "extra.gguf", extra))
    fewer = {name: value for name, value in arrays().items() if name != "blk.1.attn_k.weight"}
    with pytest.raises(ValueError, match=r"lacks tensors: model\.layers\.1\.self_attn\.k_proj\.weight"):
        load(write(tmp_path / "fewer.gguf", fewer))


def test_no_file_and_no_gguf_file(tmp_path):
    with pytest.raises(ValueError, match=f"init_from: gguf:{tmp_path}/none.gguf: there is no such file"):
        hf_folder.locate(f"gguf:{tmp_path}/none.gguf")
    (tmp_path / "text.gguf").write_text("not one")
    with pytest.raises(ValueError, match=r"text.gguf: is not a GGUF file"):
        hf_folder.locate(f"gguf:{tmp_path}/text.gguf")


def test_unpacked_once_until_the_file_changes(tmp_path):
    name = write(tmp_path / "m.gguf", arrays())
    first = hf_folder.locate(name)
    made = (first / "config.json").stat().mtime
    assert hf_folder.locate(name) == first and (first / "config.json").stat().mtime == made
    write(tmp_path / "m.gguf", arrays(tied=False), Q8_0)
    assert hf_folder.locate(name) != first


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def test_byte_level_tokenizer(tmp_path):
    """The same ids as the tokenizer whose vocabulary it is, special tokens whole, the chat template kept."""
    folder = str(hf_folder.locate(write(tmp_path / "m.gguf", arrays())))
    there, here = train_bpe(TEXTS, 300), load_tokenizer(folder)
    for text in [*TEXTS[:2], "it's 2002, é \U0001f600!", "<eos>after"]:
        assert here(text, add_special_tokens=False).input_ids == there(text, add_special_tokens=False).input_ids
        assert here.decode(here(text).input_ids) == text
    assert (here.eos_token_id, here.bos_token_id) == (1, 2)
    assert here.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    generation = hf_folder.read_json(folder, "generation_config.json")
    assert generation == {"eos_token_id": [1]}


def test_cuts(tmp_path):
    """Digits one by one and runs of spaces whole (smollm); digits by threes (llama-bpe)."""
    cuts = {}
    for pre in ("gpt-2", "smollm", "llama-bpe"):
        folder = str(hf_folder.locate(write(tmp_path / f"{pre}.gguf", arrays(), pre=pre)))
        split = load_tokenizer(folder).backend_tokenizer.pre_tokenizer.pre_tokenize_str
        cuts[pre] = [piece for piece, _ in split("x  1234 It's")]
    assert cuts["gpt-2"] == ["x", "Ġ", "Ġ1234", "ĠIt", "'s"]
    assert cuts["smollm"] == ["x", "ĠĠ", "1", "2", "3", "4", "ĠIt", "'s"]
    assert cuts["llama-bpe"] == ["x", "Ġ", "Ġ", "123", "4", "ĠIt", "'s"]


def test_merges_from_scores():
    """A vocabulary whose scores are the order of its merges gives back the same segmentation."""
    model = json.loads(train_bpe(TEXTS, 300).backend_tokenizer.to_str())["model"]
    joined = ["".join(merge) for merge in model["merges"]]
    scores = [-float(joined.index(token)) if token in joined else -1e6 for token in model["vocab"]]
    from tokenizers import Tokenizer, models

    whole = Tokenizer(models.BPE(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]]))
    again = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges_of(model["vocab"], scores)))
    words = {word for text in TEXTS for word in text.split()}
    assert len(joined) > 20
    for word in words:
        assert again.encode(word).tokens == whole.encode(word).tokens


def test_sentence_piece(tmp_path):
    """Spaces as U+2581, bytes where the vocabulary has no letter, BOS in front, and text comes back."""
    words = ["▁", "t", "h", "e", "▁t", "he", "▁the", "▁film", "f", "i", "l", "m", "fi", "lm", "film"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(words))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    from jaxrlhf.models.files.gguf_tokenizer import write_tokenizer

    write_tokenizer(metadata, hf_folder.epath.Path(tmp_path), "here")
    tokenizer = load_tokenizer(str(tmp_path))
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("the film é").input_ids)
    assert pieces == ["<s>", "▁the", "▁film", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer("the film é").input_ids, skip_special_tokens=True) == "the film é"


# ---- transformers reads the same file -------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("kind", [F32, gguf.GGMLQuantizationType.Q4_1])
def test_logits_equal_those_of_transformers(tmp_path, kind):
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")  # which transformers wants for GGUF files
    import transformers

    from jaxrlhf.models.heads import lm_logits
    from jaxrlhf.models.transformer import Runtime, forward

    scaled = {name: value * (0.1 if value.ndim == 2 else 1.0) for name, value in arrays().items()}
    params, cfg = load(write(tmp_path / "m.gguf", scaled, kind))
    hf_weights.save(params, cfg, "lm", tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 9))
    ours_logits = lm_logits(
        params, cfg, forward(params, cfg, jnp.array(tokens), jnp.ones((2, 9), jnp.int32), Runtime())
    )
    direct = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert np.abs(ours_logits).max() > 0.5
    for model in (direct, exported):
        with torch.no_grad():
            theirs = model.eval()(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(ours_logits[..., : cfg.vocab_size], theirs, atol=1e-4)
