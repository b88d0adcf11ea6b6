"""`jaxrlhf report`: what it reads of runs, what the page says of them, the command, the server, the images."""

import fcntl
import json
import re
import shutil
import threading
import urllib.error
import urllib.request

import pytest

from jaxrlhf.errors import ConfigError
from jaxrlhf.log.metric_names import METRICS
from jaxrlhf.log.rows import read_rows
from jaxrlhf.report import content, evaluations, layout, live, page
from jaxrlhf.report.runs import read_run, read_runs, short_names
from tests.support.made_runs import HOSTILE, make_run

FEW = ["score/mean", "kl/reference", "time/iteration", "time/rewards"]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    return [str(make_run(folder / "first")), str(make_run(folder / "second", steps=6, kl_coef=0.3))]


@pytest.fixture
def kept_library(monkeypatch) -> None:
    """The library of the charts, which takes seconds to bundle, as a word."""
    monkeypatch.setattr(page, "library", lambda: "/* library */")
    monkeypatch.setattr(live, "library", lambda: "")


# ---- what is read ---------------------------------------------------------------------------------------------------


def test_a_run_says_how_far_it_is(two, tmp_path):
    first, second = read_runs(two)
    assert (first.name, first.algorithm, first.state, first.step, first.iterations) == (
        "first",
        "ppo",
        "finished",
        12,
        12,
    )
    assert (second.state, second.step) == ("stopped", 6)
    running = make_run(tmp_path / "running", steps=3)
    with open(running / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert read_run(str(running), "r").state == "running"


def test_a_row_that_is_being_written_is_left_for_the_next_time(tmp_path):
    run = make_run(tmp_path / "run", names=FEW)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "score/me')
    assert read_run(str(run), "run").step == 12


def test_a_run_that_has_no_row_yet_has_a_page(tmp_path):
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / "evaluations")
    for path in run.glob("*.jsonl"):
        path.unlink()
    found = content.content_of(read_runs([str(run)]))
    assert found["parts"] == [] and found["glance"] == [] and found["samples"]["rows"] == []
    assert found["runs"][0]["step"] == 0


@pytest.mark.parametrize(
    "paths, names",
    [
        (["runs/a/ppo", "runs/b/ppo"], ["a/ppo", "b/ppo"]),
        (["runs/a", "runs/b"], ["a", "b"]),
        (["gs://bucket/a/x", "gs://other/a/x"], ["bucket/a/x", "other/a/x"]),
    ],
)
def test_runs_have_short_names_that_differ(paths, names):
    assert short_names(paths) == names


def test_a_run_that_is_named_twice_is_there_once(two):
    assert len(read_runs([two[0], two[0] + "/"])) == 1


def test_a_config_that_is_none_is_one_line(tmp_path):
    (tmp_path / "config.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match=r"config\.yaml: .1.: expected the config that a run writes"):
        read_run(str(tmp_path), "x")


def test_a_config_is_read_as_training_reads_it(tmp_path):
    """By YAML 1.2: a number without a point, a word that an older YAML takes for false."""
    run = make_run(tmp_path / "run", steps=1)
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "rate: 1e-4\nname: no\n")
    found = read_run(str(run), "x").config
    assert found["rate"] == 1e-4 and found["name"] == "no"
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"config\.yaml: line 1, column 5: "):
        read_run(str(run), "x")


# ---- evaluations ----------------------------------------------------------------------------------------------------


