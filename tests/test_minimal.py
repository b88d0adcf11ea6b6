"""Every method with nothing but the keys it needs, and with one row at a time, wherever it runs."""

import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import step as steps
from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.algorithms.cm import CMConfig
from jaxrlhf.algorithms.dpo import DPOConfig
from jaxrlhf.algorithms.grpo import GRPOConfig
from jaxrlhf.algorithms.kto import KTOConfig
from jaxrlhf.algorithms.ppo import PPOConfig
from jaxrlhf.algorithms.ppo_lagrangian import PPOLagrangianConfig
from jaxrlhf.algorithms.raft import RAFTConfig
from jaxrlhf.algorithms.rm import RMConfig
from jaxrlhf.algorithms.rm_ratings import RMRatingsConfig
from jaxrlhf.algorithms.rm_ties import RMTiesConfig
from jaxrlhf.algorithms.sft import SFTConfig
from jaxrlhf.cli import discover
from jaxrlhf.config.load import load
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.generate import loop
from jaxrlhf.generate.sampler import Sampler
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.files import hf_config, hf_weights
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.plan.shapes import blueprint
from jaxrlhf.run.batch_shapes import batch_shapes
from jaxrlhf.run.build import Blueprint
from jaxrlhf.run.initial_state import abstract_state
from jaxrlhf.sharding import MeshConfig, batch_shards, current, is_pmap, make_mesh
from jaxrlhf.types import Batch
from tests.support import runs, tiny

OFF_TRAJECTORIES = ["ilql", "fqi", "mc_returns", "bc"]
METHODS = ["sft", "rm", "rm_ratings", "rm_ties", "cm", "dpo", "simpo", "orpo", "kto", "ppo", "ppo_lagrangian"]
METHODS += ["grpo", "raft", "online_dpo", "distill", "distill_data", *OFF_TRAJECTORIES]

# ---- required keys only ---------------------------------------------------------------------------------------------

# what each method cannot do without, besides run_dir, iterations and algorithm.name
REQUIRED = {
    "sft": "models: {{policy: {{init_from: {lm}}}}}\ndata: {{demonstrations: {{path: {text}/demonstrations.jsonl}}}}",
    "rm": "models: {{reward: {{init_from: {lm}}}}}\ndata: {{preferences: {{path: {text}/preferences.jsonl}}}}",
    "dpo": "models: {{policy: {{init_from: {lm}}}}}\ndata: {{preferences: {{path: {text}/preferences.jsonl}}}}",
    "kto": "models: {{policy: {{init_from: {lm}}}}}\ndata: {{unpaired: {{path: {text}/unpaired.jsonl}}}}",
    "ppo": "models: {{policy: {{init_from: {lm}}}, reward: {{init_from: {scalar}}}}}\n"
    "data: {{prompts: {{path: {text}/prompts.jsonl}}}}",
}
REQUIRED["grpo"] = REQUIRED["raft"] = REQUIRED["online_dpo"] = REQUIRED["ppo"] + "\nbatch: {{samples_per_prompt: 2}}"
REQUIRED |= {name: REQUIRED["kto"].replace("unpaired", "trajectories") for name in OFF_TRAJECTORIES}
REQUIRED["rm_ties"] = REQUIRED["rm"]
REQUIRED["distill"] = REQUIRED["ppo"].replace("reward:", "teacher:")
REQUIRED["distill_data"] = REQUIRED["distill"].replace("prompts", "demonstrations")
REQUIRED["simpo"] = REQUIRED["orpo"] = REQUIRED["dpo"]
REQUIRED["cm"] = REQUIRED["kto"].replace("policy", "cost")
REQUIRED["ppo_lagrangian"] = REQUIRED["ppo"].replace("reward:", "cost: {{init_from: {scalar}}}, reward:")
REQUIRED["rm_ratings"] = REQUIRED["rm"].replace("preferences", "trajectories")
SHORT = ["data.prompt_buckets=[16]", "generate.max_new_tokens=8"]  # of three programs that are compiled, one


