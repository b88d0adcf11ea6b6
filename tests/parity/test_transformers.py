"""The same weights in transformers and here: logits, scores, greedy tokens, and files both ways.

The live tests need torch. Without it the committed numbers of transformers (golden/transformers_*.json) are checked;
``python tests/parity/test_transformers.py`` writes those anew. Their weights are not stored but drawn by ``law``.
"""

import functools
import json
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.generate import Sampler, sample
from jaxrlhf.models import hf, hf_config, hf_layout
from jaxrlhf.models.heads import lm_logits, scalar
from jaxrlhf.models.transformer import Leaf, Runtime, forward, padded_vocab, parameter_table
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.types import Prompts

GOLDEN = Path(__file__).parents[1] / "golden"
NEW_TOKENS = 32
GREEDY = ("llama", "llama_linear", "gpt2")  # cases that also generate: programs take seconds to compile
TOLERANCE = 1e-4  # on logits of size 1 to 10, float32

LLAMA = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
GPT2 = {"model_type": "gpt2", "vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
CASES = {
    # grouped queries, wide heads
    "llama": {**LLAMA, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "llama_linear": {
        **LLAMA,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_theta": 500.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    # wavelengths of 6, 20, 63, 200, ...: below 64 / 4, between, and above 64 / 1
    "llama_llama3": {
        **LLAMA,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64},
    },
    "gpt2": GPT2,
    "gpt2_untied": {**GPT2, "n_inner": 40, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
}
TOKENS = np.random.default_rng(7).integers(0, 101, (3, 9))
VALID = np.arange(9) >= np.array([[0], [4], [7]])  # left-padded
POSITIONS = np.maximum(np.cumsum(VALID, 1) - 1, 0)


def law(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights of every test here: normal numbers seeded by the tensor's name, about 1 for norms and 0 elsewhere."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    center = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
    return (center + 0.2 * noise).astype(np.float32)


# ---- here ---------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2))
def compute(params, cfg, head, tokens, valid):
    hidden = forward(params, cfg, tokens, valid.astype(jnp.int32), Runtime())
    return scalar(params, hidden) if head == "scalar" else lm_logits(params, cfg, hidden)[..., : cfg.vocab_size]


generate = jax.jit(sample, static_argnums=(1, 5, 6))


def our_output(folder):
    """Logits [B, S, V] or per-token scores [B, S] of a folder."""
    cfg, head = hf_config.read_config(folder)
    params = hf.load(folder, cfg, head)
    return np.asarray(compute(params, cfg, head, jnp.array(TOKENS), jnp.array(VALID)))


def our_greedy(folder):
    """[B, NEW_TOKENS]"""
    cfg, head = hf_config.read_config(folder)
    sampler = Sampler(Sampling(temperature=0.0), NEW_TOKENS, eos_ids=(), pad_id=0)
    prompts = Prompts(jnp.array(TOKENS), jnp.array(VALID), jnp.arange(len(TOKENS)))
    made = generate(hf.load(folder, cfg, head), cfg, prompts, jnp.int32(0), jnp.int32(0), sampler, Runtime())
    return np.asarray(made.tokens[:, TOKENS.shape[1] :])


def config_of(case: str, head: str) -> dict:
    names = {"llama": ("LlamaForCausalLM", "LlamaForSequenceClassification")}
    names["gpt2"] = ("GPT2LMHeadModel", "GPT2ForSequenceClassification")
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    labels = {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}} if head == "scalar" else {}
    architecture = names[CASES[case]["model_type"]][head == "scalar"]
    return {**CASES[case], **tokens, **labels, "architectures": [architecture]}


@pytest.mark.parametrize("case", CASES)
def test_golden(case, tmp_path):
    """transformers' numbers from the law's weights, read from a folder written without torch."""
    from safetensors.numpy import save_file

    golden = json.loads((GOLDEN / f"transformers_{case}.json").read_text())
    for head in ("lm", "scalar"):
        folder = tmp_path / head
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(golden["config"][head]))
        cfg, found = hf_config.read_config(folder)
        assert found == head
        sources = hf_layout.find_sources(cfg, head).values()
        weights = {name: law(name, source.shape()) for source in sources for name in source.names()}
        save_file(weights, folder / "model.safetensors")
    logits = our_output(tmp_path / "lm")
    assert np.abs(logits[VALID]).max() > 1  # else the tolerance says little
    np.testing.assert_allclose(logits[VALID], np.array(golden["logits"]), atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(our_output(tmp_path / "scalar")[:, -1], golden["scores"], atol=TOLERANCE, rtol=0)
    if case in GREEDY:
        assert our_greedy(tmp_path / "lm").tolist() == golden["greedy"]


# ---- there --------------------------------------------------------------------------------------------------------


def their_model(case: str, head: str = "lm"):
    """A transformers model with the law's weights."""
    torch = pytest.importorskip("torch")
    import transformers

    raw = config_of(case, head)
    cls = getattr(transformers, raw["architectures"][0])
    model = cls(cls.config_class.from_dict(raw)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():  # a tied head is not listed
            value.copy_(torch.tensor(law(name, tuple(value.shape))))
    return model


def their_output(model) -> np.ndarray:
    """Logits [B, S, V]; or scores [B] at the last token, where all rows end."""
    torch = pytest.importorskip("torch")
    inputs = {"input_ids": TOKENS, "attention_mask": VALID.astype(int), "position_ids": POSITIONS}
    with torch.no_grad():
        if hasattr(model, "score"):
            hidden = model.base_model(**{name: torch.tensor(x) for name, x in inputs.items()}).last_hidden_state
            return model.score(hidden)[:, -1, 0].numpy()
        return model(**{name: torch.tensor(x) for name, x in inputs.items()}).logits.numpy()


def their_greedy(model) -> np.ndarray:
    torch = pytest.importorskip("torch")
    made = model.generate(
        torch.tensor(TOKENS),
        attention_mask=torch.tensor(VALID.astype(int)),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
    )
    return made[:, TOKENS.shape[1] :].numpy()


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name] == other[name]).all(), name


def reload(model, folder):
    return type(model).from_pretrained(folder).eval()


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_theirs_to_ours_and_back(case, tmp_path):
    model = their_model(case)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    expected = their_output(model)
    np.testing.assert_allclose(our_output(tmp_path / "theirs")[VALID], expected[VALID], atol=TOLERANCE, rtol=0)
    if case in GREEDY:
        assert our_greedy(tmp_path / "theirs").tolist() == their_greedy(model).tolist()

    cfg, head = hf_config.read_config(tmp_path / "theirs")
    params = hf.load(tmp_path / "theirs", cfg, head)
    hf.save(params, cfg, head, tmp_path / "ours", max_shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    again = reload(model, tmp_path / "ours")
    same_weights(model, again)
    np.testing.assert_array_equal(their_output(again), expected)
    golden = json.loads((GOLDEN / f"transformers_{case}.json").read_text())
    np.testing.assert_allclose(expected[VALID], np.array(golden["logits"]), atol=1e-5, rtol=0)


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_ours_to_theirs_and_back(case, tmp_path):
    cfg, head = hf_config.parse_config(config_of(case, "lm"), case)
    rng = np.random.default_rng(3)
    is_leaf = lambda x: isinstance(x, Leaf)
    draw = lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32)
    params = jax.tree.map(draw, parameter_table(cfg, head), is_leaf=is_leaf)
    hf.save(params, cfg, head, tmp_path / "ours")
    model = reload(their_model(case), tmp_path / "ours")
    logits = compute(params, cfg, head, jnp.array(TOKENS), jnp.array(VALID))
    assert np.abs(logits).max() > 0.5
    np.testing.assert_allclose(logits[VALID], their_output(model)[VALID], atol=TOLERANCE, rtol=0)

    model.save_pretrained(tmp_path / "theirs")
    assert hf_config.read_config(tmp_path / "theirs") == (cfg, head)
    again = hf.load(tmp_path / "theirs", cfg, head)
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        loaded = hf.leaf_at(again, hf_layout.dotted(path))
        cut = tuple(slice(101 if size == padded_vocab(cfg) else None) for size in value.shape)  # files have no padding
        np.testing.assert_array_equal(loaded[cut], value[cut])


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_scores_both_ways(case, tmp_path):
    """A classifier with one label; our score's bias, which transformers lacks, comes back from config.json."""
    model = their_model(case, "scalar")
    model.save_pretrained(tmp_path / "theirs")
    expected = their_output(model)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(our_output(tmp_path / "theirs")[:, -1], expected, atol=TOLERANCE, rtol=0)

    cfg, head = hf_config.read_config(tmp_path / "theirs")
    params = hf.load(tmp_path / "theirs", cfg, head)
    params["head"]["bias"] = params["head"]["bias"] + 0.3
    hf.save(params, cfg, head, tmp_path / "ours", ids=hf_config.TokenIds(eos=(5, 6), pad=100))
    again = reload(model, tmp_path / "ours")
    same_weights(model, again)
    assert (again.config.num_labels, again.config.pad_token_id) == (1, 100)
    np.testing.assert_allclose(our_output(tmp_path / "ours")[:, -1], expected + 0.3, atol=TOLERANCE, rtol=0)

    torch = pytest.importorskip("torch")
    with torch.no_grad():  # as a user calls it: the last token that is not padding, padded on the right
        tokens = np.where(np.arange(9) < VALID.sum(1)[:, None], np.minimum(TOKENS, 99), 100)
        theirs = again(torch.tensor(tokens), attention_mask=torch.tensor((tokens != 100).astype(int))).logits[:, 0]
    ours = compute(params, cfg, head, jnp.array(tokens), jnp.array(tokens != 100))
    last = ours[np.arange(3), VALID.sum(1) - 1] - 0.3
    np.testing.assert_allclose(last, theirs.numpy(), atol=TOLERANCE, rtol=0)


@pytest.mark.torch
def test_bfloat16_files_and_token_ids(tmp_path):
    """Weights written in bfloat16 are transformers' own rounding, and generation stops at either EOS token."""
    torch = pytest.importorskip("torch")
    model = their_model("llama")
    model.save_pretrained(tmp_path / "theirs")
    cfg, head = hf_config.read_config(tmp_path / "theirs")
    params = hf.load(tmp_path / "theirs", cfg, head)
    ids = hf_config.TokenIds(eos=(int(their_greedy(model)[0, 3]), 99), bos=1, pad=2)
    hf.save(params, cfg, head, tmp_path / "ours", "bfloat16", ids=ids)
    again = reload(model, tmp_path / "ours")
    assert again.dtype == torch.bfloat16
    same_weights(model.to(torch.bfloat16), again)
    assert again.generation_config.eos_token_id == list(ids.eos)
    assert (again.config.bos_token_id, again.config.pad_token_id) == (1, 2)
    loaded = hf.load(tmp_path / "ours", cfg, head, jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def write_golden() -> None:
    """Ask transformers and write golden/transformers_*.json."""
    import transformers

    for case in CASES:
        model, scorer = their_model(case), their_model(case, "scalar")
        rounded = lambda x: np.round(x.astype(float), 6).tolist()
        golden = {
            "about": "Logits of the valid tokens, scores of the last token, and greedy tokens of transformers, with "
            "the weights, tokens and mask of tests/parity/test_transformers.py.",
            "source": f"transformers {transformers.__version__}",
            "config": {head: config_of(case, head) for head in ("lm", "scalar")},
            "logits": rounded(their_output(model)[VALID]),
            "scores": rounded(their_output(scorer)),
            "greedy": their_greedy(model).tolist() if case in GREEDY else None,
        }
        (GOLDEN / f"transformers_{case}.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    sys.exit(write_golden())
