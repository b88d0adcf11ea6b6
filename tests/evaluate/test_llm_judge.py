"""A language model as the judge of an evaluation: its settings, what it is asked, win rates by hand."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxrlhf.cli.evaluate import tell
from jaxrlhf.config.yaml_text import read_yaml
from jaxrlhf.errors import ConfigError
from jaxrlhf.evaluate import llm_judge
from jaxrlhf.evaluate import report as reporting
from jaxrlhf.evaluate.kept import keep
from jaxrlhf.evaluate.llm_judge import EvaluationJudge, LlmJudge, position_report, read_judge
from jaxrlhf.evaluate.report import Options, evaluate_run
from jaxrlhf.evaluate.win_intervals import interval, length_controlled
from jaxrlhf.rewards.llm_judge import Verdicts
from jaxrlhf.rewards.remote import settings_of
from tests.support import runs
from tests.support.fake_judge import FakeJudge, texts_of


def longest(body: dict[str, Any]) -> str:
    texts = texts_of(body)
    a, b = len(texts["first"]), len(texts["second"])
    return f"Verdict: {'first' if a > b else 'second' if b > a else 'tie'}"


# ---- its settings ---------------------------------------------------------------------------------------------------


def test_a_judge_is_a_model_at_a_url_or_a_file(tmp_path):
    found = read_judge("llm:org/model@2@http://127.0.0.1:8000/v1")
    assert (found.model, found.url, found.against) == ("org/model@2", "http://127.0.0.1:8000/v1", None)
    (tmp_path / "judge.yaml").write_text("model: m\nurl: https://a/v1\nconcurrency: 2\nagainst: chosen\n")
    found = read_judge(f"llm:{tmp_path}/judge.yaml")
    assert (found.model, found.url, found.concurrency, found.against) == ("m", "https://a/v1", 2, "chosen")


@pytest.mark.parametrize(
    "text, message",
    [
        ("gpt", "--judge gpt: expected llm:MODEL@URL, as in"),
        ("llm:gpt", "--judge llm:gpt: expected llm:MODEL@URL, as in"),
        ("llm:no.yaml", "--judge llm:no.yaml: No such file or directory; expected llm:MODEL@URL, as in"),
        ("llm:m@http://", '--judge llm:m@http://: url: "http://": expected an address'),
        ("llm:m@http://user:word@a", "url: a key for a is in it; expected the key in an environment variable"),
    ],
)
def test_another_text_is_one_line(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        read_judge(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_file_of_the_readme_is_one():
    text = (Path(llm_judge.__file__).parent / "README.md").read_text()
    block = text.partition("```text\nmodel: ")[2].partition("```")[0]
    given = read_yaml(f"model: {block}", "README.md")
    fields = {field.name: field.default for field in dataclasses.fields(EvaluationJudge)}
    assert fields.keys() - given.keys() == {"prompt"}
    assert settings_of(EvaluationJudge, given).against == "chosen"
    own = ("model", "url", "against", "prompt_file", "extra")
    assert all(given[name] == fields[name] for name in given if name not in own)


@pytest.mark.parametrize(
    "text, message",
    [
        ("modle: m\n", "modle: unknown key; nearest: model"),
        ("model: m\n", "url: expected a value"),
        ("", "empty; expected sections and key: value lines"),
        ("a: [", "line 1, column 5"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(text, message, tmp_path):
    (tmp_path / "judge.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_judge(f"llm:{tmp_path}/judge.yaml")
    assert str(error.value).startswith("--judge llm:") and message in str(error.value)


def test_a_server_that_refuses_is_known_before_anything_is_computed(tmp_path):
    for fault, message in ((401, "expected a key in JAXRLHF_JUDGE_KEY"), (500, "none of 2 requests was answered")):
        with FakeJudge(longest, always=fault) as judge, pytest.raises(ConfigError) as error:
            (tmp_path / "judge.yaml").write_text(f"model: m\nurl: {judge.url}\nretries: 0\n")
            evaluate_run("/no/such/run", Options(llm=f"llm:{tmp_path}/judge.yaml"))
        assert str(error.value).startswith(f"--judge llm:m: {judge.url}: ") and message in str(error.value)


# ---- what it says ---------------------------------------------------------------------------------------------------


def test_bias_and_agreement_by_hand():
    verdicts = [
        Verdicts("first", "second"),  # a, whatever the order
        Verdicts("first", "first"),  # what stands first
        Verdicts("first", "tie"),
        Verdicts("tie", "tie"),
        Verdicts(None, "second"),  # no verdict
    ]
    expected = {"first_position": 4 / 6, "agreement": 2 / 4, "unscorable": 1 / 5}
    assert position_report(verdicts) == {name: round(value, 4) for name, value in expected.items()}
    assert position_report([Verdicts(None, None)]) == {"unscorable": 1.0}


def made_evaluation(columns: list[dict[str, Any]], reference: bool = True) -> Any:
    """Three prompts that a policy, and perhaps a reference, answered."""
    row = lambda text: {"prompt": "as tokens", "response": text}
    after = SimpleNamespace(rows=[row("aaaa"), row("bb"), row("c")], lengths=np.array([4.0, 2.0, 1.0]))
    before = SimpleNamespace(rows=[row("a"), row("bb"), row("ccc")], lengths=np.array([1.0, 2.0, 3.0]))
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [*text])
    ready = SimpleNamespace(tokenizer=tokenizer, heads={"policy": "lm"} | ({"reference": "lm"} if reference else {}))
    batches = [SimpleNamespace(columns=columns)]
    return SimpleNamespace(after=after, before=before if reference else None, ready=ready, batches=batches, more={})


def judged(judge: FakeJudge, **more: Any) -> LlmJudge:
    return LlmJudge(EvaluationJudge(model="m", url=judge.url, **more))


RECORDS = [{"prompt": f"question {n}", "chosen": "xxx", "n": n} for n in range(3)]


def test_a_win_rate_against_the_reference_is_counted_by_hand():
    evaluation = made_evaluation(RECORDS)
    with FakeJudge(longest) as judge:
        made = judged(judge, concurrency=1)
        made.check(evaluation)
        found = made.report(evaluation)
    wins, longer = np.array([1.0, 0.5, 0.0]), np.array([3.0, 0.0, -2.0])
    assert [pair.win for pair in made.verdicts] == [*wins]
    low, high = interval(wins)
    expected = {"prompts": 3, "rate": 0.5, "low": low, "high": high}
    expected |= {"length_controlled": round(length_controlled(wins, longer), 4)}
    expected |= {"first_position": 0.5, "agreement": 1.0, "unscorable": 0.0}
    cost = {"requests": 8, "prompt_tokens": 80, "completion_tokens": 24}  # with the two at the start
    assert found == {"model": "m", "against": "reference", **expected, **cost}
    assert texts_of(judge.bodies[2]) == {"prompt": "question 0", "first": "aaaa", "second": "a"}


def test_the_data_may_be_the_opponent():
    evaluation = made_evaluation(RECORDS, reference=False)
    with FakeJudge(longest) as judge:
        made = judged(judge, against="chosen")
        made.check(evaluation)
        found = made.report(evaluation)
        with pytest.raises(ConfigError, match="--judge llm:m: the run has no reference; expected against: COLUMN"):
            judged(judge).check(evaluation)
        with pytest.raises(ConfigError, match=r"against: chosn: no text column of data\.eval_prompts; nearest: chosen"):
            judged(judge, against="chosn").check(evaluation)
        with pytest.raises(ConfigError, match="there are no responses; expected a run with a policy"):
            judged(judge).check(None)
    assert (found["against"], found["rate"]) == ("chosen", round(1 / 3, 4))
    assert [pair.win for pair in made.verdicts] == [1.0, 0.0, 0.0]


def test_pairs_without_a_verdict_are_left_out():
    says = iter(["Verdict: first"] * 2 + ["", "", "Verdict: first", "Verdict: second"] + ["Verdict: first"] * 2)
    with FakeJudge(lambda body: next(says)) as judge:
        found = judged(judge, concurrency=1).report(made_evaluation(RECORDS))
    assert (found["prompts"], found["rate"], found["unscorable"]) == (2, 0.75, round(1 / 3, 4))
    assert found["first_position"] == 0.75
    with FakeJudge(lambda body: "") as judge:
        found = judged(judge).report(made_evaluation(RECORDS))
    assert found["prompts"] == 0 and found["unscorable"] == 1.0 and "rate" not in found


@pytest.mark.usefixtures("one_device")
def test_a_run_is_judged(root, capsys):
    """The judge likes what is longer; what it was shown is what the report shows."""
    runs.whole(root)
    with FakeJudge(longest) as judge:
        report = evaluate_run(f"{root}/whole/grpo", Options(samples=32, llm=f"llm:m@{judge.url}"))
    rows, found = report["samples"], report["win_rates"]["llm"]
    wins = [(len(row["after"]) > len(row["before"])) + (len(row["after"]) == len(row["before"])) / 2 for row in rows]
    assert [row["llm"] for row in rows] == wins and len({*wins}) > 1
    assert found["rate"] == round(float(np.mean(wins)), 4) and found["prompts"] == 32
    assert found["requests"] == 66 and report["win_rates"].keys() == {"reward", "llm"}
    shown = {tuple(sorted(texts_of(body).items())) for body in judge.bodies[2:]}
    both = {(row[a], row[b]) for row in rows for a, b in (("after", "before"), ("before", "after"))}
    assert {(dict(texts)["first"], dict(texts)["second"]) for texts in shown} == both
    reporting.print_report(report)
    text = capsys.readouterr().out
    assert f"win rate of after over before, by the LLM judge m: {found['rate']:.1%} (95%: " in text
    assert "0.0% of pairs without a verdict in both orders, both orders agree on 100.0%" in text
    assert "it took 66 requests, 660 tokens of prompts and 198 of replies" in text


# ---- what is kept ---------------------------------------------------------------------------------------------------


def test_an_evaluation_is_kept_and_never_replaced(tmp_path):
    report = {"run": str(tmp_path / "run"), "step": 40, "after": {"score/mean": 1.5}}
    paths = [keep(report, Options(llm="llm:m@http://a").given()) for _ in range(3)]
    files = sorted((tmp_path / "run" / "evaluations").iterdir())
    assert len(files) == 3 and all(file.name.startswith("000040-2") and file.suffix == ".json" for file in files)
    assert sorted(map(str, paths)) == [str(file) for file in files]
    found = json.loads(files[0].read_text())
    assert found.pop("written")[:2] == "20" and found == {"options": {"llm": "llm:m@http://a"}, **report}


def test_a_run_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    tell({"run": str(tmp_path / "run"), "step": 1}, Options(), True, print)
    out, err = capsys.readouterr()
    assert json.loads(out)["step"] == 1
    assert err == f"{tmp_path}/run/evaluations: Not a directory; the evaluation is not kept\n"
