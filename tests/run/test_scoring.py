"""Scores of the host: which response and record the function is given, and what the second program makes of them."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import sharding
from jaxrlhf import step as steps
from jaxrlhf import train as trainer
from jaxrlhf.algorithms.grpo import GRPOConfig
from jaxrlhf.algorithms.ppo import PPOConfig
from jaxrlhf.cli import app
from jaxrlhf.cli.exits import raised_here
from jaxrlhf.config.load import dump, parse
from jaxrlhf.config.record import BatchConfig, Config
from jaxrlhf.data.batches import Share
from jaxrlhf.errors import ConfigError
from jaxrlhf.evaluate.report import evaluate_run
from jaxrlhf.hosts import call_timeout
from jaxrlhf.rewards.functions import RewardFunction, RewardsConfig
from jaxrlhf.rewards.graders import GraderError, Graders
from jaxrlhf.run import build, saved_run, scoring
from jaxrlhf.run.programs import compile_programs
from jaxrlhf.run.scoring import joined, score
from jaxrlhf.run.transfer import fetch, put
from jaxrlhf.sharding import MeshConfig, current, for_programs, make_mesh
from jaxrlhf.types import Ask, Batch, Sequences, Trees
from tests.support import runs, tiny
from tests.support.fake_judge import FakeJudge, texts_of

MESHES = [(1, 1, 1), (2, 2, 2), (8, 1, 1)]  # data, fsdp, tensor
ONE_DEVICE = MeshConfig(1, 1, 1)


def mesh_of(shape: tuple[int, ...]):
    return make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])


def ready_for(mesh, function: Callable, recipe: Any = None, samples_per_prompt: int = 2, overlap=None) -> Any:
    """What scoring reads of a Run, with a tokenizer whose words are the token ids."""
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(map(str, ids)))
    sampler = SimpleNamespace(samples_per_prompt=samples_per_prompt, max_new_tokens=6)
    graders = Graders((RewardFunction("my:f", function),))
    algorithm, own = (recipe.algorithm, recipe.cfg) if recipe else (None, None)
    rewards = RewardsConfig("my:f", overlap=overlap)
    what = {"models": {}, "algorithm": own, "acts": False, "converses": False}
    cfg = SimpleNamespace(rewards=rewards, batch=BatchConfig(), **what)
    what = {"cfg": cfg, "recipe": recipe, "algorithm": algorithm, "heads": {}, "mesh": mesh}
    return SimpleNamespace(**what, tokenizer=tokenizer, sampler=sampler, graders=graders)


# ---- two programs are the one ---------------------------------------------------------------------------------------


# under pmap the one program to compare with is split by XLA, the two are not
@pytest.mark.parametrize(
    ("name", "mesh", "atol", "overlap"),
    [
        # by day: test_integer_scores_of_the_host_meet_fractions_of_nats
        pytest.param("grpo", ONE_DEVICE, 1e-6, True, id="grpo-one-overlap", marks=pytest.mark.nightly),
        pytest.param("ppo", ONE_DEVICE, 1e-6, True, id="one-overlap", marks=pytest.mark.nightly),
        pytest.param("ppo", MeshConfig(2, 2, 2), 1e-6, True, id="mesh-overlap", marks=pytest.mark.nightly),
        pytest.param("ppo", MeshConfig(2, 2, 2), 1e-6, None, id="mesh-in turn", marks=pytest.mark.nightly),
        pytest.param("ppo", MeshConfig(style="pmap"), 1e-5, True, id="pmap-overlap", marks=pytest.mark.nightly),
        pytest.param("ppo", MeshConfig(style="pmap"), 1e-5, None, id="pmap-in turn", marks=pytest.mark.nightly),
    ],
)
def test_a_function_that_is_the_reward_model_teaches_what_it_teaches(name, mesh, atol, overlap):
    """It reads text and records, makes tokens of them again, and asks the reward model of the one program."""
    cfgs = {"grpo": GRPOConfig(), "ppo": PPOConfig(num_epochs=2, num_minibatches=2, kl_coef=0.1)}
    mesh = make_mesh(mesh, jax.devices()[: 1 if mesh == ONE_DEVICE else 8])
    with current(mesh):
        run = tiny.build(name, cfgs[name], batch=Batch(prompts=tiny.prompts()), samples_per_prompt=2)
        run = run._replace(state=for_programs(run.state, mesh), batch=put(mesh, run.batch))
        one = tiny.program(steps.make_iteration(run.recipe))
        expected, metrics, sequences = one(run.state, run.batch)
        ids, valid = np.asarray(run.batch.prompts.tokens), np.asarray(run.batch.prompts.valid)
        records = [{"ids": row[real].tolist()} for row, real in zip(ids, valid)]
        read, ask = run.recipe.nets.read, Ask("reward", "scores")
        scores = tiny.program(lambda slow, rows: read(Trees({}, slow), rows, ask)[0])
        reward_model = {"reward": run.state.slow["reward"]}

        def function(responses: list[str], records: list[dict]) -> list[float]:
            return scores(reward_model, written_again(responses, records)).tolist()

        without = run.state.replace(slow={"reference": run.state.slow["reference"]})
        ready = ready_for(mesh, function, run.recipe, overlap=overlap)
        programs = compile_programs(ready, without, run.batch)
        assert [*programs] == ["rollout", *["read"] * bool(overlap), "learn"]
        halves = joined(ready, programs)
        found, numbers, scored = halves(without, run.batch, records)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(without.params)), "nothing was donated"
    np.testing.assert_array_equal(scored.tokens, sequences.tokens)
    np.testing.assert_allclose(scored.scores, sequences.scores, rtol=0, atol=atol)
    assert np.std(scored.scores) > 0.1
    assert numbers.keys() == metrics.keys() | {"time/rewards", "score/unscorable"}
    for name, value in metrics.items():
        np.testing.assert_allclose(numbers[name], value, rtol=1e-5, atol=atol, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), found.params, expected.params)
    assert not tiny.equal_trees(found.params["policy"], found.slow["reference"])


def written_again(responses: list[str], records: list[dict], prompt: int = 4, room: int = 6) -> Sequences:
    """The rows that the texts were decoded from."""
    tokens, valid = np.zeros((2, len(responses), prompt + room), np.int32)
    for row, (text, record) in enumerate(zip(responses, records)):
        ids, words = record["ids"], [int(word) for word in text.split()]
        tokens[row, prompt - len(ids) : prompt + len(words)] = ids + words
        valid[row, prompt - len(ids) : prompt + len(words)] = 1
    mask = valid.astype(bool) & (np.arange(prompt + room) >= prompt)
    return Sequences(*tiny.put((tokens, valid.astype(bool), mask)), response_start=prompt)


@functools.cache
def half_scored(mesh) -> tuple:
    """(parameters, metrics, scores) after an update of GRPO from responses of which every third length has no score."""

    def function(responses, records):
        return [None if len(text) % 3 == 0 else len(text) / 9 for text in responses]

    with current(mesh):
        run = tiny.build("grpo", GRPOConfig(), batch=Batch(prompts=tiny.prompts()), samples_per_prompt=2)
        state, batch = for_programs(run.state, mesh), put(mesh, run.batch)
        ready = ready_for(mesh, function, run.recipe)
        state, metrics, scored = joined(ready, compile_programs(ready, state, batch))(state, batch, [{}] * 16)
        return jax.device_get((state.params, metrics, scored.scores))


@pytest.mark.nightly  # by day: responses without a score on one device, in test_several_graders
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(2, 2, 2), id="mesh", marks=pytest.mark.nightly),
        pytest.param(MeshConfig(style="pmap"), id="pmap"),
    ],
)
def test_what_no_grader_scores_is_left_out_on_any_devices(mesh):
    """16 prompts x 2 responses of which some have no score: the same update as on one device, and none of it NaN."""
    (params, metrics, scores), (expected, numbers, _) = half_scored(make_mesh(mesh)), half_scored(mesh_of((1, 1, 1)))
    assert metrics["score/unscorable"] == np.isnan(scores).sum() == 32 - metrics["response/count"]
    assert 4 < metrics["score/unscorable"] < 28 and metrics["policy/grad_norm"] > 0.01
    for name in numbers.keys() - {"time/rewards"}:
        np.testing.assert_allclose(metrics[name], numbers[name], rtol=1e-4, atol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), params, expected)


# ---- which rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", MESHES)
def test_fetch_is_the_inverse_of_put(shape):
    mesh, rows = mesh_of(shape), (np.arange(48).reshape(16, 3), np.arange(16.0, dtype=np.float32))
    with jax.set_mesh(mesh):
        found = fetch(put(mesh, rows))
    for a, b in zip(found, rows, strict=True):
        assert a.dtype == put(mesh, b).dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", MESHES)
def test_rows_that_fill_up_a_batch_are_never_shown(shape):
    """5 prompts of 8 are real, each with 2 responses: 10 rows of 16; the prompt is no part of the text."""
    tokens = np.arange(16 * 4, dtype=np.int32).reshape(16, 4)
    mask = np.array([[False, True, True, False]] * 15 + [[False] * 4])
    mesh, seen = mesh_of(shape), []

    def function(responses, records, token_ids, ended, groups, max_new_tokens):
        seen.append((responses, records))
        assert [" ".join(map(str, ids)) for ids in token_ids] == responses
        assert ended == [row % 3 > 0 for row in range(10)] and groups == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert max_new_tokens == 6
        return [float(text.split()[0]) + 1000 * record["number"] for text, record in zip(responses, records)]

    with jax.set_mesh(mesh):
        rows = Sequences(*put(mesh, (tokens, np.ones_like(mask), mask)), ended=put(mesh, np.arange(16) % 3 > 0))  # type: ignore[arg-type]
        found, seconds = score(ready_for(mesh, function), rows, [{"number": number} for number in range(5)])
    ((responses, records),) = seen
    assert responses == [f"{4 * row + 1} {4 * row + 2}" for row in range(10)]
    assert [record["number"] for record in records] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    expected = [4 * row + 1 + 1000 * (row // 2) for row in range(10)] + [0] * 6
    np.testing.assert_array_equal(found.scores, np.array(expected, np.float32))
    assert found.scores.dtype == jnp.float32 and found.scores.sharding == rows.tokens[:, 0].sharding
    assert 0 <= seconds["time/rewards"] < 60


def test_a_process_that_scores_its_share_has_whole_groups(monkeypatch):
    """Of four blocks of four rows the second and the last: prompts 2, 3, 6 and 7, with both of their responses."""
    monkeypatch.setattr(scoring, "scored_here", lambda mesh, rows: np.repeat([False, True, False, True], rows // 4))
    seen = []

    def function(responses, records, groups):
        seen.append(([record["number"] for record in records], groups))
        return [float(number) for number in groups]

    mesh = mesh_of((4, 1, 1))
    with jax.set_mesh(mesh):
        arrays = put(mesh, (np.zeros((16, 4), np.int32), *np.ones((2, 16, 4), bool)))
        rows = Sequences(*arrays, ended=put(mesh, np.ones(16, bool)))  # type: ignore[arg-type]
        found, _ = score(ready_for(mesh, function), rows, [{"number": number} for number in range(8)])
    assert seen == [([2, 2, 3, 3, 6, 6, 7, 7], [2, 2, 3, 3, 6, 6, 7, 7])]
    np.testing.assert_array_equal(found.scores, [0, 0, 0, 0, 2, 2, 3, 3, 0, 0, 0, 0, 6, 6, 7, 7])


def test_a_batch_without_a_real_row_is_not_asked_about():
    mesh = mesh_of((1, 1, 1))
    with jax.set_mesh(mesh):
        arrays = put(mesh, (np.zeros((2, 3), np.int32), *np.zeros((2, 2, 3), bool)))
        rows = Sequences(*arrays, ended=put(mesh, np.ones(2, bool)))  # type: ignore[arg-type]
        found, _ = score(ready_for(mesh, lambda *_: pytest.fail("it is asked")), rows, [])
    np.testing.assert_array_equal(found.scores, [0, 0])


def test_a_function_may_change_its_records():
    """They are its own: the next evaluation finds them as they were, and so does the other sample of the prompt."""
    mesh, records = mesh_of((1, 1, 1)), [{"answer": "4"}]

    def function(responses, records):
        return [float(record.pop("answer")) for record in records]

    with jax.set_mesh(mesh):
        arrays = put(mesh, (np.zeros((2, 3), np.int32), *np.ones((2, 2, 3), bool)))
        rows = Sequences(*arrays, ended=put(mesh, np.ones(2, bool)))  # type: ignore[arg-type]
        found, _ = score(ready_for(mesh, function), rows, records)
    np.testing.assert_array_equal(found.scores, [4, 4])
    assert records == [{"answer": "4"}]


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Demonstrations to train a tokenizer on, and prompts with an answer each."""
    folder = tmp_path_factory.mktemp("rewards")
    runs.write_text(folder / "text")
    for name in ("prompts", "eval_prompts"):
        rows = [json.loads(line) for line in (folder / "text" / f"{name}.jsonl").read_text().splitlines()]
        rows = [row | {"answer": len(row["prompt"])} for row in rows]
        (folder / "text" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "text"


def config(text: Path, run_dir: Path, **more: Any) -> Config:
    """grpo from random weights, 8 prompts x 2 responses against my_rewards:f; held out: 12 prompts answered once."""
    file = lambda name: {"path": str(text / f"{name}.jsonl")}
    shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_positions": 32}
    tree: dict[str, Any] = {
        "run_dir": str(run_dir),
        "iterations": 4,
        "algorithm": {"name": "grpo", "num_minibatches": 2},
        "models": {"policy": {"architecture": shape}},
        "tokenizer": {"train_vocab_size": 300},
        "optimizer": {"default": {"learning_rate": 1e-2}},
        "data": {name: file(name) for name in ("demonstrations", "prompts", "eval_prompts")}
        | {"prompt_buckets": [16], "cache_dir": str(text / "cache")},
        "batch": {"prompts_per_step": 8, "samples_per_prompt": 2},
        "generate": {"max_new_tokens": 6},
        "rewards": {"function": "my_rewards:f"},
        "checkpoint": {"every": 10},
        "eval": {"size": 12},
        "log": {"samples": 16, "samples_every": 1, "trackers": []},
    }
    return parse(tree | more, "test")


@contextlib.contextmanager
def rewarded_by(function: Callable) -> Iterator[None]:
    """my_rewards:f is the function; runs take the first device."""
    module = ModuleType("my_rewards")
    module.f = function  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "my_rewards", module)
        patch.setattr(build, "make_mesh", lambda cfg, *_: sharding.make_mesh(cfg, jax.devices()[:1]))
        yield


