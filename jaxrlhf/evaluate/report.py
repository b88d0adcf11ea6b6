"""`jaxrlhf evaluate`: a finished run measured on its held-out data, before and after, as JSON and for a reader."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxrlhf.algorithms.grading import combined, members_of
from jaxrlhf.algorithms.rm import score_pairs
from jaxrlhf.config.batch import rows_taken
from jaxrlhf.config.load import load
from jaxrlhf.config.record import Config, RoleConfig
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.data.batch_kinds import PREFERENCES
from jaxrlhf.data.batches import HostBatch
from jaxrlhf.data.summary import Summary
from jaxrlhf.errors import ConfigError, counted
from jaxrlhf.evaluate.against_reference import correlation
from jaxrlhf.evaluate.best_of import best_of_report
from jaxrlhf.evaluate.diversity import diversity
from jaxrlhf.evaluate.held_out import HeldOut, Result
from jaxrlhf.evaluate.llm_judge import LlmJudge, read_judge
from jaxrlhf.evaluate.perplexity import perplexities
from jaxrlhf.hosts import compiler_flags, processes
from jaxrlhf.log.run_dir import split_step
from jaxrlhf.models.lora import bases_in
from jaxrlhf.rewards.built_in import BUILT_IN
from jaxrlhf.rewards.graders import gold_graders
from jaxrlhf.run import checkpoint, saved_run, verified_steps
from jaxrlhf.run.build import Run, build
from jaxrlhf.run.feed import held_out
from jaxrlhf.run.initial_state import abstract_state
from jaxrlhf.run.transfer import fetch_all, put
from jaxrlhf.sharding import current
from jaxrlhf.types import Array, Preferences, TrainState, Trees, given


class Options(NamedTuple):
    """What an evaluation is to measure, and how."""

    judge: bool = True  # whether the outside judge of eval.judge is queried
    samples: int = 8  # prompts whose responses are shown
    beta: float | None = None  # in place of generate.beta
    best_of: Sequence[int] = ()  # the n of best_of_report
    gold: str | None = (
        None  # a second reward in place of the config's: "module:name" or a built-in one, else a reward model
    )
    sampling: Sequence[str] = ()  # keys of generate in place of the config's: "top_p=0.9"
    llm: str = ""  # a language model as a judge, as read_judge takes it

    def given(self) -> dict[str, Any]:
        """What is not as by default."""
        return {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}


def evaluate_run(name: str, options: Options = Options()) -> dict[str, Any]:
    """A run (RUN: its latest checkpoint, RUN@best, RUN@40) on its held-out data, as JSON: ``after``; for a policy with
    a reference also ``before`` (the reference, under the same sampling noise), ``win_rates`` of after over it; for a
    policy ``diversity``, ``samples`` and, with data.eval_demonstrations, their ``perplexity``; ``best_of``, rows of
    best_of_report; and ``reward_model``, what its reward model gets right.

    Raises FileNotFoundError, in one line, where there is no checkpoint."""
    llm = LlmJudge(read_judge(options.llm)) if options.llm else None
    with verified_steps.reading():
        return measure_run(name, options, llm)


def sampling_keys(sampling: Sequence[str]) -> list[str]:
    """The keys of a config that ``sampling`` (temperature=0.6) sets; a temperature that is named goes before the
    config's own for held-out responses."""
    named = any(text.startswith("temperature=") for text in sampling)
    return [*(f"generate.{text}" for text in sampling), *["eval.temperature=null"] * named]


