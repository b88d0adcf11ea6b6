"""Published numbers: which row counts, what holds, what a config may not say, and the command."""

import pytest

from jaxrlhf.config.check import check
from jaxrlhf.config.load import parse
from jaxrlhf.errors import ConfigError
from jaxrlhf.log.bars import BarConfig, results
from tests.support.made_runs import make_run

ROWS = [
    {"step": 0, "eval/score/mean": 0.4},
    {"step": 20, "eval/score/mean": 0.7, "score/mean": 0.6},
    {"step": 30, "score/mean": 0.9},
    {"step": 40, "eval/score/mean": 0.6, "kl/reference": None},
]


def bar(metric="eval/score/mean", **more) -> BarConfig:
    return BarConfig(metric=metric, source="a paper", **more)


@pytest.mark.parametrize(
    ("given", "value", "step", "held"),
    [
        (bar(at_least=0.6), 0.6, 40, True),
        (bar(at_least=0.61), 0.6, 40, False),
        (bar(at_least=0.61, best=True), 0.7, 20, True),
        (bar(at_most=0.5, best=True), 0.4, 0, True),
        (bar(at_least=0.61, at_most=0.8, step=20), 0.7, 20, True),
        (bar(at_most=0.69, step=20), 0.7, 20, False),
        (bar(at_least=0.1, step=30), None, None, False),
        (bar("kl/reference", at_most=9), None, None, False),
        (bar("score/mean", at_least=0.9), 0.9, 30, True),
    ],
)
def test_the_row_that_counts(given, value, step, held):
    (found,) = results({"ours": given}, ROWS)
    assert (found.value, found.step, found.held) == (value, step, held)


def test_what_is_said():
    low, missing = results({"a": bar(at_least=0.65, at_most=0.8), "b": bar(at_least=1, step=50)}, ROWS)
    assert str(low) == "bar a: eval/score/mean: 0.6 at step 40; expected at least 0.65, at most 0.8: missed (a paper)"
    assert str(missing) == "bar b: eval/score/mean: not measured at step 50; expected at least 1: missed (a paper)"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "bars.x: neither at_least nor at_most is given; expected one of them"),
        ({"at_least": 2, "at_most": 1}, "bars.x.at_least: 2.0: above at_most 1.0; nearest: 1.0"),
        ({"at_least": 2, "best": True, "step": 3}, "bars.x.best: true: step 3 is given too; expected one of them"),
        (
            {"at_least": 2, "metric": "eval/gold/men"},
            "bars.x.metric: eval/gold/men: no metric; nearest: eval/gold/mean",
        ),
        ({"at_least": 2, "step": -1}, "bars.x.step: -1: expected a number in [0, inf); nearest: 0"),
    ],
)
def test_a_config_with_a_bar_that_means_nothing_is_refused(given, message):
    shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_positions": 512}
    tree = {"run_dir": "runs/x", "iterations": 2, "algorithm": {"name": "sft"}, "tokenizer": {"train_vocab_size": 300}}
    tree |= {"models": {"policy": {"architecture": shape}}, "data": {"demonstrations": {"path": "x.jsonl"}}}
    with pytest.raises(ConfigError) as error:
        check(parse(tree | {"bars": {"x": {"metric": "eval/score/mean", "source": "us"} | given}}, "test"), 1)
    assert message in str(error.value)


def test_the_command(tmp_path, command):
    run = make_run(tmp_path / "run", names=["score/mean"])
    bars = "bars:\n  ours: {{metric: eval/score/mean, at_least: {}, step: 4, source: us}}\n"
    for bound, code, verdict in ((-9, 0, "holds"), (9, 1, "missed")):
        (tmp_path / "other.yaml").write_text((run / "config.yaml").read_text() + bars.format(bound))
        out, _ = command("benchmark", "bars", run, "--config", tmp_path / "other.yaml", code=code)
        assert out.startswith(f"{run}: bar ours: eval/score/mean: ") and f": {verdict} (us)" in out
    _, error = command("benchmark", "bars", run, code=2)
    assert "bars: none; expected published numbers to hold the run against" in error
    _, error = command("benchmark", "bars", tmp_path, code=2)
    assert "no config.yaml; expected a run directory" in error
