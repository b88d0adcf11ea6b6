"""Held-out evaluation: what the algorithm measures on data that it never learned from, during a run and after it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxrlhf import checkpoint
from jaxrlhf.algorithms.rm import score_pairs
from jaxrlhf.build import Run, abstract_state, build
from jaxrlhf.config import load
from jaxrlhf.config_batch import ROWS_KEY
from jaxrlhf.feed import KIND_OF, held_out, put, read_source
from jaxrlhf.rewards.judge import Judge
from jaxrlhf.score import score
from jaxrlhf.step import make_held_out_rollout, make_measure
from jaxrlhf.types import Mean, Sequences, TrainState


class Result(NamedTuple):
    """One evaluation."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]  # prompt, response, score, split


class HeldOut:
    """The held-out batches of a run and the programs that evaluate on them."""

    def __init__(self, ready: Run, size: int | None = None):
        cfg = ready.cfg
        self.ready, self.size = ready, size or cfg.eval.size
        field = ready.algorithm.batch(cfg.algorithm)[0]
        self.kind = KIND_OF[field]
        rows = min(getattr(cfg.batch, ROWS_KEY[field]), self.size)
        self.batches = held_out(ready, self.kind, self.size, rows)
        self.rollout = jax.jit(make_held_out_rollout(ready.recipe)) if ready.algorithm.rollout else None
        self.measure = jax.jit(make_measure(ready.recipe))

    def run(self, state: TrainState) -> Result | None:
        """Metrics over all held-out batches, and the first sampled responses. None without held-out data."""
        if not self.batches:
            return None
        total: dict[str, Mean] = {}
        samples: list[dict[str, Any]] = []
        for host in self.batches:
            batch = put(self.ready.mesh, host.batch)
            if self.rollout is not None:
                batch = batch.replace(sequences=self.rollout(state, batch))
            if self.ready.reward_function is not None:
                batch = batch.replace(sequences=score(self.ready, batch.sequences, host.columns or []).sequences)
            means, sequences = self.measure(state, batch)
            means = jax.device_get(means)
            total = {name: total[name] + mean if name in total else mean for name, mean in means.items()}
            if sequences is not None:
                samples += sample_rows(self.ready, sequences, host.counts["rows"], "eval")
        metrics = {name: float(mean.total) / max(float(mean.count), 1e-8) for name, mean in total.items()}
        return Result(metrics, samples)


def sample_rows(ready: Run, sequences: Sequences, count: int, split: str) -> list[dict[str, Any]]:
    """The first ``count`` rows as text: prompt, response, score, split."""
    rows = jax.tree.map(lambda x: np.asarray(jax.device_get(x))[:count], sequences)
    decode = lambda ids: ready.tokenizer.decode(ids, skip_special_tokens=True)
    texts = []
    for i in range(len(rows.tokens)):
        prompt = rows.tokens[i][rows.valid[i] & ~rows.response_mask[i]]
        row = {"prompt": decode(prompt), "response": decode(rows.tokens[i][rows.response_mask[i]])}
        if rows.scores is not None:
            row["score"] = round(float(rows.scores[i]), 4)
        texts.append(row | {"split": split})
    return texts


# ---- a finished run -------------------------------------------------------------------------------------------------


def evaluate_run(run_dir: str, judge: bool = True, samples: int = 8) -> dict[str, Any]:
    """A run's latest checkpoint on its held-out data, as JSON: ``after``, and for a policy that was trained from a
    reference ``before`` (the reference, under the same sampling noise), what the reward model gets right, and what an
    outside judge says (``judge``; where the config names data to train it on).

    Raises FileNotFoundError, in one line, where there is no checkpoint."""
    step, _ = checkpoint.read_extra(run_dir)
    cfg = dataclasses.replace(load(epath.Path(run_dir) / "config.yaml"), run_dir=run_dir)
    ready = build(cfg)
    report: dict[str, Any] = {"run": run_dir, "algorithm": cfg.algorithm_name, "step": step}
    with jax.set_mesh(ready.mesh):
        saved = checkpoint.Checkpoints(run_dir, read_only=True)
        state = saved.restore(step, abstract_state(ready))
        saved.close()
        held = HeldOut(ready)
        results = {"after": held.run(state)}
        if ready.algorithm.rollout and "reference" in state.slow:
            before = state.replace(params=state.params | {"policy": state.slow["reference"]})
            results = {"before": held.run(before), **results}
        report |= {name: result.metrics for name, result in results.items() if result}
        report |= pair_report(ready, state)
    responses = {name: result.samples for name, result in results.items() if result and result.samples}
    if judge and responses and cfg.eval.judge is not None:
        judge_of = Judge(read_source(ready, "labels", cfg.eval.judge, "eval.judge"))
        report["judge"] = judge_report(judge_of, responses)
    if responses:
        report["samples"] = compare(responses, samples)
    return report


