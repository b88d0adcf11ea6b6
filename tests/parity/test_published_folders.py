"""Folders as published models have them, read here and in transformers: models of text and images, reward models."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.files import hf_config, hf_headers, hf_weights
from jaxrlhf.models.files.hf_config import TokenIds
from jaxrlhf.models.parameters import Leaf, parameter_table
from jaxrlhf.run import export_pad_token
from tests.parity.both import compute, read
from tests.parity.cases import SCALED, VOCAB, law
from tests.parity.checks import TOLERANCE

pytestmark = pytest.mark.torch

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
SIGHT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TOKENS = np.random.default_rng(5).integers(3, 90, (2, 9))
WINDOW = {"sliding_window": 4}
# class -> (config class, text_config, model_type of the vision part, more)
WRAPPED = {
    "Gemma3ForConditionalGeneration": ("Gemma3Config", {"sliding_window": 4}, "siglip_vision_model", {}),
    "Gemma3ForSequenceClassification": (
        "Gemma3Config",
        {"sliding_window": 4},
        "siglip_vision_model",
        {"num_labels": 1},
    ),
    "LlavaForConditionalGeneration": ("LlavaConfig", {"model_type": "llama"}, "clip_vision_model", {}),
    "LlavaNextForConditionalGeneration": ("LlavaNextConfig", {"model_type": "mistral"}, "clip_vision_model", {}),
    "Qwen3_5ForConditionalGeneration": (
        "Qwen3_5Config",
        {"model_type": "qwen3_5_text", "num_hidden_layers": 4, "linear_num_value_heads": 2, "linear_num_key_heads": 2}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "rms_norm_eps": 1e-2},
        "qwen3_5_vision",
        {},
    ),
    "Qwen3_5MoeForConditionalGeneration": (
        "Qwen3_5MoeConfig",
        {"model_type": "qwen3_5_moe_text", "num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "linear_num_value_heads": 2}
        | {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "rms_norm_eps": 3e-2},
        "qwen3_5_moe_vision",
        {},
    ),
    "Gemma4ForConditionalGeneration": (
        "Gemma4Config",
        {"sliding_window": 4, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"global_head_dim": 16, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}
        | {"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": VOCAB},
        "gemma4_vision",
        {},
    ),
    "Mistral3ForConditionalGeneration": ("Mistral3Config", {"model_type": "mistral"}, "pixtral", {}),
    "Mistral3ForConditionalGeneration: Ministral 3": (
        "Mistral3Config",
        {"model_type": "ministral3", "rope_parameters": SCALED},
        "pixtral",
        {},
    ),
}
OTHER_PARTS = ("vision_tower", "embed_vision", "multi_modal", "newline", "visual")
NEW_NAMES = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}


def whole(name: str):
    """The model of text and images, with the law's weights."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config, text, vision, more = WRAPPED[name]
    kinds = {"text_config": TEXT | text, "vision_config": SIGHT | {"model_type": vision}}
    images = {"image_token_index": VOCAB - 1, "mm_tokens_per_image": 4}
    model = getattr(transformers, name.partition(":")[0])(
        getattr(transformers, config)(**kinds, **images, **more)
    ).eval()
    with torch.no_grad():
        for tensor, value in model.named_parameters():
            value.copy_(torch.tensor(law(tensor, tuple(value.shape))))
    return model


@pytest.mark.parametrize("names", [pytest.param("as saved", marks=pytest.mark.nightly), "as in memory"])
@pytest.mark.parametrize("name", WRAPPED)
def test_the_text_part_of_a_model_of_text_and_images(name, names, tmp_path):
    """With the tensors' names in files of transformers, and with those that its classes have since version 4.52."""
    torch, model = pytest.importorskip("torch"), whole(name)
    model.save_pretrained(tmp_path)
    if names == "as in memory":
        file = tmp_path / "model.safetensors"
        save_file({renamed(tensor): value for tensor, value in load_file(file).items()}, file)
    params, cfg, head = read(tmp_path)
    assert head == ("scalar" if "Classification" in name else "lm")
    left = hf_headers.examine(tmp_path, cfg, head).left
    assert left and all(any(part in tensor for part in OTHER_PARTS) for tensor in left)
    ours = compute(params, cfg, head, TOKENS, np.ones(TOKENS.shape, bool))
    with torch.no_grad():
        if head == "lm":
            theirs = model(input_ids=torch.tensor(TOKENS)).logits.numpy()
        else:
            theirs = model.score(model.model(input_ids=torch.tensor(TOKENS)).last_hidden_state)[..., 0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


def renamed(tensor: str) -> str:
    if tensor.startswith(("model.", "lm_head.")):
        return tensor  # classes without older names
    old = next((old for old in NEW_NAMES if tensor.startswith(old)), None)
    return NEW_NAMES[old] + tensor.removeprefix(old) if old else tensor if tensor[:5] == "score" else f"model.{tensor}"


# ---- exported reward models -----------------------------------------------------------------------------------------

TEXTS = ["Is it late?", "Is it late? Yes, it is.", "No", "a dog ran to the red boat . . ."]


def exported(folder: Path, family, change, vocab: int = 0):
    """(params, config, tokenizer, notes) of a random reward model written to the folder, whose tokenizer ``change``
    has made; its bias is 3.5."""
    tokenizer = tokenizers.train_bpe(["a dog ran to the red boat"] * 4, 270)
    change(tokenizer)
    size = vocab or len(tokenizer)
    shape = resolve(ModelConfig(family, size, 32, 2, 4, head_dim=8, mlp_size=48, max_positions=64))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32),
        parameter_table(shape, "scalar"),
        is_leaf=lambda x: isinstance(x, Leaf),
    )
    params["head"]["bias"][:] = 3.5
    ids = TokenIds(tokenizers.eos_ids(tokenizer), tokenizer.bos_token_id, tokenizer.pad_token_id)
    padded, grown, wider, ids, notes = export_pad_token.with_own_pad(tokenizer, params, shape, ids)
    tokenizers.save_tokenizer(padded, str(folder / "tokenizer"))
    notes += hf_weights.save(grown, wider, "scalar", folder / "model", ids=ids, tokenizer_folder=folder / "tokenizer")
    return params, shape, tokenizer, notes