def test_evaluations_are_rows_newest_first(two):
    found = evaluations.part(read_runs(two[:1]))
    (chart, bins), (rates, pairs, bench) = found["charts"], found["tables"]
    assert [(row["confidence"], row["accuracy"]) for row in bins["rows"]] == [(0.55, 0.5), (0.72, 0.75), (0.93, 0.9)]
    assert {row["step"] for row in bins["rows"]} == {12}  # of the newest evaluation
    assert [row["who"] for row in chart["rows"]] == [
        "step 4, reward",
        "step 8, reward",
        "step 8, llm: org/<b>judge</b>",
        "step 12, reward",
    ]
    (low, rate, high) = (chart["rows"][2][name] for name in ("low", "rate", "high"))
    assert (low, high, chart["rows"][2]["series"]) == (0.48, 0.7, "held out") and rate == pytest.approx(0.55)
    row = dict(zip(rates["columns"], rates["rows"][1]))
    assert row == {
        "step": 8,
        "judge": "llm: org/<b>judge</b>",
        "against": "chosen",
        "win rate": "55.0%",
        "95%": "48.0% to 70.0%",
        "at equal lengths": "57.0%",
        "prompts": 64,
        "first position": "62.0%",
        "orders agree": "80.0%",
        "no verdict": "1.6%",
        "options": "temperature=0.6 top_p=0.95",
        "written": "2026-11-29 12:00:01",
    }
    assert [each[2] for each in pairs["rows"]] == ["70.0%", "65.0%", "60.0%"]
    assert [each[3:5] for each in bench["rows"]] == [
        ["Chat", "90.0%"],
        ["Chat Hard", "50.0%"],
        ["Safety", "70.0%"],
        ["Reasoning", "60.0%"],
        ["score", "67.5%"],
    ]


def test_evaluations_of_a_step_are_told_apart_and_the_newest_is_drawn(tmp_path):
    run = make_run(tmp_path / "run", steps=4)
    (file,) = (run / "evaluations").iterdir()
    kept = json.loads(file.read_text())
    for at, (options, rate) in enumerate([({}, 0.1), ({"beta": 2.0}, 0.2), ({"samples": 3}, 0.3)]):
        kept["win_rates"]["reward"]["rate"] = rate
        told = kept | {"options": options, "written": f"2026-12-01T00:00:0{at}"}
        (run / "evaluations" / f"{at}.json").write_text(json.dumps(told))
    (run / "evaluations" / "half.json").write_text('{"step": 4, "win')
    (run / "evaluations" / "none.json").write_text("[]")
    found = evaluations.part(read_runs([str(run)]))
    assert {row["who"]: row["rate"] for row in found["charts"][0]["rows"]} == {
        "step 4, reward": 0.3,
        "step 4, reward, beta=2.0": 0.2,
    }
    assert len(found["tables"][0]["rows"]) == 4


def test_win_rates_without_a_verdict_are_in_the_table_alone(tmp_path):
    run = make_run(tmp_path / "run", steps=4)
    (file,) = (run / "evaluations").iterdir()
    llm = {"model": "m", "against": "reference", "prompts": 0, "unscorable": 1.0}
    file.write_text(json.dumps({"step": 4, "win_rates": {"llm": llm}, "written": "x", "after": {"a": float("nan")}}))
    found = evaluations.part(read_runs([str(run)]))
    assert found["charts"] == [] and found["tables"][0]["columns"][-2:] == ["no verdict", "written"]


# ---- charts ---------------------------------------------------------------------------------------------------------


def test_every_metric_of_the_table_has_one_place():
    names = [re.sub("<.*?>", "policy", row.name) for row in METRICS]
    arranged = layout.arrange([*names, *(f"eval/{name}" for name in names), "mine/own"])
    placed = [name for part in arranged.values() for name in part]
    assert sorted(placed) == sorted({*names, "mine/own"})
    assert arranged["Other"] == ["mine/own"]
    teacher = {"teacher/divergence", "teacher/entropy", "kl/teacher", "policy/entropy"}
    assert teacher <= {*arranged["Policy"]}, "side by side"
    assert "reward/grad_norm" in layout.arrange(["reward/grad_norm"])["Optimizer"]


def test_a_chart_has_training_and_held_out_rows_by_the_runs_colours(two):
    found = content.content_of(read_runs(two))
    charts = {chart["title"]: chart for part in found["parts"] for chart in part["charts"]}
    rows = charts["score/mean"]["rows"]
    assert {(row["run"], row["split"]) for row in rows} == {
        (run, split) for run in ("first", "second") for split in ("training", "held out")
    }
    assert [row["step"] for row in rows if (row["run"], row["split"]) == ("second", "held out")] == [0, 4]
    written = read_rows(two[0], "metrics")
    shown = {row["step"]: row["value"] for row in rows if (row["run"], row["split"]) == ("first", "training")}
    assert shown == {row["step"]: row["score/mean"] for row in written if "score/mean" in row}
    assert [each["name"] for each in found["series"]] == ["first", "second"]
    assert {"score against KL", "calibration of the reward model", "time by phase"} <= charts.keys()
    alone = content.content_of(read_runs(two[:1]))
    assert [each["name"] for each in alone["series"]] == ["training", "held out"]


