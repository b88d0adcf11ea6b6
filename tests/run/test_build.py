"""From a config to a run: where weights and tokenizer come from, what does not fit, what the state starts as."""

import contextlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from etils import epath

from jaxrlhf import train as trainer
from jaxrlhf.cli import app
from jaxrlhf.config.load import parse
from jaxrlhf.config.record import Config, RoleConfig
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.data.chat import ChatConfig
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import parameters
from jaxrlhf.models.attention.kernels import Hardware
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.run import build, manifest, origins, programs, runtime, saved_run
from jaxrlhf.run.announce import other_endings, spelled_markers
from jaxrlhf.run.export import export
from jaxrlhf.run.initial_state import abstract_state, initial_state
from jaxrlhf.run.runtime import check_shapes, kernels_passed_over
from jaxrlhf.run.sampler import run_sampler
from jaxrlhf.run.verified_steps import BESIDE
from jaxrlhf.serve import writer
from jaxrlhf.sharding import MeshConfig, make_mesh
from jaxrlhf.types import TrainState
from tests.support import runs


@pytest.fixture(scope="module")
def whole(root) -> Path:
    runs.whole(root)
    return root / "whole"


@pytest.fixture
def ppo(whole, root, tmp_path):
    """Makes a Config of ppo that starts from the runs in ``whole``."""
    return lambda *more: runs.config("ppo", root, tmp_path, *more)


@pytest.fixture
def foreign(whole, tmp_path) -> Path:
    """A copy of the sft run whose tokens mean other text."""
    run = tmp_path / "foreign"
    shutil.copytree(whole / "sft", run)
    tokenizers.save_tokenizer(tokenizers.train_bpe(["zebra zebras zoo zoom"] * 9, 300), str(run / "tokenizer"))
    for step in epath.Path(run).glob("checkpoints/*"):  # else the tokenizer would be found to be another
        manifest.write(step, {}, BESIDE)
    return run


@pytest.mark.parametrize(
    "changes, pattern",
    [
        ({"mlp_size": 30}, r"its mlp_size 30 is not divided by mesh.tensor: 4; nearest: 3$"),
        ({"hidden_size": 33, "head_dim": 8}, "its hidden_size 33 is not divided by mesh.fsdp: 2; nearest: 1$"),
        ({"vocab_size": 50257, "num_heads": 9, "num_kv_heads": 3, "head_dim": 8}, None),  # padded; heads stay whole
        ({"family": "gpt2", "max_positions": 7}, "computes rows of 7 columns at most; expected that of [0-9]+ = "),
    ],
)
def test_models_from_files_must_fit_the_mesh_and_the_rows(ppo, changes, pattern):
    shape = resolve(ModelConfig(**{"vocab_size": 300, "hidden_size": 32, "mlp_size": 48} | changes))
    mesh = make_mesh(MeshConfig(1, 2, 4), jax.devices()[:8])
    check = lambda: check_shapes(
        resolve_config(ppo()), {"policy": build.Weights("hf", "some/folder", shape, "lm")}, mesh
    )
    if pattern is None:
        return check()
    with pytest.raises(ConfigError, match=r"^models\.policy: some/folder: " + pattern) as error:
        check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size, pattern", [(0, None), (4, r"its padded vocabulary 100 .* mesh\.fsdp x tensor: 8")])
def test_fsdp_divides_the_vocabulary_where_layers_have_embeddings(ppo, monkeypatch, size, pattern):
    monkeypatch.setattr(parameters, "padded_vocab", lambda cfg: 100)
    shape = resolve(ModelConfig("gemma4_text", 100, 32, mlp_size=48, per_layer_size=size))
    weights = {"policy": build.Weights("hf", "some/folder", shape, "lm")}
    raises = pytest.raises(ConfigError, match=pattern) if pattern else contextlib.nullcontext()
    with raises:
        check_shapes(resolve_config(ppo()), weights, make_mesh(MeshConfig(1, 2, 4), jax.devices()[:8]))


