"""What roles start from: everything is loaded, or a role learns it; and token ids mean the same to all models."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf.config.load import parse
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.data.same_tokenizer import foreign_ids
from jaxrlhf.errors import ConfigError
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.files import hf_weights
from jaxrlhf.models.parameters import Leaf, parameter_table
from jaxrlhf.ops.sampling import Sampling, shape_logits
from jaxrlhf.run import build, feed, origins
from jaxrlhf.run.initial_state import read_weights
from jaxrlhf.sharding import MeshConfig, current, make_mesh, spec
from jaxrlhf.types import Head

TEXTS = ["the cat sat on the mat", "a dog ran to the red boat", "how many apples does Ana have?"] * 4
VOCAB = 280
SHAPE = resolve(ModelConfig("llama", VOCAB, 32, 2, 2, mlp_size=32, max_positions=64, tie_embeddings=False))


@functools.cache
def params(shape: ModelConfig, head: Head):
    """Normal numbers for every leaf."""
    rng = np.random.default_rng(0)
    one = lambda leaf: 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
    return jax.tree.map(one, parameter_table(shape, head), is_leaf=lambda x: isinstance(x, Leaf))


@pytest.fixture(scope="module")
def trained():
    return tokenizers.train_bpe(TEXTS, VOCAB)


@pytest.fixture
def model(tmp_path, trained):
    """Writes a Hugging Face folder ``name``; ``change``: of its tensors."""

    def make(name: str, head: Head = "lm", shape=SHAPE, tokenizer=None, change=None) -> str:
        folder = tmp_path / name
        tokenizers.save_tokenizer(tokenizer or trained, str(folder))
        hf_weights.save(params(shape, head), shape, head, folder)
        if change:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors")
        return str(folder)

    return make


def config(tmp_path, algorithm: str, **models: Any):
    """The Config of a run with these models; a string is an init_from."""
    models = {role: {"init_from": start} if isinstance(start, str) else start for role, start in models.items()}
    text = {"sft": {"response": " ran", "prompt": "a dog"}, "rm": {"prompt": "a", "chosen": " b", "rejected": " c"}}
    text["dpo"] = text["rm"]
    kind = {"sft": "demonstrations", "rm": "preferences", "dpo": "preferences"}.get(algorithm, "prompts")
    (tmp_path / "rows.jsonl").write_text(json.dumps(text.get(algorithm, {"prompt": "a dog"})) + "\n")
    data: dict[str, Any] = {kind: {"path": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    tree = {"run_dir": str(tmp_path / "run"), "iterations": 1, "algorithm": {"name": algorithm}, "models": models}
    return parse(tree | {"data": data | {"max_length": 32, "prompt_buckets": [16]}}, "test")


def refused(cfg, *parts: str) -> None:
    """``build`` refuses it in one line with all ``parts``, and reads no weights."""
    with pytest.raises(ConfigError) as error:
        build.build(resolve_config(cfg), jax.devices()[:1])
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


# ---- nothing random in a role that stays as it is -------------------------------------------------------------------


def drop(*endings: str):
    """Takes the tensors out whose names end so."""

    def change(tensors) -> None:
        for name in [name for name in tensors if name.endswith(endings)]:
            del tensors[name]

    return change


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
@pytest.mark.parametrize(
    "reward, said",
    [
        ("a language model", "is a language model: the head would be random"),
        ("no head", "is a reward model whose files hold no head (score.weight): the head would be random"),
        ("policy", "models.reward.init_from: policy: is a language model: the head would be random"),
        ("an architecture", "models.reward.architecture: its weights would be random"),
    ],
)
def test_a_frozen_reward_model_without_a_trained_head_is_refused(model, tmp_path, algorithm, reward, said):
    starts: dict[str, Any] = {
        "a language model": model("policy-copy"),
        "no head": model("headless", "scalar", change=drop("score.weight")),
        "policy": "policy",
        "an architecture": {"architecture": {"hidden_size": 32}},
    }
    refused(config(tmp_path, algorithm, policy=model("policy"), reward=starts[reward]), said, algorithm)


def test_a_reference_of_random_weights_is_refused_but_a_copy_of_a_random_policy_is_one(model, tmp_path):
    policy, random = model("policy"), {"architecture": {"hidden_size": 32}}
    refused(config(tmp_path, "dpo", policy=policy, reference=random), "models.reference.architecture: its weights")
    more = {"init_from": model("other")}
    cfg = config(tmp_path, "dpo", policy=random, reference="policy")
    build.build(
        resolve_config(dataclasses.replace(cfg, tokenizer=dataclasses.replace(cfg.tokenizer, **more))),
        jax.devices()[:1],
    )


def test_roles_that_learn_may_start_without_a_head(model, tmp_path):
    for reward in (model("lm"), model("headless", "scalar", change=drop("score.weight"))):
        ready = build.build(resolve_config(config(tmp_path, "rm", reward=reward)), jax.devices()[:1])
        with current(ready.mesh):
            head = read_weights(ready, "reward")["head"]
        assert np.std(np.asarray(head["kernel"])) > 0.05 and not np.any(head["bias"])


def test_a_reward_model_for_evaluation_alone_is_checked_too(model, tmp_path):
    cfg = config(tmp_path, "dpo", policy=model("policy"), reward=model("lm"))
    ready = build.build(resolve_config(cfg), jax.devices()[:1])
    with pytest.raises(ConfigError, match=r"^models\.reward\.init_from: .*lm: is a language model: the head would be"):
        build.with_roles(ready, {"reward": "scalar"}, ready.sampler)


def test_a_reference_for_evaluation_may_copy_a_random_policy(model, tmp_path):
    cfg = config(tmp_path, "sft", policy={"architecture": {"hidden_size": 32}}, reference="policy")
    start = dataclasses.replace(cfg.tokenizer, init_from=model("other"))
    ready = build.build(resolve_config(dataclasses.replace(cfg, tokenizer=start)), jax.devices()[:1])
    assert build.with_roles(ready, {"reference": "lm"}, ready.sampler).weights["reference"].kind == "new"


def test_another_run_s_policy_is_no_reward_model(model, tmp_path):
    """``find_role`` falls back to it where a run has no reward model."""
    cfg = config(tmp_path, "grpo", policy=model("policy"), reward="runs/sft")
    found = {"policy": origins.Weights("hf", "p", SHAPE, "lm")}
    found["reward"] = origins.Weights("run", "runs/sft", SHAPE, "lm", 3, "policy")
    heads: dict[str, Head] = {"policy": "lm", "reward": "scalar"}
    with pytest.raises(ConfigError, match=r"runs/sft: the policy of this run is a language model: the head would be"):
        origins.check_loaded(cfg, found, heads, ["policy"])
    found["reward"] = found["reward"]._replace(head="scalar", role="reward")
    origins.check_loaded(cfg, found, heads, ["policy"])
    found["policy"] = origins.Weights("run", "runs/rm", SHAPE, "scalar", 3, "reward")
    with pytest.raises(ConfigError, match=r"models.policy.init_from: runs/rm: the reward of this run .*untied embed"):
        origins.check_loaded(cfg, found, heads, ["policy"])


BIASED = dataclasses.replace(SHAPE, family="qwen2", attention_bias=True)


@pytest.mark.parametrize(
    "endings, said",
    [
        (("lm_head.weight",), "lacks tensors: lm_head.weight"),
        (("layers.1.mlp.up_proj.weight",), "lacks tensors: model.layers.1.mlp.up_proj.weight"),
        (("k_proj.bias",), "lacks tensors: model.layers.0.self_attn.k_proj.bias, model.layers.1.self_attn.k_proj.bias"),
        (("norm.weight",), "lacks tensors: "),
    ],
)
@pytest.mark.parametrize("role", ["policy", "reference"])
def test_a_file_that_lacks_a_part_is_refused_before_anything_is_read(model, tmp_path, monkeypatch, endings, said, role):
    monkeypatch.setattr(hf_weights, "load", lambda *_: pytest.fail("weights are read"))
    starts = {"policy": model("whole", shape=BIASED), role: model("part", shape=BIASED, change=drop(*endings))}
    refused(config(tmp_path, "dpo", **starts), f"models.{role}.init_from: ", said)


# ---- ids that mean the same -----------------------------------------------------------------------------------------


def changed(tokenizer, change=None, **settings):
    """A copy with ``change`` made to the object in tokenizer.json, and with other settings of tokenizer_config.json."""
    import copy

    from tokenizers import Tokenizer

    other = copy.deepcopy(tokenizer)
    if change:
        state = json.loads(other.backend_tokenizer.to_str())
        change(state)
        other._tokenizer = Tokenizer.from_str(json.dumps(state))
    for name, value in settings.items():
        setattr(other, name, value)
    return other


def add(*words: str, special: bool = True):
    """Appends added tokens."""

    def change(state) -> None:
        first = max([*state["model"]["vocab"].values(), *(token["id"] for token in state["added_tokens"])]) + 1
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
        state["added_tokens"] += [{"id": first + i, "content": word, **flags} for i, word in enumerate(words)]

    return change


def flags(state) -> None:
    for token in state["added_tokens"]:
        token |= {"special": False, "rstrip": True, "normalized": True}


def swap(state) -> None:
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def reorder(state) -> None:
    state["model"]["merges"].reverse()


def lowercase(state) -> None:
    state["normalizer"] = {"type": "Lowercase"}


def split_digits(state) -> None:
    digits = {"type": "Digits", "individual_digits": True}
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, state["pre_tokenizer"]]}


def one_in_a_sequence(state) -> None:
    """Written otherwise, and the same."""
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [state["pre_tokenizer"]]}


SAME = {
    "another pad": {"pad_token": "<eos>"},
    "no pad": {"pad_token": None},
    "another eos": {"eos_token": "<bos>"},
    "an appended pad": {"change": add("[PAD]"), "pad_token": "[PAD]"},
    "an appended word": {"change": add("zebra", special=False)},
    "flags": {"change": flags},
    "written otherwise": {"change": one_in_a_sequence},
    "a chat template": {"chat_template": "{{ messages }}"},
    "padding side": {"padding_side": "left"},
}
OTHER = {
    "two ids swapped": (swap, r"id \d+ is 'a' in the run's tokenizer and 'b' in its own"),
    "merges": (reorder, r"merge 0 is '. .' in the run's tokenizer and '\S+ \S+' in its own"),
    "normalizer": (
        lowercase,
        r"'Hello world' is ids \[.*\] and others in the run's tokenizer and \[.*\] and others in",
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_reward_models_whose_ids_mean_the_same_are_accepted(model, trained, tmp_path, name):
    theirs = changed(trained, **SAME[name])
    reward = model("reward", "scalar", tokenizer=theirs)
    ready = build.build(
        resolve_config(config(tmp_path, "grpo", policy=model("policy"), reward=reward)), jax.devices()[:1]
    )
    assert ready.sampler.sampling.banned == () and tokenizers.unreadable(ready.tokenizer) == {}


@pytest.mark.parametrize("name", OTHER)
def test_an_id_or_a_text_that_differs_is_named(model, trained, tmp_path, name):
    change, said = OTHER[name]
    reward = model("reward", "scalar", tokenizer=changed(trained, change))
    with pytest.raises(ConfigError, match=rf"^models\.reward\.init_from: .*/reward: token ids mean .*{said}"):
        build.build(resolve_config(config(tmp_path, "grpo", policy=model("policy"), reward=reward)), jax.devices()[:1])


def test_digits_split_otherwise_are_named(trained):
    longer = tokenizers.train_bpe(["12 345 12 345 12"] * 9, 270)
    theirs = changed(longer, split_digits)
    with pytest.raises(ValueError, match=r"'.*12.*' is ids \[.*\] and others in the run's tokenizer and \[.*\]"):
        foreign_ids(longer, theirs)
    assert foreign_ids(longer, longer) == {}


# ---- ids beyond a model's vocabulary --------------------------------------------------------------------------------

LONGER = {"change": add("<image>")}


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo"])
def test_a_token_without_an_embedding_is_refused_in_the_record_that_holds_it(model, trained, tmp_path, algorithm):
    """gemma-3-1b's tokenizer has one token more than the model; [PAD] is added and the model never resized."""
    start = model("policy", tokenizer=changed(trained, **LONGER))
    roles = {"policy": start} | ({"reward": model("reward", "scalar")} if algorithm == "grpo" else {})
    cfg = config(tmp_path, algorithm, **roles)
    ready = build.build(resolve_config(cfg), jax.devices()[:1])
    assert len(ready.tokenizer) == VOCAB + 1 and ready.configs["policy"].vocab_size == VOCAB
    feed.Feed(ready)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text() + rows.read_text().replace('"a', '"a <image>'))
    with pytest.raises(ValueError) as error:
        feed.Feed(ready)
    assert str(error.value) == (
        f"record 1 of {rows}: holds token 280, '<image>', which not every model can read: models.policy: its "
        "vocab_size is 280; expected weights that have it, or text and a chat template (data.chat.template) without it"
    )