def measure_run(name: str, options: Options, llm: LlmJudge | None) -> dict[str, Any]:
    """``evaluate_run``, while the run's steps stay where they are."""
    step, (run_dir, _) = saved_run.find_step(name), split_step(name)
    compiler_flags.use_compilation_cache()
    cfg = with_options(run_dir, options)
    resolved = resolve_config(cfg)
    if cfg.generate.beta and not resolved.roles.guides:
        beta = cfg.generate.beta
        raise ValueError(f"--beta: {beta:g}: {cfg.algorithm_name} has no action values to guide its policy; expected 0")
    ready = build(resolved)
    report: dict[str, Any] = {"run": run_dir, "algorithm": cfg.algorithm_name, "step": step}
    with current(ready.mesh):
        state = checkpoint.restore(run_dir, step, abstract_state(ready))
        held = HeldOut(ready, options.judge)
        if llm:
            llm.check(held.policy)
        result = held.run(state)
        kind = next((kind for kind in ready.resolved.kinds if kind.name == PREFERENCES.name), PREFERENCES)
        pairs = held_out(ready, kind, cfg.eval.size, rows_taken(cfg, kind))
        report |= pair_report(ready, state, pairs)
        extra = held.policy.others() if held.policy else {}
        if found := perplexities(ready if held.policy is None else held.policy.ready, state, extra):
            report["perplexity"] = found
        if options.best_of:
            report["best_of"] = best_of_report(ready, state, options.best_of)
    told = {row.where: row._asdict() for row in (*held.summaries(), pairs.summary) if row}
    report["data"] = list(told.values())
    return report | written_report(held, result, llm, options.samples)


def written_report(held: HeldOut, result: Result | None, llm: LlmJudge | None, samples: int) -> dict[str, Any]:
    """What is said of the responses of the last evaluation, and of its metrics."""
    report: dict[str, Any] = {}
    before = held.policy.before if held.policy else None
    if held.policy and before:
        report["before"] = held.policy.metrics(before)
        report["win_rates"] = held.policy.win_reports()
    if result:
        report["after"] = {name: value for name, value in result.metrics.items() if not name.startswith("data/")}
    if held.policy and llm and processes.is_main():
        report["win_rates"] = report.get("win_rates", {}) | {"llm": llm.report(held.policy)}
    if result and result.samples:
        written = {"before": before.rows} if before else {}
        written["after"] = result.samples
        report["diversity"] = {when: diversity(rows) for when, rows in written.items()}
        report["samples"] = compare(written, samples)
        for row, pair in zip(report["samples"], llm.verdicts if llm else []):
            row["llm"] = pair.win
    return report


def with_options(run_dir: str, options: Options) -> Config:
    """The run's config, as ``options`` change it."""
    cfg = load(epath.Path(run_dir) / "config.yaml", sampling_keys(options.sampling))
    cfg = dataclasses.replace(cfg, run_dir=run_dir)
    cfg = cfg if options.gold is None else with_gold(cfg, options.gold)
    if options.beta is None:
        return cfg
    return dataclasses.replace(cfg, generate=dataclasses.replace(cfg.generate, beta=options.beta))


def with_gold(cfg: Config, gold: str) -> Config:
    """``cfg`` whose second reward is ``gold``. Raises ConfigError for a function that is not there."""
    models = {role: model for role, model in cfg.models.items() if role != "gold"}
    if gold not in BUILT_IN and (":" not in gold or gold.startswith("gs://")):
        models["gold"] = RoleConfig(init_from=gold)
        return dataclasses.replace(cfg, models=models, eval=dataclasses.replace(cfg.eval, gold=None))
    try:
        gold_graders(gold)
    except ValueError as error:
        raise ConfigError(str(error).replace("eval.gold", "--gold", 1)) from None
    return dataclasses.replace(cfg, models=models, eval=dataclasses.replace(cfg.eval, gold=gold))


