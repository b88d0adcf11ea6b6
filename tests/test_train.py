"""What a run leaves, what it refuses, what it compiles and when, and how it ends before its end."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import train as trainer
from jaxrlhf.config.load import dump, load
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.errors import ConfigError
from jaxrlhf.hosts.signals import Stop
from jaxrlhf.log import progress
from jaxrlhf.log.run_dir import RunDirBusy, lock_run_dir
from jaxrlhf.report.content import content_of
from jaxrlhf.report.runs import read_run
from jaxrlhf.run import build, checkpoint, programs, saved_run, verified_steps
from jaxrlhf.run.initial_state import abstract_state
from jaxrlhf.run.resume import changes_since_saved
from jaxrlhf.sharding import current
from tests.support import runs


@pytest.fixture(scope="module")
def process(root) -> runs.Done:
    """The process that trained root/whole."""
    (done,) = runs.whole(root)
    assert done.code == 0, done.errors
    return done


# ---- the run directory ----------------------------------------------------------------------------------------------

OF_EVERY_ROW = {"step", "time", "time/iteration", "data/epoch"}
NAMES = {
    "sft": {"loss/policy", "policy/entropy", "policy/grad_norm"},
    "rm": {"loss/reward", "reward/accuracy", "reward/margin", "reward/confidence", "reward/brier", "reward/grad_norm"},
    "dpo": {
        "loss/policy",
        "policy/grad_norm",
        "implicit_reward/chosen",
        "implicit_reward/rejected",
        "implicit_reward/margin",
        "implicit_reward/accuracy",
        "logprobs/chosen",
        "logprobs/rejected",
    },
    "kto": {
        "loss/policy",
        "policy/grad_norm",
        "kl/baseline",
        "implicit_reward/desirable",
        "implicit_reward/undesirable",
        "implicit_reward/accuracy",
        "logprobs/desirable",
        "logprobs/undesirable",
    },
    "grpo": {
        "score/mean",
        "score/std",
        "kl/reference",
        "kl/sampler_mismatch",
        "group/zero_variance",
        "policy/entropy",
        "policy/clip_fraction",
        "policy/grad_norm",
        "response/length_mean",
        "response/ended",
        "loss/policy",
        "loss/kl",
        "throughput/response_tokens_per_second",
    },
    "ppo": {
        "score/mean",
        "score/std",
        "kl/reference",
        "kl/coef",
        "kl/sampler_mismatch",
        "policy/entropy",
        "policy/clip_fraction",
        "policy/grad_norm",
        "response/length_mean",
        "response/ended",
        "loss/policy",
        "loss/value",
        "loss/reward",
        "value/explained_variance",
        "throughput/response_tokens_per_second",
    },
}


def metric_rows(run: Path) -> tuple[list[dict], list[dict]]:
    """(rows of updates, rows of evaluations) of metrics.jsonl as they stand there."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if any(key.startswith("eval/") for key in row)]
    return [row for row in rows if row not in evaluations], evaluations


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_one_flat_object_an_update(process, root, name):
    updates, evaluations = metric_rows(root / "whole" / name)
    assert [row["step"] for row in updates] == [1, 2, 3, 4]
    for row in updates:
        assert row.keys() >= OF_EVERY_ROW | NAMES[name]
        trained = {"rm": ["reward"], "ppo": ["policy", "value", "reward"]}.get(name, ["policy"])
        rates = {key: value for key, value in row.items() if key.endswith("/learning_rate")}
        optimizer = load(root / "whole" / name / "config.yaml").optimizer_of
        assert rates == {f"{role}/learning_rate": pytest.approx(optimizer(role).learning_rate) for role in trained}
    for row in updates + evaluations:
        assert all(isinstance(value, int | float) for value in row.values()), row
        assert all("/" in key for key in row if key not in ("step", "time"))
    assert len({json.dumps(row) for row in updates}) == 4


@pytest.mark.parametrize("name", NAMES)
def test_evaluations_come_at_their_steps(process, root, name):
    _, evaluations = metric_rows(root / "whole" / name)
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    shown = {"sft": "eval/loss/policy", "rm": "eval/reward/accuracy", "dpo": "eval/implicit_reward/margin"}
    shown["kto"] = "eval/implicit_reward/desirable"
    shown = shown.get(name, "eval/score/mean")
    assert len({row[shown] for row in evaluations}) > 1
    assert all(key.startswith("eval/") or key in ("step", "time") for row in evaluations for key in row)