def pair_report(ready: Run, state: TrainState) -> dict[str, Any]:
    """{"reward_model": accuracy and calibration on held-out pairs}, where the run has a reward model and such pairs.

    The expected calibration error is over 10 bins of the probability of the predicted preference (Guo et al. 2017).
    """
    trees = state.params if "reward" in state.params else state.slow
    batches = held_out(ready, "preferences", ready.cfg.eval.size, ready.cfg.batch.preferences_per_step)
    if "reward" not in trees or not batches:
        return {}
    score = jax.jit(lambda trees, pairs: score_pairs(ready.recipe.nets, trees, pairs))
    differences = []
    for host in batches:
        chosen, rejected = jax.device_get(score(trees, put(ready.mesh, host.batch).preferences))
        differences.append((chosen - rejected)[: host.counts["rows"]])
    difference = np.concatenate(differences)
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    right = (difference > 0) + 0.5 * (difference == 0)
    bins = np.minimum(((confidence - 0.5) * 20).astype(int), 9)
    gaps = [abs((confidence - right)[bins == b].sum()) for b in range(10)]
    found = {"accuracy": right.mean(), "calibration_error": sum(gaps) / len(difference)}
    rounded = {name: round(float(value), 4) for name, value in found.items()}
    return {"reward_model": {"pairs": len(difference), **rounded}}


def judge_report(judge: Judge, responses: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The outside judge's mean probability that a text is positive, before and after; win_rate: after over before."""
    marks = {name: judge([row["prompt"] + row["response"] for row in rows]) for name, rows in responses.items()}
    report = {name: float(values.mean()) for name, values in marks.items()}
    if "before" in marks:
        win = (marks["after"] > marks["before"]) + 0.5 * (marks["after"] == marks["before"])
        report["win_rate"] = float(win.mean())
    return {name: round(value, 4) for name, value in report.items()}


def compare(responses: dict[str, list[dict[str, Any]]], count: int) -> list[dict[str, Any]]:
    """The first ``count`` prompts with their response and score under each name."""
    rows = []
    for group in zip(*responses.values(), strict=True):
        row: dict[str, Any] = {"prompt": group[0]["prompt"]}
        for name, sample in zip(responses, group, strict=True):
            row |= {name: sample["response"], f"score_{name}": sample.get("score")}
        rows.append(row)
    return rows[:count]


SHOWN = {  # metric -> what a reader calls it
    "score/mean": "reward",
    "score/std": "its standard deviation",
    "kl/reference": "KL from the reference (nats a response)",
    "response/length_mean": "length (tokens)",
    "response/ended": "share that ended by itself",
    "loss/policy": "loss (nats a token)",
    "reward/accuracy": "accuracy on pairs",
    "loss/reward": "loss (nats a pair)",
}


def print_report(report: dict[str, Any]) -> None:
    """The report for a reader: a table of before and after, then the samples."""
    console = Console(soft_wrap=True)
    console.print(f"[bold]{report['run']}[/bold]: {report['algorithm']}, step {report['step']}", highlight=False)
    names = [name for name in ("before", "after") if name in report]
    table = Table("held out", *names)
    for metric, label in SHOWN.items():
        if any(metric in report[name] for name in names):
            table.add_row(label, *(f"{report[name][metric]:.3f}" for name in names))
    if "judge" in report:
        table.add_row("outside judge: share positive", *(f"{report['judge'][name]:.3f}" for name in names))
    console.print(table)
    if "win_rate" in report.get("judge", {}):
        console.print(f"outside judge prefers after to before: {report['judge']['win_rate']:.1%}", highlight=False)
    if "reward_model" in report:
        pairs = report["reward_model"]
        text = f"reward model: {pairs['accuracy']:.1%} of {pairs['pairs']:.0f} held-out pairs right, "
        console.print(text + f"calibration error {pairs['calibration_error']:.3f}", highlight=False)
    for row in report.get("samples", []):
        console.print(f"\n[bold]{escape(row['prompt'])}[/bold]", highlight=False)
        for name in names:
            score = "" if row.get(f"score_{name}") is None else f" ({row[f'score_{name}']:+.2f})"
            console.print(f"  {name:>6}{score}: {escape(row[name].strip())}", highlight=False)