@pytest.mark.parametrize(
    "asked, hardware, line, said",
    [
        ("auto", Hardware("cpu"), None, []),
        ("auto", Hardware("tpu"), None, []),
        ("auto", Hardware("gpu", 9.0), None, ["attention: xla for policy: not cudnn, which .*float32"]),
        ("xla", Hardware("gpu", 9.0), None, []),
        ("splash", Hardware("cpu"), "attention: splash: runs on TPUs, .*; nearest: xla", []),
        ("cudnn", Hardware("gpu", 9.0), "attention: cudnn: computes in bfloat16, and precision.compute is float32", []),
    ],
)
def test_a_kernel_is_refused_or_passed_over_in_one_line(monkeypatch, asked, hardware, line, said):
    monkeypatch.setattr(runtime, "hardware_of", lambda device: hardware)
    tree = {"run_dir": "r", "iterations": 1, "attention": asked, "algorithm": {"name": "sft"}}
    cfg, mesh = (
        parse(tree | {"models": {"policy": {"init_from": "x"}}}, "test"),
        make_mesh(MeshConfig(), jax.devices()[:1]),
    )
    weights = {"policy": build.Weights("hf", "some/folder", resolve(ModelConfig(vocab_size=300)), "lm")}
    if line:
        with pytest.raises(ConfigError, match=f"^{line}.* \\(models.policy: some/folder\\)$"):
            check_shapes(resolve_config(cfg), weights, mesh)
        return
    check_shapes(resolve_config(cfg), weights, mesh)
    notes = kernels_passed_over(cfg, mesh, {"policy": weights["policy"].config})
    assert len(notes) == len(said) and all(map(re.match, said, notes))


@pytest.mark.parametrize("platform, refused", [("tpu", True), ("cpu", False)])
def test_packed_responses_want_a_kernel_that_computes_them(monkeypatch, platform, refused):
    monkeypatch.setattr(runtime, "hardware_of", lambda device: Hardware(platform))
    tree = {"run_dir": "r", "iterations": 1, "algorithm": {"name": "sft"}, "batch": {"pack_widths": 4}}
    cfg = parse(tree | {"models": {"policy": {"init_from": "x"}}}, "test")
    weights = {"policy": build.Weights("hf", "some/folder", resolve(ModelConfig(vocab_size=300)), "lm")}
    check = lambda: check_shapes(resolve_config(cfg), weights, make_mesh(MeshConfig(), jax.devices()[:1]))
    if not refused:
        return check()
    with pytest.raises(ConfigError) as error:
        check()
    line = "batch.pack_widths: 4: splash attention (models.policy: some/folder) can't compute packed responses; "
    assert str(error.value) == line + "expected 1, or attention: xla"


LINEAR = ModelConfig("qwen3_5_text", 300, 32, 4, num_heads=4)


@pytest.mark.parametrize(
    ("shape", "more", "line"),
    [
        (ModelConfig(vocab_size=300), {}, None),
        (
            LINEAR,
            {},
            "mesh.context: 2: models.policy: some/folder: a qwen3_5_text has linear layers, whose states pass from "
            "column to column; nearest: 1",
        ),
        (
            ModelConfig(vocab_size=300),
            {"batch": {"pack_widths": 4}},
            "batch.pack_widths: 4: mesh.context: 2 splits the columns of each response; nearest: 1",
        ),
    ],
)
def test_what_split_columns_cannot_compute_is_one_line(shape, more, line):
    tree = {"run_dir": "r", "iterations": 1, "algorithm": {"name": "sft"}, "mesh": {"data": 1, "context": 2}} | more
    resolved = resolve_config(parse(tree | {"models": {"policy": {"init_from": "x"}}}, "test"))
    weights = {"policy": build.Weights("hf", "some/folder", resolve(shape), "lm")}
    check = lambda: check_shapes(resolved, weights, make_mesh(resolved.cfg.mesh, jax.devices()[:2]))
    if line is None:
        return check()
    with pytest.raises(ConfigError) as error:
        check()
    assert str(error.value) == line


