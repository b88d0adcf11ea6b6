"""A policy that acts in an environment, through the same step: PPO by its rewards and by learned ones, reward models
from segments; one device and eight, stopped and resumed."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import api, step
from jaxrlhf import train as trainer
from jaxrlhf.algorithms import on_policy
from jaxrlhf.config.check import check
from jaxrlhf.config.record import Config
from jaxrlhf.errors import ConfigError
from jaxrlhf.ops.advantages import gae
from jaxrlhf.rewards import upright
from jaxrlhf.run import saved_run
from jaxrlhf.run.export import export
from jaxrlhf.run.kept_programs import share_programs
from jaxrlhf.types import Sequences, TrainState
from tests.support.iterated import iterated

UPRIGHT = "jaxrlhf.rewards.upright:UprightCartPole-v0"
SHAPE = {"family": "mlp", "hidden_size": 8, "num_layers": 2}
STEPS = 6


def config(tmp_path: Path, name: str = "ppo", **changes: Any) -> Config:
    tree = {
        "run_dir": str(tmp_path / name),
        "iterations": 2,
        "algorithm": {"name": name},
        "models": {"policy": {"architecture": SHAPE}},
        "batch": {"prompts_per_step": 8},
        "data": {"prompt_buckets": [1], "cache_dir": str(tmp_path / "cache")},
        "generate": {"max_new_tokens": STEPS},
        "environment": {"id": UPRIGHT, "starts": 64},
        "log": {"trackers": []},
    }
    return api.load_config(tree, changes)


def segments(tmp_path: Path, rows: int = 8) -> str:
    """Pairs of segments that random actions made; the chosen side stays more upright."""
    rng, path = np.random.default_rng(0), tmp_path / "pairs.jsonl"
    angles = np.sort(np.abs(rng.normal(size=(rows, 2, STEPS + 1))), axis=1)[:, ::-1]
    lines = []
    for row in range(rows):
        line = {}
        for side, name in enumerate(("chosen", "rejected")):
            seen = rng.normal(size=(STEPS + 1, 4))
            seen[:, 2] = angles[row, 1 - side]
            line |= {
                f"{name}_observations": seen.round(3).tolist(),
                f"{name}_actions": rng.integers(0, 2, STEPS).tolist(),
            }
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory) -> Path:
    """A run of an ensemble of two reward models, from segments."""
    folder = tmp_path_factory.mktemp("reward")
    cfg = config(
        folder,
        "rm",
        **{
            "models": {"reward_0": {"architecture": SHAPE}, "reward_1": {"architecture": SHAPE}},
            "data.preferences": {"path": segments(folder)},
            "data.max_length": STEPS + 1,
            "batch.preferences_per_step": 8,
            "optimizer": {"default": {"learning_rate": 0.02}},
            "iterations": 30,
        },
    )
    assert trainer.run(cfg) == "done"
    return folder / "rm"


@pytest.mark.nightly  # by day: the short twin of the benchmark control
def test_reward_models_learn_from_segments(reward_run):
    rows = [json.loads(line) for line in (reward_run / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["reward/accuracy"] < 0.8 < 0.95 < rows[-1]["reward/accuracy"]
    assert rows[-1]["reward/disagreement"] > 0


@pytest.fixture(scope="module")
def one_device(tmp_path_factory) -> tuple[TrainState, dict[str, float], Sequences]:
    return iterated(config(tmp_path_factory.mktemp("one")), 1, 2)[:3]


def test_episodes_are_rows_and_what_sampled_is_what_learns(one_device):
    _, metrics, sequences = one_device
    assert sequences.tokens.shape == (8, STEPS + 2) and sequences.observations.shape == (8, STEPS + 2, 4)
    assert sequences.response_mask[:, 1:-1].all() and not sequences.response_mask[:, [0, -1]].any()
    assert sequences.valid.all() and not sequences.ended.any()  # a limit cut them
    assert set(np.unique(sequences.tokens[:, 1:-1])) <= {0, 1}
    assert metrics["kl/sampler_mismatch"] < 1e-6 and metrics["policy/clip_fraction"] < 0.5
    earned = upright.reward_of(sequences.observations[:, 1:-1])  # of the state that each action led to
    np.testing.assert_allclose(sequences.rewards[:, 1:-1], earned, atol=1e-5)
    np.testing.assert_allclose(metrics["return/mean"], earned.sum(1).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["score/mean"], metrics["return/mean"], rtol=1e-5)


@pytest.mark.nightly  # by day: text on eight devices, in test_mesh
@pytest.mark.parametrize(
    "devices",
    [
        {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
        *(pytest.param({"mesh.data": 8, "mesh.style": style}, marks=pytest.mark.nightly) for style in ("mesh", "pmap")),
    ],
)
def test_eight_devices_do_what_one_does(tmp_path, one_device, devices):
    one, numbers, rows = one_device
    eight, others, more, _ = iterated(config(tmp_path, **devices), 8, 2)
    np.testing.assert_array_equal(rows.tokens, more.tokens)
    for first, second in zip(jax.tree.leaves(one.params), jax.tree.leaves(eight.params), strict=True):
        np.testing.assert_allclose(first, second, atol=2e-6)
    assert numbers["return/mean"] == pytest.approx(others["return/mean"], rel=1e-6)


@pytest.mark.nightly  # by day: runs of text, in run/test_resume
def test_a_resumed_run_is_the_same_run(tmp_path):
    whole, parts = config(tmp_path / "whole", iterations=4), config(tmp_path / "parts", iterations=2)
    with share_programs():
        assert trainer.run(whole) == "done" and trainer.run(parts) == "done"
        assert trainer.run(config(tmp_path / "parts", iterations=4)) == "done"
    rows = [(Path(cfg.run_dir) / "metrics.jsonl").read_text().splitlines() for cfg in (whole, parts)]
    words = ("time", "per_second", "memory/")  # of the machine
    own = lambda line: {
        name: value for name, value in json.loads(line).items() if not any(word in name for word in words)
    }
    assert [*map(own, rows[0])] == [*map(own, rows[1])] and len(rows[0]) == 4
    with pytest.raises(ValueError, match="a model of observations, which no Hugging Face class holds"):
        export(whole.run_dir, "policy", tmp_path / "folder")
    with pytest.raises(ValueError, match="its policy model acts in an environment; expected a model of text"):
        api.sample(whole.run_dir, ["0"], max_new_tokens=2)


@pytest.mark.nightly  # by day: the short twin of the benchmark control
def test_learned_rewards_of_every_action_take_the_place_of_the_environments(tmp_path, reward_run):
    members = {f"reward_{at}": {"init_from": str(reward_run)} for at in (0, 1)}
    start = {"models": {"policy": {"architecture": SHAPE}} | members, "algorithm.kl_coef": 0.0}
    more = {"models.value": {"architecture": SHAPE}, "algorithm.whiten_advantages": "no"}
    _, metrics, sequences, _ = iterated(config(tmp_path, **start, **more))
    found = saved_run.SavedRuns().read_extra(str(reward_run))[1]
    assert {*found["models"]} == {"reward_0", "reward_1"}
    np.testing.assert_allclose(metrics["reward/mean"], metrics["score/mean"], rtol=1e-5)
    assert metrics["score/mean"] != pytest.approx(metrics["return/mean"], rel=1e-3)
    assert metrics["score/mean"] == pytest.approx((metrics["score/reward_0"] + metrics["score/reward_1"]) / 2, rel=1e-5)
    assert metrics["return/mean"] == pytest.approx(sequences.rewards.sum(1).mean(), rel=1e-6)


@pytest.mark.nightly  # by day: a NumPy loop, in algorithms/test_ppo_lagrangian
def test_costs_of_every_action_are_those_of_the_cost_models(tmp_path, reward_run):
    """A run of rm is a cost model where the chosen side costs more; the environment rewards."""
    members = {f"cost_{at}": {"init_from": str(reward_run)} for at in (0, 1)}
    start = {"models": {"policy": {"architecture": SHAPE}} | members, "algorithm.kl_coef": 0.0}
    state, metrics, sequences, _ = iterated(config(tmp_path, "ppo_lagrangian", **start))
    assert metrics["return/mean"] == pytest.approx(sequences.rewards.sum(1).mean(), rel=1e-6)
    assert metrics["reward/mean"] == pytest.approx(metrics["return/mean"], rel=1e-5)
    moved = 1.0 + 0.1 * float(metrics["cost/mean"])
    assert metrics["cost/mean"] and float(state.controls["multiplier"]) == pytest.approx(max(moved, 0), rel=1e-5)


def test_an_environment_gives_no_cost(tmp_path):
    with pytest.raises(ConfigError, match=r"models\.cost: missing; ppo_lagrangian needs it"):
        check(config(tmp_path, "ppo_lagrangian"), 8)
    on_host = {"rewards.functions": {"cost": {"function": "mine:f"}}}
    with pytest.raises(
        ConfigError, match=r'rewards.functions: \["cost"\]: of text, and the run acts in environment.id'
    ):
        check(config(tmp_path, "ppo_lagrangian", **on_host), 8)
    check(config(tmp_path, "ppo_lagrangian", **{"models.cost": {"architecture": SHAPE}}), 8)


def test_a_constant_reward_tells_nothing_where_a_limit_cuts_and_much_where_episodes_end():
    """Of the values that it has: r / (1 - gamma) of every state if episodes go on for ever, r at the last action."""
    mask = jnp.array([[False, True, True, True, False], [False, True, True, False, False]])
    cut = jnp.array([[True] * 5, [True] * 3 + [False] * 2])
    rows = Sequences(cut, cut, mask, observations=jnp.zeros((2, 5, 1)))
    values, ones = jnp.full(mask.shape, 1 / (1 - 0.9)), jnp.ones(mask.shape)
    whole = on_policy.with_what_follows(ones, values, rows, 0.9)
    np.testing.assert_allclose(whole[0], [1, 1, 1, 10, 1], rtol=1e-6)  # 1 + 0.9 x 10
    np.testing.assert_allclose(whole[1], [1, 1, 1, 1, 1], rtol=1e-6)  # it ended
    advantages, _ = gae(whole, values, mask, gamma=0.9, gae_lambda=0.95)
    np.testing.assert_allclose(advantages[0], 0, atol=1e-5)
    assert advantages[1, 2] == pytest.approx(1 - 10, rel=1e-5)


def test_groups_of_episodes_with_one_start(tmp_path):
    changes = {"batch.prompts_per_step": 4, "batch.samples_per_prompt": 2}
    _, _, sequences, _ = iterated(config(tmp_path, "grpo", **changes))
    starts = np.asarray(sequences.observations)[:, 0]
    np.testing.assert_array_equal(starts[::2], starts[1::2])
    assert not np.array_equal(starts[0], starts[2]) and not np.array_equal(sequences.tokens[0], sequences.tokens[1])


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"environment.id": "CartPole-v11"}, "environment.id: CartPole-v11: no such environment; nearest: CartPole-v1"),
        ({"environment.id": None}, "models.policy.architecture.family: mlp: computed from observations"),
        ({"models.policy.architecture": {"family": "llama"}}, "family: llama: reads tokens.*nearest: mlp"),
        ({"models.policy.architecture": SHAPE | {"observation_size": 5}}, "observation_size: 5: nearest: 4"),
        ({"tokenizer.init_from": "gpt2"}, 'tokenizer.init_from: "gpt2": of text.*expected null'),
        ({"rewards.function": "mine:f"}, "rewards.function: .*of text, and the run acts in environment.id"),
        ({"generate.stop": ["0"]}, "generate.stop: .*expected"),
        ({"data.eval_prompts": {"path": "x.jsonl"}}, "data.eval_prompts: .*expected null"),
    ],
)
def test_what_does_not_go_with_an_environment_is_told_in_one_line(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        check(config(tmp_path, **changes), 8)


def test_an_algorithm_that_reads_text_is_refused(tmp_path):
    changes = {"data.demonstrations": {"path": "x.jsonl"}}
    with pytest.raises(ConfigError, match=r"environment\.id: .*sft reads demonstrations, which are text"):
        check(config(tmp_path, "sft", **changes), 8)


def test_networks_of_text_choose_no_actions():
    class Recipe:
        nets = type("Nets", (), {"act": None})

    with pytest.raises(ValueError, match=r"nets\.act is None"):
        step.make_act(Recipe())  # type: ignore[arg-type]
