"""`epochs:` in place of `iterations:`: counted in rows of the training data, before optimizers are made."""

import dataclasses
import json

import pytest

from jaxrlhf import train
from jaxrlhf.config.batch import describe_batch
from jaxrlhf.config.load import load
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.data import batches
from jaxrlhf.data.batch_kinds import DEMONSTRATIONS, PROMPTS
from jaxrlhf.data.sources import open_source
from jaxrlhf.data.tokenizer import eos_ids, train_bpe
from jaxrlhf.errors import ConfigError
from jaxrlhf.plan import Plan, report
from jaxrlhf.plan.length import with_length
from jaxrlhf.run import build, epochs
from tests.support import runs
from tests.test_train import count_steps

TOKENIZER = train_bpe(["the film is warm"], 260)
BASE = """
run_dir: runs/x
epochs: {epochs}
algorithm: {{name: {name}}}
models: {{policy: {{init_from: here}}, reward: {{init_from: here}}}}
data: {{{section}: {{path: {path}}}, cache_dir: {cache}, max_length: 24, prompt_buckets: [24]}}
batch: {{prompts_per_step: 4, samples_per_prompt: 2, preferences_per_step: 4, sequences_per_step: 4}}
"""
ROWS = {
    "sft": ("demonstrations", lambda n: {"text": "x" * (1 + n % 9)}),
    "rm": ("preferences", lambda n: {"chosen": f"a{n}", "rejected": f"b{n}"}),
    "dpo": ("preferences", lambda n: {"chosen": f"a{n}", "rejected": f"b{n}"}),
    "ppo": ("prompts", lambda n: {"prompt": f"p{n}"}),
    "grpo": ("prompts", lambda n: {"prompt": f"p{n}"}),
}


