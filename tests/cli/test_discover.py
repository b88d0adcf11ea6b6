"""What tells users what there is: config keys, the JSON schema, metrics, configs, completion, the version."""

import ast
import json
import os
import re
import subprocess
import sys
import types

import jsonschema
import pytest

import jaxrlhf
from jaxrlhf.algorithms import ALGORITHMS
from jaxrlhf.cli import discover
from jaxrlhf.config.check import check
from jaxrlhf.config.load import load
from jaxrlhf.config.record import Config
from jaxrlhf.config.reference import keys_of, select
from jaxrlhf.config.schema import schema
from jaxrlhf.config.yaml_text import read_file, read_yaml
from jaxrlhf.errors import ConfigError
from jaxrlhf.log.metric_names import METRICS, find_metric
from jaxrlhf.log.rows import read_rows
from jaxrlhf.optim import OptimizerConfig
from tests.support import runs

FILES = sorted((runs.ROOT / "configs").rglob("*.yaml"))
KEYS = keys_of(Config)


# ---- config keys ----------------------------------------------------------------------------------------------------


def test_every_key_says_what_it_means():
    assert [key.path for key in KEYS if not key.meaning] == []
    assert len({(key.path, key.algorithm) for key in KEYS}) == len(KEYS) > 150


@pytest.mark.parametrize(
    "words, found",
    [
        ("dpo", ["algorithm.beta", "algorithm.objective", "algorithm.label_smoothing"]),
        ("sft", []),
        ("checkpoint.best", ["checkpoint.best"]),
        ("optimizer.default.learning_rate", ["optimizer.<role>.learning_rate"]),
        ("trunk_gradient", ["models.<role>.trunk_gradient"]),
        ("seed", ["seed"]),
        ("data.prompts.path", ["data.prompts.path"]),
    ],
)
def test_keys_are_chosen_by_algorithm_prefix_or_name(words, found):
    assert [key.path for key in select(KEYS, words)] == found


def test_a_section_has_all_its_keys():
    assert {key.path for key in select(KEYS, "log")} == {
        "log.every",
        "log.samples",
        "log.samples_every",
        "log.trackers",
        "log.project",
    }
    assert select(KEYS, "") == KEYS


@pytest.mark.parametrize(
    "words, near", [("optimzer", "optimizer"), ("grop", "grpo"), ("lerning_rate", "learning_rate"), ("qqqq", None)]
)
def test_an_unknown_key_names_the_nearest(words, near):
    said = f"nearest: {near}$" if near else "choices: .*optimizer.*, dpo, .*grpo"
    with pytest.raises(ConfigError, match=f"config keys: {words}: no key, section or algorithm; {said}"):
        select(KEYS, words)


def test_the_command_lists_keys(command):
    out, _ = command("config", "keys", "grpo")
    assert "algorithm.kl_coef [grpo]: number, default 0.04\n    weight of the KL" in out
    assert max(map(len, out.splitlines())) <= 100
    assert "sft has no keys of its own" in command("config", "keys", "sft")[0]
    (row,) = json.loads(command("config", "keys", "run_dir", "--json")[0])
    assert (row["path"], row["type"], row["default"]) == ("run_dir", "text", "required")
    assert command("config", "keys", "qq", code=2)[1].startswith("config keys: qq: ")
    assert (
        "algorithm.beta [jaxrlhf.algorithms.dpo:ALG" in command("config", "keys", "jaxrlhf.algorithms.dpo:ALGORITHM")[0]
    )


# ---- schema ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validator():
    jsonschema.Draft202012Validator.check_schema(schema())
    return jsonschema.Draft202012Validator(schema())


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_fits_the_schema(path, validator):
    assert list(validator.iter_errors(read_yaml(read_file(str(path)), str(path)))) == []


GOOD = {"run_dir": "runs/a", "iterations": 3, "algorithm": {"name": "dpo"}}


@pytest.mark.parametrize(
    "more",
    [
        {"iterations": 0},
        {"iterations": "3"},
        {"algorithm": {"name": "dqo"}},
        {"algorithm": {"beta": 0.1}},
        {"algorithm": {"name": "dpo", "kl_coef": 0.1}},
        {"algorithm_name": "dpo"},
        {"optimizer": {"default": {"lr": 1e-3}}},
        {"optimizer": {"default": {"b1": 1.0}}},
        {"generate": {"top_p": 0}},
        {"data": {"prompt_buckets": [0]}},
        {"models": {"policy": {"init": "x"}}},
        {"remat": "some"},
    ],
    ids=str,
)
def test_the_schema_refuses_mistakes(more, validator):
    assert validator.is_valid(GOOD)
    assert validator.is_valid(GOOD | {"algorithm": {"name": "mine.losses:BEST", "sharpness": 3}})
    assert not validator.is_valid(GOOD | more)


