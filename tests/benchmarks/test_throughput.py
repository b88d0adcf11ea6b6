"""``jaxrlhf benchmark throughput``, end to end on tiny shapes, and what it refuses in one line."""

import gzip
import json
import sys

import numpy as np
import pytest

from jaxrlhf.benchmarks import machine
from jaxrlhf.cli import app
from tests.support import runs

TINY = ["--layers", "1", "--hidden", "64", "--prompt-tokens", "4", "--new-tokens", "4", "--prompts", "4"]
QUICK = [*TINY, "--steps", "3", "--json"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The machine is measured in milliseconds."""
    for name, value in {"CPU": machine.Sizes((64, 128), 2**12), "SECONDS": 0.01}.items():
        monkeypatch.setattr(machine, name, value)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs ``jaxrlhf benchmark throughput args`` in this process; gives (stdout, stderr)."""

    def call(*args, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["jaxrlhf", "benchmark", "throughput", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            app.main()
        assert (stop.value.code or 0) == code
        return capsys.readouterr()

    return call


def check_report(report: dict, phases: list[str], rows: int) -> None:
    assert report.keys() >= {"machine", "run", "seconds", "tokens", "flops", "compile", "memory", "limits"}
    assert list(report["seconds"]) == phases
    for name in ("iteration", "rollout", "score", "update"):
        if name in phases:
            found = report["seconds"][name]
            assert 0 < found["min"] <= found["median"] <= found["max"]
    assert report["compile"]["recompilations"] == 0 < report["compile"]["seconds"]
    assert report["flops"]["total"] == sum(report["flops"][part] for part in ("rollout", "prepare", "update")) > 0
    assert report["limits"]["seconds_at_matmul_peak"] > 0 < report["limits"]["memory_bytes_per_second"]
    assert report["memory"]["peak_rss"] > 2**26 and report["machine"]["cores"] >= 1
    assert report["tokens"]["update"] == rows * 8
    assert report["tokens"]["update_valid_share"] == 1


@pytest.mark.nightly  # by day: sft, below
@pytest.mark.parametrize("name, phases", [("grpo", ["iteration", "rollout", "score", "update", "idle"])])
def test_a_reward_on_the_host_lies_between_two_programs(command, name, phases):
    report = json.loads(command("--algorithm", name, "--samples", 2, *QUICK)[0])
    check_report(report, phases, rows=8)
    assert report["run"]["reward"] == "host" and report["tokens"]["response"] == 8 * 4
    assert report["tokens"]["update_distinct_share"] == (4 * 4 + 8 * 4) / (8 * 8)
    assert report["limits"]["decode"]["steps"] == 4


@pytest.mark.nightly
def test_ppo_is_one_program(command):
    report = json.loads(command("--algorithm", "ppo", *QUICK)[0])
    check_report(report, ["iteration", "rollout", "update", "idle"], rows=4 * 4)
    assert report["run"]["reward"] == "model"
    assert set(report["run"]["parameters"]) == {"policy", "value", "reference", "reward"}


@pytest.mark.parametrize(
    "name, rows", [*(pytest.param(name, 8, marks=pytest.mark.nightly) for name in ("dpo", "rm")), ("sft", 4)]
)
def test_offline_there_is_no_rollout(command, name, rows):
    report = json.loads(command("--algorithm", name, *QUICK)[0])
    check_report(report, ["iteration", "update", "idle"], rows)
    assert report["run"]["reward"] is None and "decode" not in report["limits"]


@pytest.mark.nightly
def test_a_config_needs_no_weights_and_no_data(command, tmp_path):
    """Ragged; its overrides hold, its run and data are nowhere; and the table for people."""
    text = """
run_dir: {0}/run
iterations: 3
algorithm: {{name: grpo, num_minibatches: 2}}
models:
  policy: {{architecture: {{vocab_size: 512, hidden_size: 32, num_layers: 1, max_positions: 64}}}}
  reward: {{init_from: policy}}
tokenizer: {{init_from: {0}/nowhere}}
data: {{prompts: {{path: {0}/nowhere.jsonl}}, prompt_buckets: [4, 8]}}
batch: {{prompts_per_step: 4, samples_per_prompt: 4}}
generate: {{max_new_tokens: 4, stop: ["."]}}
"""
    config = tmp_path / "mine.yaml"
    config.write_text(text.format(tmp_path))
    trace = tmp_path / "trace"
    out, _ = command(config, "generate.max_new_tokens=12", "--lengths", "ragged", "--steps", "1", "--profile", trace)
    assert "prompts of 8 tokens, responses of at most 12" in out and "ragged: lognormal" in out
    assert "whole iteration" in out and "0 recompilations" in out
    assert not (tmp_path / "run").exists()
    (file,) = trace.glob("**/perfetto_trace.json.gz")
    assert json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]


@pytest.mark.nightly
def test_costs_grow_with_what_is_doubled(command):
    more = ["--prompt-tokens", "1", "--prompts", "2", "--steps", "1", "--cost-growth"]
    report = json.loads(command("--algorithm", "sft", *QUICK, *more)[0])
    growth = report["growth"]
    assert list(growth) == ["samples", "new tokens", "layers"]
    assert growth["samples"]["flop_ratio"] == 2 and all(one["time_ratio"] > 0 for one in growth.values())
    layer, logits = 4 * 64 * 64 + 3 * 64 * 128, 8192 * 64
    once = 2 * (5 * layer + 4 * logits) + 4 * 15 * 64
    assert growth["layers"]["flop_ratio"] == pytest.approx((2 * (5 * 2 * layer + 4 * logits) + 8 * 15 * 64) / once)
    assert growth["new tokens"]["flop_ratio"] == pytest.approx((2 * (9 * layer + 8 * logits) + 4 * 45 * 64) / once)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, line",
    [
        (["--algorithm", "grop"], "--algorithm: grop: nearest: grpo; others by their config"),
        (["--hidden", "100"], "--hidden: 100: expected a multiple of 64, a head; nearest: 128"),
        (["--prompt-tokens", "0"], "--prompt-tokens: 0: expected 1 or more; nearest: 1"),
        (["--algorithm", "sft", "--samples", "2"], "--samples: 2: sft samples nothing; expected 1, and more --prompts"),
        (["--algorithm", "rm", "--reward", "host"], "--reward: host: rm asks for none; leave it out"),
        (["--reward", "modle"], "--reward: modle: nearest: model"),
        (["--lengths", "raged"], "--lengths: raged: nearest: ragged"),
        (["--lengths", "ragged", "mesh.style=pmap"], "--lengths: ragged: mesh.style pmap "),
        (["--steps", "0"], "--steps: 0: expected 1 or more; nearest: 1"),
        (["--samples", "1"], "benchmark: batch.samples_per_prompt: 1: grpo compares the responses"),
        (["algorithm.kl_coeff=1"], "command line: algorithm.kl_coeff: unknown key (value 1); nearest: kl_coef"),
        (["grpo:seed=1"], "command line: grpo:seed: there is one config; leave the name"),
        (["a.yaml", "b.yaml"], "benchmark: a.yaml, b.yaml: expected one config, or none and the shape options"),
        ([runs.ROOT / "configs/tiny/ppo.yaml", "--layers", "2"], "--layers: 2: "),
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        (["mesh.data=3"], "benchmark: mesh: (data=3, fsdp=1, tensor=1) needs 3 devices"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_compiled(command, monkeypatch, options, line):
    monkeypatch.setattr("jaxrlhf.benchmarks.throughput.measure", lambda *_: pytest.fail("something ran"))
    out, err = command(*options, code=2)
    assert out == "" and err.startswith(line) and err.count("\n") == 1


def test_the_machine_is_described():
    found = machine.describe()
    assert found["cpu"] and found["device"] == "cpu" and found["date"].endswith("UTC")
    assert found["commit"] is None or len(found["commit"].rstrip("+")) == 12
    assert np.isfinite(machine.matmul_peak("float32")) and machine.matmul_peak("bfloat16") > 0