def test_numbers_make_sense(process, root):
    for name, rows, total in (("rm", 8, 200), ("dpo", 8, 200), ("grpo", 4, 200), ("ppo", 16, 200)):
        updates, _ = metric_rows(root / "whole" / name)
        kind = "preferences" if name in ("rm", "dpo") else "prompts"
        kept = total - sum(updates[0].get(f"data/{kind}_{what}", 0) for what in ("dropped", "identical"))
        np.testing.assert_allclose([row["data/epoch"] for row in updates], rows * np.arange(1, 5) / kept, rtol=1e-6)
    first, *_ = updates, _ = metric_rows(root / "whole" / "ppo")
    assert abs(first[0]["kl/reference"]) < 1e-5  # the policy is still the reference
    assert updates[-1]["kl/reference"] > 1e-3
    assert {row["response/length_mean"] <= 8 for row in updates} == {True}
    for row in updates:
        assert 0 <= row["policy/clip_fraction"] <= 1 and 0 <= row["response/ended"] <= 1
        tokens = row["throughput/response_tokens_per_second"] * row["time/iteration"]
        np.testing.assert_allclose(tokens, row["response/length_mean"] * 16, rtol=1e-5)
    for name, loss in (("sft", "loss/policy"), ("rm", "loss/reward")):
        (first_row, *_), _ = metric_rows(root / "whole" / name)
        assert {"sft": 4 < first_row[loss] < 8, "rm": 0.3 < first_row[loss] < 1.5}[name]


def test_the_adaptive_controller_moves_the_coefficient(process, root):
    updates, _ = metric_rows(root / "whole" / "ppo")
    coefs = [row["kl/coef"] for row in updates]
    assert coefs[0] == pytest.approx(0.05) and sorted(coefs, reverse=True) == coefs  # KL is far below its target
    state = runs.read_state(root / "whole" / "ppo", 4)
    assert state["state/controls/kl_coef"] < coefs[-1]


def test_samples(process, root):
    samples = runs.rows(root / "whole" / "ppo", "samples")
    assert all(row.keys() == {"step", "prompt", "response", "score", "split"} for row in samples)
    count = lambda step, split: sum((row["step"], row["split"]) == (step, split) for row in samples)
    assert [count(step, "train") for step in range(5)] == [0, 2, 2, 2, 2]
    assert [count(step, "eval") for step in range(5)] == [8, 0, 8, 0, 8]
    held_out = [row["prompt"] for row in samples if row["split"] == "eval"]
    assert held_out[:8] == held_out[8:16] == held_out[16:]
    known = {json.loads(line)["prompt"] for line in (root / "text/eval_prompts.jsonl").read_text().splitlines()}
    assert all(any(prompt.endswith(shown) for prompt in known) for shown in held_out)  # too long ones lose their start
    assert runs.rows(root / "whole" / "sft", "samples") == []


@pytest.mark.parametrize("name", NAMES)
def test_the_config_is_kept_whole(process, root, name):
    kept = load(root / "whole" / name / "config.yaml")
    assert kept == runs.config(name, root, root / "whole")
    more = {"dpo": {"reference"}, "grpo": {"reference"}, "ppo": {"value", "reference"}}.get(name, set())
    assert kept.models.keys() >= {"reward" if name == "rm" else "policy"} | more