def test_an_editor_shows_meanings(command):
    made = json.loads(command("config", "schema")[0])
    assert made == schema()
    assert made["$defs"]["GRPOConfig"]["properties"]["dual_clip"]["description"].startswith("the largest ratio")
    assert made["$defs"]["OptimizerConfig"]["properties"]["b1"]["exclusiveMaximum"] == 1


# ---- metrics --------------------------------------------------------------------------------------------------------

WRITERS = [
    "step",
    "train",
    "hosts/memory",
    "run/scoring",
    "run/feed",
    "evaluate/held_out",
    "evaluate/against_reference",
]
PATTERNS = {"{name}/mean": "score/mean", "{name}/std": "score/std", "{role}/grad_norm": "<role>/grad_norm"}


def names_in_the_source() -> set[str]:
    """What looks like a metric's name in the modules that make metrics, {...} as in the source."""
    files = [runs.ROOT / f"jaxrlhf/{name}.py" for name in WRITERS] + [*(runs.ROOT / "jaxrlhf/algorithms").glob("*.py")]
    found = set()
    for file in files:
        tree = ast.parse(file.read_text())
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            text = ast.unparse(node)[2:-1] if isinstance(node, ast.JoinedStr) else getattr(node, "value", None)
            if isinstance(text, str) and id(node) not in inside and re.fullmatch(r"[a-z_{}]+/[a-z_{}]+", text):
                found.add(text)
    return found


def test_every_metric_in_the_source_is_in_the_table():
    found = names_in_the_source()
    assert {"loss/policy", "kl/coef", "{role}/grad_norm", "time/rewards"} <= found
    for name in found - {"eval/{name}", "data/{kind}_{what}", "{role}/{name}"}:
        name = name.replace("{name}", "reward").replace("{role}", "policy").replace("{critic}", "cost_value")
        assert find_metric("score/mean" if name in ("reward/mean", "reward/std") else name), name


@pytest.mark.parametrize("length, fits", [({"epochs": 2.5}, True), ({"epochs": 0}, False), ({}, False)], ids=str)
def test_a_run_is_as_long_as_iterations_or_epochs_say(length, fits, validator):
    rest = {key: value for key, value in GOOD.items() if key != "iterations"}
    assert validator.is_valid(rest | length) == fits
    assert validator.is_valid(GOOD | length) == (not length)
    assert validator.is_valid(rest | {"epochs": 1, "iterations": None})


@pytest.mark.parametrize("name", [path.stem for path in runs.ALL])
def test_a_run_of_each_method_writes_only_metrics_of_the_table(name, root):
    runs.whole(root)
    rows = read_rows(root / "whole" / name, "metrics")
    written = {key for row in rows for key in row} - {"step", "time"}
    assert len(written) > 4 and any(key.startswith("eval/") for key in written)
    assert [key for key in sorted(written) if find_metric(key) is None] == []


def test_metrics_are_found_by_pattern():
    assert find_metric("reward/grad_norm").name == "<role>/grad_norm"  # type: ignore[union-attr]
    assert find_metric("eval/data/prompts_dropped").unit == "rows"  # type: ignore[union-attr]
    assert [find_metric(name) for name in ("a/b/grad_norm", "loss/polic", "loss/policyx", "eval/", "")] == [None] * 5
    assert len({row.name for row in METRICS}) == len(METRICS) and all(row.meaning and row.unit for row in METRICS)


def test_the_command_lists_metrics(command):
    assert "kl/reference (nats)\n    KL from the reference" in command("metrics")[0]
    assert command("metrics", "eval/kl/reference")[0].startswith("kl/reference (nats)\n")
    assert command("metrics", "loss/polcy", code=2)[1] == "metrics: loss/polcy: no such metric; nearest: loss/policy\n"


# ---- configs --------------------------------------------------------------------------------------------------------


def test_configs_are_listed_with_a_line_each(command):
    out, _ = command("configs")
    for path in FILES:
        name = path.relative_to(runs.ROOT / "configs").with_suffix("").as_posix()
        assert discover.first_comment(path), path
        assert f"{name}\n    " in out


def test_configs_are_copied(command, tmp_path):
    out, _ = command("configs", "copy", "tiny/dpo", tmp_path / "new")
    assert out == f"{tmp_path}/new/dpo.yaml\n"
    assert (tmp_path / "new" / "dpo.yaml").read_text() == (runs.ROOT / "configs/tiny/dpo.yaml").read_text()
    assert "dpo.yaml: exists already" in command("configs", "copy", "tiny/dpo.yaml", tmp_path / "new", code=2)[1]
    command("configs", "copy", "tiny", tmp_path / "all")
    assert {path.stem for path in (tmp_path / "all").iterdir()} == set(ALGORITHMS)
    assert (
        command("configs", "copy", "tiny/dpi", code=2)[1]
        == "configs copy: tiny/dpi: no such config; nearest: tiny/dpo\n"
    )