def vowels(responses: list[str], records: list[dict]) -> list[float]:
    """The share of the response that is vowels; records only have to be those of the responses."""
    assert all(record["answer"] == len(record["prompt"]) for record in records)
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in responses]


@pytest.fixture(scope="module")
def learned(text, tmp_path_factory) -> Path:
    """A run of 80 iterations for vowels."""
    run = tmp_path_factory.mktemp("learned") / "grpo"
    calls = []

    def counted(responses, records):
        calls.append(len(responses))
        return vowels(responses, records)

    with rewarded_by(counted):
        evaluated = {"every": 80, "size": 12, "samples": 12}
        assert trainer.run(config(text, run, iterations=80, eval=evaluated)) == "done"
        # held out: 12 prompts, answered once by the reference and once by the policy, and at the end by the policy
        # once before anything is compiled, with two sample responses, for training and held-out data
        assert calls == [2, 2, 12, 12, *[16] * 80, 12]  # in between, 80 iterations of 8 prompts x 2 responses
    return run


@pytest.mark.nightly  # by day: the short twin of the benchmark reverse
def test_a_policy_learns_what_the_function_pays_for(learned):
    rows = runs.rows(learned)
    before, after = (row["eval/score/mean"] for row in rows if "eval/score/mean" in row)
    assert after > before + 0.2
    scores = [row["score/mean"] for row in rows if "score/mean" in row]
    assert len(scores) == 80 and np.mean(scores[-5:]) > np.mean(scores[:5]) + 0.2


