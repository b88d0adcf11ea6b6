"""Runs with adapters: what learns and what stays, resume, roles on one base, files out and in, what is refused."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import train as trainer
from jaxrlhf.config.check import check
from jaxrlhf.config.load import parse
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.errors import ConfigError
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.files import peft
from jaxrlhf.models.lora import Based, LoraConfig
from jaxrlhf.run import checkpoint, verified_steps
from jaxrlhf.run.announce import describe_adapters
from jaxrlhf.run.build import Run, build
from jaxrlhf.run.export import export, export_adapter
from jaxrlhf.run.initial_state import abstract_state, initial_state
from jaxrlhf.run.manifest import Damaged
from jaxrlhf.run.saved_run import read_extra, restore_model
from jaxrlhf.sharding import MeshConfig, make_mesh
from tests.support import runs, tiny

ADAPTER = {"rank": 2, "alpha": 4}
DATA = {
    "grpo": ["prompts"],
    "ppo": ["prompts"],
    "sft": ["demonstrations"],
    "rm": ["preferences"],
    "dpo": ["preferences"],
    "raft": ["prompts"],
    "kto": ["unpaired"],
    "distill": ["prompts", "eval_prompts", "demonstrations", "eval_demonstrations"],
    "distill_data": ["prompts", "eval_prompts", "demonstrations", "eval_demonstrations"],
}


def config(name: str, root: Path, run_dir: Path, models: dict, **more) -> Config:
    """A run of a few rows with these models."""
    text = runs.text(root)
    data = {section: {"path": f"{text}/{section}.jsonl"} for section in DATA[name]}
    rows = ("sequences_per_step", "preferences_per_step", "unpaired_per_step")
    limits = {"max_length": 24, "prompt_buckets": [8], "too_long": "truncate", "cache_dir": str(text / "cache")}
    tree = {
        "run_dir": str(run_dir),
        "iterations": 2,
        "algorithm": {"name": name},
        "models": models,
        "optimizer": {"default": {"learning_rate": 1e-2}},
        "data": data | limits,
        "batch": {"prompts_per_step": 8, "samples_per_prompt": 2} | dict.fromkeys(rows, 8),
        "generate": {"max_new_tokens": 4},
        "log": {"trackers": []},
    }
    if name in ("grpo", "raft"):
        tree["rewards"] = {"function": "tests.support.runs:praise"}
    return parse(tree | more, name)


def learner(name: str, adapted: dict, folder: Path) -> tuple[str, dict, dict]:
    """(the role that learns with the adapter of ``adapted``; the models of a run of the algorithm; what else it
    needs)."""
    role = "reward" if name == "rm" else "policy"
    models = {role: adapted}
    if name == "ppo":
        models |= {"reward": {"init_from": str(folder / "scalar")}}
        models |= {"value": {"init_from": "policy", "adapter": ADAPTER}}
    if name == "rm":
        models |= {"policy": {"init_from": str(folder / "lm")}}
    more: dict = {"algorithm": {"name": "rm", "normalize_samples": 0}} if name == "rm" else {}
    return role, models, more


def ready(cfg: Config) -> Run:
    return build(resolve_config(cfg), jax.devices()[:1], keep=False)


def started(cfg: Config):
    """(the run, its initial state)."""
    run = ready(cfg)
    with jax.set_mesh(run.mesh):
        return run, initial_state(run)


def base_leaves(run_dir: Path) -> list[np.ndarray]:
    """What a run wrote down of its base."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        return jax.tree.leaves(reader.restore(run_dir / "base" / "base_policy"))


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_learns_its_adapter_alone_resumes_and_is_exported(folder, root, tmp_path, built_on_one_device):
    """The base is as the folder has it, to the bit, and no part of a checkpoint; two iterations are one and one more;
    the merged folder holds what the run's policy is; the adapter's starts another run with the same log-probs."""
    models = {"policy": {"init_from": str(folder / "lm"), "adapter": ADAPTER}}
    whole, parts = (config("grpo", root, tmp_path / name, models) for name in ("whole", "parts"))
    assert trainer.run(whole) == "done"
    assert trainer.run(dataclasses.replace(parts, iterations=1)) == "done" and trainer.run(parts) == "done"
    one, two = (runs.read_state(tmp_path / name, 2) for name in ("whole", "parts"))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    assert not any(name.startswith("slow") or "kernel" in name or "embedding" in name for name in one)
    assert np.abs(one["params.policy/layers/mlp/up/lora_b"]).max() > 0

    run, state = started(dataclasses.replace(whole, run_dir=str(tmp_path / "new")))
    assert state.slow["reference"] == {}
    for kept, read in zip(base_leaves(tmp_path / "whole"), jax.tree.leaves(state.slow["base_policy"]), strict=True):
        np.testing.assert_array_equal(kept, read)

    _, notes = export(str(tmp_path / "whole"), "policy", tmp_path / "merged")
    export_adapter(str(tmp_path / "whole"), "policy", tmp_path / "peft")
    assert notes == []
    with pytest.raises(
        ValueError, match=r"^--dequantized: .*: the weights of its policy are not quantised; leave it out$"
    ):
        export(str(tmp_path / "whole"), "policy", tmp_path / "no", dequantized=True)
    _, extra = read_extra(str(tmp_path / "whole"))
    with jax.set_mesh(run.mesh):
        merged = restore_model(str(tmp_path / "whole"), 2, extra["models"], "policy", jnp.float32, run.mesh)
    again = {"policy": {"init_from": str(folder / "lm"), "adapter": ADAPTER | {"init_from": str(tmp_path / "peft")}}}
    _, adapted = started(config("grpo", root, tmp_path / "next", again))
    for name, x in one.items():
        if name.startswith("params.policy/"):
            leaf = adapted.params["policy"]
            for key in name.split("/")[1:]:
                leaf = leaf[key]
            np.testing.assert_array_equal(leaf, x)
    assert tiny.equal_trees(adapted.slow["reference"], adapted.params["policy"]), "it starts as the policy does"
    plain = {"policy": {"init_from": str(tmp_path / "merged")}}
    _, full = started(config("grpo", root, tmp_path / "full", plain))
    assert tiny.equal_trees(full.params["policy"], merged)
    from_run = {"policy": {"init_from": str(tmp_path / "whole"), "adapter": ADAPTER}}
    _, onward = started(config("grpo", root, tmp_path / "onward", from_run))
    assert tiny.equal_trees(onward.slow["base_policy"], merged)
    changed = {"policy": {"init_from": str(folder / "lm"), "adapter": ADAPTER | {"rank": 3}}}
    with pytest.raises(ConfigError, match=r"models\.policy\.adapter\.rank: 3: the run in .* is at step 2 with 2"):
        trainer.run(config("grpo", root, tmp_path / "whole", changed, iterations=3))


