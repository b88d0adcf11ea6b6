"""Held-out evaluation: what the reports say, against numbers worked out another way."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxrlhf.cli import app
from jaxrlhf.config.load import load
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.errors import ConfigError
from jaxrlhf.evaluate import held_out
from jaxrlhf.evaluate import report as reporting
from jaxrlhf.evaluate.against_reference import PolicyEvaluation, Responses, correlation, sample_rows
from jaxrlhf.evaluate.best_of import best_of_rows
from jaxrlhf.evaluate.report import Options, evaluate_run
from jaxrlhf.rewards.judge import Judge
from jaxrlhf.run import build, checkpoint
from jaxrlhf.run.initial_state import abstract_state, initial_state
from jaxrlhf.serve.writer import generate_text
from jaxrlhf.sharding import current
from jaxrlhf.types import Sequences
from tests.support import runs

NAMES = ("sft", "rm", "dpo", "grpo", "ppo", "still")


@pytest.fixture(scope="module")
def reports(root) -> dict[str, dict[str, Any]]:
    """What ``jaxrlhf evaluate RUN --json`` printed of each run."""
    (done,) = runs.whole(root)
    assert done.code == 0, done.errors
    return {name: json.loads(text) for name, text in zip(NAMES, done.outputs[2:8], strict=True)}


@pytest.fixture
def last_evaluation(root):
    """The last row of evaluation in a run's metrics.jsonl, without "eval/"."""

    def find(name: str) -> dict[str, float]:
        row = [row for row in runs.rows(root / "whole" / name) if any("eval/" in key for key in row)][-1]
        return {key.removeprefix("eval/"): value for key, value in row.items() if key.startswith("eval/")}

    return find


def test_a_best_that_can_only_be_the_last_is_told():
    """Steps that are both measured and saved."""
    cfg = SimpleNamespace(eval=SimpleNamespace(every=30), checkpoint=SimpleNamespace(every=50, best="eval/a"))
    cfg.iterations = 150
    (line,) = held_out.describe_best(cfg)  # type: ignore[arg-type]
    assert line.startswith("checkpoint.best: eval/a: evaluations (eval.every: 30) and saves (checkpoint.every: 50) m")
    for iterations in (151, 30, 0):  # step 150; one that is short is no mistake
        cfg.iterations = iterations
        assert held_out.describe_best(cfg) == []  # type: ignore[arg-type]


@pytest.mark.nightly
def test_sampling_takes_the_place_of_the_config(root):
    runs.whole(root)
    found = evaluate_run(f"{root}/whole/grpo", Options(sampling=("temperature=0.6", "max_new_tokens=2")))
    assert 1 <= found["after"]["response/length_mean"] <= 2


def test_held_out_responses_have_a_temperature_of_their_own(root):
    runs.whole(root)
    saved = load(root / "whole" / "grpo" / "config.yaml")
    assert saved.eval.temperature is None and saved.generate.temperature == 1
    for given, expected in ((None, 1.0), (0.0, 0.0), (0.6, 0.6)):
        cfg = dataclasses.replace(saved, eval=dataclasses.replace(saved.eval, temperature=given))
        ready = build.build(resolve_config(cfg))
        evaluation = PolicyEvaluation(ready)
        assert evaluation.ready.sampler.sampling.temperature == expected
        assert ready.sampler.sampling.temperature == 1, "the run trains as it did"
    assert reporting.sampling_keys(["top_p=0.9"]) == ["generate.top_p=0.9"]
    assert reporting.sampling_keys(["temperature=1"]) == ["generate.temperature=1", "eval.temperature=null"]


@pytest.mark.nightly  # by day: which temperature the sampler of an evaluation has
def test_greedy_held_out_responses_are_those_of_greedy_generation(root, tmp_path):
    runs.whole(root)
    saved = load(root / "whole" / "grpo" / "config.yaml")
    cfg = dataclasses.replace(saved, eval=dataclasses.replace(saved.eval, temperature=0.0))
    ready = build.build(resolve_config(cfg))
    with current(ready.mesh):
        state = checkpoint.restore(cfg.run_dir, 4, abstract_state(ready))
        rows = PolicyEvaluation(ready).run(state).rows
    greedy = dataclasses.replace(cfg.generate, temperature=0.0)
    assert [row["response"] for row in rows] == generate_text(cfg.run_dir, [row["prompt"] for row in rows], greedy)