@pytest.mark.nightly  # by day: the short twin of the benchmark reverse
def test_samples_carry_their_own_scores(learned):
    """In training and held out: the function on the text that is shown gives the score that is shown."""
    rows = runs.rows(learned, "samples")
    assert {row["split"] for row in rows} == {"train", "eval"} and len(rows) > 400
    for row in rows:
        assert row["score"] == pytest.approx(vowels([row["response"]], [])[0], abs=1e-4)


@pytest.mark.nightly  # by day: the short twin of the benchmark reverse
def test_the_time_in_the_function_is_a_metric(learned):
    lines = [json.loads(line) for line in (learned / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in lines if "time/iteration" in row]
    assert len(updates) == 80
    assert all(0 < row["time/rewards"] < row["time/iteration"] for row in updates)


def test_an_iteration_before_an_evaluation_takes_its_own_time(text, tmp_path):
    """Its rollout and its scores, and not those of the iteration after it."""
    slept = 0.4

    def slow(responses, records):
        time.sleep(slept if len(responses) == 16 else 0)
        return vowels(responses, records)

    with rewarded_by(slow):
        cfg = config(text, tmp_path / "grpo", eval={"every": 2, "size": 12})
        assert trainer.run(cfg) == "done"
    lines = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in lines if "time/iteration" in row]
    assert len(updates) == 4
    for row in updates:
        assert row["time/iteration"] >= row["time/rewards"] >= slept