@pytest.mark.parametrize("name", NAMES)
def test_tensorboard_has_the_same_numbers(process, root, name):
    updates, evaluations = metric_rows(root / "whole" / name)
    events = scalars(root / "whole" / name / "tensorboard")
    for row in updates + evaluations:
        for key in row.keys() - {"step", "time"}:
            assert events[key, row["step"]] == pytest.approx(row[key], rel=1e-6, abs=1e-30)


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """(tag, step) -> value of the event files: records of length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event  # type: ignore[import-untyped]

    found = {}
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            at += 16 + size
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_last_two_checkpoints_stay(process, root, name):
    run = root / "whole" / name
    assert runs.steps_kept(run) == [2, 4]
    assert {path.name for path in run.iterdir()} == {
        "source.yaml",
        ".lock",
        "checkpoints",
        "config.yaml",
        *([] if name == "kto" else ["evaluations"]),
        *(["histograms.jsonl"] if name not in ("sft", "rm") else []),
        "metrics.jsonl",
        "phases.jsonl",
        "samples.jsonl",
        "tensorboard",
        "tokenizer",
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_page_shows_each_kind_of_run(process, root, name):
    """All that it wrote has a chart, or is in the table of samples."""
    run = read_run(str(root / "whole" / name), name)
    page = content_of([run])
    drawn = {chart["title"] for part in page["parts"] for chart in part["charts"]}
    finite = {key.removeprefix("eval/") for row in run.metrics for key, value in row.items() if value is not None}
    assert finite - {"step", "time"} <= drawn and run.state == "finished"
    assert len(page["samples"]["rows"]) == len(run.samples)
    assert bool(run.histograms) == ("scores of held-out responses" in drawn)


def test_a_log_has_plain_lines(process):
    lines = process.outputs[0].splitlines()
    opening = r".*/whole/sft: sft, llama \d+\.\dK, 1 x cpu, 4 iterations, seed 0"
    assert re.fullmatch(opening, lines[0])
    batch = "batch: 8 sequences -> 1 epoch x 1 minibatch of 8 = 1 update an iteration"
    assert any(line.startswith(batch) for line in lines[:8])
    assert "data.demonstrations: text" in lines and "data.preferences: chosen + rejected: text" in lines
    assert sum(line.startswith("compiled 1 program in ") for line in lines) == len(NAMES)
    assert any(line.startswith("step 3/4  reward ") and "  kl " in line and "  loss " in line for line in lines)
    assert "\x1b" not in process.outputs[0]


def test_a_run_ends_with_what_it_made_and_what_to_do_next(process, root):
    lines, whole = process.outputs[0].splitlines(), root / "whole"
    for name in NAMES:
        at = next(at for at, line in enumerate(lines) if line.startswith(f"{whole / name}: done in 0:"))
        assert lines[at].endswith(": checkpoint of step 4, metrics.jsonl, samples.jsonl, tensorboard/")
        asked = [line.removeprefix("next:").strip() for line in lines[at + 1 : at + 5]]
        if name == "rm":  # it can't write
            assert asked[:3] == [
                f"jaxrlhf evaluate {whole}/rm",
                f"jaxrlhf report {whole}/rm",
                f"jaxrlhf export {whole}/rm --role reward --to {whole}/rm-hf",
            ]
        else:
            assert asked == [
                f"jaxrlhf evaluate {whole / name}",
                f"jaxrlhf report {whole / name}",
                f"jaxrlhf generate {whole / name} --prompt TEXT",
                f"jaxrlhf export {whole / name} --to {whole / name}-hf",
            ]


def test_no_command_writes_noise(process):
    """Train, evaluate, export and generate: nothing of transformers, orbax, absl, TFDS or JAX on standard error."""
    assert process.errors == ""


# ---- compilations and dispatches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_compiled_after_the_first_iteration(process, name):
    """But, at the very end, what normalises a reward model."""
    rows = [at for at, event in enumerate(process.events) if event["what"] == "row" and event["run"] == name]
    first, last = (next(at for at in rows if process.events[at]["step"] == step) for step in (1, 4))
    compiled = [event["name"] for event in process.events[first : rows[-1]] if event["what"] == "compiled"]
    assert [event for event in process.events[first:last] if event["what"] == "compiled"] == []
    assert compiled == {"rm": ["jit(score)", "jit(fold)"]}.get(name, [])


@pytest.mark.parametrize("name", NAMES)
def test_the_step_is_compiled_once_and_before_the_first_iteration(process, name):
    whats = [(event["what"], event.get("run")) for event in process.events]
    programs = whats.index(("programs", name))
    assert process.events[programs]["count"] == 1  # one bucket
    assert programs < whats.index(("row", name))


def test_an_iteration_is_one_dispatch(process):
    """Sampling, scoring and 2 x 2 updates of three models; between two iterations the trainer dispatches nothing."""
    known, found = (event["count"] for event in process.events if event["what"] == "dispatched")
    assert known >= 1 and known == int(known)
    assert found == 2 * known


# ---- a trainer with a step that costs nothing -----------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch, one_device, process):
    """In place of the fused step: count, and report ``numbers`` of the step (f32[] -> metrics)."""
    return functools.partial(count_steps, monkeypatch)


def count_steps(monkeypatch, numbers=lambda step: {}, seen=None) -> None:

    def make_iteration(recipe):
        def iteration(state, batch):
            if seen is not None and batch.prompts is not None:
                seen.append(batch.prompts.tokens.shape)
            step = state.step + 1
            return state.replace(step=step), {"loss/policy": jnp.float32(1), **numbers(step)}, None

        return iteration

    monkeypatch.setattr(programs, "make_iteration", make_iteration)


def bare(root: Path, folder: Path, *more: str):
    """sft of the model of root/whole, without held-out data."""
    off = ["eval.every=0", "data.eval_demonstrations=null", "log.trackers=[]", "tokenizer.train_vocab_size=null"]
    return runs.config("sft", root, folder, *off, f"models.policy={{init_from: {root}/whole/sft}}", *more)


def test_rows_that_are_left_out_are_told_before_anything_is_compiled(root, tmp_path, one_device, monkeypatch, capsys):
    """Of training data and of held-out data; the counts are metrics of the iterations and of the evaluation."""
    count_steps(monkeypatch)
    rows = ["the film is warm and its plot bright"] * 5 + ["the film is warm " * 30] * 35
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    data = [f"data.{name}={{path: {tmp_path}/rows.jsonl}}" for name in ("demonstrations", "eval_demonstrations")]
    more = ["iterations=1", "eval.every=1", "data.too_long=drop"]
    assert trainer.run(runs.config("sft", root, tmp_path, *data, *more)) == "done"
    out = capsys.readouterr().out
    for name in ("data.demonstrations", "data.eval_demonstrations"):
        assert f"{name}: 40 read, 5 kept, 35 dropped (35 too long)" in out
        assert f"warning: {name}: 88% of its rows are dropped; data.max_length=" in out
    assert out.index("data.eval_demonstrations") < out.index("compiled")
    _, train, held_out = runs.rows(tmp_path / "sft")
    assert (train["data/demonstrations_dropped"], held_out["eval/data/demonstrations_dropped"]) == (35, 35)


@pytest.mark.parametrize("metric", ["loss/policy", "loss/value", "value/grad_norm"])
def test_numbers_that_are_not_finite_stop_the_run_before_they_are_saved(root, tmp_path, fake, metric):
    fake(lambda step: {metric: jnp.where(step == 3, jnp.nan, 1.0)})
    cfg = bare(root, tmp_path, "iterations=5", "checkpoint.every=1")
    file = rf"{re.escape(str(tmp_path))}/sft/bad_batch_3\.npz"
    then = "the same command comes to it again, with on_nonfinite=skip it goes on without the update"
    expected = rf"^step 3: {metric} is nan; last good checkpoint: step 2; the batch: {file}; {then}$"
    with pytest.raises(FloatingPointError, match=expected):
        trainer.run(cfg)
    with np.load(tmp_path / "sft" / "bad_batch_3.npz") as batch:
        assert any(name.endswith(".tokens") and batch[name].ndim == 2 for name in batch)
    assert runs.steps_kept(tmp_path / "sft") == [1, 2]
    assert [row[metric] for row in runs.rows(tmp_path / "sft")] == [1.0, 1.0, None]


def test_an_infinite_loss_is_exit_code_1_also_where_its_batch_can_t_be_written(root, tmp_path, fake, command):
    fake(lambda step: {"loss/value": jnp.where(step == 2, jnp.inf, 1.0)})
    config = tmp_path / "sft.yaml"
    (tmp_path / "sft" / "bad_batch_2.npz").mkdir(parents=True)
    config.write_text(dump(bare(root, tmp_path)))
    _, err = command("train", config, code=1)
    assert err.startswith("step 2: loss/value is inf; last good checkpoint: step None; the batch: not written (")


@pytest.mark.parametrize(("bad", "stopped"), [((2, 3, 5), None), ((2, 3, 4), 4)])
def test_updates_that_are_not_finite_may_be_left_out(root, tmp_path, fake, capsys, bad, stopped):
    """Until there are three steps with such updates, one after the other."""
    fake(lambda step: {"update/not_finite": jnp.where(jnp.isin(step, jnp.array(bad)), 0.25, 0.0)})
    cfg = bare(root, tmp_path, "iterations=6", "on_nonfinite=skip")
    if stopped is None:
        assert trainer.run(cfg) == "done"
    else:
        with pytest.raises(FloatingPointError, match=r"^step 4: a new parameter is not finite; .*3 steps in a row \("):
            trainer.run(cfg)
    out = capsys.readouterr().out
    assert "warning: step 2: a new parameter is not finite: 25% of its updates left out; the batch: " in out
    assert {path.name for path in (tmp_path / "sft").glob("bad_*")} == {f"bad_batch_{step}.npz" for step in bad}


def test_other_metrics_may_be_nan(root, tmp_path, fake):
    fake(lambda step: {"value/explained_variance": jnp.float32(jnp.nan)})
    assert trainer.run(bare(root, tmp_path)) == "done"


def signal_when(monkeypatch, method: str, call: int, number: signal.Signals = signal.SIGTERM) -> None:
    """This process gets a signal when the Trainer's method begins for the ``call``-th time."""
    real, calls = getattr(trainer.Trainer, method), []

    def signalling(self, *args):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return real(self, *args)

    monkeypatch.setattr(trainer.Trainer, method, signalling)