def tokenizer_of(run: Path) -> str:
    return tokenizers.fingerprint(tokenizers.load_tokenizer(str(run / "tokenizer")))


def started(cfg: Config) -> tuple[build.Run, TrainState]:
    ready = build.build(resolve_config(cfg), jax.devices()[:1])
    with jax.set_mesh(ready.mesh):
        return ready, initial_state(ready)


def named(tree: Any) -> dict[str, np.ndarray]:
    """Leaves by their path: "embed/tokens/embedding"."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in paths}


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def equal(first: Any, second: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(leaves(first), leaves(second), strict=True))


# ---- one tokenizer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["policy", "reward", "value", "reference"])
def test_a_model_with_another_tokenizer_is_refused(ppo, foreign, tmp_path, whole, role):
    cfg = ppo(f"models.{role}={{init_from: {foreign}}}", f"tokenizer.init_from={whole / 'sft'}")
    with pytest.raises(ConfigError) as error:
        build.build(resolve_config(cfg))
    assert str(error.value).startswith(f"models.{role}.init_from: {foreign}: token ids mean other text to it: id 2")
    assert "in the run's tokenizer and" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ppo").exists()


def test_the_command_refuses_it_in_one_line_and_starts_nothing(root, whole, foreign, tmp_path, monkeypatch, capsys):
    command = runs.train(*runs.overrides(root / "text", tmp_path, whole), configs=runs.TINY[2:])
    monkeypatch.setattr(sys, "argv", ["jaxrlhf", *command, f"models.reward.init_from={foreign}"])
    monkeypatch.setattr(trainer, "initial_state", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(SystemExit, match="2"):
        app.main()
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "models.reward.init_from" in err
    assert [path.name for path in (tmp_path / "ppo").iterdir()] == [".lock"]


def test_a_start_that_came_to_nothing_leaves_no_tokenizer_behind(ppo, foreign, whole, tmp_path):
    """Neither when it was refused, nor when it ended before its first checkpoint."""
    with pytest.raises(ConfigError, match="token ids"):
        build.build(resolve_config(ppo(f"models.policy.init_from={foreign}")))
    build.build(resolve_config(ppo(f"models.policy.init_from={foreign}", "models.reward={init_from: policy}")))
    assert tokenizer_of(tmp_path / "ppo") == tokenizer_of(foreign)
    build.build(resolve_config(ppo()))
    assert tokenizer_of(tmp_path / "ppo") == tokenizer_of(whole / "sft") != tokenizer_of(foreign)


def test_a_run_with_a_checkpoint_keeps_its_tokenizer(whole, root, tmp_path):
    run = runs.copy_run(whole / "sft", tmp_path / "sft", 2)
    before = {path: path.stat().st_mtime_ns for path in (run / "tokenizer").iterdir()}
    ready = build.build(resolve_config(runs.config("sft", root, tmp_path)))
    assert tokenizers.fingerprint(ready.tokenizer) == tokenizer_of(whole / "sft")
    assert before == {path: path.stat().st_mtime_ns for path in (run / "tokenizer").iterdir()}


def test_a_vocabulary_that_is_too_small(root, tmp_path):
    cfg = runs.config("sft", root, tmp_path, "models.policy.architecture.vocab_size=280")
    with pytest.raises(
        ConfigError, match=r"^models\.policy: vocab_size 280 is less than the 300 tokens of the tokenizer$"
    ):
        build.build(resolve_config(cfg))


@pytest.mark.parametrize("role", ["policy", "reward"])
def test_a_reward_model_s_rows_end_as_the_policy_s_responses(tmp_path, role):
    """What generation_config.json names beside the tokenizer's EOS (Gemma, Phi-3, Llama 3) ends the rows of all runs,
    and is kept with each of them."""
    origin, tokenizer = tmp_path / "origin", tokenizers.train_bpe(["a b"], 300)
    tokenizers.save_tokenizer(tokenizer, str(origin))
    (origin / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    tree = {"run_dir": str(tmp_path / "run"), "iterations": 1, "algorithm": {"name": "rm"}}
    cfg = parse(tree | {"models": {"reward": {"init_from": str(origin)}}}, "test")
    weights = {role: build.Weights("hf", str(origin), resolve(ModelConfig(vocab_size=300)), "lm")}
    assert run_sampler(saved_run.SavedRuns(), cfg, tokenizer, weights).eos_ids == (1, 7)
    new = {role: build.Weights("new", None, resolve(ModelConfig(vocab_size=300)), "lm")}
    assert run_sampler(saved_run.SavedRuns(), cfg, tokenizers.load_tokenizer(str(origin)), new).eos_ids == (1, 7)


@pytest.mark.parametrize("theirs, warned", [([1], True), ([7, 1], False), (None, False)])
def test_a_reward_model_of_other_endings_is_told(theirs, warned):
    from types import SimpleNamespace

    tokenizer = tokenizers.train_bpe(["a b"], 300)
    tree = {"run_dir": "run", "iterations": 1, "algorithm": {"name": "grpo"}}
    cfg = parse(tree | {"models": {role: {"init_from": f"runs/{role}"} for role in ("policy", "reward")}}, "test")
    started = lambda role: build.Weights(
        "run", f"runs/{role}", resolve(ModelConfig()), "lm", record={"eos_ids": theirs}
    )
    weights = {role: started(role) for role in cfg.models}
    sampler, heads = SimpleNamespace(eos_ids=(1, 7)), {"policy": "lm", "reward": "scalar", "reference": "lm"}
    run: Any = SimpleNamespace(cfg=cfg, sampler=sampler, heads=heads, weights=weights, tokenizer=tokenizer)
    said = other_endings(run)
    assert len(said) == warned
    if warned:
        assert said[0].startswith(
            "warning: models.reward: runs/reward: was trained on rows that end with '<eos>', and "
        )


@pytest.mark.parametrize("template, special, warned", [("chatml", (), 1), ("chatml", 1, 0), ("plain", (), 0)])
def test_a_template_whose_tokens_are_missing_is_told(template, special, warned):
    from types import SimpleNamespace

    words = ["<|im_start|>", "<|im_end|>"] if special else []
    cfg = SimpleNamespace(data=SimpleNamespace(chat=ChatConfig(template=template)))
    run: Any = SimpleNamespace(cfg=cfg, tokenizer=tokenizers.train_bpe(["a b"], 300, words))
    said = spelled_markers(run)
    assert len(said) == warned and all("has no token <|im_start|>, <|im_end|>: they are" in line for line in said)


def test_a_run_s_tokenizer_names_its_endings(whole):
    ends = json.loads((whole / "rm" / "tokenizer" / "generation_config.json").read_text())
    assert ends == {"eos_token_id": saved_run.read_extra(whole / "rm")[1]["eos_ids"]}


# ---- where things come from -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["policy", "reward", "value"])
def test_an_origin_that_is_not_there_is_one_line(ppo, tmp_path, role):
    cfg = ppo(f"models.{role}.init_from={tmp_path}/nowhere/run")
    with pytest.raises(ConfigError) as error:
        build.build(resolve_config(cfg))
    assert str(error.value).startswith(f"models.{role}.init_from: '{tmp_path}/nowhere/run': there is no such folder")
    assert "\n" not in str(error.value)


def test_a_run_that_has_saved_nothing_yet_is_one_line(ppo, whole, tmp_path):
    run = runs.copy_run(whole / "rm", tmp_path / "early", 0)
    with pytest.raises(FileNotFoundError, match="early: no checkpoint in it"):
        build.build(resolve_config(ppo(f"models.reward.init_from={run}")))


def test_roles_that_start_from_roles(ppo):
    cfg = ppo("models.reference={init_from: policy}", "models.value={init_from: reference}")
    assert [origins.base_role(cfg, role) for role in ("policy", "reference", "value")] == ["policy"] * 3
    circle = {"policy": RoleConfig(init_from="value"), "value": RoleConfig(init_from="policy")}
    with pytest.raises(ConfigError, match="goes round in a circle"):
        origins.origin(runs.dataclasses.replace(cfg, models=circle), "policy")


def test_ppo_starts_from_both_runs(ppo, whole):
    ready, state = started(ppo())
    for role, run in (("policy", "sft"), ("reward", "rm")):
        saved = {path: leaf for path, leaf in runs.read_state(whole / run, 4).items() if path.startswith("params.")}
        found = named(state.params[role])
        assert {f"params.{role}/{path}" for path in found} == saved.keys()
        assert all(np.array_equal(leaf, saved[f"params.{role}/{path}"]) for path, leaf in found.items())
    assert equal(state.slow["reference"], state.params["policy"])
    assert equal(state.params["value"], state.params["reward"])
    assert ready.heads == {"policy": "lm", "value": "scalar", "reward": "scalar", "reference": "lm"}
    assert state.step == 0 and state.seed == 0 and state.controls["kl_coef"] == np.float32(0.05)


def test_no_role_is_another_s_alias(ppo):
    """The state is donated: a buffer that two roles shared would be used after it was given away."""
    _, state = started(ppo("models.value={init_from: policy}", "models.reward={init_from: policy}"))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.params, state.slow)) if leaf.size > 1]
    assert len(pointers) == len(set(pointers))


def test_a_value_model_that_starts_from_a_policy_knows_nothing(ppo):
    _, state = started(ppo("models.value={init_from: policy}"))
    head = state.params["value"]["head"]
    assert not np.any(head["kernel"]) and not np.any(head["bias"])
    trunk = {name: part for name, part in state.params["value"].items() if name != "head"}
    assert equal(trunk, {name: state.params["policy"][name] for name in trunk})


def test_a_value_model_that_shares_the_policy_s_trunk(ppo, whole):
    """A head at 0 and no trunk; from a reward model's weights, its head; and it starts from the policy by itself."""
    ready, state = started(ppo("models.value={share_trunk: true}"))
    assert ready.cfg.models["value"].init_from == "policy" and ready.heads["value"] == "bare"
    assert named(state.params["value"]).keys() == {"head/kernel", "head/bias"}
    assert not any(np.any(leaf) for leaf in named(state.params["value"]).values())
    assert optax.tree.get(state.opt_state["value"], "mu").keys() == {"head"}
    _, state = started(ppo(f"models.policy.init_from={whole}/rm", "models.value={share_trunk: true}"))
    trained = runs.read_state(whole / "rm", 4)["params.reward/head/kernel"]
    assert np.any(trained) and np.array_equal(state.params["value"]["head"]["kernel"], trained)