@pytest.mark.nightly  # by day: the short twin of the benchmark reverse
def test_a_finished_run_is_evaluated_with_its_function(learned):
    with rewarded_by(vowels):
        report = evaluate_run(str(learned))
    last = [row for row in runs.rows(learned) if "eval/score/mean" in row][-1]
    assert report["after"]["score/mean"] == pytest.approx(last["eval/score/mean"], abs=1e-6)
    first = next(row for row in runs.rows(learned) if "eval/score/mean" in row)
    assert report["before"]["score/mean"] == pytest.approx(first["eval/score/mean"], abs=1e-6)
    assert "reward_model" not in report


def odd(responses: list[str], records: list[dict]) -> list[float | None]:
    """No score for a response of an even length."""
    return [float(len(text)) if len(text) % 2 else None for text in responses]


def test_several_graders(text, tmp_path):
    """The weighted sum is the score; each has a metric, and a number beside every sample, in training and held out."""
    graders = {
        "vowels": {"function": "my_rewards:f", "weight": 2.0},
        "odd": {"function": "my_rewards:odd", "weight": 0.5},
        "length": {"function": "trl:my_rewards:lengths", "weight": 0.0},
    }
    with rewarded_by(vowels):
        module: Any = sys.modules["my_rewards"]
        module.odd = odd
        module.lengths = lambda completions, answer, **kwargs: [len(completion) for completion in completions]
        more = {
            "rewards": {"functions": graders},
            "iterations": 2,
            "checkpoint": {"every": 2, "best": "eval/score/odd"},
        }
        assert (
            trainer.run(config(text, tmp_path / "grpo", **more, eval={"size": 12, "every": 2, "samples": 12})) == "done"
        )
    samples, rows = runs.rows(tmp_path / "grpo", "samples"), runs.rows(tmp_path / "grpo")
    assert {row["split"] for row in samples} == {"train", "eval"}
    for row in samples:
        response = row["response"]
        assert row["score/vowels"] == pytest.approx(vowels([response], [])[0], abs=1e-4)
        assert (row["score/odd"], row["score/length"]) == (odd([response], [])[0], len(response))
        lost = row["score/odd"] is None
        expected = None if lost else pytest.approx(2 * row["score/vowels"] + 0.5 * row["score/odd"], abs=1e-3)
        assert row["score"] == expected
    assert any(row["score"] is None for row in samples) and any(row["score"] is not None for row in samples)
    for split, prefix in (("train", ""), ("eval", "eval/")):
        numbers = [row for row in rows if f"{prefix}score/mean" in row][-1]
        mine = [row for row in samples if row["split"] == split and row["step"] == numbers["step"]]
        assert len(mine) == (16 if split == "train" else 12)
        for name in ("vowels", "odd", "length"):
            known = [row[f"score/{name}"] for row in mine if row["score"] is not None]
            assert numbers[f"{prefix}score/{name}"] == pytest.approx(np.mean(known), abs=1e-3)
        known = [row["score"] for row in mine if row["score"] is not None]
        assert numbers[f"{prefix}score/mean"] == pytest.approx(np.mean(known), abs=1e-3)
        assert numbers[f"{prefix}score/unscorable"] == len(mine) - len(known)
        assert numbers[f"{prefix}score/unscorable/odd"] == len(mine) - len(known)
        assert numbers[f"{prefix}score/unscorable/vowels"] == 0


