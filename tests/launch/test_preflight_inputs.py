"""What `jaxrlhf preflight` says of the inputs of a config: tokenizer, weights, data, reward functions."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxrlhf.config.load import parse
from jaxrlhf.config.record import Config
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.launch.preflight import Finding, attempt
from jaxrlhf.launch.preflight_inputs import Inputs
from tests.run.test_scoring import rewarded_by


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer, prompts with answers, and held-out ones without."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = tokenizers.train_bpe(["what is two and two"] * 9, 300)
    tokenizers.save_tokenizer(tokenizer, str(folder / "tokenizer"))
    rows = [{"prompt": f"what is {number}", "answer": number} for number in range(40)]
    write = lambda name, rows: (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("prompts.jsonl", rows)
    write("unanswered.jsonl", [{"prompt": row["prompt"]} for row in rows])
    return folder


def config(folder: Path, **more: Any) -> Config:
    shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_positions": 64}
    prompts = {"path": str(folder / "prompts.jsonl")}
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "iterations": 1,
        "algorithm": {"name": "grpo"},
        "models": {"policy": {"architecture": shape}},
        "tokenizer": {"init_from": str(folder / "tokenizer")},
        "data": {"prompts": prompts, "prompt_buckets": [16], "cache_dir": str(folder / "cache")},
        "batch": {"samples_per_prompt": 2},
        "rewards": {"function": "my_rewards:f"},
    }
    return parse(tree | more, "test")


def looked_at(cfg: Config, made: dict[str, str] | None = None) -> list[Finding]:
    with rewarded_by(lambda responses, records: [record["answer"] for record in records]):
        return [attempt(name, look) for name, look in Inputs(cfg, made or {}).looks()]


def test_a_line_for_each(folder):
    tokens = len(tokenizers.load_tokenizer(str(folder / "tokenizer")))
    lines = looked_at(config(folder))
    assert all(line.ok for line in lines), lines
    assert [line.name for line in lines] == ["tokenizer", "weights", "data", "rewards"]
    assert lines[0].text == f"{folder}/tokenizer: {tokens} tokens"
    assert lines[1].text == "policy, reference: random"
    assert (
        lines[2].text.startswith("data.prompts: 40 rows, prompt: text")
        and "of the first 32 32 are kept" in lines[2].text
    )
    assert lines[3].text == "my_rewards:f: called on records of data.prompts"


@pytest.mark.parametrize(
    ("more", "name", "text"),
    [
        (
            {"tokenizer": {"init_from": "/nowhere/tokenizer"}},
            "tokenizer",
            "'/nowhere/tokenizer': there is no such folder",
        ),
        (
            {"models": {"policy": {"init_from": "/nowhere/model"}}},
            "weights",
            "'/nowhere/model': there is no such folder",
        ),
        (
            {"data": {"prompts": {"path": "/nowhere/prompts.jsonl"}}},
            "data",
            "data.prompts.path: '/nowhere/prompts.jsonl' does not exist",
        ),
        (
            {"data": {"eval_prompts": "unanswered"}},
            "rewards",
            "rewards.function: my_rewards:f: raised KeyError: 'answer'",
        ),
        ({"data": {"prompt_buckets": [2]}}, "data", "data.prompts: none of its 32 rows is left"),
    ],
    ids=["tokenizer", "weights", "data", "rewards", "too long"],
)
def test_what_is_wrong_is_one_line(folder, more, name, text):
    if "data" in more:
        data = {"prompts": {"path": str(folder / "prompts.jsonl")}, "prompt_buckets": [16]} | more["data"]
        if data.get("eval_prompts"):
            data["eval_prompts"] = {"path": str(folder / "unanswered.jsonl")}
        more = {"data": data | {"cache_dir": str(folder / "cache")}}
    lines = looked_at(config(folder, **more))
    wrong = [line for line in lines if not line.ok]
    line = next(line for line in wrong if line.name == name)
    assert text in line.text and "\n" not in line.text


def test_what_an_earlier_config_makes_need_not_be_there(folder):
    made = {"runs/sft": "sft.yaml"}
    cfg = config(folder, models={"policy": {"init_from": "runs/sft"}}, tokenizer={})
    lines = looked_at(cfg, made)
    assert all(line.ok for line in lines), lines
    assert lines[0].text == "runs/sft: made before by sft.yaml"
    assert lines[1].text == "policy, reference: runs/sft (made before by sft.yaml)"
    assert "not encoded, there is no tokenizer yet" in lines[2].text
    assert not all(line.ok for line in looked_at(cfg))