def write_models(folder: Path, text: Path) -> dict[str, Path]:
    """Hugging Face folders of a language model and of a scalar-headed one, with one tokenizer."""
    lines = (text / "demonstrations.jsonl").read_text().splitlines()
    tokenizer = tokenizers.train_bpe((json.loads(line)["text"] for line in lines), 300)
    tokenizers.save_tokenizer(tokenizer, str(folder / "tokenizer"))
    ids = hf_config.TokenIds((tokenizer.eos_token_id,), tokenizer.bos_token_id, tokenizer.pad_token_id)
    sizes: dict[str, Any] = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_size": 16, "max_positions": 640}
    shape = resolve(ModelConfig(vocab_size=len(tokenizer), **sizes))
    for seed, head in enumerate(("lm", "scalar")):
        params = tiny.parameters(shape, head, seed)
        hf_weights.save(params, shape, head, folder / head, ids=ids, tokenizer_folder=folder / "tokenizer")
    return {head: folder / head for head in ("lm", "scalar")}


def write_config(name: str, folder: Path, text: Path, models: dict[str, Path]) -> Path:
    """The config of a method with its required keys, whose run directory is folder/NAME."""
    needed, config = REQUIRED[name].format(text=text, **models), folder / f"{name}.yaml"
    config.write_text(f"run_dir: {folder}/{name}\niterations: 1\nalgorithm: {{name: {name}}}\n{needed}\n")
    return config


def train_all(folder: Path, text: Path, names: list[str], more: list[str]) -> runs.Done:
    """A process that trains each method with its required keys, and ``more`` of those that sample, to folder/NAME."""
    models, commands = write_models(folder, text), []
    for name in names:
        config = write_config(name, folder, text, models)
        commands.append(["train", str(config), *(more if ALGORITHMS[name].online else [])])
    return runs.process(folder / "process", commands)


def fill_in(starter: str, folder: Path, text: Path, models: dict[str, Path]) -> str:
    """A starter config with what is marked CHANGE in it replaced."""
    for old, new in {
        r"teacher: \{init_from: [\w/-]+": f"teacher: {{init_from: {models['scalar']}",  # other weights
        r"HuggingFaceTB/[\w-]+": str(models["lm"]),
        r"init_from: runs/my-[rc]m": f"init_from: {models['scalar']}",
        r"path: (\w+)\.jsonl": rf"path: {text}/\1.jsonl",
        r"jaxrlhf\.rewards\.math_answer:strict": "tests.support.runs:praise",
        r"runs/my-": f"{folder}/my-",
    }.items():
        starter = re.sub(old, new, starter)
    return starter


@pytest.fixture(scope="module")
def started(root, tmp_path_factory) -> tuple[Path, runs.Done]:
    """Each starter config, filled in, trained for a small part of an epoch: one iteration."""
    folder, text = tmp_path_factory.mktemp("started"), runs.text(root)
    models, commands = write_models(folder, text), []
    for method, path in discover.starters().items():
        config = folder / f"{method}.yaml"
        config.write_text(fill_in(path.read_text(), folder, text, models))
        more = SHORT if ALGORITHMS[method].online else ["data.max_length=64"]
        commands.append(["train", str(config), "epochs=0.01", *more])
    return folder, runs.process(folder / "process", commands)


@pytest.mark.nightly
@pytest.mark.parametrize("name", METHODS)
def test_a_starter_config_trains_once_it_is_filled_in(started, name):
    check_trained(started[0] / f"my-{name}", started[1])