def test_built_in_graders_normalised_apart_one_of_which_is_late(text, tmp_path, caplog):
    """They are given token ids, ends and groups; the late one has no score, and the run goes on without it."""
    calls = []

    def late(responses, records):
        calls.append(len(responses))
        time.sleep(30 if len(calls) == 3 else 0)  # the second iteration; the first call is of the sample responses
        return vowels(responses, records)

    functions = {
        "vowels": {"function": "my_rewards:f", "timeout": 0.3, "required": False},
        "short": {"function": "soft_overlong", "arguments": {"buffer": 4}},
        "varied": {"function": "unlike_others", "weight": 0.5, "arguments": {"n": 1, "unit": "tokens"}},
        "ended": {"function": "ended", "weight": 0.0},
    }
    rewards = {"functions": functions, "normalize": "group_then_sum", "on_timeout": "unscorable", "overlap": True}
    more: dict[str, Any] = {"rewards": rewards, "iterations": 3}
    with rewarded_by(late):
        cfg = config(text, tmp_path / "grpo", **more)
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, eval_prompts=None))
        assert trainer.run(cfg) == "done"
    assert calls == [2, 16, 16, 16]
    rows = [row for row in runs.rows(tmp_path / "grpo") if "score/mean" in row]
    assert [row["score/unscorable/vowels"] for row in rows] == [0, 16, 0]
    assert [row["score/unscorable"] for row in rows] == [0] * 3
    assert all(np.isfinite(row["policy/grad_norm"]) and row["policy/grad_norm"] > 0 for row in rows)
    for row in rows:
        assert -1 <= row["score/short"] <= 0 <= row["score/varied"] <= 1
        assert row["score/ended"] == pytest.approx(row["response/ended"], abs=1e-6)
    assert "no answer within 0.3 s to 16 responses" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()]
    times = [row for row in lines if "time/rewards" in row]
    assert all({f"time/rewards/{name}" for name in functions} <= row.keys() for row in times)
    assert [row["time/rewards/vowels"] >= 0.3 and row["time/rewards"] >= 0.3 for row in times] == [False, True, False]
    for row in runs.rows(tmp_path / "grpo", "samples"):
        assert row["score/short"] in (0, -0.25, -0.5, -0.75, -1)  # of 2, 3, ... tokens