def test_the_score_against_kl_takes_both_from_one_row(two):
    found = content.split_rows(read_runs(two[:1]), kl="kl/reference", score="score/mean")
    written = read_rows(two[0], "metrics")
    expected = [(row["step"], row["kl/reference"], row["score/mean"]) for row in written if "score/mean" in row]
    assert [(row["step"], row["kl"], row["score"]) for row in found if row["split"] == "training"] == expected


def test_numbers_that_were_not_finite_leave_a_gap(tmp_path):
    run = make_run(tmp_path / "run", names=FEW)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "score/mean": null}\n{"step": 14, "score/mean": 2.5}\n')
    found = content.values(read_run(str(run), "run"), "score/mean")
    assert [step for step, _ in found][-2:] == [12, 14]


@pytest.mark.parametrize("count", [601, 10_000])
def test_a_long_curve_is_thinned_and_keeps_its_ends_and_spikes(count):
    rows = [(step, [float(step % 7)]) for step in range(count)]
    rows[500] = (500, [99.0])
    kept = content.thinned(rows)
    assert content.POINTS / 2 < len(kept) <= content.POINTS and (kept[0], kept[-1]) == (rows[0], rows[-1])
    assert rows[500] in kept and kept == sorted(kept) and len({step for step, _ in kept}) == len(kept)
    assert content.thinned(rows[:400]) == rows[:400]


def test_rows_are_packed_by_columns_and_nothing_is_lost(two):
    found = content.content_of(read_runs(two))
    charts = [chart for part in found["parts"] for chart in part["charts"]]
    for chart in charts:
        rows = []
        for block in content.blocks(chart["rows"]):
            numbers = [dict(zip(block["columns"], values)) for values in zip(*block["columns"].values(), strict=True)]
            rows += [block["same"] | row for row in numbers]
        order = lambda row: sorted(map(str, row.items()))
        assert sorted(rows, key=order) == sorted(chart["rows"], key=order)
    assert {chart["kind"] for chart in charts} == found["specifications"].keys()


def test_a_histogram_is_a_density_of_the_first_and_last_evaluation(two):
    rows = list(content.histogram_rows(read_run(two[0], "first"), several=True))
    last = [row for row in rows if row["last"]]
    assert [row["step"] for row in last] == [12, 12] and [row["responses"] for row in last] == [3, 12]
    assert sum(row["density"] * (row["high"] - row["low"]) for row in last) == pytest.approx(1)
    assert {row["step"] for row in rows if not row["last"]} == {0}


def test_time_by_phase_adds_up(tmp_path):
    run = read_run(str(make_run(tmp_path / "run", names=FEW)), "run")
    run.metrics[:] = [{"step": 1, "time/iteration": 3.0, "time/rewards": 1.0}, {"step": 1, "eval/time/evaluation": 0.5}]
    run.phases[:] = [{"step": 0, "phase": "compiling", "seconds": 4.0}]
    run.phases.extend([{"step": 1, "phase": "saving", "seconds": 0.25}] * 2)
    found = {row["phase"]: row["seconds"] for row in content.phases(run)}
    assert found == {"step": 2.0, "reward functions": 1.0, "evaluation": 0.5, "compiling": 4.0, "saving": 0.5}


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_before_and_after_says_what_changed(two):
    pairs = content.before_and_after(read_run(two[0], "first"))
    pair = next(pair for pair in pairs if pair["prompt"] == "prompt 3")
    assert pair["before"] == [(False, "a "), (True, "plain"), (False, " film number 3")]
    assert pair["after"] == [(False, "a "), (True, "gorgeous"), (False, " film number 3")]
    assert (pair["step_before"], pair["step_after"]) == (0, 12) and pair["score_after"] == 3 - 6


def test_configs_are_compared_key_by_key(two):
    rows = {row["key"]: row for row in content.config_rows(read_runs(two))}
    assert rows["algorithm.kl_coef"] == {"key": "algorithm.kl_coef", "values": [0.1, 0.3], "differs": True}
    assert not rows["seed"]["differs"] and rows["models"]["values"] == [{}, {}]