def test_a_reward_model_starts_as_the_policy_with_a_new_head(root, whole, tmp_path):
    _, state = started(runs.config("rm", root, tmp_path))
    policy = runs.read_state(whole / "sft", 4)
    found = named(state.params["reward"])
    head = {path: found.pop(path) for path in ("head/kernel", "head/bias")}
    assert np.std(head["head/kernel"]) > 0.1 and not np.any(head["head/bias"])
    assert found.keys() == {path.split("/", 1)[1] for path in policy if path.startswith("params.policy/")}
    assert all(np.array_equal(leaf, policy[f"params.policy/{path}"]) for path, leaf in found.items())


def test_random_weights_are_the_seed_s(root, tmp_path):
    states = [started(runs.config("sft", root, tmp_path, f"seed={seed}"))[1].params for seed in (0, 0, 1)]
    assert equal(states[0], states[1]) and not equal(states[0], states[2])


def test_weights_are_cast_to_the_run_s_precision(ppo, whole):
    _, state = started(ppo("precision.params=bfloat16"))
    expected = runs.read_state(whole / "sft", 4)["params.policy/embed/tokens/embedding"].astype(jax.numpy.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.slow)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}  # it adds up small updates
    np.testing.assert_array_equal(state.slow["reference"]["embed"]["tokens"]["embedding"], expected)
    np.testing.assert_array_equal(state.params["policy"]["embed"]["tokens"]["embedding"].astype("bfloat16"), expected)