@pytest.mark.nightly  # by day: grpo, above
@pytest.mark.parametrize("name", ["ppo", "sft", "rm", "dpo", "raft", "kto"])
def test_every_algorithm_trains_one(name, folder, root, tmp_path, built_on_one_device):
    adapted = {"init_from": str(folder / "lm"), "adapter": ADAPTER}
    role, models, more = learner(name, adapted, folder)
    assert trainer.run(config(name, root, tmp_path / "run", models, **more)) == "done"
    state = runs.read_state(tmp_path / "run", 2)
    learned = {item.partition("/")[0] for item in state if item.startswith("params")}
    assert learned == ({"params.policy", "params.value"} if name == "ppo" else {f"params.{role}"})
    assert all(np.abs(x).max() > 0 for item, x in state.items() if item.endswith("lora_b") and "params" in item)
    _, state = started(config(name, root, tmp_path / "new", models, **more))
    assert [base for base in state.slow if base.startswith("base_")] == [f"base_{role}"]


# ---- roles on one base ----------------------------------------------------------------------------------------------


def test_policy_value_reward_and_reference_on_one_base(folder, root, tmp_path):
    """Bytes by hand, in float32: the base once; of policy and value the adapter and two moments, of the reward the
    adapter; a head each of value and reward."""
    lora = LoraConfig(rank=2, alpha=4)
    shape = ready(config("grpo", root, tmp_path / "x", {"policy": {"init_from": str(folder / "lm")}})).configs["policy"]
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        peft.save(tiny.adapter(shape, "scalar", lora, 5), shape, "scalar", lora, tmp_path / "rm", str(folder / "lm"))
    models = {
        "policy": {"init_from": str(folder / "lm"), "adapter": ADAPTER},
        "value": {"init_from": "policy", "adapter": ADAPTER},
        "reward": {"init_from": "policy", "adapter": ADAPTER | {"init_from": str(tmp_path / "rm")}},
    }
    cfg = config("ppo", root, tmp_path / "run", models)
    run, state = started(cfg)
    assert run.resolved.bases == {
        "policy": Based("base_policy", lora),
        "value": Based("base_policy", lora),
        "reward": Based("base_policy", dataclasses.replace(lora, init_from=str(tmp_path / "rm"))),
        "reference": Based("base_policy", None),
    }
    assert state.slow.keys() == {"base_policy", "reward", "reference"} and state.slow["reference"] == {}
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    # hidden 8, 2 heads of 4, mlp 16, one layer, rank 2
    adapter, head = 2 * (4 * (8 + 8) + 3 * (8 + 16)), 8 + 1
    vocabulary = 320 if run.configs["policy"].vocab_size > 256 else 256
    base = vocabulary * 8 + 4 * 64 + 3 * 128 + 3 * 8
    assert [count(state.params[role]) for role in ("policy", "value")] == [adapter, adapter + head]
    assert [count(state.slow[name]) for name in ("base_policy", "reward")] == [base, adapter + head]
    moments = 2 * (2 * adapter + head)
    arrays = [x for x in jax.tree.leaves(state) if x.ndim]
    assert sum(x.nbytes for x in arrays) == 4 * (base + 3 * adapter + 2 * head + moments)
    (line,) = describe_adapters(run)
    assert line == (
        f"adapters: {2 * adapter + head} parameters learn (policy {adapter}, value {adapter + head}); "
        f"{base / 1000:.1f}K are frozen, kept once for policy, value, reference, reward"
    )
    with jax.set_mesh(run.mesh):
        described = abstract_state(run)
    alike = lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype)
    assert all(jax.tree.leaves(jax.tree.map(alike, described, state)))