STOPS = {signal.SIGTERM: ("SIGTERM", "preempted"), signal.SIGINT: ("Ctrl-C", "interrupted")}


@pytest.mark.parametrize(
    ("method", "call", "at", "number"),
    [
        ("flush", 2, 2, signal.SIGTERM),
        pytest.param("save", 1, 3, signal.SIGINT, marks=pytest.mark.nightly),
        pytest.param("samples_due", 4, 4, signal.SIGTERM, marks=pytest.mark.nightly),
    ],
)
def test_a_signal_is_heard_wherever_the_loop_is(root, tmp_path, monkeypatch, fake, capsys, method, call, at, number):
    """And saves, where checkpoint.every would not."""
    fake()
    signal_when(monkeypatch, method, call, number)
    handler = signal.getsignal(number)
    cfg = bare(root, tmp_path, "iterations=6", "checkpoint.every=3")
    name, ended = STOPS[number]
    assert trainer.run(cfg) == ended
    assert f"{name}: stopped at step {at}; the same command resumes\n" in capsys.readouterr().out
    assert signal.getsignal(number) == handler
    assert verified_steps.newest(tmp_path / "sft") == at
    assert [row["step"] for row in runs.rows(tmp_path / "sft")] == list(range(1, at + 1))
    assert trainer.run(cfg) == "done"
    assert [row["step"] for row in runs.rows(tmp_path / "sft")] == [1, 2, 3, 4, 5, 6]


