"""Alarms: each sign by hand, when it is told, what a resumed run knows, what the config refuses."""

import dataclasses
import math

import pytest

from jaxrlhf.config.load import load
from jaxrlhf.errors import ConfigError
from jaxrlhf.log.alarms import SIGNS, Alarms, AlarmsConfig
from jaxrlhf.log.metric_names import find_metric
from jaxrlhf.log.rows import read_rows
from jaxrlhf.report.content import content_of
from jaxrlhf.report.runs import read_run
from tests.log.test_metrics import open_log
from tests.support.made_runs import make_run

# sign -> (its metrics in the first row, in a healthy row, in a row that is told)
CASES = {
    "kl": ({"kl/reference": 1.0, "response/length_mean": 10.0}, {"kl/reference": 19.9}, {"kl/reference": 20.1}),
    "entropy": ({"policy/entropy": 4.0}, {"policy/entropy": 0.41}, {"policy/entropy": 0.39}),
    "length": ({"response/length_mean": 20.0}, {"response/length_mean": 39.0}, {"response/length_mean": 41.0}),
    "zero_variance": ({"group/zero_variance": 0.5}, {"group/zero_variance": 0.9}, {"group/zero_variance": 0.91}),
    "explained_variance": (
        {"value/explained_variance": 0.3},
        {"value/explained_variance": 0.0},
        {"value/explained_variance": -0.1},
    ),
    "mismatch": ({"kl/sampler_mismatch": 0.0}, {"kl/sampler_mismatch": 0.1}, {"kl/sampler_mismatch": 0.11}),
}
for held_out in ("judge", "gold"):
    best = {f"eval/{held_out}/mean": 0.7, f"eval/{held_out}/std": 0.5, "eval/score/mean": 1.0}
    CASES[held_out] = (
        best,
        {f"eval/{held_out}/mean": 0.61, "eval/score/mean": 2.0},
        {f"eval/{held_out}/mean": 0.59, "eval/score/mean": 2.0},
    )


def told(alarms: Alarms, *rows: dict) -> list[tuple[int, str]]:
    """(step, name) of what is told of the rows, which begin at step 1."""
    found = [alarm for step, row in enumerate(rows, 1) for alarm in alarms.see(step, row)]
    return [(alarm.step, alarm.name) for alarm in found]


@pytest.mark.parametrize("name", SIGNS)
def test_each_sign_is_told_past_its_threshold(name):
    first, healthy, wrong = CASES[name]
    cfg = AlarmsConfig(patience=1)
    assert told(Alarms(cfg), first, first | healthy) == []
    assert told(Alarms(cfg), first, first | wrong) == [(2, name)]
    assert told(Alarms(dataclasses.replace(cfg, **{name: None})), first, first | wrong) == []
    assert all(find_metric(metric) for metric in SIGNS[name].metrics)


def test_every_threshold_has_a_sign_and_a_case():
    fields = set(AlarmsConfig.__dataclass_fields__) - {"patience", "stop"}
    assert fields == SIGNS.keys() == CASES.keys()


def test_short_responses_are_a_drift_too():
    assert told(Alarms(AlarmsConfig(patience=1)), {"response/length_mean": 20}, {"response/length_mean": 9.9}) != []


def test_a_judge_that_falls_with_the_score_is_no_alarm():
    first, _, wrong = CASES["judge"]
    assert told(Alarms(AlarmsConfig()), first, first | wrong | {"eval/score/mean": 0.9}) == []


def test_the_judge_is_compared_with_its_best():
    row = lambda judge, score: {"eval/judge/mean": judge, "eval/judge/std": 0.5, "eval/score/mean": score}
    rows = [row(0.5, 0.0), row(0.8, 1.0), row(0.6, 2.0)]
    assert told(Alarms(AlarmsConfig()), *rows) == [(3, "judge")]
    assert told(Alarms(AlarmsConfig()), rows[0], rows[2]) == []


def test_a_sign_has_to_stay_and_is_told_once():
    wrong, healthy = {"value/explained_variance": -1.0}, {"value/explained_variance": 0.5}
    rows = [wrong, wrong, healthy, *[wrong] * 5, healthy, *[wrong] * 3]
    assert told(Alarms(AlarmsConfig(patience=3)), *rows) == [(6, "explained_variance"), (12, "explained_variance")]


def test_evaluations_tell_what_iterations_do_not_measure():
    """At once, where there is no training row with these metrics; else the training rows decide."""
    first, _, wrong = CASES["kl"]
    held_out = lambda row: {f"eval/{name}": value for name, value in row.items()}
    dpo = [held_out(first), {"loss/policy": 0.5}, held_out(first | wrong)]
    assert told(Alarms(AlarmsConfig()), *dpo) == [(3, "kl")]
    assert told(Alarms(AlarmsConfig()), held_out(first), first, held_out(first | wrong)) == []


