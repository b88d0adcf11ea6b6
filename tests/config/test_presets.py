"""Presets: what they set, what goes over them, and the numbers of the libraries whose defaults they are."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxrlhf.algorithms import find
from jaxrlhf.cli.app import app
from jaxrlhf.config.check import check
from jaxrlhf.config.load import dump, load, parse
from jaxrlhf.config.presets import METHODS, PEERS, PRESETS
from jaxrlhf.config.record import Config
from jaxrlhf.config.reference import keys_of
from jaxrlhf.config.yaml_text import flat, read_yaml
from jaxrlhf.errors import ConfigError
from jaxrlhf.types import Batch, Sequences, TrainState, Trees
from tests.support.fake import FAKE, prompts_of

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "presets.json").read_text())
ROOT = Path(__file__).parents[2]


def config(name: str, **more: Any) -> Config:
    models = {"policy": {"init_from": "x"}, "reward": {"init_from": "y"}, "value": {"init_from": "y"}}
    if PRESETS[name].algorithm == "grpo":
        del models["value"]
    tree = {"preset": name, "run_dir": "runs/x", "iterations": 100, "models": models}
    return parse(tree | {"data": {"prompts": {"path": "x.jsonl"}, "prompt_buckets": [64]}} | more, "test")


# ---- precedence -----------------------------------------------------------------------------------------------------

TEXT = """
preset: trl-grpo
run_dir: runs/x
iterations: 3
models: {policy: {init_from: x}, reward: {init_from: y}}
algorithm: {std_eps: 1e-6, clip_range_high: 0.28}
optimizer:
generate: {temperature: 0.7}
"""


def test_a_preset_is_over_defaults_and_under_the_file_and_the_command_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    cfg = load(path, ["algorithm.clip_range_high=0.3", "optimizer.default.b2=0.95", "grpo:seed=7"])
    found = cfg.algorithm
    assert (found.kl_coef, found.old_logprobs) == (0.0, "recompute")  # of the preset; the defaults are 0.04, sampler
    assert (found.std_eps, cfg.generate.temperature) == (1e-6, 0.7)  # of the file, the first equal to the default
    assert found.clip_range_high == 0.3 and cfg.seed == 7  # of the command line
    assert found.clip_range_low == 0.2 and cfg.generate.max_new_tokens == 512
    rates = cfg.optimizer["default"]
    assert (rates.learning_rate, rates.schedule, rates.b2) == (1e-6, "linear", 0.95)
    assert cfg.preset == "trl-grpo" and cfg.batch.samples_per_prompt == 8


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads_and_the_resolved_config_says_every_value(name):
    cfg = config(name)
    check(cfg if PRESETS[name].algorithm == "ppo" else with_two(cfg), 1)
    written = flat(read_yaml(dump(cfg), "config"))
    for key, value in flat(PRESETS[name].tree).items():
        assert written[key] == value, key
    for whole in (True, False):
        again = parse(read_yaml(dump(cfg, whole), "config"), "config")
        assert dataclasses.replace(again, preset=name) == cfg


def with_two(cfg: Config) -> Config:
    """With two responses to a prompt, where a preset leaves their number to the user."""
    each = max(2, cfg.batch.samples_per_prompt)
    return dataclasses.replace(cfg, batch=dataclasses.replace(cfg.batch, samples_per_prompt=each))


def test_a_value_that_is_a_default_over_a_preset_is_kept_by_the_short_form():
    cfg = config("trl-grpo", algorithm={"std_eps": 1e-6})
    assert parse(read_yaml(dump(cfg, whole=False), "config"), "config").algorithm.std_eps == 1e-6


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["preset=trl-grop"], 'command line: preset: "trl-grop": unknown preset; nearest: trl-grpo'),
        (["preset=3"], "command line: preset: 3: unknown preset; choices: trl-grpo, openrlhf-ppo, verl-grpo, tunix-"),
        (["algorithm.name=ppo"], 'mine.yaml: algorithm.name: "ppo": preset trl-grpo is of grpo; expected that, or no '),
        (["algorithm.gae_lambda=1"], "command line: algorithm.gae_lambda: unknown key (value 1); choices: num_epochs"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, overrides, line):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(TEXT)
    with pytest.raises(ConfigError) as caught:
        load("mine.yaml", overrides)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_presets_are_listed_and_printed():
    run = CliRunner().invoke
    listed = run(app, ["configs"])
    assert listed.exit_code == 0 and all(f"preset: {name}" in listed.output for name in PRESETS)
    for name, preset in PRESETS.items():
        printed = run(app, ["config", "preset", name])
        assert printed.exit_code == 0 and read_yaml(printed.output, name) == preset.tree
    wrong = run(app, ["config", "preset", "verl"])
    assert isinstance(wrong.exception, ConfigError) and "nearest: verl-grpo" in str(wrong.exception)


# ---- the numbers of the libraries -----------------------------------------------------------------------------------


def column_behind_prompt(x: Any, dtype: Any = np.float32) -> np.ndarray:
    """[B, S] with one column, that of the prompt, before the response."""
    return np.pad(np.asarray(x, dtype), ((0, 0), (1, 0)))


def numbers(name: str) -> dict[str, Any]:
    """What ours makes of the golden case under a preset, with the parameters of networks as their answers."""
    cfg, case = config(name).algorithm, GOLDEN["case"]
    algorithm, mask = find(PRESETS[name].algorithm), jnp.array(column_behind_prompt(case["mask"], bool))
    array = lambda key: jnp.array(column_behind_prompt(case[key]))
    net = lambda key: {"logprobs": array(key), "entropy": jnp.zeros(mask.shape)}
    scores = jnp.array(case["scores_far" if name == "openrlhf-ppo" else "scores"], jnp.float32)
    before = {"policy": net("old_logprobs"), "value": {"values": array("old_values")}}
    after = {"policy": net("logprobs"), "value": {"values": array("values")}}
    slow = {"reference": net("ref_logprobs"), "reward": {"scores": scores}}
    sequences = Sequences(
        jnp.zeros(mask.shape, jnp.int32),
        mask.at[:, 0].set(True),
        mask,
        logprobs=jnp.full(mask.shape, -5.0),  # the sampler's, which none of the four reads
        ended=jnp.ones(len(mask), bool),
    )
    state = TrainState(jnp.int32(0), jnp.int32(0), before, slow, {}, {"kl_coef": jnp.float32(0)})
    experience: Any = algorithm.prepare(FAKE, state, Batch(prompts=prompts_of(2), sequences=sequences), cfg)[0]

    def total(params):
        losses, _ = algorithm.loss(FAKE, Trees(params, slow), experience, cfg)
        return sum(mean.value() for mean in losses.values()), losses

    gradient, losses = jax.grad(total, has_aux=True)(after)
    found: dict[str, Any] = {"advantages": experience.advantages, "loss": losses["policy"].value()}
    found["gradient"] = gradient["policy"]["logprobs"]
    if "value" in losses:
        found |= {"returns": experience.returns, "value_loss": losses["value"].value()}
        found["value_gradient"] = gradient["value"]["values"]
    return found


@pytest.mark.parametrize("name", PEERS)
def test_a_preset_has_the_numbers_of_its_library(name):
    """Printed by the library's own code: tests/golden/presets.json says by which functions."""
    found, golden = numbers(name), GOLDEN[name]
    assert {*golden} - {"source"} == {*found}
    for key, value in found.items():
        expected = golden[key] if np.ndim(golden[key]) == 0 else column_behind_prompt(golden[key])
        np.testing.assert_allclose(value, expected, rtol=2e-6, atol=2e-6, err_msg=key)