def test_a_second_ctrl_c_stops_at_once(root, tmp_path, monkeypatch, fake):
    """While it saves: the checkpoint before is whole, and the run goes on from a whole one."""
    fake()
    signal_when(monkeypatch, "flush", 2, signal.SIGINT)
    signal_when(monkeypatch, "save", 1, signal.SIGINT)
    cfg = bare(root, tmp_path, "iterations=6")
    with pytest.raises(KeyboardInterrupt):
        trainer.run(cfg)
    assert trainer.run(cfg) == "done"
    assert [row["step"] for row in runs.rows(tmp_path / "sft")] == [1, 2, 3, 4, 5, 6]


def test_a_run_needs_no_main_thread(root, tmp_path, fake):
    fake()
    ended: list[str] = []
    thread = threading.Thread(target=lambda: ended.append(trainer.run(bare(root, tmp_path))))
    thread.start()
    thread.join()
    assert ended == ["done"] and runs.steps_kept(tmp_path / "sft") == [2, 4]


@pytest.mark.parametrize(("method", "number"), [("evaluate", signal.SIGINT), ("compile", signal.SIGTERM)])
def test_a_signal_before_the_first_iteration_saves_nothing(root, tmp_path, monkeypatch, fake, capsys, method, number):
    fake()
    cfg = runs.config("sft", root, tmp_path, "log.trackers=[]")
    numbers = trainer.held_out.Result({"loss/policy": 1.0}, [])
    monkeypatch.setattr(trainer.held_out.HeldOut, "run", lambda *_: numbers)
    signal_when(monkeypatch, method, 1, number)
    name, ended = STOPS[number]
    assert trainer.run(cfg) == ended
    assert f"{name}: stopped at step 0" in capsys.readouterr().out
    assert verified_steps.newest(tmp_path / "sft") is None
    assert trainer.run(cfg) == "done"
    assert [row["step"] for row in runs.rows(tmp_path / "sft")] == [0, 1, 2, 2, 3, 4, 4]


def test_a_run_that_is_out_of_time_saves_and_resumes(root, tmp_path, fake, capsys, monkeypatch):
    """Each look at the clock takes 10 s: time runs out in the third iteration. Nothing of it is an error."""
    fake()
    now = itertools.count(1000.0, 10.0)
    monkeypatch.setattr(trainer.TimeLimit, "clock", staticmethod(lambda: next(now)))
    cfg = bare(root, tmp_path, "max_run_duration=100", "checkpoint.every=3")
    cfg_without = dataclasses.replace(cfg, max_run_duration=None)
    stop = Stop()
    stop.began = 1000.0
    assert trainer.run(cfg, stop=stop) == "out of time"
    assert re.search(r"max_run_duration: stopped at step [1-3]; the same command resumes", capsys.readouterr().out)
    (step,) = runs.steps_kept(tmp_path / "sft")
    assert 1 <= step < 4
    assert trainer.run(cfg_without) == "done"
    assert [row["step"] for row in runs.rows(tmp_path / "sft")] == [1, 2, 3, 4]


def test_an_alarm_stops_a_run_that_goes_on_by_the_same_command(root, tmp_path, fake, capsys):
    """It is seen once its row is there, while the next iteration runs; that one is saved too."""
    fake(lambda step: {"kl/sampler_mismatch": jnp.where(step >= 2, 0.5, 0.0)})
    cfg = bare(root, tmp_path, "iterations=6", "checkpoint.every=6", "alarms.patience=1", "alarms.stop=[mismatch]")
    assert trainer.run(cfg) == "alarmed"
    (step,) = runs.steps_kept(tmp_path / "sft")
    out = capsys.readouterr().out
    assert step == 3 and "warning: mismatch at step 2: kl/sampler_mismatch is 0.5 (alarms.mismatch: 0.1)\n" in out
    assert f"alarms.stop: mismatch: stopped at step {step}, which is saved; the same command resumes\n" in out
    assert trainer.run(cfg) == "done"
    assert [row["step"] for row in runs.rows(tmp_path / "sft")] == [1, 2, 3, 4, 5, 6]
    assert "warning: mismatch" not in capsys.readouterr().out


def test_sigterm_in_the_last_iteration_is_no_preemption(root, tmp_path, monkeypatch, fake):
    fake()
    signal_when(monkeypatch, "save", 2)
    assert trainer.run(bare(root, tmp_path)) == "done"


@pytest.fixture
def measured(monkeypatch, fake):
    """Evaluations that cost nothing: the loss is 2 at step 0, then 1, 3, 4, ..."""
    numbers = iter([2.0, 1.0, 3.0, 4.0, 5.0, 6.0])
    make = lambda *_: trainer.held_out.Result({"loss/policy": next(numbers)}, [])
    monkeypatch.setattr(trainer.held_out.HeldOut, "run", make)
    fake()