def test_sampling_by_an_unknown_key_is_one_line(root):
    runs.whole(root)
    with pytest.raises(ConfigError, match=r"^command line: generate.temperatur: unknown key .* nearest: temperature$"):
        evaluate_run(f"{root}/whole/grpo", Options(sampling=("temperatur=0.6",)))


# ---- reports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_after_is_the_evaluation_at_the_end_of_training(root, reports, last_evaluation, name):
    """The same data, the same noise: an evaluation of a run can be repeated."""
    report, expected = reports[name], last_evaluation(name)
    expected = {
        key: value for key, value in expected.items() if not key.startswith("data/")
    }  # which report["data"] has
    assert report["run"] == str(root / "whole" / name)
    assert (report["algorithm"], report["step"]) == ("dpo" if name == "still" else name, 1 if name == "still" else 4)
    assert report["after"].keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(report["after"][key], value, rtol=1e-5, atol=1e-6, err_msg=key)


def test_only_a_policy_with_a_reference_has_a_before(reports):
    has = {name: sorted(report.keys() - {"run", "algorithm", "step", "data"}) for name, report in reports.items()}
    assert all(report["data"] for report in reports.values())
    assert has == {
        "sft": ["after", "perplexity"],
        "rm": ["after", "reward_model"],
        "dpo": ["after", "before", "diversity", "samples", "win_rates"],
        "grpo": ["after", "before", "diversity", "samples", "win_rates"],
        "ppo": ["after", "before", "diversity", "reward_model", "samples", "win_rates"],
        "still": ["after", "before", "diversity", "samples", "win_rates"],
    }


def test_perplexity_of_demonstrations_is_what_sft_minimises(reports):
    expected = np.exp(reports["sft"]["after"]["loss/policy"])
    assert reports["sft"]["perplexity"]["after"] == pytest.approx(expected, rel=1e-4)


def test_before_is_the_reference(reports):
    before, after = reports["ppo"]["before"], reports["ppo"]["after"]
    expected = {"score/mean", "score/std", "kl/reference", "response/length_mean", "response/ended"}
    expected |= {"score/length_correlation"}
    assert before.keys() == after.keys() == expected | {"judge/mean", "judge/std", "win_rate/reward", "win_rate/judge"}
    assert before["win_rate/reward"] == before["win_rate/judge"] == 0.5  # against itself
    assert abs(before["kl/reference"]) < 1e-5 < 1e-3 < after["kl/reference"]
    assert before["score/mean"] != after["score/mean"]


def test_evaluations_share_their_noise(root, reports):
    """What the reference says at the end is what the policy said at the start, when it was the reference."""
    samples = runs.rows(root / "whole" / "ppo", "samples")
    start = [row["response"] for row in samples if (row["step"], row["split"]) == (0, "eval")]
    assert [row["before"] for row in reports["ppo"]["samples"]] == start
    assert len(set(start)) == 8


def test_a_policy_that_did_not_learn_is_its_reference(root, reports):
    """Trained at learning rate 0: the same responses under the same noise, so the same of everything."""
    report = reports["still"]
    assert report["before"].items() <= report["after"].items() and report["after"]["implicit_reward/margin"] == 0
    assert abs(report["after"]["kl/reference"]) < 1e-5
    assert report["after"]["win_rate/reward"] == report["after"]["win_rate/judge"] == 0.5
    assert all(row["before"] == row["after"] and row["score_before"] == row["score_after"] for row in report["samples"])
    state = runs.read_state(root / "whole" / "still", 1)
    policy = {path.removeprefix("params.policy/"): leaf for path, leaf in state.items() if "params.policy" in path}
    assert all(np.array_equal(state[f"slow.reference/{path}"], leaf) for path, leaf in policy.items())