@pytest.mark.nightly  # by day: these graders by themselves in tests/rewards, others in training above
def test_a_judge_and_a_grader_on_servers_train_and_are_missed_at_the_start(text, tmp_path):
    """The judge prefers the response with more vowels; one of its requests fails, which leaves that pair out."""

    def says(body: dict[str, Any]) -> Any:
        if "responses" in body:  # the other grader's
            return {"scores": [float(len(text)) for text in body["responses"]]}
        texts = texts_of(body)
        first, second = vowels([texts["first"], texts["second"]], [])
        return f"Verdict: {'first' if first > second else 'second' if second > first else 'tie'}"

    with FakeJudge(says) as judge, rewarded_by(vowels):
        limits = {"retries": 0, "concurrency": 1, "timeout": 5.0}
        functions = {
            "judge": {"function": "llm_pairwise", "arguments": {"model": "m", "url": judge.url, **limits}},
            "size": {"function": "http", "weight": 0.0, "arguments": {"url": f"{judge.url}/grade", **limits}},
        }
        cfg = config(text, tmp_path / "grpo", rewards={"functions": functions}, iterations=2)
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, eval_prompts=None))
        answer, asked = judge.answer, []

        def answer_all_but_one(handler: Any, body: dict[str, Any], fault: Any) -> None:
            asked.append("responses" in body)
            answer(handler, body, 500 if len(asked) - sum(asked) == 5 and not asked[-1] else fault)

        judge.answer = answer_all_but_one  # type: ignore[method-assign]
        assert trainer.run(cfg) == "done"
        rows = [row for row in runs.rows(tmp_path / "grpo") if "score/mean" in row]
        assert [row["score/unscorable/judge"] for row in rows] == [2, 0] and rows[0]["score/unscorable/size"] == 0
        samples = runs.rows(tmp_path / "grpo", "samples")
        assert len(samples) == 32 and {row["score/judge"] for row in samples} <= {None, 0.0, 0.5, 1.0}
        assert all(row["score/size"] == len(row["response"]) for row in samples)
        for one, other in zip(samples[::2], samples[1::2]):
            if one["score/judge"] is not None:
                expected = np.sign(vowels([one["response"]], [])[0] - vowels([other["response"]], [])[0]) / 2 + 0.5
                assert (one["score/judge"], other["score/judge"]) == (expected, 1 - expected)
        judge.always = 503
        with pytest.raises(ValueError, match=r"rewards\.functions\.judge\.function: llm_pairwise: http.* was answered"):
            trainer.run(dataclasses.replace(cfg, iterations=4))
    assert runs.steps_kept(tmp_path / "grpo")[-1] == 2


def test_a_function_that_fails_on_held_out_records_is_refused_before_anything_is_compiled(text, tmp_path, monkeypatch):
    """Without an evaluation at the start it would fail after the last iteration."""
    monkeypatch.setattr(trainer, "compile_programs", lambda *_: pytest.fail("it is compiled"))
    rows = [json.loads(line) for line in (text / "eval_prompts.jsonl").read_text().splitlines()]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    cfg = config(text, tmp_path / "grpo")
    assert cfg.data.eval_prompts is not None
    held_out = dataclasses.replace(cfg.data.eval_prompts, path=str(tmp_path / "held_out.jsonl"))
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, eval_prompts=held_out))
    line = r"^rewards\.function: my_rewards:f: raised KeyError: 'answer' .* a record of data\.eval_prompts$"
    with rewarded_by(vowels), pytest.raises(ValueError, match=line):
        trainer.run(cfg)