def test_old_samples_are_left_out_and_that_is_said(two, monkeypatch):
    monkeypatch.setattr(content, "SAMPLES", 10)
    found = content.samples(read_runs(two[:1]))
    assert len(found["rows"]) == 10 and found["rows"][0]["step"] == 12
    assert found["notes"] == ["first: the newest 10 samples of 32"]


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_asks_for_nothing_and_holds_hostile_text_as_text(two, kept_library):
    html = page.page_of(content.content_of(read_runs(two)))
    (inside,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', html, re.DOTALL)
    held = json.loads(inside)
    assert any(row["response"].startswith(HOSTILE.split("\ud83d")[0]) for row in held["samples"]["rows"])
    assert html.count("</script>") == 3
    assert re.findall(r'(?:src|href)="([^"]*)"', html) == ["data:,"]
    for mark in ("STYLE", "CONTENT", "LIBRARY", "SCRIPT"):
        assert f"/*{mark}*/" not in html


def test_the_library_is_bundled_once(monkeypatch, tmp_path):
    import vl_convert

    calls = []
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda snippet: calls.append(snippet) or "a</script>")
    monkeypatch.setenv("HOME", str(tmp_path))
    for _ in range(2):
        page.library.cache_clear()
        assert page.library() == "a<\\/script>"
    assert len(calls) == 1
    page.library.cache_clear()


def test_the_command_writes_the_page_beside_the_run(two, command, kept_library, tmp_path, monkeypatch):
    out, _ = command("report", two[0])
    assert re.fullmatch(rf"{two[0]}/report.html: \d\.\d MB, opens in any browser, offline\n", out)
    command("report", *two, "--out", tmp_path / "deep" / "x.html")
    assert (tmp_path / "deep" / "x.html").read_text().startswith("<!doctype html>")
    monkeypatch.chdir(tmp_path)
    assert command("report", *two)[0].startswith("report.html: ")


def test_mistakes_are_one_line(two, command, monkeypatch, tmp_path):
    errors = command("report", two[0], f"{two[0]}x", code=2)[1]
    assert errors.startswith(f"{two[0]}x: no run directory (config.yaml is not in it)") and errors.count("\n") == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(page, "library", lambda: "")
    errors = command("report", two[0], "--out", tmp_path / "file" / "x.html", code=2)[1]
    assert errors.startswith(f"--out {tmp_path}/file/x.html: ") and errors.count("\n") == 1
    monkeypatch.setattr("jaxrlhf.errors.find_spec", lambda name: None)
    expected = "jaxrlhf report: altair and vl_convert not installed; expected: pip install 'jaxrlhf[report]'\n"
    assert command("report", two[0], code=2)[1] == expected


@pytest.mark.nightly  # by day: the page in a browser, in test_browser.py
def test_every_chart_becomes_an_image(tmp_path, command, kept_library):
    run = make_run(tmp_path / "run", names=["score/mean", "kl/reference"])
    out = command("report", run, "--png", tmp_path / "png")[0]
    images = {path.name: path.read_bytes() for path in (tmp_path / "png").iterdir()}
    assert out.startswith(f"{tmp_path}/png: {len(images)} charts\n")
    assert {"score_mean.png", "score_against_KL.png", "kl_reference.png"} <= images.keys()
    assert all(data.startswith(b"\x89PNG") and len(data) > 3000 for data in images.values())


# ---- the server -----------------------------------------------------------------------------------------------------


def test_the_server_follows_a_run(tmp_path, kept_library, monkeypatch):
    monkeypatch.setattr(live, "FRESH", 0.0)
    run = make_run(tmp_path / "run", steps=3, names=FEW)
    with live.make_server([str(run)], "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_address[1]}"
        ask = lambda place: urllib.request.urlopen(base + place, timeout=10).read().decode()
        assert ask("/").startswith("<!doctype html>")
        assert json.loads(ask("/content.json"))["runs"][0]["step"] == 3
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"step": 4, "score/mean": 2.5}\n')
        newest = json.loads(ask("/content.json"))
        assert newest["runs"][0]["step"] == 4 and newest["live"]
        for place in ("/config.yaml", "/../run/config.yaml"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                ask(place)
        with pytest.raises(ConfigError, match=r"--port \d+: 127.0.0.1: Address already in use; expected a free port"):
            live.make_server([str(run)], "127.0.0.1", server.server_address[1])
        server.shutdown()