@pytest.mark.parametrize("name", ["sft", "rm", "ppo"])
def test_the_abstract_state_is_the_state_with_nothing_in_it(root, whole, tmp_path, name):
    ready, state = started(runs.config(name, root, tmp_path))
    with jax.set_mesh(ready.mesh):
        described = abstract_state(ready)
    assert jax.tree.structure(described) == jax.tree.structure(state)
    for shape, leaf in zip(jax.tree.leaves(described), jax.tree.leaves(state)):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
        assert shape.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


# ---- folders of Hugging Face ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """The exported policy, with a second token that ends a response, as chat models have."""
    found = tmp_path / "hf"
    shutil.copytree(whole / "policy-hf", found)
    generation = json.loads((found / "generation_config.json").read_text())
    (found / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [1, 7]}))
    return found


def test_a_folder_starts_a_run_as_its_run_would(ppo, whole, folder):
    from_run, from_folder = (started(ppo(f"models.policy.init_from={path}"))[1] for path in (whole / "ppo", folder))
    expected, found = named(from_run.params["policy"]), named(from_folder.params["policy"])
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():  # rows that pad the vocabulary are not in the folder
        rows = slice(300) if path == "embed/tokens/embedding" else ...
        np.testing.assert_array_equal(found[path][rows], leaf[rows], err_msg=path)