def test_a_pad_token_without_an_embedding_fills_no_rows(model, trained, tmp_path):
    start = model("policy", tokenizer=changed(trained, add("[PAD]"), pad_token="[PAD]"))
    ready = build.build(resolve_config(config(tmp_path, "sft", policy=start)), jax.devices()[:1])
    assert ready.tokenizer.pad_token_id == VOCAB and ready.sampler.pad_id == ready.tokenizer.eos_token_id
    batch, _ = feed.Feed(ready).next()
    assert np.asarray(batch.sequences.tokens).max() < VOCAB


def test_what_a_reward_model_cannot_read_is_never_sampled(model, trained, tmp_path):
    """A token that the policy's model has a row for and the reward model has none; and one that it calls otherwise."""
    wide = dataclasses.replace(SHAPE, vocab_size=VOCAB + 4)
    ours, theirs = (changed(trained, add(*words)) for words in (("<call>", "<tool>"), ("<call>", "<reserved>")))
    roles = {"policy": model("policy", shape=wide, tokenizer=ours)}
    roles["reward"] = model("reward", "scalar", dataclasses.replace(SHAPE, vocab_size=VOCAB + 2), theirs)
    cfg = config(tmp_path, "grpo", **roles)
    ready = build.build(resolve_config(cfg), jax.devices()[:1])
    assert ready.sampler.sampling.banned == (281, 282, 283)
    assert tokenizers.unreadable(ready.tokenizer) == {281: "models.reward: to it the id is '<reserved>'"}
    logits = np.asarray(shape_logits(jnp.zeros((1, 284)), ready.sampler.sampling, jnp.zeros(1, jnp.int32)))
    assert (logits[0, 281:] < -1e29).all() and (logits[0, :281] == 0).all()
    only = changed(ours, eos_token="<tool>")
    roles["policy"] = model("only", shape=wide, tokenizer=only)
    refused(config(tmp_path, "grpo", **roles), "token 281, which ends responses, is not known to every model")


def test_a_vocabulary_that_the_model_has_no_rows_for_is_refused(model, trained, tmp_path):
    small = dataclasses.replace(SHAPE, vocab_size=VOCAB - 3)
    refused(config(tmp_path, "sft", policy=model("policy", shape=small)), "vocab_size 277 is less than the 280 tokens")


def test_banned_tokens_are_left_out_of_logits_that_are_split_over_devices():
    sampling = Sampling(banned=(1, 6))
    logits = np.arange(16, dtype=np.float32).reshape(2, 8)
    with jax.set_mesh(make_mesh(MeshConfig(1, 2, 4), jax.devices()[:8])):
        split = jax.device_put(logits, spec("batch", "vocab"))
        found = np.asarray(jax.jit(shape_logits, static_argnums=1)(split, sampling, np.zeros(2, np.int32)))
    assert (found[:, [1, 6]] < -1e29).all()
    np.testing.assert_array_equal(np.delete(found, [1, 6], 1), np.delete(logits, [1, 6], 1))
