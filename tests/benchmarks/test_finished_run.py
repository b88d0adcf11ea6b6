"""What the reward models of a finished run say of rows, and its policy of tokens, read again from its checkpoint."""

import json

import jax
import numpy as np
import pytest

from jaxrlhf import api, train
from jaxrlhf.benchmarks import finished_run, reproduce
from jaxrlhf.benchmarks.published import control, reverse
from jaxrlhf.benchmarks.record import Cell, FinishedCell
from jaxrlhf.run import build
from jaxrlhf.serve import writer
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


@pytest.mark.benchmark
def test_the_tokens_of_greedy_responses_rank_first_and_others_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for module in (build, writer):
        monkeypatch.setattr(module, "make_mesh", lambda cfg, *_: make_mesh(cfg, jax.devices()[:1]))
    (tmp_path / "data").mkdir()
    reverse.write_data(tmp_path / "data", 5, letters="abc", length=2, rows=9)
    small = {"models.policy.architecture.num_layers": 1, "models.policy.architecture.hidden_size": 16}
    small |= {"iterations": 40, "optimizer.default.learning_rate": 2e-2}
    assert train.run(reproduce.config_of(reverse.BENCHMARK, Cell("sft", "", "sft", small), tmp_path, 5)) == train.DONE
    run, prompts = tmp_path / "sft", ["ab>", "ca>", "bca>"]
    greedy = [texts[0] for texts in api.sample(str(run), prompts, temperature=0, max_new_tokens=6)]
    assert all(text and {*text} <= {*"abc"} for text in greedy)
    rows = lambda responses: [{"prompt": prompt, "response": text} for prompt, text in zip(prompts, responses)]
    for text, ranks in zip(greedy, finished_run.token_ranks(run, rows(greedy))):
        assert len(ranks) == len(text) + 1 and (ranks[:-1] == 1).all()  # behind them EOS
    others = finished_run.token_ranks(run, rows("#" + text[1:] for text in greedy))
    assert all(ranks[0] > 1 for ranks in others)