def test_the_best_checkpoint_stays(root, tmp_path, measured, capsys):
    """Best is step 2. Step 3 is saved without having been measured, and is not mistaken for it."""
    options = ["checkpoint.every=1", "checkpoint.keep=1", "checkpoint.best=eval/loss/policy", "checkpoint.mode=min"]
    assert trainer.run(runs.config("sft", root, tmp_path, *options)) == "done"
    assert runs.steps_kept(tmp_path / "sft") == [2, 4]
    assert ": checkpoint of step 4 (best eval/loss/policy: step 2), metrics.jsonl" in capsys.readouterr().out


def test_what_is_shown_is_what_goes_on(root, tmp_path, measured, monkeypatch):
    """Evaluations and checkpoints happen within their states, programs are compiled in theirs, and updates in none."""
    shown: list[str] = []
    noted: list[tuple[str, str | None]] = []

    @contextlib.contextmanager
    def doing(self, state):
        shown.append(state)
        yield
        shown.pop()

    def note(owner, name):
        inner = getattr(owner, name)
        call = lambda *args, **kwargs: (noted.append((name, shown[-1] if shown else None)), inner(*args, **kwargs))[1]
        monkeypatch.setattr(owner, name, call)

    monkeypatch.setattr(progress.PlainLines, "doing", doing)
    for owner, name in (
        (trainer, "build"),
        (trainer, "initial_state"),
        (trainer, "compile_programs"),
        (trainer.held_out.HeldOut, "run"),
        (trainer.checkpoint.Checkpoints, "save"),
        (trainer.checkpoint.Checkpoints, "close"),
        (trainer.MetricsLog, "write"),
    ):
        note(owner, name)
    trainer.run(runs.config("sft", root, tmp_path))
    assert set(noted) == {
        ("build", "loading"),
        ("initial_state", "loading"),
        ("compile_programs", "compiling"),
        ("run", "evaluating"),
        ("save", "saving"),
        ("close", "saving"),
        ("write", None),
    }


def test_a_best_that_is_never_measured_is_refused_before_anything_is_compiled(root, tmp_path, monkeypatch, process):
    monkeypatch.setattr(trainer, "compile_programs", lambda *_: pytest.fail("something is compiled"))
    cfg = runs.config("sft", root, tmp_path, "checkpoint.best=eval/loss/polcy")
    with pytest.raises(ConfigError, match=r"checkpoint\.best: eval/loss/polcy: nothing that is .* eval/loss/policy"):
        trainer.run(cfg)


@pytest.mark.parametrize("name", NAMES)
def test_what_an_evaluation_will_measure_is_known_before(process, root, tmp_path, one_device, name):
    """The names that checkpoint.best may take are those that evaluations give."""
    ready = build.build(resolve_config(runs.config(name, root, tmp_path)))
    with current(ready.mesh):
        names = trainer.held_out.HeldOut(ready).names(abstract_state(ready))
    _, evaluations = metric_rows(root / "whole" / name)
    written = {key for row in evaluations for key in row if "/" in key}
    assert {f"eval/{name}" for name in names} == written - {"eval/time/evaluation"}


def test_a_role_starts_from_the_checkpoint_that_is_named(process, root, tmp_path, one_device):
    start = f"{root}/whole/sft@2"
    cfg = runs.config("sft", root, tmp_path, f"models.policy={{init_from: {start}}}", "tokenizer.train_vocab_size=null")
    found = build.build(resolve_config(cfg)).weights["policy"]
    assert (found.path, found.step) == (f"{root}/whole/sft", 2)
    with pytest.raises(ConfigError, match=r"^models\.policy\.init_from: .*/sft@3: no step 3; .*/sft has: 2, 4$"):
        build.build(
            resolve_config(runs.config("sft", root, tmp_path, f"models.policy={{init_from: {root}/whole/sft@3}}"))
        )


