"""A list under models.reward: numbered roles, their heads, their optimizers, and what is said of mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxrlhf.config.check import check
from jaxrlhf.config.load import dump, load
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.config.roles import graders_of
from jaxrlhf.errors import ConfigError
from jaxrlhf.types import Grader

ONE: dict[str, Any] = {"init_from": "runs/sft"}
PAIRS = {"preferences": {"path": "pairs.jsonl"}}


def config(folder: Path, *overrides: str, models: Any = None, algorithm: str = "rm", **more: Any) -> Config:
    models = {"reward": [ONE, ONE, ONE]} if models is None else models
    tree = {"run_dir": "runs/x", "iterations": 1, "algorithm": {"name": algorithm}, "models": models, "data": PAIRS}
    (folder / "config.yaml").write_text(json.dumps(tree | more))
    return load(folder / "config.yaml", overrides)


def problem(call, *given) -> str:
    with pytest.raises(ConfigError) as error:
        call(*given)
    return str(error.value)


def test_a_list_becomes_numbered_roles(tmp_path):
    cfg = config(tmp_path, rewards={"combine": "mean_minus_variance", "variance_coef": 0.1})
    roles = resolve_config(cfg).roles
    assert roles.trained == dict.fromkeys(("reward_0", "reward_1", "reward_2"), "scalar") and roles.slow == {}
    assert graders_of(cfg) == {"reward": Grader(("reward_0", "reward_1", "reward_2"), "mean_minus_variance", 0.1)}
    check(cfg, 1)


def test_what_is_saved_loads_back(tmp_path):
    cfg = config(tmp_path)
    (tmp_path / "again.yaml").write_text(dump(cfg))
    assert load(tmp_path / "again.yaml") == cfg


def test_one_model_is_no_ensemble(tmp_path):
    cfg = config(tmp_path, models={"reward": ONE})
    assert graders_of(cfg) == {} and resolve_config(cfg).roles.trained == {"reward": "scalar"}
    assert len(graders_of(config(tmp_path, models={"reward": [ONE]}))["reward"].members) == 1


def test_the_value_model_starts_from_the_first_member(tmp_path):
    models = {"policy": ONE, "reward": [{"init_from": "runs/rm0"}, {"init_from": "runs/rm1"}]}
    cfg = config(tmp_path, models=models, algorithm="ppo", data={"prompts": {"path": "prompts.jsonl"}})
    check(cfg, 1)
    assert cfg.models["value"].init_from == "reward_0"
    assert resolve_config(cfg).roles.slow == {"reference": "lm", "reward_0": "scalar", "reward_1": "scalar"}


def test_an_item_can_be_overridden_by_its_number(tmp_path):
    cfg = config(tmp_path, "models.reward.1.init_from=runs/other")
    assert [cfg.models[f"reward_{at}"].init_from for at in range(3)] == ["runs/sft", "runs/other", "runs/sft"]
    assert "models.reward.3.init_from: models.reward holds" in problem(config, tmp_path, "models.reward.3.init_from=x")


def test_members_share_the_row_of_their_grader_in_optimizer(tmp_path):
    rows = {"reward": {"learning_rate": 0.1}, "reward_1": {"learning_rate": 0.2}, "default": {"learning_rate": 0.3}}
    cfg = config(tmp_path, optimizer=rows)
    check(cfg, 1)
    assert [cfg.optimizer_of(f"reward_{at}").learning_rate for at in range(3)] == [0.1, 0.2, 0.1]
    assert cfg.optimizer_of("policy").learning_rate == 0.3


def test_heads_on_one_trunk(tmp_path):
    head = {"init_from": "reward_0", "share_trunk": True, "trunk_gradient": 1.0}
    cfg = config(tmp_path, models={"reward": [ONE, head, head]})
    check(cfg, 1)
    assert resolve_config(cfg).roles.trained == {"reward_0": "scalar", "reward_1": "bare", "reward_2": "bare"}


@pytest.mark.parametrize(
    ("models", "more", "expected"),
    [
        ({"reward": []}, {}, "models.reward: []: expected a model, or several"),
        ({"reward": [ONE], "reward_1": ONE}, {}, "models.reward_1 is given too; expected one of them"),
        ({"reward": [ONE, 3]}, {}, "models.reward_1: 3: expected a section"),
        ({"policy": [ONE]}, {}, "models.policy"),
        ({"reward_0": ONE, "reward": ONE}, {}, "models.reward: models.reward_0 is given too; expected one of them"),
        ({"reward_0": ONE, "reward_2": ONE}, {}, "models.reward_2: no models.reward_1; expected a list under"),
        ({"reward": ONE}, {"rewards": {"combine": "min"}}, "rewards.combine: min: there is no ensemble; expected mean"),
        (
            {"reward": [ONE]},
            {"rewards": {"combine": "max"}},
            'rewards.combine: "max": expected one of mean, median, min',
        ),
        ({"reward": [ONE]}, {"rewards": {"variance_coef": -1}}, "rewards.variance_coef: -1"),
        (
            {"reward": [ONE, {"init_from": "reward_2", "share_trunk": True}, ONE]},
            {},
            "models.reward_1.share_trunk: true: init_from reward_2: expected reward_0",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, models, more, expected):
    text = problem(lambda: check(config(tmp_path, models=models, **more), 1))
    assert expected in text and len(text.splitlines()) == 1, text