def test_records_are_those_of_the_responses(text, tmp_path):
    """A score that only the record knows lies beside the prompt that it belongs to, in training and held out."""
    with rewarded_by(lambda responses, records: [record["answer"] for record in records]):
        assert trainer.run(config(text, tmp_path / "grpo", iterations=1)) == "done"
    rows = runs.rows(tmp_path / "grpo", "samples")
    assert {row["split"] for row in rows} == {"train", "eval"} and len({row["score"] for row in rows}) > 4
    assert all(row["score"] == len(row["prompt"]) for row in rows)


def test_errors_of_the_function_s_own_are_shown_where_they_are_and_answers_in_one_line():
    def broken(responses, records):
        raise ValueError("not mine to explain")

    for function, one_line in ((broken, False), (lambda *_: ["1"], True)):
        with pytest.raises(ValueError) as caught:
            RewardFunction("my:f", function)([""], [{}])
        assert raised_here(caught.value) == one_line


def test_a_function_that_is_not_there_is_refused_before_anything_is_built(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "build", lambda *_: pytest.fail("a model is built"))
    cfg = config(text, tmp_path / "grpo", rewards={"function": "nowhere_at_all:f"})
    (tmp_path / "ppo.yaml").write_text(dump(cfg))
    monkeypatch.setattr(sys, "argv", ["jaxrlhf", "train", str(tmp_path / "ppo.yaml")])
    with pytest.raises(SystemExit, match="2"):
        app.main()
    out, err = capsys.readouterr()
    line = f"{tmp_path}/ppo.yaml: rewards.function: nowhere_at_all:f: no module nowhere_at_all; "
    assert out == "" and err.startswith(line) and err.count("\n") == 1
    assert not (tmp_path / "grpo").exists()


@pytest.mark.nightly  # by day: the short twin of the benchmark reverse
def test_a_run_whose_function_is_gone_is_refused_in_one_line(learned):
    with pytest.raises(ConfigError, match=r"^rewards\.function: my_rewards:f: no module my_rewards; .*$"):
        evaluate_run(str(learned))


@pytest.mark.nightly  # by day: the short twin of the benchmark reverse
def test_roles_of_a_run_with_a_function(learned):
    _, extra = saved_run.read_extra(str(learned))
    assert extra["models"].keys() == {"policy", "reference"}


@pytest.mark.parametrize(
    ("number", "raises"),
    [
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.nightly),
        pytest.param(signal.SIGINT, False, marks=pytest.mark.nightly),
        (signal.SIGINT, True),
    ],
)
def test_a_signal_in_the_function_and_resuming_change_no_bit(text, tmp_path, capsys, number, raises):
    """Ctrl-C ends processes that the function has started, too, so that it raises: its iteration is left out."""
    calls = []

    def stopping(responses, records):
        calls.append(len(responses))
        if len(calls) == 4 + raises:  # after two on sample responses
            os.kill(os.getpid(), number)
            if raises:
                raise BrokenPipeError("a worker is gone")
        return vowels(responses, records)

    whole, parts = (config(text, tmp_path / name) for name in ("whole", "parts"))
    with rewarded_by(vowels):
        assert trainer.run(whole) == "done"
    with rewarded_by(stopping):
        assert trainer.run(parts) == ("interrupted" if number == signal.SIGINT else "preempted")
        assert runs.steps_kept(tmp_path / "parts") == [2]  # the iteration that it came in was finished
        said = "step 3 was left out: rewards.function: my_rewards:f: raised BrokenPipeError: a worker is gone (/"
        assert (said in capsys.readouterr().out) == raises
        assert trainer.run(parts) == "done"
    expected, found = (runs.read_state(tmp_path / name, 4) for name in ("whole", "parts"))
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].tobytes() == leaf.tobytes(), path
    for name in ("metrics", "samples"):
        assert runs.rows(tmp_path / "parts", name) == runs.rows(tmp_path / "whole", name)


