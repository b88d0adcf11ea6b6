"""The figures of configs/: their tables, and what is computed of them. Drawing needs matplotlib and is not tested."""

import importlib.util
import json
import re

import pytest

from jaxrlhf.log.metric_names import METRICS
from tests.launch.cases import ROOT

TABLES = sorted((ROOT / "configs").glob("*/curves.csv"))


def load_script():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "configs" / "figures.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


figures = load_script()


def test_every_figure_has_a_table():
    drawn = sorted((ROOT / "configs").glob("*/*.svg"))
    assert len(TABLES) >= 2 and drawn == [path.with_suffix(".svg") for path in TABLES]


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.parent.name)
def test_a_figure_is_small_and_drawn_from_its_table(table):
    text = table.with_suffix(".svg").read_text()
    assert len(text) <= 100_000
    assert figures.digest(table) in text, "python configs/figures.py draws it anew"


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.parent.name)
def test_a_table_is_read_and_written_alike(table, tmp_path):
    figures.write_table(tmp_path / "again.csv", figures.read_table(table))
    assert (tmp_path / "again.csv").read_text() == table.read_text()


def test_the_dots_of_the_quickstart_are_those_of_its_readme():
    """Seed, reward before and after, gain, KL, length before and after, judge before and after, pairs."""
    text = (ROOT / "configs" / "quickstart" / "README.md").read_text()
    found = re.findall(
        r"^\| (\d) \| (\S+) \| (\S+) \| \S+ \| (\S+) \| (\S+), (\S+) \| (\S+), (\S+) \|", text, re.MULTILINE
    )
    dots = {(row.seed, row.step): row.values for row in read("quickstart", "held_out")}
    assert len(found) == 4
    for seed, *told in found:
        before, after = dots[int(seed), 0], dots[int(seed), 44]
        texts = [f"{before['reward']:+.2f}", f"{after['reward']:+.2f}", f"{after['kl']:.1f}"]
        texts += [f"{at['length']:.1f}" for at in (before, after)] + [f"{at['judge']:.2f}" for at in (before, after)]
        assert texts == told


def test_the_last_dots_of_smollm2_are_those_of_its_readme():
    """One column a method."""
    text = (ROOT / "configs" / "smollm2" / "README.md").read_text()
    table = {name: row.split(" | ") for name, row in re.findall(r"^\| ([^|]+?) \| (.*) \|$", text, re.MULTILINE)}
    lines = {"reward": "+.2f", "kl": ".1f", "length": ".1f", "judge": ".2f"}
    starts = ("reward (", "KL from", "length, tokens", "outside judge")
    for (key, form), start in zip(lines.items(), starts, strict=True):
        (told,) = (row for name, row in table.items() if name.startswith(start))
        for method, expected in zip(("ppo", "grpo", "dpo"), told[1:], strict=True):
            dots = [row for row in read("smollm2", "held_out") if row.algorithm == method and key in row.values]
            first, last = min(dots, key=lambda row: row.step), max(dots, key=lambda row: row.step)
            assert format(last.values[key], form) == expected
            assert float(format(first.values[key], form)) == float(told[0])


def read(name: str, split: str):
    return [row for row in figures.read_table(ROOT / "configs" / name / "curves.csv") if row.split == split]


def test_a_run_becomes_rows(tmp_path):
    """Of the metrics of a panel alone; an evaluation is a row of its own."""
    (tmp_path / "config.yaml").write_text("algorithm: {name: dpo}\nseed: 3\n")
    rows = [
        {"step": 0, "eval/score/mean": -0.5, "eval/kl/reference": 0.0},
        {"step": 1, "implicit_reward/accuracy": 0.75, "loss/policy": 0.6, "score/mean": None},
        {"step": 2, "loss/policy": 0.5},
        {"step": 2, "eval/judge/mean": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert figures.read_run(tmp_path) == [
        ("dpo", 3, "held_out", 0, {"reward": -0.5, "kl": 0.0}),
        ("dpo", 3, "train", 1, {"pairs": 0.75}),
        ("dpo", 3, "held_out", 2, {"judge": 0.5}),
    ]


def test_the_metrics_of_panels_are_logged():
    names = {name for panel in figures.PANELS.values() for name in panel.metrics}
    assert names <= {metric.name for metric in METRICS}


def test_a_mean_of_the_last_by_hand():
    line = [(1, 1.0), (2, 3.0), (3, 5.0), (4, 1.0)]
    assert figures.mean_of_last(line, 2) == [(1, 1.0), (2, 2.0), (3, 4.0), (4, 3.0)]


def test_over_seeds_by_hand():
    """Of the steps that all of them have."""
    lines = [[(1, 1.0), (2, 3.0)], [(1, 2.0), (2, 1.0), (3, 9.0)]]
    assert figures.over_seeds(lines) == [(1, 1.5, 1.0, 2.0), (2, 2.0, 1.0, 3.0)]


def test_a_folder_without_a_table_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "CONFIGS", tmp_path)
    with pytest.raises(SystemExit, match=r"tiny: no configs/tiny/curves\.csv; expected another folder"):
        figures.main(["tiny"])
