"""Every file in configs/ loads, fits itself, and names a state that can be built."""

import dataclasses
import math

import jax
import pytest

from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.config.batch import describe_batch
from jaxrlhf.config.check import check
from jaxrlhf.config.load import dump, load
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.models.config import MLP
from jaxrlhf.models.lora import BASE
from jaxrlhf.models.parameters import padded_vocab
from jaxrlhf.plan import shapes
from jaxrlhf.plan.shapes import blueprint
from jaxrlhf.run.initial_state import abstract_state
from jaxrlhf.sharding import MeshConfig, make_mesh
from tests.support import runs

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
    return math.prod((mesh.slices, max(mesh.data, 1), max(mesh.fsdp, mesh.decode), mesh.expert, max(mesh.tensor, 1)))


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_it_loads_checks_and_is_short(path, tmp_path):
    cfg = CONFIGS[path]
    resolved = check(cfg, devices_of(cfg))
    assert describe_batch(resolved, 1).startswith("batch: ")
    (tmp_path / "again.yaml").write_text(dump(cfg))
    assert load(tmp_path / "again.yaml") == cfg
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_what_it_starts_from_is_made_by_another_config_or_comes_from_elsewhere(path):
    for role, model in CONFIGS[path].models.items():
        if model.init_from and model.init_from.startswith("runs/"):
            assert model.init_from in ORIGINS, f"models.{role}.init_from"
            assert ORIGINS[model.init_from].run_dir != CONFIGS[path].run_dir


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No hub and no run: shapes come from the table, and from the configs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "on_the_hub", lambda name: None)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_its_abstract_state_builds(path, offline):
    """From the shapes that its models will have, which other configs make or the table knows."""
    cfg = dataclasses.replace(CONFIGS[path], mesh=MeshConfig())
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    drawn, _ = blueprint(resolve_config(cfg), mesh, ORIGINS)
    with jax.set_mesh(mesh):
        state = abstract_state(drawn)
    trained, slow, _ = drawn.resolved.roles
    bases = {based.base for based in drawn.resolved.bases.values()}
    assert (state.params.keys(), state.slow.keys()) == (trained.keys(), slow.keys() | bases)
    assert state.opt_state.keys() == trained.keys()
    for role, tree in {**state.params, **state.slow}.items():
        if role in drawn.resolved.bases:
            continue  # its own leaves alone
        shape = drawn.configs[role.removeprefix(BASE)]
        rows = (padded_vocab(shape), shape.hidden_size)
        if set(tree) == {"head"} or shape.family == MLP:  # on the trunk of another role; of observations
            continue
        assert tree["embed"]["tokens"]["embedding"].shape == rows, role
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))