def pair_report(ready: Run, state: TrainState, batches: list[HostBatch]) -> dict[str, Any]:
    """{"reward_model": what it gets right of held-out pairs}, where the run has a reward model and such pairs.

    Of an ensemble its combined score is measured, and its members beside it."""
    nets = ready.recipe.nets
    members = members_of(nets)
    if members[0] not in {*state.params, *state.slow} or not batches:
        return {}
    trees = Trees({role: state.trees.of(role) for role in members}, bases_in(state.slow))

    @processes.jit
    def score(trees: Trees, pairs: Preferences) -> dict[str, tuple[Array, Array]]:
        each = score_pairs(nets, trees, pairs)
        whole = [combined(nets, {role: pair[side] for role, pair in each.items()}) for side in (0, 1)]
        return {"": (whole[0], whole[1])} | (each if len(each) > 1 else {})

    found: dict[str, list[np.ndarray]] = {}
    lengths = []
    for host in batches:
        batch = put(ready.mesh, host.batch)
        compared = batch.comparisons
        pairs = given(batch.preferences if compared is None else compared.pairs, "pairs")
        decided = slice(None) if compared is None else ~fetch_all(compared.tie)[: host.real]
        for name, sides in fetch_all(score(trees, pairs)).items():
            found.setdefault(name, []).append(np.stack(sides)[:, : host.real][:, decided])
        masks = fetch_all((pairs.chosen.response_mask, pairs.rejected.response_mask))
        lengths.append(np.stack([mask.sum(1) for mask in masks])[:, : host.real][:, decided])
    scores = {name: np.concatenate(parts, axis=1) for name, parts in found.items()}
    return {"reward_model": pair_metrics(scores, np.concatenate(lengths, axis=1))}


def pair_metrics(scores: dict[str, np.ndarray], lengths: np.ndarray) -> dict[str, Any]:
    """Of pairs: how many, accuracy, calibration error, Brier score, and the correlation of score and length; of an
    ensemble also each member's accuracy, and the deviation of differences between members.

    The expected calibration error is over 10 bins of the probability of the predicted preference (Guo et al. 2017).
    "reliability" has [mean probability, share right, pairs] of each bin that holds some.

    Args:
        scores: [2, pairs] of the chosen and the rejected sides, by "" and by the members' names.
        lengths: [2, pairs], tokens of the responses.
    """
    differences = {name: chosen - rejected for name, (chosen, rejected) in scores.items()}
    difference = differences.pop("")
    right = {name: (each > 0) + 0.5 * (each == 0) for name, each in {"": difference, **differences}.items()}
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    bins = np.minimum(((confidence - 0.5) * 20).astype(int), 9)
    gaps = [abs((confidence - right[""])[bins == b].sum()) for b in range(10)]
    filled = [(confidence[bins == b], right[""][bins == b]) for b in range(10) if (bins == b).any()]
    reliability = [[round(float(p.mean()), 4), round(float(hits.mean()), 4), len(p)] for p, hits in filled]
    found = {
        "accuracy": right.pop("").mean(),
        "calibration_error": sum(gaps) / len(difference),
        "brier": np.mean((1 - 1 / (1 + np.exp(-difference))) ** 2),
        "length_correlation": correlation(scores[""].reshape(-1), lengths.reshape(-1)),
    }
    found |= {f"accuracy/{name}": each.mean() for name, each in right.items()}
    if differences:
        found["disagreement"] = np.std([*differences.values()], axis=0).mean()
    rounded = {name: round(float(value), 4) for name, value in found.items()}
    return {"pairs": len(difference), **rounded, "reliability": reliability}


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
    "score/std": "standard deviation of the reward",
    "cost/mean": "cost",
    "cost/violations": "unsafe responses (cost above 0)",
    "kl/reference": "KL from the reference (nats per response)",
    "response/length_mean": "length (tokens)",
    "response/ended": "responses that ended with EOS or a stop text",
    "judge/mean": "share positive, by the outside judge",
    "gold/mean": "the second reward",
    "loss/policy": "loss",
    "implicit_reward/accuracy": "accuracy on pairs, by the policy's log-probs",
    "reward/accuracy": "accuracy on pairs",
    "loss/reward": "loss (nats a pair)",
}
DIVERSITY = {f"distinct_{n}": f"distinct-{n} of the responses" for n in (1, 2, 3)} | {"self_bleu": "self-BLEU"}
WINS = {"reward": "the reward", "judge": "the outside judge", "gold": "the second reward", "llm": "the LLM judge"}