@pytest.mark.parametrize("mistake", ["raises", pytest.param("answers", marks=pytest.mark.nightly)])
def test_a_function_that_breaks_loses_no_iteration_before(text, tmp_path, capsys, mistake):
    """What it raises is told in one line, with the place in its file, and with it mended the run goes on."""
    calls = []

    def breaking(responses, records):
        calls.append(len(responses))
        if len(calls) == 5:  # the first two were on sample responses
            return {"raises": lambda: [record["solution"] for record in records], "answers": lambda: [1.0]}[mistake]()
        return vowels(responses, records)

    cfg = config(text, tmp_path / "grpo", checkpoint={"every": 10})
    named, line = "rewards.function: my_rewards:f", breaking.__code__.co_firstlineno + 3
    expected = {
        "raises": pytest.raises(GraderError, match=rf"^{named}: raised KeyError: 'solution' \({__file__}:{line}\)$"),
        "answers": pytest.raises(ValueError, match=rf"^{named}: returned 1 scores: expected 16"),
    }
    with rewarded_by(breaking), expected[mistake] as caught:
        trainer.run(cfg)
    assert raised_here(caught.value)
    went_on = "stopped at step 2, which is saved; once the error is mended, the same command resumes\n"
    assert went_on in capsys.readouterr().out
    assert runs.steps_kept(tmp_path / "grpo") == [2]
    with rewarded_by(vowels):
        assert trainer.run(dataclasses.replace(cfg, iterations=3)) == "done"
    assert runs.steps_kept(tmp_path / "grpo") == [2, 3]


@pytest.mark.parametrize(
    "signalled", [pytest.param(False, id="timeout", marks=pytest.mark.nightly), pytest.param(True, id="SIGTERM")]
)
def test_a_function_that_hangs_loses_no_iteration_before(text, tmp_path, capsys, monkeypatch, signalled):
    """After rewards.timeout the run ends as if the function had raised; after a signal it has a few seconds."""
    monkeypatch.setattr(call_timeout, "PATIENCE", 0.5)
    calls = []

    def hanging(responses, records):
        calls.append(len(responses))
        if len(calls) == 5:  # the first two were on sample responses
            if signalled:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return vowels(responses, records)

    rewards = {"function": "my_rewards:f"} | ({} if signalled else {"timeout": 0.5})
    cfg = config(text, tmp_path / "ppo", checkpoint={"every": 10}, rewards=rewards)
    why = r"no answer within 0\.5 s%s to 16 responses, the first of them to the record \{\"prompt\": "
    named = r"rewards\.function: my_rewards:f: "
    with rewarded_by(hanging):
        if signalled:
            assert trainer.run(cfg) == "preempted"
            said = re.escape("step 3 was left out: ") + named + why % " after SIGTERM"
            assert re.search(said, capsys.readouterr().out)
        else:
            with pytest.raises(GraderError, match="^" + named + why % "") as caught:
                trainer.run(cfg)
            assert raised_here(caught.value)
    assert runs.steps_kept(tmp_path / "ppo") == [2]


# ---- several processes ----------------------------------------------------------------------------------------------


def test_rows_that_two_processes_hold_are_scored_once(monkeypatch):
    """Blocks 0 and 1 of 3 are on both processes, block 2 is on the second alone: its rows get the scores of the one
    process that scores them, everywhere."""
    held = [[0, 1], [0, 1], [1]]
    monkeypatch.setattr(scoring, "holders", lambda mesh: held)
    monkeypatch.setattr(scoring, "share_of", lambda mesh: Share(tuple(blocks), 3))
    answers = {0: np.arange(1.0, 5.0), 1: np.arange(10.0, 16.0)}  # a function that answers each process otherwise
    sent: dict[int, np.ndarray] = {}
    found: dict[int, np.ndarray] = {}
    for gathering in (False, True):
        for process, scores in answers.items():
            blocks = [block for block, processes in enumerate(held) if process in processes]
            monkeypatch.setattr(scoring.jax, "process_index", lambda process=process: process)
            note = lambda x, process=process: sent.setdefault(process, x)[None]
            gather = (lambda x: np.stack([sent[0], sent[1]])) if gathering else note
            monkeypatch.setattr(scoring.multihost_utils, "process_allgather", gather)
            mine = scoring.scored_here(None, 2 * len(blocks))  # type: ignore[arg-type]
            found[process] = scoring.exchange(None, np.where(mine, scores, 0).astype(np.float32))  # type: ignore[arg-type]
    assert found[0].tolist() == [1, 2, 3, 4]
    assert found[1].tolist() == [1, 2, 3, 4, 14, 15]
