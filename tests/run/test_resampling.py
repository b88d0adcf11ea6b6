"""Dynamic sampling: which prompts an iteration learns from, beside a loop over the data; resumption; a mesh."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import step as steps
from jaxrlhf import train as trainer
from jaxrlhf.algorithms.grpo import GRPOConfig
from jaxrlhf.config.check import check
from jaxrlhf.config.load import parse
from jaxrlhf.config.record import BatchConfig, Config
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.errors import ConfigError
from jaxrlhf.ops.selection import fill_groups, take_groups
from jaxrlhf.rewards.functions import RewardsConfig
from jaxrlhf.run import kept_programs
from jaxrlhf.run.build import build
from jaxrlhf.run.feed import Feed
from jaxrlhf.run.initial_state import initial_state
from jaxrlhf.run.programs import compile_programs
from jaxrlhf.run.scoring import joined
from jaxrlhf.run.transfer import put
from jaxrlhf.sharding import MeshConfig, current, for_programs, make_mesh
from jaxrlhf.types import Batch
from tests.support import runs, tiny
from tests.support.tiny import program
from tests.support.tiny import put as put_rows

GROUPS, SIZE, MOST, PROMPTS = 4, 2, 3, 40
SHAPE = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_positions": 32}


# ---- which groups fill a batch --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("filled", "differ"), [*itertools.product(range(5), ["0000", "1111", "0101", "1001", "0010"])])
def test_groups_are_filled_up_in_the_order_of_the_data(filled, differ):
    flags = np.array([flag == "1" for flag in differ])
    earlier, new = np.arange(8).reshape(4, 2).repeat(3, 0)[::3], np.arange(10, 18).reshape(4, 2)
    order, total = fill_groups(jnp.int32(filled), jnp.array(flags))
    expected = [f"old {i}" for i in range(filled)] + [f"new {i}" for i in range(4) if flags[i]]
    assert int(total) == len(expected)
    found = [f"old {i}" if i < 4 else f"new {i - 4}" for i in np.asarray(order)]
    assert found[: min(4, len(expected))] == expected[:4] and len(set(found)) == 4
    rows = take_groups(jnp.array(earlier.ravel()), jnp.array(new.ravel()), order, 2)
    both = np.concatenate([earlier, new])
    np.testing.assert_array_equal(rows, both[np.asarray(order)].ravel())


def test_groups_on_a_mesh_are_those_of_one_device():
    rng = np.random.default_rng(0)
    old, new = (rng.normal(size=(16, 3)).astype(np.float32) for _ in range(2))
    flags = rng.random(8) < 0.5

    def fill(old, new):
        order, total = fill_groups(jnp.int32(3), jnp.array(flags))
        return take_groups(old, new, order, 2), total

    expected = fill(jnp.array(old), jnp.array(new))
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        found = program(fill)(*put_rows((old, new)))
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1] == expected[1]


# ---- whole iterations -----------------------------------------------------------------------------------------------


def by_kind(responses: list[str], records: list[dict[str, Any]]) -> list[float | None]:
    """Of the kind "equal" 1 to each; "unscorable" nothing; else by the place among the responses to the prompt."""
    kinds: dict[str, Any] = {"equal": lambda place: 1.0, "unscorable": lambda place: None}
    places = [row % SIZE for row in range(len(responses))]
    return [kinds.get(record["kind"], lambda place: float(place))(place) for record, place in zip(records, places)]


def never(responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    return [2.0] * len(responses)


def write(folder: Path) -> Path:
    """Prompts of which 3 in 5 tell nothing."""
    kinds = ["equal", "differ", "unscorable", "equal", "differ"]
    rows = [{"prompt": f"the film {number:02d}", "kind": kinds[number * 7 % 5]} for number in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": row["prompt"] + " is x"}) + "\n" for row in rows))
    return folder


def config(folder: Path, run_dir: str = "run", function: str = "by_kind", **more: Any) -> Config:
    tree = {
        "run_dir": str(folder / run_dir),
        "iterations": 4,
        "algorithm": {"name": "grpo", "kl_coef": 0.0, "advantages": "mean"},
        "models": {"policy": {"architecture": SHAPE}},
        "tokenizer": {"train_vocab_size": 300},
        "rewards": {"function": f"tests.run.test_resampling:{function}"},
        "optimizer": {"default": {"learning_rate": 1e-3}},
        "data": {
            "prompts": {"path": str(folder / "prompts.jsonl")},
            "demonstrations": {"path": str(folder / "text.jsonl")},
            "prompt_buckets": [24],
            "cache_dir": str(folder / "cache"),
        },
        "batch": {"prompts_per_step": GROUPS, "samples_per_prompt": SIZE, "max_rollouts": MOST},
        "generate": {"max_new_tokens": 4},
        "checkpoint": {"every": 2, "background": False},
        "log": {"samples": 0, "trackers": []},
    }
    return parse(tree | more, "test")


def records_of(ready) -> list[list[dict[str, Any]]]:
    """The records of the data's first batches."""
    feed = Feed(ready)
    return [feed.next()[1] for _ in range(PROMPTS)]