def test_every_eos_token_stays_one_when_a_run_goes_on(root, folder, tmp_path, ppo, monkeypatch, one_device):
    """Also in the runs that start from the run, in text that it writes, and in its export."""
    make = lambda recipe: lambda state, batch: (state.replace(step=state.step + 1), {}, None)
    monkeypatch.setattr(programs, "make_iteration", make)
    off = ["eval.every=0", "data.eval_demonstrations=null", "log.trackers=[]", "tokenizer.train_vocab_size=null"]
    cfg = runs.config("sft", root, tmp_path, *off, f"models.policy={{init_from: {folder}}}")
    assert build.build(resolve_config(cfg)).sampler.eos_ids == (1, 7)
    assert trainer.run(cfg) == "done"
    assert build.build(resolve_config(cfg)).weights["policy"].kind == "run"
    assert build.build(resolve_config(cfg)).sampler.eos_ids == (1, 7)
    assert build.build(resolve_config(ppo(f"models.policy.init_from={cfg.run_dir}"))).sampler.eos_ids == (1, 7)
    mesh = writer.make_mesh(writer.MeshConfig())
    with jax.set_mesh(mesh):
        assert writer.read_model(cfg.run_dir, mesh).ids.eos == (1, 7)
    export(cfg.run_dir, "policy", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"] == [1, 7]


# ---- what the step is told ------------------------------------------------------------------------------------------


def test_schedules_end_with_the_run(root, tmp_path, monkeypatch):
    """They count optimizer steps: iterations x epochs x minibatches."""
    told = []
    real = build.make_optimizer
    monkeypatch.setattr(build, "make_optimizer", lambda cfg, total, _: told.append((cfg, total)) or real(cfg, total))
    runs.whole(root)
    optimizer = ["optimizer.value.learning_rate=0.5", "optimizer.value.delay=3", "batch.micro_batch_size=8"]
    ready = build.build(resolve_config(runs.config("ppo", root, tmp_path, *optimizer, "iterations=5")))
    assert sorted(total for _, total in told) == [(5 - 3) * 4, 5 * 4, 5 * 4]
    assert sorted(cfg.learning_rate for cfg, _ in told) == [1e-3, 1e-3, 0.5]
    assert ready.recipe.delays == {"policy": 0, "value": 3, "reward": 0} and ready.recipe.num_micro == 1


def test_the_vocabulary_is_the_tokenizer_s(root, tmp_path):
    ready = build.build(resolve_config(runs.config("sft", root, tmp_path)))
    assert ready.configs["policy"].vocab_size == len(ready.tokenizer) == 300
    assert parameters.padded_vocab(ready.configs["policy"]) >= 300
    assert os.path.exists(tmp_path / "sft" / "tokenizer" / "tokenizer.json")