def test_samples_show_both_policies_on_the_same_prompts(reports):
    samples = reports["ppo"]["samples"]
    assert len(samples) == 8
    assert all(row.keys() == {"prompt", "before", "score_before", "after", "score_after"} for row in samples)
    assert any(row["before"] != row["after"] for row in samples)
    assert [row["prompt"] for row in samples] == [row["prompt"] for row in reports["still"]["samples"]]
    scores = [row["score_after"] for row in samples]
    assert min(scores) < reports["ppo"]["after"]["score/mean"] < max(scores)


def test_the_report_for_a_reader(reports, capsys):
    reporting.print_report(reports["ppo"])
    shown = capsys.readouterr().out
    for words in (
        "reward",
        "KL from the reference",
        "length (tokens)",
        "share positive, by the outside judge",
        "distinct-2 of the responses",
        "self-BLEU",
        "before",
    ):
        assert words in shown
    assert f"{reports['ppo']['after']['score/mean']:.3f}" in shown
    wins = reports["ppo"]["after"]["win_rate/judge"]
    assert f"win rate of after over before, by the outside judge: {wins:.1%} (95%: " in shown
    assert wins == pytest.approx(reports["ppo"]["win_rates"]["judge"]["rate"], abs=1e-4)
    assert (
        f"reward model: {reports['ppo']['reward_model']['accuracy']:.1%} of 32 held-out pairs ranked correctly" in shown
    )
    assert reports["ppo"]["samples"][0]["prompt"] in shown
    reporting.print_report(reports["sft"])
    assert f"{reports['sft']['after']['loss/policy']:.3f}" in capsys.readouterr().out


def test_prompts_of_brackets_are_no_markup(capsys):
    row = {"prompt": "[bold]is[/bold] this", "after": "[red]text", "score_after": 1.0}
    reporting.print_report({"run": "r", "algorithm": "ppo", "step": 1, "after": {}, "samples": [row]})
    assert "[bold]is[/bold] this\n   after (+1.00): [red]text" in capsys.readouterr().out


def test_a_run_without_a_checkpoint_is_one_line(root, tmp_path, monkeypatch, capsys):
    runs.whole(root)
    run = runs.copy_run(root / "whole" / "sft", tmp_path / "sft", 0)
    monkeypatch.setattr(sys, "argv", ["jaxrlhf", "evaluate", str(run)])
    with pytest.raises(SystemExit, match="2"):
        app.main()
    assert capsys.readouterr().err == f"{run}: no checkpoint in it; a run saves one every checkpoint.every iterations\n"


def test_evaluating_leaves_the_run_as_it_is(root, tmp_path, reports, one_device):
    """Also a checkpoint that another process is writing."""
    run = runs.copy_run(root / "whole" / "sft", tmp_path / "sft", 4)
    half = run / "checkpoints" / "6.orbax-checkpoint-tmp"
    half.mkdir()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    report = evaluate_run(str(run))
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} and half.exists()
    np.testing.assert_allclose(report["after"]["loss/policy"], reports["sft"]["after"]["loss/policy"], rtol=1e-5)


# ---- all of the held-out data, and no more --------------------------------------------------------------------------