def nothing(tokenizer) -> None:
    """It has a pad of its own."""


def pad_is_eos(tokenizer) -> None:
    tokenizer.pad_token = tokenizer.eos_token


def no_pad(tokenizer) -> None:
    tokenizer.pad_token = None


def pad_is_eos_and_one_is_reserved(tokenizer) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_special_token_0|>"]})
    tokenizer.pad_token = tokenizer.eos_token


def pad_is_another_end(tokenizer) -> None:
    """As of Qwen 2.5: a response may end with the pad token too."""
    tokenizer.endings = (tokenizer.eos_token_id, tokenizer.pad_token_id)


def pad_is_eos_and_nothing_is_free(tokenizer) -> None:
    """Every token of the vocabulary is one that texts hold: a row is added."""
    tokenizer.add_special_tokens({"eos_token": "<end>", "bos_token": "<begin>"})
    tokenizer.endings = (tokenizer.eos_token_id, 0)
    tokenizer.pad_token = tokenizer.eos_token


CHANGES = (
    nothing,
    pad_is_eos,
    no_pad,
    pad_is_eos_and_one_is_reserved,
    pad_is_another_end,
    pad_is_eos_and_nothing_is_free,
)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        pytest.param(family, change, marks=[] if change is nothing or family == "llama" else pytest.mark.nightly)
        for family in ("llama", "gpt2", "gpt_neox", "gemma3_text")
        for change in CHANGES
    ],
)
def test_an_exported_reward_model_has_our_scores_in_transformers(change, family, tmp_path):
    """One row at a time, in a batch padded on the right, and on the left where positions are not counted from there."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    params, shape, tokenizer, notes = exported(tmp_path, family, change)
    rows = [tokenizers.encode_text(tokenizer, text).ids + [tokenizer.eos_token_id] for text in TEXTS]
    one = lambda row: compute(params, shape, "scalar", np.array([row]), np.ones((1, len(row)), bool))[0, -1]
    missing = 0.0 if family.startswith("gpt") else 3.5
    assert sum("score.bias: 3.5" in note for note in notes) == bool(missing)
    ours = np.array([one(row) for row in rows]) - missing

    there = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    score = lambda batch: model(**batch).logits[:, 0].detach().numpy()
    with torch.no_grad():
        single = np.concatenate([score({"input_ids": torch.tensor([row])}) for row in rows])
        np.testing.assert_allclose(single, ours, atol=TOLERANCE, rtol=0)
        texts = [text + tokenizer.eos_token for text in TEXTS]
        for side in ("right", "left")[: 1 if family == "gpt2" else 2]:
            batch = there(texts, return_tensors="pt", padding=True, padding_side=side, add_special_tokens=False)
            np.testing.assert_allclose(score(batch), ours, atol=TOLERANCE, rtol=0)
    assert there.padding_side == "right"
    again, cfg, head = read(tmp_path / "model")  # and here the bias is back
    found = [compute(again, cfg, head, np.array([row]), np.ones((1, len(row)), bool))[0, -1] for row in rows]
    np.testing.assert_allclose(found, ours + missing, atol=TOLERANCE, rtol=0)


def test_what_was_changed_for_padding_is_told(tmp_path):
    _, shape, tokenizer, notes = exported(tmp_path, "llama", pad_is_eos_and_nothing_is_free)
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    assert raw["pad_token_id"] == shape.vocab_size and raw["vocab_size"] == shape.vocab_size + 1
    assert notes[0].startswith(
        f"pad_token: '<|pad|>', id {shape.vocab_size}, in place of '<end>', which may end a row:"
    )
    assert hf_config.read_config(tmp_path / "model")[0].vocab_size == len(tokenizer) + 1