def test_a_base_in_bfloat16_has_adapters_in_float32(folder, root, tmp_path):
    models = {"policy": {"init_from": str(folder / "lm"), "adapter": ADAPTER}}
    _, state = started(config("grpo", root, tmp_path / "run", models, precision={"params": "bfloat16"}))
    assert {x.dtype.name for x in jax.tree.leaves(state.slow)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (
            {"policy": {"architecture": {"hidden_size": 8}, "adapter": {}}},
            "models.policy.adapter: models.policy.architecture is random weights, which would stay so; expected "
            "models.policy.init_from: a trained model",
        ),
        (
            {"policy": {"init_from": "x", "adapter": {"targets": ["q_proj"]}}},
            "models.policy.adapter.targets: q_proj: no linear map of a layer; choices: all-linear, query, key, value",
        ),
        (
            {"policy": {"init_from": "x", "adapter": {"targets": ["qurey"]}}},
            "models.policy.adapter.targets: qurey: no linear map of a layer; nearest: query",
        ),
        (
            {"policy": {"init_from": "x", "adapter": {}}, "reference": {"init_from": "policy", "adapter": {}}},
            "models.reference.adapter: grpo does not train reference; expected null, or adapter.init_from",
        ),
        (
            {"policy": {"init_from": "x", "adapter": {"targets": []}}},
            "models.policy.adapter.targets: []: nothing would learn; expected all-linear",
        ),
    ],
)
def test_mistakes_in_a_config(models, message, root, tmp_path):
    tokenizer = {"init_from": "y"}
    with pytest.raises(ConfigError) as caught:
        check(config("grpo", root, tmp_path / "run", models, tokenizer=tokenizer), 1)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"rank": 0}, "models.policy.adapter.rank: 0: expected a number in [1, inf); nearest: 1"),
        ({"dropout": 0.1}, "models.policy.adapter.dropout: 0.1: expected a number in [0, 0]; nearest: 0"),
        ({"alpha": 0}, "models.policy.adapter.alpha: 0.0: expected a number in (0, inf)"),
    ],
)
def test_numbers_out_of_range(adapter, message, root, tmp_path):
    with pytest.raises(ConfigError) as caught:
        config("grpo", root, tmp_path / "run", {"policy": {"init_from": "x", "adapter": adapter}})
    assert message in str(caught.value)


def test_a_rank_above_the_width(folder, root, tmp_path):
    models = {"policy": {"init_from": str(folder / "lm"), "adapter": {"rank": 9}}}
    with pytest.raises(
        ConfigError, match=r"^models\.policy\.adapter\.rank: 9: more than hidden_size; expected at most 8"
    ):
        ready(config("grpo", root, tmp_path / "run", models))


def change(folder: Path, **fields) -> None:
    """Edits adapter_config.json."""
    raw = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps(raw | fields))