def test_the_golden_case_tells_presets_apart():
    """It has clipped tokens on both sides, and one that the dual clip bounds; scores beyond the reward clip."""
    case = {key: np.array(value, float) for key, value in GOLDEN["case"].items()}
    mask = case["mask"] > 0
    ratio = np.exp(case["logprobs"] - case["old_logprobs"])[mask]
    assert (ratio > 1.2).any() and (ratio < 0.8).any() and ratio.max() > 3
    assert np.abs(case["scores_far"]).max() > 10
    losses = {GOLDEN[name]["loss"] for name in ("trl-grpo", "verl-grpo", "tunix-grpo")}
    assert len(losses) == 3


def by_numpy(name: str) -> dict[str, Any]:
    """The published formulas as a loop over tokens, in float64; independent of ours and of the libraries' code."""
    case = {key: np.array(value, float) for key, value in GOLDEN["case"].items()}
    rows = [[int(t) for t in np.flatnonzero(row)] for row in case["mask"]]
    tokens = sum(map(len, rows))
    eps, cap, beta = {"trl-grpo": (1e-4, np.inf, 0), "verl-grpo": (1e-6, 3, 0), "tunix-grpo": (1e-6, np.inf, 0.04)}[
        name
    ]
    loss = 0.0
    for row, columns in enumerate(rows):
        group = case["scores"][row // 3 * 3 : row // 3 * 3 + 3]
        advantage = (case["scores"][row] - group.mean()) / (group.std(ddof=1) + eps)
        share = 1 / (6 * len(columns)) if name == "tunix-grpo" else 1 / tokens
        for t in columns:
            ratio = np.exp(case["logprobs"][row, t] - case["old_logprobs"][row, t])
            term = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2))
            term = min(term, -advantage * cap) if advantage < 0 else term
            loss += share * (term + beta * (case["logprobs"][row, t] - case["ref_logprobs"][row, t]))
    return {"loss": loss}


@pytest.mark.parametrize("name", ["trl-grpo", "verl-grpo", "tunix-grpo"])
def test_the_golden_losses_are_a_numpy_loop(name):
    assert by_numpy(name)["loss"] == pytest.approx(GOLDEN[name]["loss"], abs=1e-6)


# ---- the table for those who come from another library --------------------------------------------------------------


def test_every_key_of_the_migration_table_exists():
    text = (ROOT / "jaxrlhf" / "algorithms" / "migration.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `")]
    known = {key.path for key in keys_of(Config)}
    named = {word for row in rows for word in row[-1].split("`")[1::2]}
    plain = lambda key: key.split(":")[0].split("=")[0].strip()
    section = lambda key: key.replace("optimizer.default", "optimizer.<role>").replace(
        "optimizer.value", "optimizer.<role>"
    )
    wrong = {key for key in map(plain, named) if "." in key and section(key) not in known}
    wrong -= {key for key in wrong if any(one.replace("<role>", key.split(".")[1]) == key for one in known)}
    assert len(rows) > 40 and not wrong
    for preset in PEERS:
        assert preset in text
    assert METHODS.keys() >= {"dr-grpo", "rloo", "dapo", "cispo", "vapo"}