# ---- starter configs ------------------------------------------------------------------------------------------------


def test_there_is_a_starter_config_for_each_method(command):
    assert set(discover.starters()) == set(ALGORITHMS)
    out, _ = command("init")
    assert re.findall(r"^(\w+)\n    \w", out, re.MULTILINE) == sorted(ALGORITHMS)
    assert command("init", "dpoo", code=2)[1] == "init: dpoo: no such method; nearest: dpo\n"


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_starter_config_says_what_to_change_and_which_learning_rate_to_take(name, command, tmp_path):
    out, _ = command("init", name)
    (tmp_path / "a.yaml").write_text(out)
    cfg = load(tmp_path / "a.yaml")
    assert cfg.algorithm_name == name and cfg.epochs == 1
    assert out.count("CHANGE") >= 3 and "for 1M parameters" in out and max(map(len, out.splitlines())) <= 120
    default = OptimizerConfig().learning_rate
    assert all(
        row.learning_rate > default for row in cfg.optimizer.values()
    )  # the default leaves small models at noise


# ---- the process ----------------------------------------------------------------------------------------------------


def test_the_version_is_printed(command):
    assert command("--version")[0] == f"jaxrlhf {jaxrlhf.__version__}\n"


@pytest.mark.parametrize(
    "words, offered",
    [
        ("jaxrlhf con", {"config", "configs"}),
        ("jaxrlhf configs copy tiny/d", {"tiny/dpo"}),
        ("jaxrlhf train --", {"--help"}),
    ],
)
def test_bash_completes(words, offered):
    code = "import sys; sys.argv = ['jaxrlhf']; from jaxrlhf.cli.app import main; main()"
    asked = {"_JAXRLHF_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | asked)
    assert offered <= set(done.stdout.split()), done


# ---- the way from TRL, in jaxrlhf/data/README.md ---------------------------------------------------------------------


NOT_IN_TRL = {
    "ppo",
    "ppo_lagrangian",
    "cm",
    "raft",
    "rm_ratings",
    "rm_ties",
    "simpo",
    "orpo",
    "online_dpo",
    "distill_data",
    "ilql",
    "fqi",
    "mc_returns",
    "bc",
}  # of version 1.16


def way_from_trl() -> str:
    readme = (runs.ROOT / "jaxrlhf" / "data" / "README.md").read_text()
    return readme.partition("## From TRL to jaxrlhf and back\n")[2].partition("\n## ")[0]


def test_each_key_of_the_table_of_trl_is_one():
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", way_from_trl(), re.MULTILINE)
    named = [name for _, ours in rows for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)", ours)]
    assert len(rows) >= 10 and len(named) >= 25
    keys = {key.path.replace("<role>", "default") for key in keys_of(Config)}
    for name in named:
        assert any(key == name or key.startswith(f"{name}.") for key in keys), name
    trainers, ours = rows[1]
    pairs = zip(re.findall(r"`(\w+)Trainer`", trainers), re.findall(r"`(?:algorithm\.name: )?(\w+)`", ours))
    assert dict(pairs) == {"SFT": "sft", "DPO": "dpo", "KTO": "kto", "Reward": "rm", "GRPO": "grpo", "GKD": "distill"}
    assert set(re.findall(r"`(?:algorithm\.name: )?(\w+)`", ours)) == set(ALGORITHMS) - NOT_IN_TRL


def test_the_configs_of_the_way_from_trl_load(tmp_path, monkeypatch):
    graders = types.ModuleType("my_rewards")
    vars(graders)["exact"] = lambda responses, records: [0.0] * len(responses)
    vars(graders)["short"] = lambda completions, **columns: [0.0] * len(completions)
    monkeypatch.setitem(sys.modules, "my_rewards", graders)
    section = way_from_trl()
    starters = discover.starters()
    edits = re.search(r'^DPO="dpo.yaml (.+)"$', section, re.MULTILINE)
    assert edits
    dpo = load(starters["dpo"], edits[1].split())
    assert (dpo.models["policy"].init_from, dpo.run_dir) == ("my-model", "runs/my-dpo")
    fragment = section.partition("```yaml\n")[2].partition("```")[0]
    tree = read_yaml(starters["grpo"].read_text(), "grpo.yaml") | read_yaml(fragment, "README.md")
    (tmp_path / "grpo.yaml").write_text(json.dumps(tree))
    grpo = load(tmp_path / "grpo.yaml")
    assert (grpo.models["policy"].init_from, grpo.run_dir) == (dpo.run_dir, "runs/my-grpo")
    assert {name: grader.weight for name, grader in grpo.rewards.functions.items()} == {"correct": 1.0, "short": 0.5}
    assert grpo.checkpoint.best == "eval/score/correct"
    check(grpo, 1)
    check(dpo, 1)
