"""Every file in configs/ loads, fits itself, and names a state that can be built."""

import dataclasses
import math
from pathlib import Path

import jax
import pytest

from jaxrlhf import build
from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.config import Config, RoleConfig, dump, load
from jaxrlhf.config_batch import describe_batch
from jaxrlhf.config_check import check
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.models.transformer import padded_vocab
from tests import runs

FILES = sorted((runs.ROOT / "configs").rglob("*.yaml"))
IDS = [str(path.relative_to(runs.ROOT / "configs").with_suffix("")) for path in FILES]
CONFIGS = dict(zip(FILES, map(load, FILES)))
ORIGINS = {cfg.run_dir: cfg for cfg in CONFIGS.values()}  # run directory -> the config that makes it


def test_there_are_configs():
    names = {f"tiny/{name}" for name in ALGORITHMS} | {f"quickstart/{name}" for name in ("sft", "rm", "ppo")}
    assert names <= set(IDS)


def devices_of(cfg: Config) -> int:
    """The fewest that the mesh fits."""
    mesh = cfg.mesh
    return math.prod(max(size, 1) for size in (mesh.slices, mesh.data, mesh.fsdp, mesh.tensor))


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_it_loads_checks_and_is_short(path, tmp_path):
    cfg = CONFIGS[path]
    check(cfg, devices_of(cfg))
    assert describe_batch(cfg).startswith("batch: ")
    (tmp_path / "again.yaml").write_text(dump(cfg))
    assert load(tmp_path / "again.yaml") == cfg
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_what_it_starts_from_is_made_by_another_config_or_comes_from_elsewhere(path):
    for role, model in CONFIGS[path].models.items():
        if model.init_from and model.init_from.startswith("runs/"):
            assert model.init_from in ORIGINS, f"models.{role}.init_from"
            assert ORIGINS[model.init_from].run_dir != CONFIGS[path].run_dir


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A small tokenizer in the place of each config's own, which would need its data."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizers.save_tokenizer(tokenizers.train_bpe(["the film is warm"] * 5, 300), str(folder))
    return folder


def from_scratch(cfg: Config, run_dir: Path, tokenizer: Path) -> Config:
    """The config with the shapes that its models will have, in the place of runs that are not there yet."""
    models = {role: RoleConfig(architecture=shape_of(cfg, role)) for role in cfg.models}
    named = dataclasses.replace(cfg.tokenizer, init_from=str(tokenizer), train_vocab_size=None)
    return dataclasses.replace(cfg, run_dir=str(run_dir), models=models, tokenizer=named)


def shape_of(cfg: Config, role: str):
    """The architecture at the end of the chain of configs."""
    start = build.origin(cfg, role)
    if start.architecture:
        return start.architecture
    if start.init_from not in ORIGINS:
        pytest.skip(f"models.{role}.init_from: {start.init_from} is made by no config here")
    made = ORIGINS[start.init_from]
    base = build.base_role(cfg, role)
    return shape_of(made, base if base in made.models else "policy")


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_its_abstract_state_builds(path, tmp_path, tokenizer):
    cfg = from_scratch(CONFIGS[path], tmp_path / "run", tokenizer)
    ready = build.build(cfg, jax.devices()[:1])
    with jax.set_mesh(ready.mesh):
        state = build.abstract_state(ready)
    trained, slow = ready.algorithm.roles(cfg.algorithm)
    assert (state.params.keys(), state.slow.keys()) == (trained.keys(), slow.keys())
    assert state.opt_state.keys() == trained.keys()
    for role, tree in {**state.params, **state.slow}.items():
        shape = ready.configs[role]
        rows = (padded_vocab(shape), shape.hidden_size)
        assert tree["embed"]["tokens"]["embedding"].shape == rows, role
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))