def print_report(report: dict[str, Any]) -> None:
    """The report for a reader: a table of before and after, then the samples."""
    console = Console(soft_wrap=True)
    console.print(f"[bold]{report['run']}[/bold]: {report['algorithm']}, step {report['step']}", highlight=False)
    for line in (line for row in report.get("data", []) for line in Summary(**row).lines()):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    names = [name for name in ("before", "after") if name in report]
    table = Table("held out", *names)
    graders = sorted({key for name in names for key in report[name] if key.startswith("score/")} - SHOWN.keys())
    for metric, label in (SHOWN | {key: key for key in graders}).items():
        cells = [f"{report[name][metric]:.3f}" if metric in report[name] else "" for name in names]
        if any(cells):
            table.add_row(label, *cells)
    if found := report.get("perplexity"):
        table.add_row("perplexity of the demonstrations", *(f"{found[at]:.3f}" if at in found else "" for at in names))
    measured = report.get("diversity", {})
    for key, label in DIVERSITY.items():
        cells = [measured.get(name, {}).get(key) for name in names]
        if any(cell is not None for cell in cells):
            table.add_row(label, *("" if cell is None else f"{cell:.3f}" for cell in cells))
    console.print(table)
    for line in (line for name, row in report.get("win_rates", {}).items() for line in win_lines(name, row)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if "best_of" in report:
        console.print(best_of_table(report["best_of"]))
    if "reward_model" in report:
        pairs = report["reward_model"]
        text = f"reward model: {pairs['accuracy']:.1%} of {pairs['pairs']:.0f} held-out pairs ranked correctly, "
        text += f"calibration error {pairs['calibration_error']:.3f}, Brier score {pairs['brier']:.3f}, "
        text += f"correlation with length {pairs['length_correlation']:+.2f}"
        if "disagreement" in pairs:
            text += f", members apart by {pairs['disagreement']:.3f}"
        console.print(text, highlight=False)
    for row in report.get("samples", []):
        console.print(f"\n[bold]{escape(row['prompt'])}[/bold]", highlight=False)
        for name in names:
            score = "" if row.get(f"score_{name}") is None else f" ({row[f'score_{name}']:+.2f})"
            console.print(f"  {name:>6}{score}: {escape(row[name].strip())}", highlight=False)


def win_lines(name: str, row: dict[str, Any]) -> Iterator[str]:
    """The win rate by one who compares, with its interval; of a language model also how it judged."""
    who = WINS[name] + (f" {row['model']}" if "model" in row else "")
    other = "before" if row.get("against", "reference") == "reference" else f"the column {row['against']}"
    if row["prompts"]:
        text = f"win rate of after over {other}, by {who}: {row['rate']:.1%}"
        text += f" (95%: {row['low']:.1%} to {row['high']:.1%}, {row['prompts']} prompts)"
        yield f"{text}; at equal lengths {row['length_controlled']:.1%}"
    if "model" not in row:
        return
    told = [f"{row['unscorable']:.1%} of pairs without a verdict in both orders"]
    if "agreement" in row:
        told.append(f"both orders agree on {row['agreement']:.1%}")
    if "first_position" in row:
        told.append(f"{row['first_position']:.1%} of verdicts are for what stands first (50% is no bias)")
    yield f"  {who}: {', '.join(told)}"
    tokens = f"{row['prompt_tokens']:,} tokens of prompts and {row['completion_tokens']:,} of replies"
    yield f"  it took {counted(row['requests'], 'request')}, {tokens}"


def best_of_table(rows: list[dict[str, Any]]) -> Table:
    """A row for each n."""
    names = [name for name in rows[0] if name != "prompts"]
    table = Table(*names, title=f"best of n by the reward, {rows[0]['prompts']} prompts; nats, tokens")
    for row in rows:
        table.add_row(str(row["n"]), *(f"{row[name]:.3f}" for name in names[1:]))
    return table
