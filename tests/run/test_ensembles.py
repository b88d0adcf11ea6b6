"""Ensembles from a config to a run: members start apart, from one run or several; train, score, evaluate."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.errors import ConfigError
from jaxrlhf.run.build import build
from jaxrlhf.run.initial_state import initial_state
from tests.support import runs


@pytest.fixture(scope="module")
def whole(root) -> Path:
    runs.whole(root)
    return root / "whole"


def state_of(cfg):
    ready = build(resolve_config(cfg), jax.devices()[:1])
    with jax.set_mesh(ready.mesh):
        return initial_state(ready)


def kernel(tree, role: str) -> np.ndarray:
    return np.asarray(tree[role]["head"]["kernel"])


def test_members_start_with_heads_of_their_own(whole, root, tmp_path):
    sft, head = f"{{init_from: {whole}/sft}}", "{init_from: reward_0, share_trunk: true}"
    state = state_of(runs.config("rm", root, tmp_path, f"models.reward=[{sft}, {sft}, {head}, {head}]"))
    heads = [kernel(state.params, f"reward_{number}") for number in range(4)]
    assert len({head.tobytes() for head in heads}) == 4
    trunks = [np.asarray(state.params[f"reward_{number}"]["final_norm"]["scale"]) for number in range(2)]
    np.testing.assert_array_equal(trunks[0], trunks[1])
    assert state.params["reward_2"].keys() == {"head"}


def test_members_come_from_several_runs(whole, root, tmp_path):
    both = f"models.reward=[{{init_from: {whole}/rm}}, {{init_from: {whole}/rm@2}}]"
    state = state_of(runs.config("grpo", root, tmp_path, both))
    assert not np.array_equal(kernel(state.slow, "reward_0"), kernel(state.slow, "reward_1"))


def test_a_member_without_a_trained_head_is_refused(whole, root, tmp_path):
    with pytest.raises(ConfigError, match=r"models.reward_1.init_from: .*the head would be random"):
        state_of(
            runs.config("grpo", root, tmp_path, f"models.reward=[{{init_from: {whole}/rm}}, {{init_from: policy}}]")
        )


@pytest.mark.nightly
def test_an_ensemble_trains_scores_and_is_evaluated(whole, root, tmp_path):
    """Two models and a head on the first, then GRPO against the three and one more run, then both evaluated."""
    sft = f"{{init_from: {whole}/sft}}"
    head = "{init_from: reward_0, share_trunk: true, trunk_gradient: 1.0}"
    text, ens = runs.text(root), tmp_path / "rm"
    several = f"[{', '.join([f'{{init_from: {ens}}}'] * 3)}, {{init_from: {whole}/rm}}]"
    more = [f"rm:models.reward=[{sft}, {sft}, {head}]", "rm:algorithm.bootstrap=true", "rewards.combine=min"]
    more += [f"grpo:models.reward={several}", "iterations=2"]
    configs = [runs.tiny_config(name) for name in ("rm", "grpo")]
    commands = [runs.train(*runs.overrides(text, tmp_path, whole), *more, configs=configs)]
    commands += [["evaluate", str(tmp_path / name), "--json"] for name in ("rm", "grpo")]
    done = runs.process(tmp_path / "process", commands)
    assert done.code == 0, done.errors[-3000:]
    measured, written = (json.loads(output.strip().splitlines()[-1]) for output in done.outputs[1:])
    assert {f"accuracy/reward_{n}" for n in range(3)} <= measured["reward_model"].keys()
    assert measured["reward_model"]["disagreement"] > 0
    scores = [written["after"][f"score/reward_{n}"] for n in range(4)]
    assert written["after"]["score/mean"] <= min(scores) + 1e-6 and len(set(scores)) == 4
    assert written["after"]["score/disagreement"] > 0
    apart = [row["score/disagreement"] for row in runs.rows(tmp_path / "grpo") if "score/disagreement" in row]
    assert len(apart) == 2 and min(apart) > 0