@pytest.fixture
def one(one_device, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with kept_programs.share_programs():
        yield write(tmp_path)


def prompt_texts(ready, sequences) -> list[str]:
    """The prompt of each group that has a response, "" of the others."""
    texts = []
    for row in range(0, len(sequences.tokens), SIZE):
        mask = np.asarray(sequences.response_mask)[row : row + SIZE]
        prompt = np.asarray(sequences.valid)[row] & (np.arange(mask.shape[1]) < sequences.response_start)
        ids = np.asarray(sequences.tokens)[row][prompt]
        texts.append(ready.tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip() if mask.any() else "")
    return texts


def test_prompts_that_are_learned_from_are_those_of_a_loop_over_the_data(one):
    """Iteration by iteration: how many rollouts, which prompts, what was dropped; the iterator goes on behind them."""
    cfg = config(one)
    check(cfg, 1)
    ready = build(resolve_config(cfg))
    with current(ready.mesh):
        feed, state, batches = Feed(ready), initial_state(ready), iter(records_of(ready))
        programs = compile_programs(ready, state, next(feed.shapes()))
        assert [*programs] == ["rollout", "begin", "fill", "learn"]
        iteration = joined(ready, programs, feed.next)
        taken = 0
        for _ in range(3):
            kept, equal, rollouts, scores = [], 0, 0, []
            while rollouts < MOST and len(kept) < GROUPS:
                records = next(batches)
                kept += [record["prompt"] for record in records if record["kind"] == "differ"]
                equal += sum(record["kind"] != "differ" for record in records)
                scores += by_kind([""] * SIZE * GROUPS, [record for record in records for _ in range(SIZE)])
                rollouts += 1
            taken += rollouts
            host, records = feed.next()
            state, metrics, sequences = iteration(state, put(ready.mesh, host), records)
            assert prompt_texts(ready, sequences) == (kept[:GROUPS] + [""] * GROUPS)[:GROUPS]
            assert feed.epoch() == taken * GROUPS / PROMPTS
            known = [score for score in scores if score is not None]
            expected = {
                "rollout/count": rollouts,
                "rollout/equal_groups": equal,
                "rollout/surplus_groups": max(0, len(kept) - GROUPS),
                "rollout/missing_groups": max(0, GROUPS - len(kept)),
                "rollout/score_mean": np.mean(known),
                "score/mean": 0.5,
                "group/zero_variance": 0,
                "response/count": SIZE * min(GROUPS, len(kept)),
                "score/unscorable": 0,
            }
            for name, number in expected.items():
                np.testing.assert_allclose(float(metrics[name]), number, rtol=1e-6, err_msg=name)
            assert float(metrics["policy/grad_norm"]) > 0
        assert taken > 3, "one rollout was enough each time: nothing is tested"


def test_no_two_rollouts_of_an_iteration_share_noise(one):
    """The same prompt in each batch: its responses differ from rollout to rollout."""
    cfg = config(one)
    ready, seen = build(resolve_config(cfg)), []
    with current(ready.mesh):
        feed, state = Feed(ready), initial_state(ready)
        host, records = feed.next()
        programs = compile_programs(ready, state, next(feed.shapes()))
        rollout = programs["rollout"]

        def recorded(state, batch):
            seen.append(np.asarray(batch.prompts.sample_id))
            return rollout.run(state, batch)

        patched = programs | {"rollout": rollout._replace(run=recorded)}
        equal = [record | {"kind": "equal"} for record in records]
        joined(ready, patched, lambda: (host, equal))(state, put(ready.mesh, host), equal)
    np.testing.assert_array_equal(seen, np.arange(MOST * GROUPS).reshape(MOST, GROUPS))


def test_where_nothing_differs_the_bound_ends_it_and_nothing_is_learned(one):
    cfg = config(one, function="never", iterations=1)
    assert trainer.run(cfg) == "done"
    (row,) = [row for row in runs.rows(one / "run") if "rollout/count" in row]
    assert row["rollout/count"] == MOST and row["rollout/missing_groups"] == GROUPS
    assert row["rollout/equal_groups"] == MOST * GROUPS and row["rollout/score_mean"] == 2.0
    assert row["response/count"] == 0 and row["policy/learning_rate"] == 0
    assert row["data/epoch"] == MOST * GROUPS / PROMPTS


def test_a_run_that_resumes_is_the_run_without_a_break(one):
    """Bit for bit: weights, moments, metrics, and the place in the data, which is not that of the step."""
    for name, lengths in (("whole", [4]), ("parts", [2, 4])):
        for length in lengths:
            assert trainer.run(config(one, run_dir=name, iterations=length)) == "done"
    whole, parts = (runs.read_state(one / name, 4) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all((whole[key] == parts[key]).all() for key in whole)
    rows = [
        [{key: row[key] for key in row if not key.startswith(("time/", "memory/"))} for row in runs.rows(one / name)]
        for name in ("whole", "parts")
    ]
    with_numbers = [[row for row in each if "rollout/count" in row] for each in rows]
    assert with_numbers[0] == with_numbers[1] and len(with_numbers[0]) == 4
    assert sum(row["rollout/count"] for row in with_numbers[0]) > 4
    assert with_numbers[0][-1]["data/epoch"] == sum(row["rollout/count"] for row in with_numbers[0]) * GROUPS / PROMPTS


@pytest.mark.nightly  # by day: scores of the host, above
@pytest.mark.parametrize("mesh", [MeshConfig(1), MeshConfig(2, 2, 2)], ids=["one", "mesh"])
def test_one_rollout_whose_groups_all_differ_is_the_iteration_in_one_program(mesh):
    """A reward model scores, in the program that fills and in the one that learns; on a mesh groups change devices."""
    mesh = make_mesh(mesh, jax.devices()[: 1 if mesh == MeshConfig(1) else 8])
    with current(mesh):
        run = tiny.build("grpo", GRPOConfig(), batch=Batch(prompts=tiny.prompts()), samples_per_prompt=2)
        run = run._replace(state=for_programs(run.state, mesh), batch=put(mesh, run.batch))
        expected, metrics, sequences = tiny.program(steps.make_iteration(run.recipe))(run.state, run.batch)
        batch = BatchConfig(prompts_per_step=16, samples_per_prompt=2, max_rollouts=2)
        cfg = SimpleNamespace(batch=batch, rewards=RewardsConfig(), acts=False, converses=False)
        ready: Any = SimpleNamespace(cfg=cfg, recipe=run.recipe, mesh=mesh, graders=None)
        iteration = joined(ready, compile_programs(ready, run.state, run.batch), lambda: pytest.fail("one is enough"))
        state, numbers, found = iteration(run.state, run.batch, [])
    assert float(numbers["rollout/count"]) == 1 and float(numbers["rollout/equal_groups"]) == 0
    np.testing.assert_array_equal(found.tokens, sequences.tokens)
    np.testing.assert_allclose(found.scores, sequences.scores, atol=1e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(numbers[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, expected.params)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"algorithm": {"name": "raft"}}, "batch.max_rollouts: 3: raft does not compare the responses to a prompt"),
        (
            {"algorithm": {"name": "grpo", "advantages": "none", "kl_coef": 0.0}},
            "batch.max_rollouts: 3: grpo does not compare the responses to a prompt with each other; expected 1",
        ),
        ({"mesh": {"style": "pmap"}}, "batch.max_rollouts: 3: groups move between devices, and mesh.style is pmap; "),
        (
            {"epochs": 1.0, "iterations": None},
            "epochs: 1: an iteration takes up to batch.max_rollouts batches; expected iterations",
        ),
    ],
)
def test_what_cannot_be_resampled_is_one_line(tmp_path, more, line):
    with pytest.raises(ConfigError) as caught:
        check(config(write(tmp_path), **more), 1, source="test")
    assert str(caught.value).startswith(f"test: {line}") and "\n" not in str(caught.value)


def test_prompts_of_several_lengths_are_refused(tmp_path):
    cfg = config(write(tmp_path))
    data = {"prompts": {"path": "x.jsonl"}, "demonstrations": {"path": "x.jsonl"}, "prompt_buckets": [16, 24]}
    with pytest.raises(ConfigError, match=r"data.prompt_buckets: \[16, 24\]: .*expected one length; nearest: \[24\]"):
        check(config(tmp_path, data=data), 1)
    check(cfg, 1)
