"""Configs: what loads, what is refused and in which words, the batch arithmetic, the reference."""

import codecs
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxrlhf.algorithm import Updates
from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.algorithms.ppo import PPOConfig
from jaxrlhf.config.batch import (
    choose_micro_batches,
    describe_batch,
    describe_sharing,
    kept_together,
    shares_prompts,
)
from jaxrlhf.config.check import check, profiled_steps
from jaxrlhf.config.field_types import hints, records
from jaxrlhf.config.load import dump, load, load_all
from jaxrlhf.config.ranges import RANGE_OF, interval_of
from jaxrlhf.config.record import Config
from jaxrlhf.config.reference import reference
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.config.roles import Roles
from jaxrlhf.config.yaml_text import decode, read_file, read_yaml
from jaxrlhf.errors import ConfigError
from jaxrlhf.launch.config import LaunchConfig
from jaxrlhf.optim import OptimizerConfig
from jaxrlhf.sharding import MeshConfig

ROOT = Path(__file__).parents[2]

PPO = """
run_dir: runs/ppo
iterations: 10
algorithm: {name: ppo, num_epochs: 2, num_minibatches: 2}
models:
  policy: {init_from: runs/sft}
  reward: {init_from: runs/rm}
optimizer:
  default: {learning_rate: 1e-4}
  value: {learning_rate: 3e-4}
data:
  prompts: {path: prompts.jsonl}
  prompt_buckets: [16, 32]
batch: {prompts_per_step: 16, samples_per_prompt: 2}
"""


@pytest.fixture
def ppo(tmp_path):
    """The path of a good config."""
    path = tmp_path / "ppo.yaml"
    path.write_text(PPO)
    return path


def mistakes(path, *overrides, devices=None) -> list[str]:
    """The lines of the ConfigError that loading (and checking on ``devices``) raises."""
    with pytest.raises(ConfigError) as caught:
        cfg = load(path, overrides)
        if devices:
            check(cfg, devices, str(path))
    return str(caught.value).split("\n")


def mistake(path, *overrides, devices=None) -> str:
    """The only line."""
    lines = mistakes(path, *overrides, devices=devices)
    assert len(lines) == 1, lines
    return lines[0]


# ---- what loads -----------------------------------------------------------------------------------------------------


def test_yaml_is_laid_over_the_defaults(ppo):
    cfg = load(ppo)
    assert cfg.algorithm == PPOConfig(num_epochs=2, num_minibatches=2)
    assert cfg.algorithm_name == "ppo"
    assert cfg.data.prompt_buckets == (16, 32)
    assert cfg.generate.max_new_tokens == 64
    assert cfg.optimizer["default"].learning_rate == 1e-4  # YAML 1.1 would read this as text


def test_command_line_is_laid_over_yaml(ppo):
    cfg = load(ppo, ["algorithm.kl_coef=2e-2", "seed=7", "data.eval_prompts.path=b", "models.policy.init_from=x=y"])
    assert (cfg.algorithm.kl_coef, cfg.seed, cfg.algorithm.num_epochs) == (0.02, 7, 2)
    assert cfg.data.eval_prompts is not None and cfg.data.eval_prompts.path == "b"
    assert cfg.models["policy"].init_from == "x=y"


def test_a_role_takes_its_own_optimizer_row_else_the_default(ppo):
    cfg = load(ppo)
    assert cfg.optimizer_of("value").learning_rate == 3e-4
    assert cfg.optimizer_of("policy").learning_rate == 1e-4
    assert dataclasses.replace(cfg, optimizer={}).optimizer_of("policy") == OptimizerConfig()


def test_reference_and_value_have_default_origins(ppo):
    models = load(ppo).models
    assert (models["reference"].init_from, models["value"].init_from) == ("policy", "reward")
    assert load(ppo, ["models.value.init_from=policy"]).models["value"].init_from == "policy"


FUNCTION = ("rewards.function=operator:add", "models={policy: {init_from: runs/sft}}")


def test_a_reward_function_takes_the_place_of_the_reward_model(ppo):
    cfg = load(ppo, FUNCTION)
    assert check(cfg, 8).roles == Roles({"policy": "lm", "value": "scalar"}, {"reference": "lm"}, {})
    assert {role: model.init_from for role, model in cfg.models.items()} == {
        "policy": "runs/sft",
        "reference": "policy",
        "value": "policy",
    }
    assert resolve_config(load(ppo)).roles.slow == {"reference": "lm", "reward": "scalar"}


LAGRANGIAN = ("algorithm={name: ppo_lagrangian}", "models.cost={init_from: runs/cm}")
COSTS = (
    "algorithm={name: ppo_lagrangian}",
    "models={policy: {init_from: runs/sft}}",
    "rewards.functions={help: {function: operator:add}, cost: {function: operator:sub, weight: 0}}",
)


def test_a_cost_is_a_model_or_a_function_called_cost(ppo):
    models = load(ppo, LAGRANGIAN).models
    assert (models["cost_value"].init_from, models["value"].init_from) == ("cost", "reward")
    assert check(load(ppo, LAGRANGIAN), 8).roles.slow == {"reference": "lm", "reward": "scalar", "cost": "scalar"}
    found = check(load(ppo, COSTS), 8)
    assert found.roles.slow == {"reference": "lm"} and found.cfg.models["cost_value"].init_from == "policy"
    with pytest.raises(ConfigError, match=r"models\.cost: rewards\.functions\.cost is given too; expected one of them"):
        check(load(ppo, [*COSTS, "models.cost={init_from: runs/cm}"]), 8)
    with pytest.raises(ConfigError, match=r"models\.cost: missing; ppo_lagrangian needs it"):
        check(load(ppo, LAGRANGIAN[:1]), 8)