@pytest.mark.parametrize(
    ("own", "fields", "message"),
    [
        ({"rank": 4}, {}, "models.policy.adapter.rank: 4: {folder} has 2; nearest: 2"),
        ({"targets": ["query"]}, {}, "models.policy.adapter.targets: query: {folder} holds "),
        ({}, {"use_dora": True}, "models.policy.adapter.dora: false: {folder} has true; nearest: true"),
        ({"dora": True}, {}, "models.policy.adapter.dora: true: {folder} has false; nearest: false"),
        (
            {"dora": True, "targets": ["query"]},
            {"use_dora": True},
            "models.policy.adapter.targets: query: {folder} lacks ",
        ),
        (
            {},
            {"init_lora_weights": "pissa"},
            "models.policy.adapter.init_from: {folder}/adapter_config.json: init_",
        ),
        ({}, {"alora_invocation_tokens": [1]}, "models.policy.adapter.init_from: {folder}/adapter_config.json: alora_"),
        ({}, {"lora_alpha": 10**400}, "models.policy.adapter.init_from: {folder}/adapter_config.json: lora_alpha: "),
        ({}, {"r": "2"}, 'models.policy.adapter.init_from: {folder}/adapter_config.json: r: "2"; expected a rank'),
    ],
)
def test_a_folder_that_does_not_fit(own, fields, message, folder, root, tmp_path):
    lora, there = LoraConfig(rank=2, alpha=4), tmp_path / "peft"
    shape = ready(config("grpo", root, tmp_path / "x", {"policy": {"init_from": str(folder / "lm")}})).configs["policy"]
    peft.save(tiny.adapter(shape, "lm", lora, 5), shape, "lm", lora, there, "base")
    change(there, **fields)
    adapter = ADAPTER | {"init_from": str(there)} | own
    models = {"policy": {"init_from": str(folder / "lm"), "adapter": adapter}}
    with pytest.raises(ConfigError) as caught:
        ready(config("grpo", root, tmp_path / "run", models))
    text = str(caught.value)
    assert text.startswith(message.format(folder=there)) and "\n" not in text


def test_no_adapter_to_export(root):
    runs.whole(root)
    with pytest.raises(ValueError, match=r"--adapter: .*: its policy has none; adapters: none"):
        export_adapter(str(root / "whole" / "sft"), "policy", root / "none")


def test_a_changed_base_is_found_and_an_abandoned_start_s_is_not_taken(folder, root, tmp_path):
    """The frozen weights belong to every checkpoint, and a run that begins anew writes its own."""
    models = {"policy": {"init_from": str(folder / "lm"), "adapter": ADAPTER}}
    run, state = started(config("grpo", root, tmp_path / "run", models))
    other = state.replace(slow=state.slow | {"base_policy": jax.tree.map(lambda x: x + 1, state.slow["base_policy"])})
    with jax.set_mesh(run.mesh):
        checkpoint.save_bases(tmp_path / "run", other)  # of a start that came to no checkpoint
        saved = checkpoint.Checkpoints(tmp_path / "run")
        saved.save(1, state, {"config": ""})
        saved.close()
        again = checkpoint.restore(tmp_path / "run", 1, abstract_state(run))
    assert tiny.equal_trees(again.slow, state.slow) and tiny.equal_trees(again.params, state.params)
    assert verified_steps.problem(tmp_path / "run", 1) is None
    part = max((tmp_path / "run" / "base").rglob("d/*"), key=lambda path: path.stat().st_size)
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(Damaged, match=r"/base/base_policy/.* expected the file with which step 1 was trained"):
        verified_steps.problem(tmp_path / "run", 1)


def test_an_adapter_alone_is_no_model(folder, root, tmp_path):
    """The line says what to write instead, also where the tokenizer is elsewhere."""
    there = tmp_path / "peft"
    there.mkdir()
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "a/b"}
    (there / peft.CONFIG).write_text(json.dumps(raw))
    expected = f"expected init_from: a/b and adapter: {{rank: 4, alpha: 8, init_from: {there}}}"
    for own in ({}, {"tokenizer": {"init_from": str(folder / "lm")}}):
        with pytest.raises(ConfigError) as caught:
            ready(config("grpo", root, tmp_path / "run", {"policy": {"init_from": str(there)}}, **own))
        assert str(caught.value) == f"models.policy.init_from: {there}: an adapter alone; {expected}"


def test_a_fused_tensor_has_no_adapter_of_peft_s_kind(tmp_path):
    """Phi-3's query shares a tensor with key and value; its other maps can be written."""
    phi = resolve(ModelConfig(family="phi3", vocab_size=64, hidden_size=8, num_layers=1, num_heads=2))
    for targets in (("query",), ("out", "down")):
        lora = LoraConfig(rank=2, targets=targets)
        own = tiny.adapter(phi, "lm", lora, 0)
        if targets == ("query",):
            with pytest.raises(ValueError, match=r"^adapter\.targets: query: a phi3's files have it in one tensor"):
                peft.save(own, phi, "lm", lora, tmp_path, "x")
        else:
            assert peft.save(own, phi, "lm", lora, tmp_path, "x") == [] and peft.is_adapter(tmp_path)