@pytest.fixture(scope="module")
def folders(root, tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    """Where configs may be written, and the models that they start from."""
    folder = tmp_path_factory.mktemp("required")
    return folder, write_models(folder, runs.text(root))


@pytest.mark.parametrize("name", METHODS)
def test_the_required_keys_alone_make_an_iteration(root, folders, name):
    """Traced: that it runs is seen each night, and by the runs of configs/tiny that other tests share."""
    cfg = load(write_config(name, folders[0], runs.text(root), folders[1]), SHORT if ALGORITHMS[name].online else [])
    trace_of(cfg, make_mesh(MeshConfig(), jax.devices()[:1]), {})


@pytest.fixture(scope="module")
def minimal(root, tmp_path_factory) -> tuple[Path, runs.Done]:
    folder = tmp_path_factory.mktemp("minimal")
    return folder, train_all(folder, runs.text(root), METHODS, SHORT)


@pytest.mark.nightly
@pytest.mark.parametrize("name", METHODS)
def test_the_required_keys_alone_train(minimal, name):
    check_trained(minimal[0] / name, minimal[1])


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_required_keys_alone_train_on_all_lengths_of_prompts(root, tmp_path, name):
    check_trained(tmp_path / name, train_all(tmp_path, runs.text(root), [name], []))


def check_trained(run: Path, done: runs.Done) -> None:
    """One finite update."""
    assert (run / "metrics.jsonl").exists(), done.errors[-3000:]
    (row,) = runs.rows(run)
    losses = {key: value for key, value in row.items() if key.startswith("loss/") or key.endswith("/grad_norm")}
    assert losses and all(np.isfinite(value) for value in losses.values())
    assert min(value for key, value in losses.items() if key.endswith("/grad_norm")) > 0


# ---- one row at a time ----------------------------------------------------------------------------------------------

ONE_ROW: dict[str, tuple] = {  # algorithm, its config, samples a prompt, more for tiny.build
    "sft": ("sft", SFTConfig(), 1, {}),
    "rm": ("rm", RMConfig(), 1, {}),
    "rm_ties": ("rm_ties", RMTiesConfig(), 1, {}),
    "rm_ratings": ("rm_ratings", RMRatingsConfig("steps"), 1, {}),
    "dpo": ("dpo", DPOConfig(), 1, {}),
    **{name: (name, ALGORITHMS[name].config(), 1, {}) for name in ("simpo", "orpo")},
    "kto": ("kto", KTOConfig(), 1, {}),
    "cm": ("cm", CMConfig(pairs=True), 1, {}),
    "ppo_lagrangian": ("ppo_lagrangian", PPOLagrangianConfig(), 1, {}),
    **{name: (name, ALGORITHMS[name].config(), 1, {}) for name in OFF_TRAJECTORIES},
    "ppo": ("ppo", PPOConfig(reward_update=True, whiten_rewards=True), 1, {}),
    "ppo, shared trunk": ("ppo", PPOConfig(num_epochs=2), 1, {"trunk_gradient": 0.5}),
    "raft": ("raft", RAFTConfig(), 2, {}),
    "online_dpo": ("online_dpo", ALGORITHMS["online_dpo"].config(), 2, {}),
    "distill": ("distill", ALGORITHMS["distill"].config(on_policy_share=0.5, top_k=5), 1, {}),
    "distill_data": ("distill_data", ALGORITHMS["distill_data"].config(), 1, {}),
    "grpo, one prompt": ("grpo", GRPOConfig(), 2, {}),
    "grpo, cut": ("grpo", GRPOConfig(num_minibatches=2), 2, {"share_prompts": False}),
    "grpo, packed": ("grpo", GRPOConfig(), 2, {"pack_widths": 3}),
}
ALONE = {"one device": MeshConfig(1, 1, 1), "tensor": MeshConfig(1, 1, 2)}


def only_row(name: str) -> Batch:
    """One row, pair or prompt of all kinds that the algorithm reads."""
    algorithm, cfg, *_ = ONE_ROW[name]
    cut = lambda tree: jax.tree.map(lambda x: np.asarray(x)[:1], tree)
    every = {
        "prompts": tiny.prompts(rows=1),
        "preferences": cut(tiny.preferences(rows=2)),
        "unpaired": cut(tiny.unpaired(rows=2)),
        "sequences": cut(tiny.sequences(rows=2)),
        "demonstrations": cut(tiny.sequences(rows=2)),
        "trajectories": cut(tiny.trajectories(rows=2)),
        "comparisons": cut(tiny.comparisons(rows=2)),
    }
    return Batch(**{field: every[field] for field in ALGORITHMS[algorithm].batch(cfg)})


# by day: groups of one prompt, packed too, and a row a device of every method, below
BY_DAY = ("ppo", "grpo, one prompt", "grpo, cut", "grpo, packed")


@pytest.mark.parametrize(
    ("name", "where"),
    [
        pytest.param(name, where, marks=[] if (where, name in BY_DAY) == ("one device", True) else pytest.mark.nightly)
        for name in ONE_ROW
        for where in ALONE
    ],
)
def test_an_iteration_of_one_row_is_traced(name, where):
    """A reshape drops the layout of an axis of size 1, unless it is told: seen while tracing only."""
    algorithm, cfg, copies, more = ONE_ROW[name]
    mesh = make_mesh(ALONE[where], jax.devices()[: 1 + (where == "tensor")])
    with jax.set_mesh(mesh):
        run = tiny.build(algorithm, cfg, batch=tiny.put(only_row(name)), samples_per_prompt=copies, **more)
        together = math.gcd(
            copies, copies // ALGORITHMS[algorithm].updates(cfg).minibatches
        )  # as config_batch.kept_together
        jax.eval_shape(steps.make_iteration(run.recipe._replace(together=together)), run.state, run.batch)


@pytest.mark.parametrize("options", [{}, {"halvings": 1}], ids=str)
@pytest.mark.parametrize("copies", [1, 3])
def test_one_prompt_is_sampled_from(copies, options):
    """Also with a vocabulary of one block of the token search."""
    sampler = Sampler(Sampling(eos_ids=(1,), top_k=4), 6, (1,), 0, (), copies, **options)
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
        params, prompts = tiny.parameters(tiny.MODEL, "lm", 0), tiny.prompts(rows=1)
        sample = lambda params, prompts: loop.sample(
            params, tiny.MODEL, prompts, jnp.int32(0), jnp.int32(0), sampler, Runtime()
        )
        assert jax.eval_shape(sample, params, prompts).tokens.shape == (copies, 4 + 6)


ALIKE = ("ppo_lagrangian", "cm", "rm_ties")  # most of their code is that of ppo and rm, which stand for them by day
PIECES = {"data": MeshConfig(8), "fsdp": MeshConfig(1, 8), "all": MeshConfig(2, 2, 2), "pmap": MeshConfig(style="pmap")}


@pytest.mark.parametrize(
    ("name", "where"),
    [
        pytest.param(name, where, marks=[] if by_day else pytest.mark.nightly)
        for name in METHODS
        for where in PIECES
        for by_day in [(where == "all" and name not in ALIKE) or (name, where) == ("ppo", "pmap")]
    ],
)
def test_a_row_a_device_is_traced(name, where):
    """micro_batch_size as small as it can be: the config of each method, on shapes alone."""
    trace(name, make_mesh(PIECES[where]), [f"mesh.style={PIECES[where].style}"])


@pytest.mark.plan
@pytest.mark.parametrize("tensor", [1, pytest.param(4, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", METHODS)
def test_one_row_at_a_time_is_traced_for_a_slice(name, tensor):
    """As ``jaxrlhf plan`` does, with the kernels and the scan over layers of TPUs."""
    pytest.importorskip("libtpu")
    from jaxrlhf.plan.target import find_target

    mesh = make_mesh(MeshConfig(1, 1, tensor), find_target("v5e:2x2").devices[:tensor])
    trace(name, mesh, [])


def trace(name: str, mesh, more: list[str]) -> None:
    """Trace the iteration of configs/tiny/NAME.yaml in micro-batches of a row a device."""
    smallest = batch_shards(mesh)
    path = runs.tiny_config(name)
    beside = {f"runs/tiny/{one.stem}": load(one) for one in runs.ALL}
    cfg = load(path, [f"batch.micro_batch_size={smallest}", "data.prompt_buckets=[16]", *more])
    drawn = trace_of(cfg, mesh, beside)
    assert drawn.recipe.num_micro * smallest * drawn.resolved.updates.minibatches >= 8


def trace_of(cfg: Config, mesh, beside: dict[str, Config]) -> Blueprint:
    """Trace the iteration of a config; ``beside``: run directory -> the config that makes it."""
    drawn, _ = blueprint(resolve_config(cfg), mesh, beside)
    iteration = steps.make_iteration(drawn.recipe)
    with current(mesh):
        state, (batch,) = abstract_state(drawn), batch_shapes(drawn.resolved, mesh)
        if is_pmap(mesh):
            split = jax.tree.map(lambda x: jax.ShapeDtypeStruct((8, x.shape[0] // 8, *x.shape[1:]), x.dtype), batch)
            jax.eval_shape(jax.pmap(iteration, "devices", in_axes=(None, 0), out_axes=(None, None, 0)), state, split)
        else:
            jax.eval_shape(iteration, state, batch)
    return drawn
