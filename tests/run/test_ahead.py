"""Responses sampled while the host scores those before: beside a loop over the programs; resumption; refusals."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxrlhf import train as trainer
from jaxrlhf.config.check import check
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.errors import ConfigError
from jaxrlhf.run import kept_programs, scoring
from jaxrlhf.run.build import build
from jaxrlhf.run.feed import Feed
from jaxrlhf.run.initial_state import initial_state
from jaxrlhf.run.programs import compile_programs
from jaxrlhf.run.transfer import put
from jaxrlhf.sharding import current, for_programs
from jaxrlhf.types import Batch
from tests.run import test_resampling
from tests.support import runs

EVERY, LENGTH, PROMPTS = 3, 5, 12
STALENESS = [0, 1, 1, 0, 1]  # nothing is sampled ahead over the checkpoint behind the third


def vowels(responses: list[str], records: list[dict]) -> list[float]:
    assert all(record["answer"] == len(record["prompt"]) for record in records), "records of another iteration"
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in responses]


def config(folder: Path, run_dir: str = "run", **more: Any) -> Config:
    tree: dict[str, Any] = {
        "iterations": LENGTH,
        "algorithm": {"name": "grpo", "kl_coef": 0.0},
        "rewards": {"function": "tests.run.test_ahead:vowels", "sample_ahead": True},
        "optimizer": {"default": {"learning_rate": 1e-2}},
        "batch": {"prompts_per_step": 4, "samples_per_prompt": 2},
        "generate": {"max_new_tokens": 6},
        "checkpoint": {"every": EVERY, "background": False},
    }
    return test_resampling.config(folder, run_dir, **tree | more)


@pytest.fixture
def one(one_device, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    texts = [f"prompt {'i' * number} has {number} letters" for number in range(PROMPTS)]
    prompts = [{"prompt": text, "answer": len(text)} for text in texts]
    for name, rows in (("prompts", prompts), ("text", [{"text": text} for text in texts])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with kept_programs.share_programs():
        yield tmp_path


def by_hand(cfg: Config) -> tuple[Any, list[float]]:
    """(the state after all iterations, the mean score of each), by a loop that reads every batch in its turn."""
    ready = build(resolve_config(cfg))
    with current(ready.mesh):
        feed, state = Feed(ready), for_programs(initial_state(ready), ready.mesh)
        programs = compile_programs(ready, state, next(feed.shapes()))
        sampler, means = state, []
        for number, stale in enumerate(STALENESS):
            host, records = feed.next()
            batch = put(ready.mesh, host)
            by = sampler.replace(step=state.step) if stale else state  # the noise is that of the iteration
            sequences, _ = scoring.score(ready, programs["rollout"].run(by, batch), records)
            sampler = jax.tree.map(lambda x: x.copy(), state)  # the program that learns is given the state as its own
            state, metrics = programs["learn"].run(state, batch.replace(sequences=sequences))
            means.append(float(metrics["score/mean"]))
            assert number + 1 == int(state.step)
    return jax.device_get(state), means


def test_the_run_is_a_loop_that_samples_from_the_policy_before(one):
    cfg = config(one)
    check(cfg, 1)
    assert trainer.run(cfg) == "done"
    rows = [row for row in runs.rows(one / "run") if "rollout/staleness" in row]
    assert [row["rollout/staleness"] for row in rows] == STALENESS
    assert [row["data/epoch"] for row in rows] == pytest.approx([4 * step / PROMPTS for step in range(1, LENGTH + 1)])
    state, means = by_hand(config(one, run_dir="hand"))
    assert [row["score/mean"] for row in rows] == pytest.approx(means, abs=1e-7)
    found = runs.read_state(one / "run", LENGTH)
    learned = [found[key] for key in found if key.startswith("params.policy/")]
    expected = jax.tree.leaves(state.params["policy"])
    assert sorted(x.tobytes() for x in learned) == sorted(x.tobytes() for x in expected)
    # the ratio starts at 1 only where the policy that learns is the one that sampled
    ratios = [row["policy/kl_old"] > 1e-4 for row in rows]
    assert ratios == [bool(stale) for stale in STALENESS]


def test_a_run_that_goes_on_from_a_checkpoint_is_the_run_without_a_break(one):
    for name, lengths in (("whole", [LENGTH]), ("parts", [EVERY, LENGTH])):
        for length in lengths:
            assert trainer.run(config(one, run_dir=name, iterations=length)) == "done"
    whole, parts = (runs.read_state(one / name, LENGTH) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all((whole[key] == parts[key]).all() for key in whole)


def test_the_next_rollout_is_dispatched_before_the_host_scores(monkeypatch):
    said: list[str] = []
    programs: Any = {
        "read": SimpleNamespace(run=lambda state, batch: said.append("read") or "answers"),
        "learn": SimpleNamespace(run=lambda state, batch: said.append("learn") or (state, {})),
    }
    ahead: Any = SimpleNamespace(
        take=lambda state, batch: said.append("take") or ("responses", {"rollout/staleness": 1.0}),
        sample=lambda state: said.append("sample ahead"),
    )
    score = lambda ready, sequences, records: said.append("score") or scoring.Scored("scored", {})  # type: ignore[arg-type]
    monkeypatch.setattr(scoring, "score", score)
    ready: Any = SimpleNamespace(cfg=SimpleNamespace(converses=False))
    iteration = scoring.joined(ready, programs, ahead=ahead)
    _, metrics, _ = iteration(None, Batch(), [], lambda: said.append("log"))  # type: ignore[arg-type]
    assert said == ["take", "read", "sample ahead", "log", "score", "learn"]
    assert metrics == {"rollout/staleness": 1.0}


def test_a_batch_that_is_peeked_at_is_not_taken(one):
    feed = Feed(build(resolve_config(config(one))))
    feed.next()
    state, epoch = feed.get_state(), feed.epoch()
    peeked = feed.peek()
    assert feed.peek() is peeked and (feed.get_state(), feed.epoch()) == (state, epoch)
    taken, records = feed.next()
    assert taken is peeked and len(records) == 4 and feed.epoch() == 2 * epoch
    feed.peek()
    feed.set_state(state)
    again, _ = feed.next()
    np.testing.assert_array_equal(again.prompts.tokens, taken.prompts.tokens)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"rewards": {"sample_ahead": True}, "models": {"reward": {"architecture": {}}}}, "no reward function runs"),
        ({"batch": {"max_rollouts": 2, "samples_per_prompt": 2}}, "the scores decide whether"),
        ({"checkpoint": {"every": 1}}, "checkpoint.every is 1; nearest: false"),
        ({"algorithm": {"name": "grpo", "old_logprobs": "recompute"}}, "expected algorithm.old_logprobs: sampler"),
    ],
    ids=["model", "rollouts", "every", "recompute"],
)
def test_what_cannot_be_sampled_ahead_is_one_line(tmp_path, more, line):
    cfg = config(tmp_path, **more)
    with pytest.raises(ConfigError, match=line) as error:
        check(cfg, 1)
    assert sum("rewards.sample_ahead: true: " in text for text in str(error.value).splitlines()) == 1
