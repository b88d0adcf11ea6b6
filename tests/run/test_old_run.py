"""A run that an older version wrote (in November 2026, by PPO after 1 of 2 iterations) goes on as it did there."""

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrlhf.config.load import load
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.run import build, checkpoint
from jaxrlhf.run.initial_state import abstract_state
from jaxrlhf.sharding import current
from tests.support import runs

GOLDEN = Path(__file__).parents[1] / "golden" / "run_2026_11.tar.xz"


@pytest.fixture
def old(tmp_path) -> Path:
    """The older version's run directory: its checkpoint of step 1, and its metrics of steps 1 and 2."""
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def data_of(old: Path, root: Path) -> list[str]:
    """Overrides: the data are not where they were."""
    data = [f"data.{name}={{path: {runs.text(root)}/{name}.jsonl}}" for name in ("prompts", "preferences")]
    return [f"run_dir={old}", f"data.cache_dir={old}/cache", *data]


def test_its_state_is_restored(old, root, one_device):
    """Every saved leaf is one of today's state, and its bits are there."""
    ready = build.build(resolve_config(load(str(old / "config.yaml"), data_of(old, root))))
    with current(ready.mesh):
        state = checkpoint.restore(str(old), 1, abstract_state(ready))
    expected = runs.read_state(old, 1)
    assert len(expected) == len(jax.tree.leaves(state)) and state.step == 1
    for kind, trees in (("params", state.params), ("slow", state.slow)):
        for path, leaf in jax.tree.leaves_with_path(trees):
            role, name = path[0].key, jax.tree_util.keystr(path[1:], simple=True, separator="/")
            assert np.asarray(leaf).tobytes() == expected[f"{kind}.{role}/{name}"].tobytes()


@pytest.mark.nightly  # by day: what it starts from, above
def test_it_goes_on(old, root, one_device, command):
    rows = (old / "metrics.jsonl").read_text().splitlines()
    expected = next(row for row in map(json.loads, rows) if row["step"] == 2)
    (old / "metrics.jsonl").write_text(rows[0] + "\n")
    out, _ = command("train", old / "config.yaml", *data_of(old, root))
    assert "going on after 1" in out and "resumed from step 1" in out
    found = next(row for row in runs.rows(old) if row["step"] == 2)
    compared = [key for key in expected if not key.startswith(("time", "throughput/", "memory"))]
    assert found.keys() >= set(compared) and len(compared) > 20
    for key in compared:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.nightly
def test_it_is_sampled_from(old, one_device, command):
    out, _ = command("generate", f"{old}@1", "--prompt", "the film", "--max-tokens", 4)
    assert out.strip()