@pytest.mark.parametrize(
    "override",
    [
        "run_dir=1e4x",
        "run_dir='1e4'",
        "run_dir='null'",
        "run_dir='no'",
        "run_dir='012'",
        "run_dir='2020-01-01'",
        'run_dir="ünï: code\\n"',
        'generate.stop=["\\n", " #", "", "1e-3"]',
        "optimizer.policy={learning_rate: 1.2345678901e-17}",
        "algorithm.whiten_advantages=no",
        "data.prompts.fields={prompt: text}",
        "models.policy={architecture: {rope_scaling: {kind: linear, factor: 2}}}",
    ],
)
def test_dump_loads_back_equal(ppo, tmp_path, override):
    cfg = load(ppo, [override])
    (tmp_path / "again.yaml").write_text(dump(cfg))
    assert load(tmp_path / "again.yaml") == cfg
    assert yaml.safe_load(dump(cfg))["run_dir"] == cfg.run_dir  # a YAML 1.1 reader sees the same text


# ---- several configs ------------------------------------------------------------------------------------------------


def test_an_override_can_name_its_config(ppo, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text(PPO)
    first, other = load_all([ppo, second], ["second:run_dir=runs/b", "second:seed=3", "iterations=2"])
    assert (first.run_dir, first.seed, first.iterations) == ("runs/ppo", 0, 2)
    assert (other.run_dir, other.seed, other.iterations) == ("runs/b", 3, 2)
    both = load_all([ppo, second], ["second:run_dir=runs/b", "ppo:seed=5"])  # both run the algorithm ppo
    assert [cfg.seed for cfg in both] == [5, 5]


def test_an_override_of_no_config_is_refused(ppo):
    assert mistake(ppo, "pppo:seed=1") == "command line: pppo:seed: no config of this name; nearest: ppo"


def test_two_configs_do_not_share_a_run_dir(ppo, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text(PPO)
    with pytest.raises(ConfigError, match=r"second\.yaml: run_dir: runs/ppo: already the run_dir of .*ppo\.yaml"):
        load_all([ppo, second])


# ---- what is refused, in one line -----------------------------------------------------------------------------------


def test_an_unknown_key_names_file_key_value_and_the_nearest(ppo):
    ppo.write_text(PPO.replace("num_epochs: 2", "kl_coeff: 0.05"))
    assert mistake(ppo) == f"{ppo}: algorithm.kl_coeff: unknown key (value 0.05); nearest: kl_coef"


@pytest.mark.parametrize(
    "override, line",
    [
        ("algorithm.group_size=4", "algorithm.group_size: unknown key (value 4); choices: num_epochs, "),
        ("learning_rate=1", "learning_rate: unknown key (value 1); nearest: optimizer.<role>.learning_rate"),
        ("algorithm_name=ppo", 'algorithm_name: unknown key (value "ppo"); nearest: algorithm.name'),
        (
            "models.policy.architecture={hiden_size: 8}",
            "models.policy.architecture.hiden_size: unknown key (value 8); ",
        ),
        ("data.prompts.feilds={}", "data.prompts.feilds: unknown key (value {}); nearest: fields"),
        ("algorithm.name=po", "algorithm.name: po: unknown algorithm; nearest: ppo"),
        (
            "algorithm.name=nowhere.at:ALL",
            "algorithm.name: nowhere.at:ALL: no module nowhere; expected ",
        ),
        ("algorithm=ppo", "algorithm.name: null: expected a name; choices: "),
        ("algorithm.kl_estimator=K1", 'algorithm.kl_estimator: "K1": expected one of k1, k2, k3'),
        ("remat=ful", 'remat: "ful": expected one of none, full, dots; nearest: full'),
        ("seed=yes", 'seed: "yes": expected an integer'),
        ("seed=true", "seed: true: expected an integer"),
        ("seed=abc", 'seed: "abc": expected an integer'),
        ("seed=1.0", "seed: 1.0: expected an integer"),
        ("seed=010", 'seed: "010": expected an integer'),
        ("algorithm.kl_coef='0.1'", 'algorithm.kl_coef: "0.1": expected a number'),
        ("algorithm.kl_coef=true", "algorithm.kl_coef: true: expected a number"),
        ("algorithm.kl_coef=.nan", "algorithm.kl_coef: NaN: expected a finite number"),
        ("run_dir=3", "run_dir: 3: expected text"),
        ("data.skip_bad=yes", 'data.skip_bad: "yes": expected true or false'),
        ("data.prompt_buckets=[16, x]", 'data.prompt_buckets.1: "x": expected an integer'),
        ("data.prompt_buckets=16", "data.prompt_buckets: 16: expected a list"),
        ("generate=", "generate: null: expected a section of key: value lines"),
        ("iterations=", "iterations: missing; expected an integer, or epochs"),
        ("epochs=2", "epochs: 2: iterations: 10 is given too; expected one of them"),
        ("models.policy.architecture={rope_scaling: {}}", "models.policy.architecture.rope_scaling.kind: missing; "),
        ("run_dir.a.b=1", 'run_dir.a.b: run_dir holds "runs/ppo", which is not a section'),
        ("seed", "seed: expected key=value"),
        ("a..b=1", "a..b=1: expected key=value"),
        ("seed={a: 1, a: 2}", "seed: line 1, column 8: key a appears twice"),
        ("seed={1: 2}", "seed: line 1, column 2: key 1: expected a word"),
    ],
)
def test_a_wrong_override_is_one_line(ppo, override, line):
    assert mistake(ppo, override).startswith(f"command line: {line}")


@pytest.mark.parametrize(
    "override, line",
    [
        ("iterations=0", "iterations: 0: expected a number in [1, inf); nearest: 1"),
        ("seed=-1", "seed: -1: expected a number in [0, 2147483647]; nearest: 0"),
        ("generate.top_p=1.5", "generate.top_p: 1.5: expected a number in (0, 1]; nearest: 1"),
        ("generate.top_p=0", "generate.top_p: 0.0: expected a number in (0, 1]"),
        ("algorithm.clip_range=0", "algorithm.clip_range: 0.0: expected a number in (0, inf)"),
        (
            "optimizer.value.learning_rate=-1e-3",
            "optimizer.value.learning_rate: -0.001: expected a number in [0, inf); ",
        ),
        ("optimizer.default.b1=1", "optimizer.default.b1: 1.0: expected a number in [0, 1)"),
        ("data.prompt_buckets=[0, 4]", "data.prompt_buckets.0: 0: expected a number in [1, inf); nearest: 1"),
        ("checkpoint.every=0", "checkpoint.every: 0: expected a number in [1, inf); nearest: 1"),
    ],
)
def test_a_number_out_of_range_is_one_line(ppo, override, line):
    assert mistake(ppo, override).startswith(f"command line: {line}")


def test_zero_is_allowed_where_it_means_something(ppo):
    cfg = load(ppo, ["optimizer.default.learning_rate=0", "eval.every=0", "generate.temperature=0"])
    assert (cfg.optimizer["default"].learning_rate, cfg.eval.every, cfg.generate.temperature) == (0, 0, 0)


def test_every_number_in_a_config_has_a_range():
    """Whoever adds a numeric field says in which interval it lies (mesh sizes have their own check)."""
    classes = {cls for top in (Config, LaunchConfig) for _, cls in records(top)}
    classes |= {row.config for row in ALGORITHMS.values()}
    classes.discard(MeshConfig)
    numeric = lambda hint: re.search(r"\b(int|float)\b", str(hint)) is not None
    missing = [
        f"{cls.__name__}.{name}"
        for cls in classes
        for name, hint in hints(cls).items()
        if numeric(hint) and not interval_of(cls, name)
    ]
    known = {known for cls in classes for name in hints(cls) for known in (name, f"{cls.__name__}.{name}")}
    assert missing == []
    assert RANGE_OF.keys() - known == set()  # nor is a range left behind by a field that went away


def test_the_config_of_an_older_run_loads(ppo, tmp_path):
    """It names every key, also one that no longer exists, with the value at which that did nothing."""
    text = dump(load(ppo))
    assert "generate:\n" in text and "slots" not in text
    old = tmp_path / "config.yaml"
    old.write_text(text.replace("generate:\n", "generate:\n  slots: 0\n"))
    assert load(old) == load(ppo)
    assert mistake(old, "generate.slots=2").startswith("command line: generate.slots: unknown key (value 2); ")
    text = text.replace("  trackers:\n  - tensorboard\n", "")
    for said, kept in (("true", ("tensorboard",)), ("false", ())):
        old.write_text(text.replace("log:\n", f"log:\n  tensorboard: {said}\n"))
        assert load(old).log.trackers == kept


def test_all_mistakes_are_told_at_once_a_line_each(ppo):
    lines = mistakes(ppo, "seed=x", "algorithm.gama=1")
    assert [line.split(":")[1].strip() for line in lines] == ["algorithm.gama", "seed"]


def test_missing_keys_are_named(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("algorithm: {name: sft}")
    assert mistakes(path) == [
        f"{path}: run_dir: missing; expected text",
        f"{path}: iterations: missing; expected an integer, or epochs",
    ]
    path.write_text("run_dir: a")
    names = ", ".join(sorted(ALGORITHMS))
    assert mistake(path) == f"{path}: algorithm.name: null: expected a name; choices: {names}, package.module:NAME"


def test_a_missing_file_names_the_nearest(ppo):
    assert mistake(ppo.parent / "pop.yaml") == f"{ppo.parent / 'pop.yaml'}: no such file; nearest: {ppo}"


def test_a_best_that_no_config_of_the_command_keeps_is_refused_before_the_first_runs(ppo, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text(PPO.replace("runs/ppo", "runs/second").replace("runs/sft", "runs/ppo@best"))
    line = rf"^{second}: models\.policy\.init_from: runs/ppo@best: {ppo} sets no checkpoint\.best$"
    with pytest.raises(ConfigError, match=line):
        load_all([ppo, second])
    keeps = "ppo:checkpoint.best=eval/score/mean"
    text = second.read_text().replace("name: ppo", "name: grpo").replace(", num_epochs: 2, num_minibatches: 2", "")
    second.write_text(text.replace("  value: {learning_rate: 3e-4}\n", ""))
    assert len(load_all([ppo, second], [keeps])) == 2


# ---- hostile YAML ---------------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    "text, words",
    [
        ("run_dir: !!python/object/apply:os.system [echo]", "could not determine a constructor"),
        ("run_dir: !!binary aGVsbG8=", "could not determine a constructor"),
        (BOMB, "more than 16 aliases"),
        ("a: &a {b: *a}", "line 1, column 11: alias *a stands inside what it names"),
        ("a: &a [1, {b: &b [*a]}]", "line 1, column 19: alias *a stands inside what it names"),
        ("seed: 1\nseed: 2", "line 2, column 1: key seed appears twice"),
        ("seed: 1\n  iterations: 2", "line 2, column 13: mapping values are not allowed here"),
        ("[" * 5000, "nested too deeply"),
        ("seed: " + "9" * 5000, "digits"),
        ("# " + "x" * 70_000, "more than 65536 bytes"),
        ("- a\n- b", "expected sections"),
        ("a: 1\n---\nb: 2", "expected a single document in the stream"),
        ("a: \x00", "holds NUL characters; expected a text file saved as UTF-8"),
        ("a: 1".encode("utf-16-le"), "holds NUL characters"),
        ("a: \x07", "special characters are not allowed"),
        (b"a: 1\nb: \xff\xfe", "line 2: no UTF-8; expected a file saved as UTF-8"),
        (codecs.BOM_UTF16_LE + b"a", "no UTF-16; expected a file saved as UTF-8"),
        ("", "empty; expected sections"),
        ("# nothing", "empty; expected sections"),
        ("a: {b: 1}\nc: {<<: {b: 2}}", "line 2, column 5: a merge key (<<) is no YAML 1.2: expected the keys"),
        ("batch:\n\tsequences_per_step: 8", "line 2, column 1: a tab; YAML is indented by spaces"),
        ("[a]: 1", "line 1, column 1: key that is a list or a section: expected a word"),
        ("3: 1", "key 3: expected a word"),
    ],
)
def test_hostile_yaml_is_refused_in_one_line(tmp_path, text, words):
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = mistake(path)
    assert line.startswith(f"{path}: ") and words in line


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_config_may_come_from_any_editor(ppo, tmp_path, encoding, end):
    """A byte order mark says what it is written in."""
    text = PPO.replace("runs/ppo", "läufe/ppo").replace("\n", end)
    path = tmp_path / "editor.yaml"
    path.write_bytes(text.encode(encoding))
    assert load(path) == dataclasses.replace(load(ppo), run_dir="läufe/ppo")
    assert decode(read_file(str(path)), "editor.yaml") == text


@pytest.mark.parametrize(
    "text",
    ["010", "0o10", "0x10", "1_000", "1:30", "2024-01-01", "yes", "off", "1e", "e5", "1.2.3", "+", ".", "-.5.", "“1”"],
)
def test_what_readers_take_for_different_numbers_is_text(ppo, text):
    """And so no number: 010 is eight in YAML 1.1 and ten in YAML 1.2."""
    assert read_yaml(text, "here", mapping=False) == text
    assert mistake(ppo, f"seed={text}") == f'command line: seed: "{text}": expected an integer'


@pytest.mark.parametrize(
    ("text", "number"), [("1e-5", 1e-5), ("1E5", 1e5), ("+1.5e+3", 1500.0), (".5", 0.5), ("5.", 5.0), ("-0", 0)]
)
def test_numbers_are_those_of_json_and_more(text, number):
    assert read_yaml(text, "here", mapping=False) == number


@pytest.mark.parametrize("key", ["seed", "iterations", "checkpoint.every", "batch.prompts_per_step", "eval.size"])
@pytest.mark.parametrize("value", [2**31, 2**32, 2**63, -(2**63) - 1, 10**400])
def test_integers_that_devices_do_not_hold_are_refused(ppo, key, value):
    line = mistake(ppo, f"{key}={value}")
    assert line.startswith(f"command line: {key}: ") and "expected " in line and len(line) < 200


@pytest.mark.parametrize("name", ["", " "])
def test_no_name_is_no_config(name):
    with pytest.raises(ConfigError, match=r'^" ?": expected the path of a config, as in configs/tiny/ppo\.yaml$'):
        load(name)


def test_a_folder_is_no_config(ppo):
    assert mistake(ppo.parent) == f"{ppo.parent}: a folder; expected a YAML file, as {ppo}"
    assert "File name too long" in mistake(ppo.parent / ("x" * 300))


def test_run_dir_is_a_directory_that_a_shell_would_find(ppo, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert load(ppo, ["run_dir=~/runs/a"]).run_dir == "/home/me/runs/a"
    assert mistake(ppo, "run_dir=''") == 'command line: run_dir: "": expected a directory, as in runs/mine'


def test_a_shared_anchor_is_not_shared_by_overrides(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        PPO.replace("default: {l", "default: &row {l").replace("value: {learning_rate: 3e-4}", "value: *row")
    )
    cfg = load(path, ["optimizer.value.learning_rate=1"])
    assert (cfg.optimizer["default"].learning_rate, cfg.optimizer["value"].learning_rate) == (1e-4, 1.0)


# ---- does it make sense on these devices? ---------------------------------------------------------------------------


def test_steps_to_trace_are_counted_as_the_log_counts():
    assert [*profiled_steps("10:13")] == [10, 11, 12] and not profiled_steps(None)


def test_a_good_config_passes(ppo):
    cfg = load(ppo)
    for devices in (1, 2, 8):
        check(cfg, devices)


@pytest.mark.parametrize(
    "overrides, line",
    [
        (
            ["batch.prompts_per_step=6", "algorithm.num_minibatches=4"],
            "batch.prompts_per_step: 6: 6 prompts x 2 samples = 12 rows do not divide over 4 minibatches x 8 batch "
            "shards (data 8 x fsdp 1); nearest: 16",
        ),
        # 12 prompts x 4 samples = 48 rows divide over 2 x 8, but 12 prompts not over 8 shards
        (["batch={prompts_per_step: 12, samples_per_prompt: 4}"], "batch.prompts_per_step: 12: 12 prompts x 4 samples"),
        (
            ["batch.micro_batch_size=5"],
            "batch.micro_batch_size: 5: a minibatch has 32 / 2 = 16 rows on 8 batch shards; expected a divisor of it "
            "that the shards divide; nearest: 8",
        ),
        (["batch.micro_batch_size=4"], "batch.micro_batch_size: 4: a minibatch has 32 / 2 = 16 rows on 8 batch shards"),
        # 12 prompts divide over 2 minibatches x 2 shards, but not over 8 devices that sample
        (
            ["batch.prompts_per_step=12", "mesh={data: 2, context: 4}"],
            "batch.prompts_per_step: 12: 12 prompts x 2 samples = 24 rows do not divide over 2 minibatches x 2 batch "
            "shards (data 2 x fsdp 1) x context 4 while responses are sampled; nearest: 16",
        ),
        (["mesh={data: 3}"], "mesh: (data=3, fsdp=1, tensor=1) needs 3 devices"),
        (["mesh={data: -1, fsdp: -1}"], "mesh: (data=-1, fsdp=-1, tensor=1): sizes are positive"),
        (["data.prompts="], "data.prompts: missing; ppo reads it; expected path, tfds or hf"),
        (["data.prompts={}"], "data.prompts: none of path, tfds and hf is given; expected one of them"),
        (["algorithm.reward_update=true"], "data.preferences: missing; ppo reads it; expected path, tfds or hf"),
        (
            ["data.prompt_buckets=[32, 16]"],
            "data.prompt_buckets: [32, 16]: expected ascending lengths; nearest: [16, 32]",
        ),
        (["eval.every=5"], "data.eval_prompts: missing; eval.every is 5"),
        (
            ["checkpoint.best=score/mean", "eval.every=1", "data.eval_prompts.path=x"],
            "checkpoint.best: score/mean: expected a metric of the evaluation; nearest: eval/score/mean",
        ),
        (["checkpoint.best=eval/x"], "checkpoint.best: eval/x: never measured, as eval.every is 0"),
        (["models.reward="], "models.reward: null: expected a section"),
        (["models.policy.init_from="], "models.policy: neither init_from nor architecture is given"),
        (["models.policy.architecture={}"], "models.policy: init_from runs/sft and architecture are both given"),
        (["models.value.init_from=cost"], "models.value.init_from: cost: a role that models does not give; choices: "),
        (["models.policy.init_from=policy"], "models.policy.init_from: policy: goes in a circle (policy -> policy); "),
        (
            ["models.reward.init_from=value"],
            "models.reward.init_from: value: goes in a circle (reward -> value -> reward)",
        ),
        (["models.reward.share_trunk=true"], "models.reward.share_trunk: true: only a value model that learns beside "),
        (
            ["models.value={init_from: reward, share_trunk: true}"],
            "models.value.share_trunk: true: init_from reward is given; expected init_from policy",
        ),
        (
            ["models.value={architecture: {}, share_trunk: true}"],
            "models.value.share_trunk: true: an architecture of its own is given; expected init_from policy",
        ),
        (
            ["models.value={init_from: reward, trunk_gradient: 0.5}"],
            "models.value.trunk_gradient: 0.5: share_trunk is false, so there is no such gradient; nearest: 0.1",
        ),
        (
            ["models.reward.replay_routing=true"],
            "models.reward.replay_routing: true: only a policy that ppo samples from keeps its routing; expected false",
        ),
        (
            ["models.reward.router_aux_loss_coef=0.1"],
            "models.reward.router_aux_loss_coef: 0.1: reward does not learn; expected 0.0",
        ),
        (["models.rewards.init_from=runs/rm"], "models.rewards: unknown role; nearest: reward"),
        (["optimizer.valeu={}"], "optimizer.valeu: no role of ppo; nearest: value"),
        (["rewards.function=operator:add"], "models.reward: rewards.function operator:add is given too; expected one"),
        (
            [*FUNCTION, "algorithm.reward_update=true", "data.preferences.path=x"],
            "rewards.function: operator:add: no model that can learn, and ppo trains one; expected null",
        ),
        (["generate.slots=2"], "generate.slots: unknown key (value 2); choices: max_new_tokens, min_new_tokens, "),
        (
            ["algorithm.sampler_ratio_cap=2"],
            "algorithm.sampler_ratio_cap: 2.0: old_logprobs is sampler, so there is no ratio to cap; expected null or "
            "old_logprobs recompute",
        ),
        ([*FUNCTION, "rewards.function=operator:ad"], "rewards.function: operator:ad: operator has no ad; nearest: a"),
        ([*FUNCTION, "rewards.function=add"], 'rewards.function: add: expected "package.module:name"'),
        (
            ["rewards.normalize=group_then_sum"],
            "rewards.normalize: group_then_sum: there are no rewards.functions to normalise; expected sum_then_group",
        ),
        (
            [*COSTS[1:], "rewards.normalize=group_then_sum"],
            "rewards.normalize: group_then_sum: ppo compares the scores alone; expected sum_then_group, or grpo",
        ),
        (
            [
                "algorithm={name: grpo, missing_eos_penalty: 1}",
                "optimizer={}",
                *COSTS[1:],
                "rewards.normalize=group_then_sum",
            ],
            "algorithm.missing_eos_penalty: 1: it is taken off a sum, and rewards.normalize: group_then_sum; expected "
            "0.0, and a function for it (soft_overlong)",
        ),
        (
            [
                "algorithm={name: grpo, kl_in: score}",
                "optimizer={}",
                *COSTS[1:],
                "rewards.normalize=group_then_sum",
            ],
            "algorithm.kl_in: score: it is taken off a sum, and rewards.normalize: group_then_sum; expected loss or ",
        ),
        (
            [
                "algorithm={name: grpo, advantages: none}",
                "optimizer={}",
                *COSTS[1:],
                "rewards.normalize=group_then_sum",
            ],
            "rewards.normalize: group_then_sum: advantages is none, so no group is compared; expected sum_then_group, "
            "or advantages mean_std",
        ),
        ([*FUNCTION, "optimizer.reward={}"], "optimizer.reward: no role of ppo; choices: default, policy, value, ref"),
        ([*FUNCTION, "models.value.init_from=reward"], "models.value.init_from: reward: a role that models does not "),
        (["generate.min_new_tokens=99"], "generate.min_new_tokens: 99: more than max_new_tokens; nearest: 64"),
        (
            ["generate.temperature=0"],
            "generate.temperature: 0.0: greedy, and ppo learns from the probabilities of what it samples; expected "
            "more than 0; nearest: 1.0",
        ),
        (
            ["tokenizer={init_from: a, train_vocab_size: 300}"],
            "tokenizer.train_vocab_size: 300: init_from a is given too",
        ),
        (["tokenizer.train_vocab_size=300"], "tokenizer.train_vocab_size: 300: there is no text to train on"),
        (
            ['profile="10"'],
            'profile: "10": expected FIRST:END with 1 <= FIRST < END, as in "10:13" for steps 10, 11 and 12',
        ),
        (['profile="0:3"'], 'profile: "0:3": expected FIRST:END with 1 <= FIRST < END'),
        (['profile="3:3"'], 'profile: "3:3": expected FIRST:END with 1 <= FIRST < END'),
        (['profile="a:b"'], 'profile: "a:b": expected FIRST:END with 1 <= FIRST < END'),
        (['profile="9:12"', "iterations=10"], 'profile: "9:12": the run has 10 iterations; nearest: "9:11"'),
        (['profile="12:14"', "iterations=10"], 'profile: "12:14": the run has 10 iterations; nearest: "10:11"'),
        (
            ['profile="1:2"', "run_dir=gs://bucket/run"],
            'profile: "1:2": a trace can\'t be written to gs://bucket/run; expected null or a local run_dir',
        ),
    ],
)
def test_what_cannot_work_is_one_line(ppo, overrides, line):
    text = mistake(ppo, *overrides, devices=8)
    assert text.startswith((f"{ppo}: {line}", f"command line: {line}"))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["batch.samples_per_prompt=1"],
            "batch.samples_per_prompt: 1: grpo compares the responses to a prompt with each other; expected 2 or more; "
            "nearest: 2",
        ),
        (["algorithm.kl_estimator=k4"], 'algorithm.kl_estimator: "k4": expected one of k1, k2, k3'),
        (["algorithm.sampler_ratio=sequence"], "algorithm.sampler_ratio: sequence: sampler_ratio_cap is null, so no "),
        (["algorithm.aggregation=token-sum"], 'algorithm.aggregation: "token-sum": expected one of token-mean, '),
        (["algorithm.dual_clip=1"], "algorithm.dual_clip: 1.0: expected a number in (1, inf)"),
        (["algorithm.sampler_ratio_cap=0"], "algorithm.sampler_ratio_cap: 0.0: expected a number in (0, inf)"),
        (["algorithm.sampler_ratio_cap=2"], "algorithm.sampler_ratio_cap: 2.0: old_logprobs is sampler, so there is "),
    ],
)
def test_a_group_that_cannot_work_is_one_line(tmp_path, overrides, line):
    path = tmp_path / "grpo.yaml"
    path.write_text(PPO.replace("name: ppo", "name: grpo").replace("  value: {learning_rate: 3e-4}\n", ""))
    check(load(path), 8)
    check(load(path, ["algorithm.old_logprobs=recompute", "algorithm.sampler_ratio_cap=0.5"]), 8)
    assert mistake(path, *overrides, devices=8).startswith((f"{path}: {line}", f"command line: {line}"))


SFT = """
run_dir: runs/sft
iterations: 3
algorithm: {name: sft}
models: {policy: {architecture: {hidden_size: 64, max_positions: 32}}}
tokenizer: {train_vocab_size: 300}
data: {demonstrations: {path: a.jsonl}, max_length: 32}
"""


@pytest.mark.parametrize(
    "override, line",
    [
        ("models.policy.architecture.num_heads=5", "num_heads: 5: does not divide hidden_size 64; nearest: 4"),
        ("models.policy.architecture.num_kv_heads=3", "num_heads: 4 is not a multiple of num_kv_heads: 3"),
        ("data.max_length=33", "max_positions: 32: less than 33 = data.max_length; nearest: 33"),
    ],
)
def test_an_architecture_that_cannot_work_is_one_line(tmp_path, override, line):
    path = tmp_path / "sft.yaml"
    path.write_text(SFT)
    check(load(path), 8)
    assert mistake(path, override, devices=8) == f"{path}: models.policy.architecture.{line}"


def test_a_mesh_divides_all_but_the_heads(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text(SFT)
    check(load(path, ["mesh={tensor: 8}"]), 8)  # 4 heads
    line = mistake(path, "mesh={tensor: 8}", "models.policy.architecture.mlp_size=100", devices=8)
    assert line.endswith("architecture.mlp_size: 100: mesh.tensor of 8 does not divide it; nearest: 96")


def test_a_policy_from_scratch_needs_room_for_prompt_and_response(ppo):
    given = ["models.policy={architecture: {max_positions: 95}}", "tokenizer.init_from=runs/sft"]
    assert "max_positions: 95: less than 96 = the largest of data.prompt_buckets" in mistake(ppo, *given, devices=1)
    check(load(ppo, [*given, "generate.max_new_tokens=63"]), 1)


def test_a_run_from_scratch_needs_a_tokenizer(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text(SFT)
    line = mistake(path, "tokenizer.train_vocab_size=", devices=1)
    assert line.endswith("tokenizer: null: no model is given that has one; expected init_from or train_vocab_size")


def test_a_reward_function_needs_responses(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text(SFT)
    line = "rewards.function: operator:add: sft samples no responses to score; expected null"
    assert mistake(path, "rewards.function=operator:add", devices=1) == f"{path}: {line}"


def test_greedy_responses_are_fine_where_none_is_trained_on(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text(SFT)
    check(load(path, ["generate.temperature=0"]), 1)


@pytest.mark.parametrize(
    "micro, devices, parts, words",
    [
        (None, 8, 1, "micro-batches of 16 (1 a minibatch)"),
        (8, 8, 2, "micro-batches of 8 (2 a minibatch)"),
        (1, 1, 16, "micro-batches of 1 (16 a minibatch)"),
    ],
)
def test_batch_arithmetic_is_stated(ppo, micro, devices, parts, words):
    cfg = load(ppo, [f"batch.micro_batch_size={'' if micro is None else micro}"])
    resolved = check(cfg, devices)
    assert choose_micro_batches(resolved, devices, "tpu") == parts
    assert resolved.updates == Updates(2, 2)
    arithmetic = "16 prompts x 2 samples = 32 rows -> 2 epochs x 2 minibatches of 16 = 4 updates an iteration"
    assert describe_batch(resolved, parts) == f"batch: {arithmetic}; {words}"
    shares = micro is None  # 16 rows on 8 devices: two responses to one prompt on each
    assert shares_prompts(resolved, devices, parts) == shares
    said = "".join(describe_sharing(resolved, devices, parts))
    assert shares == (said == "") and shares != (f"read once in micro-batches of a multiple of {2 * devices}" in said)
    alone = resolve_config(load(ppo, ["batch.share_prompts=false"]))
    assert not shares_prompts(alone, 1, 1) and describe_sharing(alone, 1, 1) == []
    assert kept_together(resolved) == kept_together(alone) == 2  # whatever cuts them afterwards
    split = resolve_config(load(ppo, ["mesh.context=2"]))
    said = "batch: mesh.context: 2: training and scoring compute a prompt for each of its 2 responses"
    assert not shares_prompts(split, 1, 1) and describe_sharing(split, 1, 1) == [said]


@pytest.mark.parametrize("samples, minibatches, together", [(8, 2, 8), (8, 16, 8), (8, 64, 2), (3, 8, 3), (3, 6, 1)])
def test_what_a_shuffle_keeps_together(ppo, samples, minibatches, together):
    """Whole groups where minibatches have room for them: 16 prompts, so many samples of each, so many minibatches."""
    edits = [f"batch.samples_per_prompt={samples}", f"algorithm.num_minibatches={minibatches}"]
    resolved = resolve_config(load(ppo, edits))
    assert 16 * samples // minibatches % together == 0 and kept_together(resolved) == together


PAIRS = ["algorithm.reward_update=true", "data.preferences.path=x", "data.max_length=512"]


@pytest.mark.parametrize(
    "given, shards, parts",
    [
        ([], 1, 2),  # a minibatch of 8 x (32 + 2 x 64) columns, in two of 640
        ([], 2, 2),
        ([], 8, 1),  # each device has one prompt
        (["generate.max_new_tokens=65"], 1, 4),
        (["generate.max_new_tokens=144", "batch.pack_widths=2"], 1, 2),  # two of 1,280 columns, half of them empty
        (["generate.max_new_tokens=145", "batch.pack_widths=2"], 1, 4),
        (["generate.max_new_tokens=1000"], 1, 8),  # no less than the responses to a prompt
        (["generate.max_new_tokens=1000", "batch.share_prompts=false"], 1, 16),
        (["batch.samples_per_prompt=3", "algorithm.num_minibatches=16"], 1, 1),
        (["batch.samples_per_prompt=4", "algorithm.num_minibatches=32"], 1, 1),  # cuts the responses apart
        (["batch.samples_per_prompt=4", "algorithm.num_minibatches=1", "batch.micro_batch_size=32"], 1, 2),
        ([*PAIRS, "batch.preferences_per_step=4"], 1, 2),  # as many as divide both
    ],
)
def test_a_cpu_computes_a_minibatch_in_parts_that_its_caches_hold(ppo, given, shards, parts):
    cfg = load(ppo, ["generate.max_new_tokens=64", *given])
    resolved = check(cfg, shards)
    assert choose_micro_batches(resolved, shards, "cpu") == parts
    elsewhere = parts if cfg.batch.micro_batch_size else 1
    assert all(choose_micro_batches(resolved, shards, platform) == elsewhere for platform in ("gpu", "tpu"))


@pytest.mark.parametrize("name, parts", [("sft", 4), ("dpo", 8)])
def test_rows_of_data_have_columns_too(tmp_path, name, parts):
    path = tmp_path / f"{name}.yaml"
    path.write_text(SFT.replace("{name: sft}", f"{{name: {name}}}"))
    resolved = resolve_config(load(path, ["batch.sequences_per_step=64", "batch.preferences_per_step=64"]))
    assert choose_micro_batches(resolved, 1, "cpu") == parts  # of 16 rows, and of 8 pairs, of 32 columns
    assert choose_micro_batches(resolved, 32, "cpu") == 2


def test_the_nearest_batch_really_works(ppo):
    """What an error proposes is accepted, and no nearer number would have been."""
    for prompts in range(1, 40, 3):  # all that is left over by 8
        for samples in (1, 2, 3, 8):
            given = [f"batch={{prompts_per_step: {prompts}, samples_per_prompt: {samples}}}"]
            works = lambda n, samples=samples: n % 8 == 0 and n * samples % 16 == 0 and n > 0
            cfg = load(ppo, given)
            if works(prompts):
                check(cfg, 8)
                continue
            with pytest.raises(ConfigError) as caught:
                check(cfg, 8)
            nearest = int(str(caught.value).rpartition("nearest: ")[2])
            assert works(nearest)
            assert not any(works(n) for n in range(prompts + 1, nearest)) or nearest < prompts
            assert abs(nearest - prompts) <= min(abs(n - prompts) for n in range(1, 80) if works(n))


def test_preferences_divide_like_the_rows_beside_them(ppo):
    given = ["algorithm.reward_update=true", "data.preferences.path=x", "batch.micro_batch_size=2"]
    check(load(ppo, given), 2)  # 32 pairs over 2 minibatches x 8 micro-batches x 2 shards
    line = mistake(ppo, *given, "batch.preferences_per_step=36", devices=2)
    rest = "36 rows do not divide over 2 minibatches x 2 batch shards (data 2 x fsdp 1) x 8 micro-batches; nearest: 32"
    assert line == f"{ppo}: batch.preferences_per_step: 36: {rest}"
    assert "with 32 preferences" in describe_batch(resolve_config(load(ppo, given)), 8)


# ---- algorithms from outside, the reference -------------------------------------------------------------------------


def test_an_algorithm_from_outside_the_package_brings_its_config(ppo, tmp_path, monkeypatch):
    (tmp_path / "outside.py").write_text(
        "import dataclasses\nfrom jaxrlhf.algorithms.ppo import ALGORITHM as PPO, PPOConfig\n"
        "@dataclasses.dataclass(frozen=True)\nclass Mine(PPOConfig):\n    twist: float = 0.5\n"
        "ALGORITHM = PPO._replace(config=Mine)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cfg = load(ppo, ["algorithm.name=outside:ALGORITHM", "algorithm.twist=2"])
    assert (cfg.algorithm.twist, cfg.algorithm.num_epochs) == (2.0, 2)
    (tmp_path / "again.yaml").write_text(dump(cfg))
    assert load(tmp_path / "again.yaml") == cfg


def test_the_reference_tells_type_default_and_comment():
    text = reference(Config)
    assert "| `clip_range` | number | `0.2` | of the policy ratio, around 1 |" in text
    assert '| `mode` | `max` or `min` | `"max"` | which value of it is best |' in text
    assert "| `micro_batch_size` | integer or null | `null` | rows whose activations are held at once; " in text
    assert "| `run_dir` | text | required |" in text
    assert "| `prompt_buckets` | list of integer | `[64, 128, 256]` |" in text
    headings = "\n".join(line for line in text.splitlines() if line.startswith("**"))
    for path, _ in records(Config):
        assert not path or headings.count(f"`{path}`") == 1
    for name in ALGORITHMS:
        assert f"**`algorithm, name: {name}`**" in headings


def test_the_readme_of_the_configs_holds_the_reference():
    start, end = "<!-- config reference -->\n", "<!-- /config reference -->"
    text = (ROOT / "configs" / "README.md").read_text()
    assert text.count(start) == 1 and text.count(end) == 1
    block = text.partition(start)[2].partition(end)[0]
    assert block.strip() == reference(Config).strip(), "stale; python -m jaxrlhf.config.reference prints it"


def test_the_module_prints_the_reference():
    done = subprocess.run(
        [sys.executable, "-m", "jaxrlhf.config.reference"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == reference(Config).strip()
