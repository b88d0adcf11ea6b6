"""The Python functions: the same runs, texts and scores as the command's."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from jaxrlhf import api, sharding
from jaxrlhf.generate.config import GenerateConfig
from jaxrlhf.run import build
from jaxrlhf.serve import scorer, writer
from jaxrlhf.serve.writer import generate_text
from tests.support import compiler, runs

PROMPTS = ["the film is", "the plot"]

OF_THE_MACHINE = ("time", "throughput/", "memory/")  # metrics of the clock and of the memory


def vowels(responses, records):
    """A reward function of this module."""
    return [sum(letter in "aeiou" for letter in response) for response in responses]


@pytest.fixture(scope="module")
def whole(root) -> Path:
    (done,) = runs.whole(root)
    assert done.code == 0, done.errors
    return root / "whole"


@pytest.fixture
def sft(root, tmp_path, one_device) -> api.Config:
    """Six iterations on tiny text, three of which are followed by an evaluation."""
    return runs.config("sft", root, tmp_path, "iterations=6", "log.samples=1", "log.trackers=[]")


# ---- configs --------------------------------------------------------------------------------------------------------


def test_a_config_is_the_same_from_a_file_from_dicts_and_with_overrides():
    path = runs.ROOT / "configs" / "tiny" / "grpo.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["optimizer"] = {"default": {"learning_rate": 1e-3}}  # PyYAML reads 1e-3 as text
    assert api.load_config(path) == api.load_config(tree)
    changed = api.load_config(path, {"iterations": 3, "batch.samples_per_prompt": 2, "generate": {"top_k": 5}})
    assert changed == api.load_config(path, ["iterations=3", "batch.samples_per_prompt=2", "generate={top_k: 5}"])
    assert (changed.iterations, changed.batch.samples_per_prompt, changed.generate.top_k) == (3, 2, 5)


def test_a_function_stands_for_its_name():
    path = runs.ROOT / "configs" / "tiny" / "grpo.yaml"
    cfg = api.load_config(path, {"rewards.function": vowels})
    assert cfg.rewards.function == f"{__name__}:vowels"
    several = api.load_config(path, {"rewards.functions": {"a": {"function": vowels, "weight": 2}}})
    assert several.rewards.functions["a"].function == f"{__name__}:vowels"
    with pytest.raises(api.ConfigError, match=r"^rewards.function: .*lambda.*: expected a function with a name"):
        api.load_config(path, {"rewards.function": lambda responses, records: [0.0] * len(responses)})


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"iteratons": 3}, "command line: iteratons: unknown key (value 3); nearest: iterations"),
        ({"batch.prompts_per_step": "8"}, "command line: batch.prompts_per_step: "),
    ],
)
def test_a_mistake_is_one_line(overrides, line):
    with pytest.raises(api.ConfigError) as error:
        api.load_config(runs.ROOT / "configs" / "tiny" / "grpo.yaml", overrides)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("function", "arguments", "line"),
    [
        ("train", ["a.yaml"], "train: 'a.yaml': expected a Config, as load_config(...) gives it"),
        ("build", [{"seed": 1}], "build: {'seed': 1}: expected a Config, as load_config(...) gives it"),
        ("iterate", [None], "iterate: None: expected a Config, as load_config(...) gives it"),
        ("sample", ["m", "hello"], "sample: prompts: 'hello': expected a list of them"),
        ("sample", ["m", None], "sample: prompts: None: expected a list of them"),
        ("sample", ["m", {"role": "user"}], "sample: prompts: {'role': 'user'}: expected a list of them"),
        (
            "sample",
            ["m", [{"role": "user"}]],
            "sample: prompts: [{'role': 'user'}]: one conversation; expected a list of them",
        ),
        ("score", ["m", "hello", ["a"] * 5], "score: prompts: 'hello': expected a list of them"),
        ("score", ["m", ["a"] * 5, "hello"], "score: responses: 'hello': expected a list of them"),
    ],
)
def test_an_argument_of_another_kind_is_one_line_before_anything_is_loaded(function, arguments, line):
    """A text is a list of letters to Python: without this each would be a prompt."""
    with pytest.raises(ValueError) as error:
        called = getattr(api, function)(*arguments)
        next(called)  # iterate begins with its first step
    assert str(error.value) == line


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.nightly  # by day: the example of the front page, below
def test_iterate_gives_what_a_run_writes_down_and_a_loop_that_is_left_goes_on(sft, capsys):
    """Left after the third iteration, the run is saved, and the same call gives the others."""
    first = []
    for step in api.iterate(sft):
        first.append(step)
        if step.number == 3:
            break
    saved = json.loads((Path(sft.run_dir) / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert 3 <= saved < 6, "the loop is at most two iterations ahead"
    rest = list(api.iterate(sft))
    assert [step.number for step in first] == [0, 1, 2, 3]
    assert [step.number for step in rest] == list(range(saved + 1, 7))
    rows = runs.rows(Path(sft.run_dir))
    for step in [*first, *rest]:
        mine = {name: value for row in rows if row["step"] == step.number for name, value in row.items()}
        found = {name: value for name, value in step.metrics.items() if not name.startswith(OF_THE_MACHINE)}
        assert found.keys() and {name: mine[name] for name in found} == pytest.approx(found)
        assert ("eval/loss/policy" in step.metrics) == (step.number % 2 == 0)
    assert list(api.iterate(sft)) == [], "all is done"


def test_what_training_raises_reaches_the_loop(sft, monkeypatch):
    monkeypatch.setattr(build, "find_tokenizer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(api.iterate(sft))


def test_a_time_limit_that_iterate_can_not_keep_is_said(sft, monkeypatch):
    monkeypatch.setattr(build, "find_tokenizer", lambda *_: 1 / 0)
    cfg = dataclasses.replace(sft, rewards=dataclasses.replace(sft.rewards, timeout=5.0))
    said = pytest.warns(UserWarning, match=r"^rewards\.timeout: 5: not kept by iterate")
    with said, pytest.raises(ZeroDivisionError):
        list(api.iterate(cfg))


def test_build_finds_shapes_and_tokenizer(sft):
    run = api.build(sft)
    assert run.configs["policy"].hidden_size == 16 and len(run.tokenizer) == 300


# ---- text -----------------------------------------------------------------------------------------------------------


def test_samples_are_those_of_generate(whole, one_device):
    greedy = api.sample(str(whole / "ppo"), PROMPTS, max_new_tokens=8, temperature=0.0)
    assert greedy == [[text] for text in generate_text(str(whole / "ppo"), PROMPTS, GenerateConfig(8, temperature=0.0))]
    several = api.sample(str(whole / "sft"), PROMPTS, n=3, max_new_tokens=8, seed=1)
    assert [len(found) for found in several] == [3, 3] and len(set(several[0])) > 1
    assert several == api.sample(str(whole / "sft"), PROMPTS, n=3, max_new_tokens=8, seed=1)


@pytest.fixture
def one_scorer(monkeypatch, one_device):
    import jax

    monkeypatch.setattr(scorer, "make_mesh", lambda cfg: sharding.make_mesh(cfg, jax.devices()[:1]))


def test_scores_are_those_of_the_run_s_evaluation_and_of_its_export(root, whole, one_scorer):
    lines = (runs.text(root) / "eval_preferences.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    pairs = pairs[: api.load_config(runs.TINY[1]).eval.size]
    measured = [row for row in runs.rows(whole / "rm") if "eval/reward/chosen" in row][-1]
    for side in ("chosen", "rejected"):
        texts = [pair[side] for pair in pairs]
        found = api.score(str(whole / "rm"), [""] * len(texts), texts)
        assert np.mean(found) == pytest.approx(measured[f"eval/reward/{side}"], abs=1e-4)
    exported = api.score(str(whole / "reward-hf"), [""] * len(texts), texts)
    assert exported == pytest.approx(found, abs=1e-4)
    assert api.score(str(whole / "rm"), [""], texts[-1:]) == pytest.approx(found[-1:], abs=1e-5)


@pytest.mark.parametrize("append_eos", [True, False])
def test_a_response_ends_as_those_that_the_run_learned_from(whole, one_scorer, monkeypatch, append_eos):
    """The score is that of the last token, so it has to be the one that training scored."""
    read = writer.read_yaml

    def of_a_run_that(text, where):
        tree = read(text, where)
        tree["data"]["append_eos"] = append_eos
        return tree

    monkeypatch.setattr(writer, "read_yaml", of_a_run_that)
    made = scorer.Scorer(str(whole / "rm"))
    (row,) = made.encode([{"prompt": "the film", "response": " is warm"}])
    assert (row[-1] in made.model.ids.eos) == append_eos
    assert made.model.tokenizer.decode(row, skip_special_tokens=True) == "the film is warm"


def test_what_gives_no_scores_is_refused(whole, one_scorer):
    with pytest.raises(ValueError, match=r"sft: its policy model: a model with a lm head gives no scores"):
        api.score(str(whole / "sft"), ["a"], ["b"])
    with pytest.raises(ValueError, match="2 prompts and 1 responses: expected as many"):
        api.score(str(whole / "rm"), ["a", "b"], ["c"])


# ---- the front page -------------------------------------------------------------------------------------------------


def test_the_example_of_the_readme_runs(tmp_path):
    """As a script of its own, so that its function is one of __main__."""
    readme = (runs.ROOT / "README.md").read_text()
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "api.iterate" in code)
    assert len(example.splitlines()) <= 25
    (tmp_path / "example.py").write_text(example)
    (tmp_path / "configs").symlink_to(runs.ROOT / "configs")
    cheap = {"XLA_FLAGS": compiler.CHEAP, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(runs.ROOT)}
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env=os.environ | cheap,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = [line for line in done.stdout.splitlines() if re.match(r"\d+ -?\d", line)]
    assert [int(line.split()[0]) for line in told] == list(range(1, 9))
