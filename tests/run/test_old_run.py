"""A run that an older version wrote (in November 2026, by PPO after 1 of 2 iterations) goes on as it did there."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.support import runs

GOLDEN = Path(__file__).parents[1] / "golden" / "run_2026_11.tar.xz"


@pytest.fixture
def old(tmp_path) -> Path:
    """The older version's run directory: its checkpoint of step 1, and its metrics of steps 1 and 2."""
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def test_it_goes_on(old, root, one_device, command):
    rows = (old / "metrics.jsonl").read_text().splitlines()
    expected = next(row for row in map(json.loads, rows) if row["step"] == 2)
    (old / "metrics.jsonl").write_text(rows[0] + "\n")
    data = [f"data.{name}={{path: {runs.text(root)}/{name}.jsonl}}" for name in ("prompts", "preferences")]
    out, _ = command("train", old / "config.yaml", f"run_dir={old}", f"data.cache_dir={old}/cache", *data)
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