@pytest.fixture
def config(tmp_path):
    """A config of this method for this many epochs of 10 rows, one of them too long."""

    def make(name, count, *more):
        section, row = ROWS[name]
        rows = [row(n) for n in range(10)] + [dict.fromkeys(row(0), "y" * 99)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = BASE.format(epochs=count, name=name, section=section, path=tmp_path / "rows.jsonl", cache=tmp_path / "c")
        (tmp_path / "a.yaml").write_text(text)
        return load(tmp_path / "a.yaml", more)

    return make


@pytest.mark.parametrize("name", sorted(ROWS))
@pytest.mark.parametrize("count, iterations", [(1, 3), (2, 5), (0.5, 2), (0.01, 1)])
def test_epochs_become_iterations(name, count, iterations, config):
    """By hand: 10 rows, 4 an iteration; the last epoch is ended, so that every row has been seen."""
    given = resolve_config(config(name, count, "data.pack=false"))
    counted = epochs.with_iterations(given, TOKENIZER, eos_ids(TOKENIZER))
    assert (counted.cfg.iterations, counted.cfg.epochs) == (iterations, None)
    assert counted == dataclasses.replace(given, cfg=counted.cfg)
    assert epochs.with_iterations(counted, TOKENIZER, eos_ids(TOKENIZER)) is counted


def test_packed_rows_are_counted_as_the_stream_makes_them(config):
    cfg = config("sft", 3)
    source = open_source(cfg.data.demonstrations, "demonstrations", cache_dir=cfg.data.cache_dir)  # type: ignore[arg-type]
    stream = batches.stream(DEMONSTRATIONS, source, TOKENIZER, cfg.data, rows=4, seed=cfg.seed)
    assert 1 < stream.rows < 10  # the 10 kept have 11 tokens at most, and share rows of 24
    counted = epochs.with_iterations(resolve_config(cfg), TOKENIZER, eos_ids(TOKENIZER))
    assert counted.cfg.iterations == -(-3 * stream.rows // 4)
    shown = epochs.describe_epochs(counted, stream.rows)
    assert f"{counted.cfg.iterations} iterations of 4 sequences = " in shown
    assert f"data.demonstrations ({stream.rows} rows)" in shown


def test_a_run_that_ends_within_its_warm_up_says_so(config):
    """By hand: 10 rows, 4 an iteration: 3 iterations, the last of which learns at 2 of 10 parts of the rate."""
    make = lambda name, *more: epochs.with_iterations(
        resolve_config(config(name, 1, *more)), TOKENIZER, eos_ids(TOKENIZER)
    )
    warm = lambda steps, name="dpo", *more: epochs.describe_short_run(
        make(name, f"optimizer.default.warmup_steps={steps}", *more), 10
    )
    said = (
        "optimizer.{}.warmup_steps: {}: the {} of {} end within it, at {} of the learning rate; expected less than {}"
    )
    assert warm(10) == [said.format("default", 10, "3 updates", "policy", "20%", 3)]
    assert warm(3) == [said.format("default", 3, "3 updates", "policy", "67%", 3)]
    assert warm(2) == warm(0) == []
    assert warm(10, "dpo", "batch.preferences_per_step=10") == [
        said.format("default", 10, "1 update", "policy", "0%", 1)
    ]
    ppo = ["algorithm.num_epochs=2", "algorithm.num_minibatches=2", "optimizer.value.delay=1"]
    assert warm(0, "ppo", *ppo, "optimizer.value.warmup_steps=8") == [
        said.format("value", 8, "8 updates", "value", "88%", 8)
    ]
    assert warm(0, "ppo", *ppo, "optimizer.value.warmup_steps=7") == []


def test_an_iteration_that_takes_rows_more_than_once_says_so(config):
    one = ["iterations=1", "epochs=null"]
    said = "batch.{}_per_step: {}: more than data.{}: an iteration takes each {} times; nearest: {}"
    pairs = said.format("preferences", 40, "preferences has (10 rows)", "4", 10)
    make = lambda name, *more: resolve_config(config(name, 1, *more, *one))
    assert epochs.describe_short_run(make("dpo", "batch.preferences_per_step=40"), 10) == [pairs]
    packed = said.format("sequences", 4, "demonstrations has (3 rows, once packed)", "1.33", 3)
    assert epochs.describe_short_run(make("sft"), 3) == [packed]
    assert epochs.describe_short_run(make("sft"), 4) == []


def test_one_is_not_plural(config):
    one = resolve_config(config("sft", 1, "iterations=1", "epochs=null"))
    assert epochs.describe_epochs(one, 4) == "1 iteration of 4 sequences = 1 epoch of data.demonstrations (4 rows)"
    assert epochs.describe_epochs(one, 2) == "1 iteration of 4 sequences = 2 epochs of data.demonstrations (2 rows)"
    updates = "1 epoch x 1 minibatch of 4 = 1 update an iteration"
    assert describe_batch(one, 1) == f"batch: 4 sequences -> {updates}; micro-batches of 4 (1 a minibatch)"


def test_as_many_iterations_see_every_row(config):
    cfg = epochs.with_iterations(resolve_config(config("ppo", 2)), TOKENIZER, ()).cfg
    source = open_source(cfg.data.prompts, "prompts", cache_dir=cfg.data.cache_dir)  # type: ignore[arg-type]
    stream = batches.stream(PROMPTS, source, TOKENIZER, cfg.data, rows=4, seed=0)
    seen = [record["prompt"] for _ in range(cfg.length) for record in next(stream).columns or []]
    assert {seen.count(f"p{n}") for n in range(10)} == {2}


def test_a_run_trains_for_its_epochs_and_goes_on_for_more(root, tmp_path, one_device, monkeypatch, capsys):
    """The schedule ends with the run; config.yaml says iterations; the same command is done, more epochs go on."""
    count_steps(monkeypatch)
    totals = []
    make = build.make_optimizer
    monkeypatch.setattr(build, "make_optimizer", lambda cfg, total, _: totals.append(total) or make(cfg, total))
    off = ["eval.every=0", "data.eval_demonstrations=null", "log.trackers=[]", "iterations=null"]
    make_config = lambda *more: runs.config("sft", root, tmp_path, *off, "batch.sequences_per_step=32", *more)
    assert train.run(make_config("epochs=1")) == "done"
    out = capsys.readouterr().out
    iterations = len(runs.rows(tmp_path / "sft"))
    assert f"{iterations} iterations of 32 sequences = " in out and totals == [iterations] and iterations > 1
    saved = load(tmp_path / "sft" / "config.yaml")
    assert (saved.iterations, saved.epochs) == (iterations, None)
    assert train.run(make_config("epochs=1")) == "done"
    assert f"all {iterations} iterations are done" in capsys.readouterr().out
    assert train.run(make_config("epochs=2")) == "done"
    assert totals[-1] == len(runs.rows(tmp_path / "sft")) in (2 * iterations, 2 * iterations - 1)
    assert f"iterations: {iterations} -> {totals[-1]}" in capsys.readouterr().out


def test_a_plan_counts_what_is_here_and_says_what_it_needs(config, monkeypatch, tmp_path):
    cfg = config("sft", 1, "models.policy={architecture: {}}", "tokenizer.train_vocab_size=300")
    counted, why = with_length(resolve_config(cfg))
    assert why == "" and counted.cfg.length >= 1 and counted.cfg.epochs is None
    away = {
        "data.demonstrations={tfds: a/b}": "data.demonstrations is no local file",
        "data.demonstrations={path: gs://bucket/a.jsonl}": "data.demonstrations is no local file",
        "data.demonstrations={path: nowhere.jsonl}": "data.demonstrations.path",
    }
    for change, said in away.items():
        counted, why = with_length(resolve_config(config("sft", 1, "tokenizer.train_vocab_size=300", change)))
        assert counted.cfg.length == 1 and why.startswith(f"epochs: 1: can't be counted here: {said}")
    counted, why = with_length(resolve_config(config("dpo", 2, "models.policy.init_from=some/model")))
    assert why == "epochs: 2: can't be counted here: the tokenizer of some/model is not here"
    plan = Plan(counted, *[None] * 9, uncounted=why)  # type: ignore[arg-type]
    assert report.whole_run(plan) == f"the run: {why}; iterations=N (and epochs=null) says how long it takes"
    assert plan.run_seconds(0.5) is None is plan.run_chip_hours(0.5)


def test_a_run_that_would_be_traced_beyond_its_end_is_refused_once_it_is_counted(root, tmp_path, one_device):
    more = ["iterations=null", "epochs=1", 'profile="900:901"', "eval.every=0"]
    with pytest.raises(ConfigError, match='profile: "900:901": the run has'):
        train.run(runs.config("sft", root, tmp_path, *more))