def test_the_size_of_batches_changes_nothing(root, tmp_path):
    """20 sentences in batches of 4 or 16 rows: the last batch is filled up, which counts for nothing."""
    found = []
    runs.whole(root)
    for rows in (4, 16):
        more = ["data.pack=false", "eval.size=20", f"batch.sequences_per_step={rows}"]
        cfg = runs.config("sft", root, tmp_path / str(rows), *more)
        ready = build.build(resolve_config(cfg), jax.devices()[:1])
        with jax.set_mesh(ready.mesh):
            held = held_out.HeldOut(ready)
            result = held.run(initial_state(ready))
        assert held.measure and len(held.measure.batches) == -(-20 // rows)
        assert result is not None and result.samples == []
        found.append(result.metrics)
    assert found[0].keys() == found[1].keys() == {"loss/policy", "policy/entropy"}
    for key, value in found[0].items():
        np.testing.assert_allclose(found[1][key], value, rtol=1e-5)


def test_no_held_out_data_no_evaluation(root, tmp_path):
    runs.whole(root)
    cfg = runs.config("sft", root, tmp_path, "data.eval_demonstrations=null", "eval.every=0")
    held = held_out.HeldOut(build.build(resolve_config(cfg), jax.devices()[:1]))
    assert held.run(None) is None  # type: ignore[arg-type]


def test_sample_rows_are_text_without_padding_and_special_tokens(root, tmp_path):
    runs.whole(root)
    ready = build.build(resolve_config(runs.config("sft", root, tmp_path)), jax.devices()[:1])
    ids = lambda text: ready.tokenizer.encode(text, add_special_tokens=False)
    prompt, response = [2, *ids("the film")], [*ids(" is warm"), 1]  # <bos>, <eos>
    tokens = np.array([[0, 0, *prompt, *response, 0], [0] * (len(prompt) + len(response) + 3)])
    valid = tokens > 0
    columns = np.arange(tokens.shape[1])
    mask = valid & (columns >= 2 + len(prompt))
    scores = np.array([0.123456, 9.0], np.float32)
    sequences = Sequences(tokens, valid, mask, scores=scores)  # type: ignore[arg-type]
    row = {"prompt": "the film", "response": " is warm", "score": 0.1235, "split": "eval"}
    assert sample_rows(ready, sequences, 1, "eval") == [row]
    bare = dataclasses.replace(sequences, scores=None)
    assert sample_rows(ready, bare, 9, "x")[1] == {"prompt": "", "response": "", "split": "x"}


# ---- what the reward model gets right -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rm", "ppo"])
def test_pairs_of_the_run(reports, last_evaluation, name):
    found = reports[name]["reward_model"]
    assert found["pairs"] == 32
    assert found["accuracy"] * 32 == pytest.approx(round(found["accuracy"] * 32), abs=2e-3)
    assert 0 <= found["calibration_error"] <= 0.5
    if name == "rm":  # the loss's own metric
        assert found["accuracy"] == pytest.approx(last_evaluation("rm")["reward/accuracy"], abs=1e-4)
        # a model that ranks pairs as it should has its confidence above its accuracy or below; the gap is a lower bound
        gap = abs(last_evaluation("rm")["reward/confidence"] - found["accuracy"])
        assert found["calibration_error"] >= gap - 1e-3


def test_what_pairs_say_of_a_reward_model_is_a_loop():
    """Scores with ties, of an ensemble of two and of its mean."""
    rng = np.random.default_rng(0)
    first, second = rng.normal([[[0.8], [0.0]]], size=(2, 2, 99)).astype(np.float32)
    second[1, [3, 20]] = second[0, [3, 20]]
    first[1, 3] = first[0, 3]
    lengths = rng.integers(1, 9, (2, 99))
    whole = (first + second) / 2
    found = reporting.pair_metrics({"": whole, "reward_0": first, "reward_1": second}, lengths)
    assert found.pop("pairs") == 99
    reliability = found.pop("reliability")
    assert sum(count for *_, count in reliability) == 99 and len(reliability) > 3
    gap = sum(count * abs(predicted - right) for predicted, right, count in reliability) / 99
    assert gap == pytest.approx(found["calibration_error"], abs=1e-4)
    assert all(low <= predicted <= low + 0.05 for (predicted, *_), low in zip(reliability, bins_of(*whole)))
    apart = [abs((a[0] - a[1]) - (b[0] - b[1])) / 2 for a, b in zip(first.T, second.T)]
    expected = {
        "accuracy": accuracy(*whole),
        "accuracy/reward_0": accuracy(*first),
        "accuracy/reward_1": accuracy(*second),
        "calibration_error": calibration_error(*whole),
        "brier": np.mean([(1 - 1 / (1 + np.exp(b - a))) ** 2 for a, b in whole.T]),
        "length_correlation": np.corrcoef(whole.reshape(-1), lengths.reshape(-1))[0, 1],
        "disagreement": np.mean(apart),
    }
    assert found == {name: pytest.approx(value, abs=6e-5) for name, value in expected.items()}
    alone = reporting.pair_metrics({"": first}, lengths)
    assert alone.keys() == {"pairs", "accuracy", "calibration_error", "brier", "length_correlation", "reliability"}


def test_equal_scores_or_lengths_have_no_correlation():
    assert correlation(np.ones(3), np.arange(3.0)) == 0 and correlation(np.arange(3.0), np.ones(3)) == 0
    assert correlation(np.arange(3.0), -np.arange(3.0)) == pytest.approx(-1)


def bins_of(chosen: np.ndarray, rejected: np.ndarray) -> list[float]:
    """Where the bins begin that hold pairs."""
    found = [1 / (1 + np.exp(-abs(float(a) - float(b)))) for a, b in zip(chosen, rejected)]
    return [low for low in np.arange(10) / 20 + 0.5 if any(low <= p < low + 0.05 for p in found)]


def accuracy(chosen: np.ndarray, rejected: np.ndarray) -> float:
    """A tie is half right."""
    points = 0.0
    for a, b in zip(chosen, rejected):
        points += 1 if a > b else 0.5 if a == b else 0
    return points / len(chosen)


def calibration_error(chosen: np.ndarray, rejected: np.ndarray) -> float:
    """Bins [0.5, 0.55), ... of the probability of what is predicted; |mean confidence - share right| by their size."""
    total = 0.0
    for low in np.arange(10) / 20 + 0.5:
        inside = []
        for a, b in zip(chosen, rejected):
            confidence = 1 / (1 + np.exp(-abs(float(a) - float(b))))
            if low <= confidence < low + 0.05 or (low > 0.94 and confidence == 1):
                inside.append((confidence, accuracy(np.array([a]), np.array([b]))))
        if inside:
            means = np.mean(inside, axis=0)
            total += len(inside) * abs(means[0] - means[1])
    return total / len(chosen)


def test_no_reward_model_no_report():
    state: Any = SimpleNamespace(params={"policy": {}}, slow={})
    batches: Any = [object()]
    ready: Any = SimpleNamespace(recipe=SimpleNamespace(nets=SimpleNamespace(graders={})))
    assert reporting.pair_report(ready, state, batches) == {}


# ---- best of n ------------------------------------------------------------------------------------------------------


def test_a_row_for_each_n():
    """Two prompts of three samples; the third prompt has a sample without a score."""
    reward = np.array([[1.0, 2.0, 3.0], [6.0, 4.0, 5.0], [np.nan, 9.0, 9.0]])
    gold = np.array([[5.0, 1.0, 0.0], [2.0, 4.0, 6.0], [0.0, 0.0, 0.0]])
    rows = best_of_rows((1, 3), {"reward": reward, "gold": gold, "kl": np.full((3, 3), 0.5)})
    bound = round(np.log(3) - 2 / 3, 4)
    assert rows == [
        {"n": 1, "prompts": 2, "kl_bound": 0.0, "reward": 3.5, "gold": 3.0, "kl/reference": 0.5},
        {"n": 3, "prompts": 2, "kl_bound": bound, "reward": 4.5, "gold": 1.0, "kl/reference": round(0.5 + bound, 4)},
    ]
    with pytest.raises(ConfigError, match="every prompt has a response without a score"):
        best_of_rows((1,), {"reward": np.full((2, 1), np.nan)})


@pytest.mark.usefixtures("one_device")
def test_the_best_of_n_of_a_run(root):
    runs.whole(root)
    found = evaluate_run(f"{root}/whole/grpo", Options(best_of=(1, 2, 8), gold="tests.support.runs:praise"))
    rows = found["best_of"]
    assert [row["n"] for row in rows] == [1, 2, 8] and rows[0]["prompts"] == 32
    assert rows[0]["reward"] < rows[1]["reward"] < rows[2]["reward"]
    assert rows[2]["kl/reference"] - rows[2]["kl_bound"] == pytest.approx(0, abs=2)
    assert {"gold/mean", "gold/std", "win_rate/gold"} <= found["after"].keys()
    assert found["after"]["gold/mean"] > 0 and rows[0]["gold"] > 0


def test_no_policy_no_best_of(root):
    runs.whole(root)
    with pytest.raises(ConfigError, match="--best-of: there is nothing to sample; expected a run with a policy"):
        evaluate_run(f"{root}/whole/rm", Options(best_of=(1, 2)))
    with pytest.raises(ConfigError, match="--gold: my_gold:f: no module my_gold"):
        evaluate_run(f"{root}/whole/grpo", Options(gold="my_gold:f"))


# ---- the outside judge ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labels(root) -> list[dict]:
    runs.text(root)
    return [json.loads(line) for line in (root / "text" / "labels.jsonl").read_text().splitlines()]


def test_the_judge_learns_the_labels(root, labels):
    judge = Judge(labels)
    held_out = [json.loads(line) for line in (Path(root) / "text" / "eval_labels.jsonl").read_text().splitlines()]
    found = judge([row["text"] for row in held_out])
    assert found.shape == (40,) and found.min() >= 0 and found.max() <= 1
    assert ((found > 0.5) == [row["label"] for row in held_out]).mean() > 0.95


def test_metrics_are_worked_out_by_hand():
    """Wins are counted prompt by prompt, a tie as half a one; padding rows never come this far."""
    row = lambda *numbers: np.array(numbers, np.float32)
    flags = np.array([True, True, False])
    ready = SimpleNamespace(graders=None, environment=None)
    before = Responses([{}] * 3, row(5, 5, 5), flags, row(0, 0, 0), row(1, 2, 3), row(0.5, 0.5, 0.5))
    after = Responses([{}] * 3, row(2, 4, 6), flags, row(1, 2, 6), row(2, 2, 2), row(0.9, 0.6, 0.1))
    found = PolicyEvaluation.metrics(SimpleNamespace(before=before, ready=ready), after)  # type: ignore[arg-type]
    expected = {
        "response/length_mean": 4,
        "response/ended": 2 / 3,
        "kl/reference": 3,
        "score/mean": 2,
        "score/std": 0,
        "score/length_correlation": 0,
        "judge/mean": 1.6 / 3,
        "judge/std": np.std([0.9, 0.6, 0.1], ddof=1),
        "win_rate/reward": (1 + 0.5 + 0) / 3,
        "win_rate/judge": 2 / 3,
    }
    assert found == {name: pytest.approx(value, abs=1e-6) for name, value in expected.items()}
    bare = after._replace(kl=None, scores=None, marks=None)
    alone = PolicyEvaluation.metrics(SimpleNamespace(before=None, ready=ready), bare)  # type: ignore[arg-type]
    assert alone.keys() == {"response/length_mean", "response/ended"}
    members = {"reward_0": row(1, 4, 8), "reward_1": row(3, 4, 4)}
    several = PolicyEvaluation.metrics(SimpleNamespace(before=None, ready=ready), after._replace(grades=members))  # type: ignore[arg-type]
    assert several["score/reward_0"] == pytest.approx(13 / 3) and several["score/reward_1"] == pytest.approx(11 / 3)
    assert several["score/disagreement"] == pytest.approx((1 + 0 + 2) / 3)
    assert "score/unscorable" not in several
    costly = PolicyEvaluation.metrics(SimpleNamespace(before=None, ready=ready), bare._replace(cost=row(-1, 2, 0.5)))  # type: ignore[arg-type]
    assert costly["cost/mean"] == pytest.approx(0.5) and costly["cost/violations"] == pytest.approx(2 / 3)


def test_the_judge_reads_prompt_and_response(labels):
    rows = [{"prompt": "the film is", "response": text} for text in (" dull and its plot grim", " warm", "")]
    evaluation = SimpleNamespace(asks_judge=True, judge=Judge(labels))
    marks = PolicyEvaluation.marks(evaluation, rows)  # type: ignore[arg-type]
    assert marks is not None
    np.testing.assert_array_equal(
        marks, Judge(labels)(["the film is dull and its plot grim", "the film is warm", "the film is"])
    )
    assert PolicyEvaluation.marks(SimpleNamespace(asks_judge=False), rows) is None  # type: ignore[arg-type]
