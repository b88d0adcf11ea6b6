"""What the reward models of a finished run say of rows, read again from its checkpoint."""

import json

import jax
import numpy as np
import pytest

from jaxrlhf import train
from jaxrlhf.benchmarks import finished_run, reproduce
from jaxrlhf.benchmarks.published import control
from jaxrlhf.benchmarks.record import Cell, FinishedCell
from jaxrlhf.run import build
from jaxrlhf.sharding import make_mesh


@pytest.mark.benchmark
def test_scores_are_those_of_the_run_however_many_rows_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(build, "make_mesh", lambda cfg, *_: make_mesh(cfg, jax.devices()[:1]))
    (tmp_path / "data").mkdir()
    control.write_data(tmp_path / "data", 5, pool=0)
    small = {
        "iterations": 3,
        "models.reward": [{"architecture": {"family": "mlp", "hidden_size": 8, "num_layers": 1}}] * 2,
    }
    cell = Cell("rm_50", "", "rm", {"data.preferences.path": "runs/benchmarks/control/data/pairs_50.jsonl"} | small)
    cfg = reproduce.config_of(control.BENCHMARK, cell, tmp_path, 5)
    assert train.run(cfg) == train.DONE
    done = FinishedCell("rm_50", tmp_path / "rm_50", tmp_path, 5)
    pairs = [json.loads(line) for line in (tmp_path / "data" / "held_out_pairs.jsonl").read_text().splitlines()]
    read = lambda: np.stack([control.segment_scores(done.run_dir, pairs, side) for side in ("chosen", "rejected")])
    sides = read()
    margins = sides[0] - sides[1]
    assert margins.shape == (2, control.HELD_OUT)
    assert np.mean(margins.mean(0) > 0) == pytest.approx(done.curve("eval/reward/accuracy")[-1])
    for member, margin in enumerate(margins):
        assert np.mean(margin > 0) == pytest.approx(done.curve(f"eval/reward/accuracy/reward_{member}")[-1])
    monkeypatch.setattr(finished_run, "ROWS", 150)  # the last part is smaller
    np.testing.assert_allclose(read(), sides, rtol=1e-5, atol=1e-6)