def test_every_bucket_is_compiled_before_the_first_iteration(process, root, tmp_path, monkeypatch, fake):
    """And none is compiled again, though the widths of the batches differ."""
    lowered, compiled = [], []
    fake(seen=lowered)
    data = ["data.prompt_buckets=[3, 4, 16]", "data.eval_prompts=null", "data.eval_preferences=null"]
    off = ["eval.every=0", "eval.judge=null", "log.trackers=[]", "log.samples=0", "algorithm.reward_update=false"]
    more = ["batch.prompts_per_step=8", "algorithm.num_minibatches=1", "iterations=8"]
    (tmp_path / "prompts.jsonl").write_text("".join('{"prompt": "%s"}\n' % ("a" * n) for n in [1] * 30 + [3, 7]))
    data.append(f"data.prompts={{path: {tmp_path}/prompts.jsonl}}")
    cfg = runs.config("ppo", root, tmp_path, *data, *off, *more)
    used, write = [], trainer.MetricsLog.write
    listen = lambda event, duration_secs, **_: compiled.append(event) if event.endswith(runs.COMPILED) else None
    real_put = trainer.put

    def put(mesh, batch):
        used.append(batch.prompts.tokens.shape)
        return real_put(mesh, batch)

    def noting(self, step, numbers):
        write(self, step, numbers)
        compiled.clear()

    monkeypatch.setattr(trainer, "put", put)
    monkeypatch.setattr(trainer.MetricsLog, "write", noting)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert trainer.run(cfg) == "done"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert lowered == [(8, 3), (8, 4), (8, 16)]
    assert len(used) == 8 and len(set(used)) > 1
    assert compiled == []


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_second_process_that_deletes_the_lock_stops_the_first(root, tmp_path, fake):
    """Before it saves; a lock that is only deleted is made anew."""
    fake()
    seen, held = [], []

    def watch(step):
        seen.append(step.number)
        (tmp_path / "sft" / ".lock").unlink(missing_ok=True)
        if step.number == 2:
            held.append(lock_run_dir(tmp_path / "sft"))

    cfg = bare(root, tmp_path, "iterations=4", "checkpoint.every=1", "checkpoint.keep=9")
    with pytest.raises(RunDirBusy, match=rf"^run_dir: .*/sft: already being written by process {os.getpid()} on "):
        trainer.run(cfg, watch=watch)
    assert seen == [1, 2] and runs.steps_kept(tmp_path / "sft") == [1]


def test_training_goes_on_where_a_save_fails(root, tmp_path, monkeypatch, fake, capsys):
    fake()
    start = checkpoint.Checkpoints.start

    def fail(self, step, *more):
        if step == 1:
            raise OSError(28, "No space left on device")
        start(self, step, *more)

    monkeypatch.setattr(checkpoint.Checkpoints, "start", fail)
    assert trainer.run(bare(root, tmp_path, "iterations=2", "checkpoint.every=1")) == "done"
    said = "a checkpoint could not be written: No space left on device; once it can be, the same command starts again"
    assert f"{tmp_path}/sft: {said}; training goes on" in capsys.readouterr().out
    assert runs.steps_kept(tmp_path / "sft") == [2]


def test_a_second_process_is_refused(process, root, command):
    """One that holds the lock is another process to the next one, whoever it is."""
    run = root / "whole" / "sft"
    kept = (run / "config.yaml").read_bytes()
    lock = lock_run_dir(run)
    assert lock
    _, err = command(*runs.train(*runs.overrides(root / "text", root / "whole"), configs=runs.TINY[:1]), code=2)
    lock.close()
    assert err.startswith(f"run_dir: {run}: already being written by process {os.getpid()} on ")
    assert err.count("\n") == 1
    assert (run / "config.yaml").read_bytes() == kept


