"""Runs with a teacher: what is saved of it, resume, number formats, adapters, evaluation, and what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import train as trainer
from jaxrlhf.config.check import check
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.errors import ConfigError
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.files import hf_config, hf_weights
from jaxrlhf.models.lora import Based
from jaxrlhf.run import saved_run
from jaxrlhf.run.build import build
from jaxrlhf.run.initial_state import initial_state
from tests.run import test_adapters
from tests.support import runs, tiny
from tests.test_minimal import write_models


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory) -> Path:
    """Hugging Face folders: a small language model (lm), a larger one (large), and those whose vocabularies are other
    ones: fewer rows than tokens (few), more (padded), other tokens (foreign)."""
    made = tmp_path_factory.mktemp("teacher")
    write_models(made, runs.text(root))
    own = tokenizers.load_tokenizer(str(made / "tokenizer"))
    tokenizers.save_tokenizer(tokenizers.train_bpe(["quick brown foxes jump"] * 9, 280), str(made / "other"))
    for name, vocab, used in (
        ("large", len(own), "tokenizer"),
        ("few", len(own) - 2, "tokenizer"),
        ("padded", len(own) + 90, "tokenizer"),
        ("foreign", len(own), "other"),
    ):
        sizes: dict[str, Any] = {"hidden_size": 12, "num_layers": 2, "num_heads": 2, "mlp_size": 20}
        shape = resolve(ModelConfig(vocab_size=vocab, max_positions=640, tie_embeddings=False, **sizes))
        ids = hf_config.TokenIds((own.eos_token_id,), own.bos_token_id, own.pad_token_id)
        params = tiny.parameters(shape, "lm", 7)
        hf_weights.save(params, shape, "lm", made / name, ids=ids, tokenizer_folder=made / used)
    return made


def config(root: Path, run_dir: Path, models: dict, name: str = "distill", **more) -> Config:
    """A run of a few rows with these models."""
    tree = {"batch": {"prompts_per_step": 8, "sequences_per_step": 8}, "eval": {"size": 16}}
    return test_adapters.config(name, root, run_dir, models, **tree | more)


def built(cfg: Config):
    return build(resolve_config(cfg), jax.devices()[:1], keep=False)


def both(folder: Path, teacher: str = "large", **policy) -> dict:
    return {"policy": {"init_from": str(folder / "lm")} | policy, "teacher": {"init_from": str(folder / teacher)}}


def test_a_run_resumes_with_the_same_bits_and_saves_its_teacher_once(folder, root, tmp_path, one_device):
    """An adapter on the policy, which is decoded in 8 bits; a teacher in bfloat16; on its own responses and on data."""
    more = {
        "algorithm": {"name": "distill", "on_policy_share": 0.7, "divergence": "jsd"},
        "precision": {"params": "bfloat16"},
        "generate": {"max_new_tokens": 4, "int8": ["weights"]},
    }
    models = both(folder, adapter={"rank": 2, "alpha": 4})
    whole, parts = (config(root, tmp_path / name, models, **more) for name in ("whole", "parts"))
    assert trainer.run(whole) == "done"
    assert trainer.run(dataclasses.replace(parts, iterations=1)) == "done" and trainer.run(parts) == "done"
    one, two = (runs.read_state(tmp_path / name, 2) for name in ("whole", "parts"))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    assert not any("teacher" in name for name in one), "it is no part of a checkpoint"
    assert sorted(path.name for path in (tmp_path / "whole" / "base").iterdir()) == ["base_policy", "base_teacher"]
    (*trained, last) = (row for row in runs.rows(tmp_path / "whole") if "step" in row)
    rows = [row for row in trained if "teacher/divergence" in row]
    assert len(rows) == 2 and all({"teacher/divergence_data", "teacher/entropy"} <= row.keys() for row in rows)
    assert "score/mean" not in rows[0] and last["eval/kl/teacher"] > 0

    run = built(dataclasses.replace(whole, run_dir=str(tmp_path / "new")))
    with jax.set_mesh(run.mesh):
        state = initial_state(run)
    assert run.resolved.bases["teacher"] == Based("base_teacher", None) and state.slow["teacher"] == {}
    teacher = state.slow["base_teacher"]
    assert {leaf.dtype for leaf in jax.tree.leaves(teacher)} == {jnp.dtype(jnp.bfloat16)}
    assert teacher["embed"]["tokens"]["embedding"].shape[1] == 12

    models = {"policy": {"init_from": str(folder / "large")}, "teacher": {"init_from": str(tmp_path / "whole")}}
    onward = config(root, tmp_path / "onward", models)
    assert built(onward).configs["teacher"].hidden_size == 8, "of a run its policy, not who taught that"


@pytest.mark.nightly  # by day: its loss by a loop, in algorithms/test_distill.py
def test_a_score_counts_beside_the_teacher(folder, root, tmp_path, one_device):
    """A reward function, in programs around the host; its teacher has more rows of vocabulary than the policy."""
    cfg = config(
        root,
        tmp_path / "run",
        both(folder, "padded"),
        algorithm={"name": "distill", "reward_coef": 0.5, "divergence_in": "rewards"},
        rewards={"function": "tests.support.runs:praise"},
        batch={"prompts_per_step": 8, "samples_per_prompt": 2},
    )
    assert trainer.run(cfg) == "done"
    row = runs.rows(tmp_path / "run")[0]
    assert {"score/mean", "kl/teacher", "group/zero_variance", "policy/clip_fraction"} <= row.keys()
    assert np.isfinite(row["loss/policy"]) and row["policy/grad_norm"] > 0


@pytest.mark.nightly  # by day: the divergence of such a vocabulary in algorithms/test_distill.py
def test_it_learns_from_data_packed_with_a_padded_vocabulary(folder, root, tmp_path, one_device):
    cfg = config(root, tmp_path / "run", both(folder, "padded"), "distill_data", iterations=12)
    assert cfg.data.pack and trainer.run(cfg) == "done"
    rows = [row["loss/policy"] for row in runs.rows(tmp_path / "run") if "loss/policy" in row]
    assert rows[-1] < 0.8 * rows[0]
    last = runs.rows(tmp_path / "run")[-1]
    assert last["eval/teacher/divergence"] > 0


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_teacher_is_needed(folder, root, tmp_path):
    models = {"policy": {"init_from": str(folder / "lm")}}
    for name in ("distill", "distill_data"):
        with pytest.raises(ConfigError) as caught:
            check(config(root, tmp_path / "run", models, name), 1)
        assert f"models.teacher: missing; {name} needs it; expected init_from or architecture" in str(caught.value)
    shape = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "max_positions": 64}
    cfg = config(root, tmp_path / "run", models | {"teacher": {"architecture": shape}})
    with pytest.raises(ConfigError, match=r"^models\.teacher\.architecture: its weights would be random, and distill"):
        built(cfg)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (
            "few",
            r"^models\.teacher\.init_from: \S+/few: its vocab_size is 298, and that of the policy \(\S+/lm\) is 300: "
            r"the tokenizer's ids from 298 on are tokens of one alone; expected a teacher with the policy's tokens$",
        ),
        ("foreign", r"^models\.teacher\.init_from: \S+/foreign: token ids mean other text to it: .*same tokenizer$"),
    ],
)
def test_a_teacher_of_other_tokens_is_refused(teacher, message, folder, root, tmp_path, monkeypatch):
    """In one line, before any weights are read."""
    monkeypatch.setattr(hf_weights, "load", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=message) as caught:
        built(config(root, tmp_path / "run", both(folder, teacher)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 1.0, "divergence": "jsd"}, "algorithm.beta: 1.0: expected a number in (0, 1)"),
        ({"temperature": 0.0}, "algorithm.temperature: 0.0: expected a number in (0, inf)"),
        ({"on_policy_share": 0.0}, "algorithm.on_policy_share: 0.0: expected a number in (0, 1]"),
        ({"divergence": "kl"}, 'algorithm.divergence: "kl": expected one of reverse_kl, forward_kl, jsd'),
    ],
    ids=str,
)
def test_numbers_out_of_range(fields, message, folder, root, tmp_path):
    with pytest.raises(ConfigError) as caught:
        config(root, tmp_path / "run", both(folder), algorithm={"name": "distill"} | fields)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_demonstrations_are_needed_for_their_share(folder, root, tmp_path):
    cfg = config(root, tmp_path / "run", both(folder), algorithm={"name": "distill", "on_policy_share": 0.5})
    with pytest.raises(ConfigError, match=r"data\.demonstrations: missing; distill reads it"):
        check(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, demonstrations=None)), 1)


def test_a_teacher_is_the_policy_of_another_run():
    record = {"policy": 1, "teacher": 2, "reference": 3}
    assert saved_run.find_role(record, "teacher") == "policy"
    assert saved_run.find_role(record, "reference") == "reference"