def test_numbers_that_are_missing_or_not_finite_are_no_sign():
    alarms = Alarms(AlarmsConfig(patience=1))
    assert told(alarms, {}, {"value/explained_variance": math.nan}, {"value/explained_variance": None}) == []


# ---- in a run -------------------------------------------------------------------------------------------------------

CFG = AlarmsConfig(patience=2, stop=("mismatch",))
WRONG = {"kl/sampler_mismatch": 0.5}


def test_it_is_a_warning_in_the_log_and_a_stop_where_that_is_asked_for(tmp_path):
    log, screen = open_log(tmp_path, alarms=CFG)
    log.write(1, WRONG)
    assert log.alarms.stop is None
    log.write(2, WRONG | {"value/explained_variance": -1.0})
    log.write(3, WRONG | {"value/explained_variance": -1.0})
    assert log.alarms.stop is not None and log.alarms.stop.name == "mismatch"
    log.close()
    lines = [line for line in screen.getvalue().splitlines() if line.startswith("warning")]
    assert lines == [
        "warning: mismatch at step 2: kl/sampler_mismatch is 0.5 (alarms.mismatch: 0.1)",
        "warning: explained_variance at step 3: value/explained_variance is -1 (alarms.explained_variance: 0)",
    ]


def test_a_run_that_an_alarm_stopped_goes_on(tmp_path):
    """What was told is not told again; what began is counted on. Rows that will be redone do not count."""
    log, _ = open_log(tmp_path, alarms=CFG)
    for step in (1, 2, 3):
        log.write(step, WRONG | ({"value/explained_variance": -1.0} if step > 1 else {}))
    log.close()
    log, screen = open_log(tmp_path, start=2, alarms=CFG)
    log.write(3, WRONG | {"value/explained_variance": -1.0})
    log.close()
    assert log.alarms.stop is None and "mismatch" not in screen.getvalue()
    assert "warning: explained_variance at step 3" in screen.getvalue()
    assert [row["step"] for row in read_rows(tmp_path, "metrics")] == [1, 2, 3]


def test_other_processes_see_the_same_and_say_nothing(tmp_path):
    log, screen = open_log(tmp_path, alarms=CFG, main=False)
    for step in (1, 2):
        log.write(step, WRONG)
    assert log.alarms.stop is not None and screen.getvalue() == ""


CONFIG = """
run_dir: run
iterations: 2
algorithm: {name: sft}
models: {policy: {architecture: {hidden_size: 32, num_layers: 1, num_heads: 2, vocab_size: 300}}}
data: {demonstrations: {path: rows.jsonl}, max_length: 16}
"""


@pytest.mark.parametrize(
    "override, text",
    [
        ("alarms.entropy=2", "alarms.entropy: 2.0: expected a number in [0, 1]; nearest: 1"),
        ("alarms.kll=1", "alarms.kll: unknown key (value 1); nearest: kl"),
        ("alarms.stop=[kll]", 'alarms.stop.0: "kll"'),
    ],
)
def test_mistakes_are_one_line(tmp_path, override, text):
    (tmp_path / "sft.yaml").write_text(CONFIG)
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "sft.yaml", [override])
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_stop_needs_a_threshold():
    from types import SimpleNamespace

    from jaxrlhf.config.check import alarm_problems

    cfg = SimpleNamespace(alarms=AlarmsConfig(kl=None, stop=("kl", "length")))
    (line,) = alarm_problems(cfg)  # type: ignore[arg-type]
    assert line == "alarms.stop: kl: alarms.kl is null, so it never tells; expected a number there"


# ---- in the report --------------------------------------------------------------------------------------------------


def test_the_report_marks_what_the_run_told(tmp_path):
    run = make_run(tmp_path / "run", kl_coef=-0.3, names=["value/explained_variance", "kl/sampler_mismatch"])
    with open(run / "config.yaml", "a") as file:
        file.write("alarms:\n  patience: 2\n  mismatch: null\n")
    rows = read_rows(run, "metrics")
    expected = Alarms(AlarmsConfig(patience=2, mismatch=None))
    steps = [alarm.step for row in rows for alarm in expected.see(row["step"], row)]
    found = content_of([read_run(str(run), "run")])["alarms"]
    assert steps and [(mark["step"], mark["alarm"], mark["run"]) for mark in found] == [
        (step, "explained_variance", "run") for step in steps
    ]
    assert found[0]["metrics"] == ["value/explained_variance"]