MISTAKES = {
    "algorithm.kl_coeff=1": "command line: algorithm.kl_coeff: unknown key (value 1); nearest: kl_coef\n",
    "iterations=many": 'command line: iterations: "many": expected an integer\n',
    "batch.prompts_per_step=24": "batch.prompts_per_step: 24: 24 rows do not divide over 2 minibatches x 8 batch ",
    "mesh.data=3": "mesh: (data=3, fsdp=1, tensor=1) needs 3 devices; there are 8 here",
    "models.value.init_from=value": "models.value.init_from: value: goes in a circle (value -> value); expected one",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_config_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, command, mistake):
    monkeypatch.setattr(trainer, "build", lambda *_: pytest.fail("a model is built"))
    out, err = command("train", runs.tiny_config("ppo"), f"run_dir={tmp_path}/run", mistake, code=2)
    assert out == "" and MISTAKES[mistake] in err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_the_process_is_refused_in_one_line_too(tmp_path):
    """Nothing that a library says while it is imported comes before or behind it."""
    command = [
        sys.executable,
        "-m",
        "jaxrlhf",
        "train",
        str(runs.tiny_config("sft")),
        f"run_dir={tmp_path}/run",
        "sead=1",
    ]
    done = subprocess.run(
        command, cwd=runs.ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "command line: sead: unknown key (value 1); nearest: seed\n"
    assert list(tmp_path.iterdir()) == []


# ---- going on with another config -----------------------------------------------------------------------------------


@pytest.fixture
def half_done(process, root, tmp_path) -> Path:
    """sft, stopped at step 2, in a folder of its own."""
    (tmp_path / "runs").mkdir()
    return runs.copy_run(root / "whole" / "sft", tmp_path / "runs" / "sft", 2)


FIXED = {
    "models.policy.architecture.num_layers=2": "models.policy.architecture.num_layers: 2: ",
    "models.policy={init_from: elsewhere}": 'models.policy.init_from: "elsewhere": ',
    "precision.params=bfloat16": 'precision.params: "bfloat16": ',
    "tokenizer.train_vocab_size=310": "tokenizer.train_vocab_size: 310: ",
    "seed=1": "seed: 1: ",
    "batch.sequences_per_step=16": "batch.sequences_per_step: 16: ",
}


@pytest.mark.parametrize("change", FIXED)
def test_what_a_run_cannot_change_is_refused(root, half_done, monkeypatch, change):
    monkeypatch.setattr(trainer, "build", lambda *_: pytest.fail("a model is built"))
    kept = {path: path.stat().st_mtime_ns for path in half_done.rglob("*") if path.name != ".lock"}
    with pytest.raises(ConfigError) as error:
        trainer.run(runs.config("sft", root, half_done.parent, change))
    assert str(error.value).startswith(FIXED[change] + f"the run in {half_done} is at step 2 with ")
    assert "\n" not in str(error.value)
    assert kept == {path: path.stat().st_mtime_ns for path in half_done.rglob("*") if path.name != ".lock"}


def test_another_algorithm_is_refused(root, half_done):
    cfg = runs.config("rm", root, half_done.parent, f"run_dir={half_done}")
    with pytest.raises(
        ConfigError, match=r'^algorithm\.name: "rm": the run in .* is at step 2 with "sft"; expected the sa'
    ):
        trainer.run(cfg)


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        (
            "sft",
            "data.max_length=16",
            r"data\.max_length: 16: .* with \d+, and its place in the data would mean other r",
        ),
        (
            "ppo",
            "algorithm.reward_update=false",
            r"algorithm\.reward_update: false: .* with true, and its state does no",
        ),
    ],
)
def test_a_key_that_turns_out_to_change_what_was_saved_is_named(
    process, root, tmp_path, one_device, name, change, line
):
    """With the way out, before anything is compiled."""
    (tmp_path / "runs").mkdir()
    run = runs.copy_run(root / "whole" / name, tmp_path / "runs" / name, 2)
    with pytest.raises(ConfigError, match=f"^{line}") as error:
        trainer.run(runs.config(name, root, run.parent, change))
    way_out = f"expected the same, or another run_dir (with init_from: {run} it starts from these weights)"
    assert str(error.value).endswith(way_out) and "\n" not in str(error.value)


def test_fewer_iterations_than_are_done(process, root, capsys):
    assert trainer.run(runs.config("sft", root, root / "whole", "iterations=3")) == "done"
    said = f"{root}/whole/sft: 4 iterations are done, and iterations is 3; raise iterations= (or epochs=) to go on\n"
    assert said in capsys.readouterr().out


def test_other_changes_are_told(root, half_done, fake, capsys):
    fake()
    changes = ["optimizer.default.learning_rate=0.5", "log.every=2", "eval.every=0", "data.eval_demonstrations=null"]
    assert trainer.run(runs.config("sft", root, half_done.parent, *changes)) == "done"
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("changed since step 2: "))
    assert "optimizer.default.learning_rate: 0.01 -> 0.5" in line
    assert "log.every: 1 -> 2" in line and "eval.every: 2 -> 0" in line
    assert "run_dir" not in line  # the run may be moved
    assert load(half_done / "config.yaml").log.every == 2


def test_a_key_that_the_saved_config_is_older_than_is_no_change(root, half_done):
    """Such as models.policy.share_trunk, where models.* can't be changed; one that is gone is told."""
    cfg = runs.config("sft", root, half_done.parent)
    file = half_done / "checkpoints" / "2" / "extra" / "metadata"
    saved, line = json.loads(file.read_text()), "    share_trunk: false\n"
    assert saved["config"].count(line) == 1
    (half_done / "checkpoints" / "2" / "manifest.json").unlink()  # an older version wrote none
    file.write_text(json.dumps(saved | {"config": saved["config"].replace(line, "")}))
    assert changes_since_saved(saved_run.SavedRuns(), resolve_config(cfg)) == []
    gone = saved["config"].replace("deterministic: false\n", "deterministic: false\nfrozen: 1\n")
    file.write_text(json.dumps(saved | {"config": gone}))
    assert changes_since_saved(saved_run.SavedRuns(), resolve_config(cfg)) == ["frozen: 1 -> null"]


def test_other_data_is_refused(root, half_done, tmp_path, one_device):
    """The position in the data would mean other rows. The run's own config stays: what reads the run reads that."""
    kept = (half_done / "config.yaml").read_bytes()
    shutil.copy(root / "text" / "eval_demonstrations.jsonl", tmp_path / "other.jsonl")
    where = (
        r"^data\.demonstrations\.path: .*other\.jsonl\": the run in .* is at step 2 with .*demonstrations\.jsonl\", "
    )
    with pytest.raises(ConfigError, match=where + "and its place in the data would mean other rows; expected the same"):
        trainer.run(runs.config("sft", root, half_done.parent, f"data.demonstrations={{path: {tmp_path}/other.jsonl}}"))
    assert (half_done / "config.yaml").read_bytes() == kept
