"""Benchmarks that reproduce published results: the harness, and of each the short twin with its own signature."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml

from jaxrlhf import api
from jaxrlhf.benchmarks import catalog, figure, reproduce, results_page
from jaxrlhf.benchmarks.published import arithmetic, perfectible, reverse
from jaxrlhf.benchmarks.record import Benchmark, Cell, FinishedCell, Results
from jaxrlhf.benchmarks.signature import Above, Below, Between, Fall, HigherThan, Holds, NoRise, Rise, verdicts
from jaxrlhf.cli import benchmark as cli
from jaxrlhf.config.load import dump
from jaxrlhf.errors import ConfigError
from jaxrlhf.hosts.signals import Stop
from jaxrlhf.run import build
from jaxrlhf.serve import writer
from jaxrlhf.sharding import make_mesh

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_device_for_runs(monkeypatch):
    for module in (build, writer):
        monkeypatch.setattr(module, "make_mesh", lambda cfg, *_: make_mesh(cfg, jax.devices()[:1]))


# ---- signatures -----------------------------------------------------------------------------------------------------


def results(**cells: list[float]) -> Results:
    return Results(range(3), {name: [{"x": value} for value in values] for name, values in cells.items()})


FOUND = results(a=[0.7, 0.8, 0.9], b=[0.2, 0.3, 0.4], c=[0.2, 0.3, 0.41], odd=[0.9, math.nan, 0.9])


@pytest.mark.parametrize(
    "line, held, numbers",
    [
        (Above("a", "x", 0.69), True, "0.7, 0.8, 0.9"),
        (Above("a", "x", 0.7), False, "0.7, 0.8, 0.9"),  # every seed, not the mean
        (Above("odd", "x", 0.1), False, "0.9, nan, 0.9"),
        (Below("b", "x", 0.41), True, "0.2, 0.3, 0.4"),
        (Below("b", "x", 0.4), False, "0.2, 0.3, 0.4"),
        (Below("odd", "x", 1.0), False, "0.9, nan, 0.9"),
        (Between("b", "x", 0.2, 0.4), True, "0.2, 0.3, 0.4"),
        (Between("b", "x", 0.2, 0.39), False, "0.2, 0.3, 0.4"),
        (HigherThan("a", "b", "x", 3.5), True, "+0.5, sigma 0.141: 3.5 sigma"),  # .5 / sqrt(.1^2 + .1^2) = 3.54
        (HigherThan("a", "b", "x", 3.6), False, "+0.5, sigma 0.141: 3.5 sigma"),
        (HigherThan("b", "a", "x", 0.0), False, "-0.5, sigma 0.141: -3.5 sigma"),
        (HigherThan("odd", "b", "x", 0.0), False, "+nan, sigma nan: nan sigma"),
        (Rise("a", "b", "x", 0.49), True, "0.5, 0.5, 0.5"),
        (Rise("a", "b", "x", 0.51), False, "0.5, 0.5, 0.5"),
        (Fall("b", "a", "x", 0.49), True, "-0.5, -0.5, -0.5"),
        (Fall("b", "a", "x", 0.51), False, "-0.5, -0.5, -0.5"),
        (Fall("odd", "a", "x"), False, "0.2, nan, 0"),
        (Fall("b", "c", "x"), False, "0, 0, -0.01"),  # every seed
        (NoRise("c", "b", "x", 0.02), True, "0, 0, 0.01"),
        (NoRise("c", "b", "x"), False, "0, 0, 0.01"),  # one seed is enough
        (NoRise("b", "c", "x"), True, "0, 0, -0.01"),
        (NoRise("odd", "a", "x", 1.0), False, "0.2, nan, 0"),
        (Holds("means differ", lambda found: (found.mean("a", "x") > 0.7, "0.8")), True, "0.8"),
    ],
)
def test_a_line_of_a_signature(line, held, numbers):
    verdict = line(FOUND)
    assert (verdict.held, verdict.numbers) == (held, numbers)
    assert verdict.line


def test_sigmas_need_two_seeds():
    one = Results([0], {"a": [{"x": 1.0}], "b": [{"x": 0.0}]})
    assert not HigherThan("a", "b", "x", 0.0)(one).held


def test_a_name_that_is_not_measured_is_one_line():
    with pytest.raises(ConfigError, match=r"^benchmark: aa: no such cell; nearest: a$"):
        Above("aa", "x", 0)(results(a=[1, 1, 1], other=[1, 1, 1]))
    with pytest.raises(ConfigError, match=r"^benchmark: a: xx is not measured; nearest: x$"):
        Above("a", "xx", 0)(FOUND)


# ---- the catalog and the command ------------------------------------------------------------------------------------

WITHOUT_JAX = """
import sys
for name in ("jax", "flax", "numpy"):
    sys.modules[name] = None  # importing it raises
sys.argv = ["jaxrlhf", "benchmark", *sys.argv[1:]]
from jaxrlhf.cli import app
app.app()
"""


def test_list_and_help_answer_without_jax():
    run = lambda *words: subprocess.run(
        [sys.executable, "-c", WITHOUT_JAX, *words], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    listed, helped = run("list"), run("--help")
    assert (listed.returncode, listed.stderr, helped.returncode) == (0, "", 0)
    for name in catalog.names():
        assert f"\n{name}\n" in f"\n{listed.stdout}", listed.stdout
    assert "arXiv 2510.26788" in " ".join(listed.stdout.split()) and "](" not in listed.stdout
    assert {"NAME", "list", "throughput", "soak"} <= set(helped.stdout.split())


@pytest.mark.parametrize("wrong, nearest", [("revers", "reverse"), ("troughput", "throughput"), ("lst", "list")])
def test_a_wrong_name_is_one_line(command, wrong, nearest):
    output = command("benchmark", wrong, code=2)
    assert output.err == f"benchmark: {wrong}: no such benchmark; nearest: {nearest}\n"


def test_a_name_far_from_all_says_where_they_are_listed(command):
    output = command("benchmark", "zzz", "--seeds", "1", code=2)
    assert output.err == "benchmark: zzz: no such benchmark; see jaxrlhf benchmark list\n"


def test_publishing_the_short_twin_is_refused(command):
    output = command("benchmark", "reverse", "--quick", "--publish", code=2)
    assert output.err == "--publish: --quick is given too; expected one of them\n"


def test_matplotlib_is_asked_for_before_any_work(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    output = command("benchmark", "reverse", code=2)
    assert output.err == "benchmark: matplotlib is not installed; expected: pip install 'jaxrlhf[figures]'\n"


# ---- running a benchmark of two seeds -------------------------------------------------------------------------------


def write_words(folder: Path, seed: int) -> None:
    from jaxrlhf.benchmarks.published.reverse import write_data

    write_data(folder, seed, letters="abc", length=2, rows=9)


def count_rows(done: FinishedCell) -> dict:
    """Cheap: nothing is sampled. ``loss`` is the last one."""
    losses = done.curve("loss/policy")
    return {"iterations": float(len(losses)), "loss": losses[-1], "seed": float(done.seed), "losses": losses}


SHORT = {
    "iterations": 2,
    "optimizer.default.warmup_steps": 0,
    "models.policy.architecture.hidden_size": 16,
    "models.policy.architecture.num_layers": 1,
}
TINY = Benchmark(
    name="reverse",
    title="Nothing much",
    after="nobody",
    about="Two runs of two iterations.",
    cells=(Cell("sft", "learns", overrides=SHORT), Cell("still", "control: learning rate 0", "sft", SHORT)),
    data=write_words,
    measure=count_rows,
    signature=(Above("sft", "iterations", 1.5), Below("still", "iterations", 1.5)),
    shown=("iterations", "loss"),
    quick=True,
)
STILL = dataclasses.replace(TINY.cells[1], overrides={**SHORT, "optimizer.default.learning_rate": 0})
TINY = dataclasses.replace(TINY, cells=(TINY.cells[0], STILL))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of TINY's runs with two seeds, and what they gave."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_mesh", lambda cfg, *_: make_mesh(cfg, jax.devices()[:1]))
        patch.setattr(jax, "device_count", lambda: 1)
        out = tmp_path_factory.mktemp("benchmark") / "out"
        return out, reproduce.reproduce(TINY, [3, 4], out)


@pytest.mark.benchmark
def test_each_cell_of_each_seed_is_an_ordinary_run(trained):
    out, done = trained
    assert done.results.of("sft", "iterations") == [2.0, 2.0] == done.results.of("still", "iterations")
    assert done.results.of("sft", "seed") == [3.0, 4.0]
    for name in ("seed3/sft", "seed3/still", "seed4/sft", "seed4/still"):
        assert (out / name / "checkpoints" / "2").is_dir() and (out / f"{name}.log").read_text()
        assert str(out / "seed") in (out / name / "config.yaml").read_text()
    first, second = ((out / f"seed{seed}" / "data" / "held_out.jsonl").read_text() for seed in (3, 4))
    assert first != second
    assert len({*done.results.of("sft", "loss"), *done.results.of("still", "loss")}) == 4


@pytest.mark.benchmark
def test_later_seeds_compile_nothing(trained):
    """Beside the random weights of a model, whose seed is a constant of the program that draws them."""
    _, done = trained
    assert done.compiled["sft"][1] <= 1 and done.compiled["still"][1] <= 1


@pytest.mark.benchmark
def test_what_is_finished_is_not_repeated(trained, monkeypatch, capsys):
    out, done = trained
    monkeypatch.setattr(reproduce, "run", None)
    assert reproduce.reproduce(TINY, [3, 4], out).results.measured == done.results.measured
    assert capsys.readouterr().out.count("done before") == 4


@pytest.mark.benchmark
def test_what_is_measured_otherwise_is_measured_again_and_not_trained_again(trained, capsys):
    out, done = trained
    path = out / "seed3" / "sft.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"source": "of another version"}))
    again = reproduce.reproduce(TINY, [3, 4], out)
    assert again.results.measured == done.results.measured
    assert "all 2 iterations are done" in (out / "seed3" / "sft.log").read_text()
    assert capsys.readouterr().out.count("done before") == 3


@pytest.mark.benchmark
def test_runs_of_another_config_or_data_are_refused_before_any_work(trained, monkeypatch):
    out, _ = trained
    monkeypatch.setattr(reproduce, "run", None)
    path = out / "seed3" / "sft.json"
    kept = json.loads(path.read_text())
    turned = "\n".join(reversed(kept["config"].splitlines()[:2])) + "\n" + "\n".join(kept["config"].splitlines()[2:])
    assert turned != kept["config"].rstrip("\n")
    path.write_text(json.dumps(kept | {"config": turned}))
    reproduce.reproduce(dataclasses.replace(TINY, cells=TINY.cells[:1]), [3], out)  # in another order it is the same
    cell = dataclasses.replace(TINY.cells[0], overrides={**SHORT, "iterations": 3})
    with pytest.raises(ConfigError, match=r"^--out: \S+sft: made by another config \(-iterations: 2, \+iterations: 3"):
        reproduce.reproduce(dataclasses.replace(TINY, cells=(cell,)), [3], out)
    other = dataclasses.replace(TINY, data=lambda folder, seed: write_words(folder, seed + 1))
    with pytest.raises(ConfigError, match=r"^--out: \S+jsonl: data of another version"):
        reproduce.reproduce(other, [3], out)


@pytest.mark.benchmark
def test_a_signal_stops_and_the_same_command_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    stop, run = Stop(), reproduce.run

    def stopped_in_the_second(cfg, **more):
        if cfg.run_dir.endswith("still"):
            stop.asked = "Ctrl-C"
        return run(cfg, **more)

    monkeypatch.setattr(reproduce, "run", stopped_in_the_second)
    with pytest.raises(reproduce.StoppedBySignal):
        reproduce.reproduce(TINY, [5], tmp_path, stop)
    assert json.loads((tmp_path / "seed5" / "still.json").read_text())["measured"] is None
    monkeypatch.setattr(reproduce, "run", run)
    done = reproduce.reproduce(TINY, [5], tmp_path)
    assert done.results.of("still", "iterations") == [2.0]


def test_a_kept_run_of_a_version_with_fewer_keys_is_taken_and_one_of_other_values_is_not(tmp_path):
    cfg, path = reproduce.config_of(TINY, TINY.cells[0], tmp_path, 5), tmp_path / "sft.json"
    tree = yaml.safe_load(dump(cfg))
    fewer = {key: value for key, value in tree.items() if key != "max_nonfinite"}
    for kept in (tree, fewer, dict(reversed(tree.items()))):
        reproduce.write_kept(path, reproduce.Kept(yaml.safe_dump(kept, sort_keys=False)))
        reproduce.check_kept(path, cfg)
    for kept in (fewer | {"iterations": 3}, fewer | {"no_such_key": 3}, fewer | {"max_nonfinite": 7}):
        reproduce.write_kept(path, reproduce.Kept(yaml.safe_dump(kept, sort_keys=False)))
        with pytest.raises(ConfigError, match=r"^--out: \S+sft: made by another config"):
            reproduce.check_kept(path, cfg)


def test_a_config_that_is_not_there_names_the_nearest():
    cell = Cell("gpro", "a typing error")
    with pytest.raises(ConfigError, match=r"cell gpro: no gpro.yaml in \S+; nearest: grpo$"):
        reproduce.config_of(TINY, cell, Path("out/seed0"), 0)


@pytest.mark.benchmark
def test_a_missed_line_exits_with_1_and_is_listed_as_missed(trained, command, monkeypatch):
    out, _ = trained
    monkeypatch.setattr(catalog, "find", lambda *_: TINY)
    monkeypatch.setattr(figure, "need_matplotlib", lambda: None)
    monkeypatch.setattr(figure, "draw", lambda plot, to, size: [path.write_text("drawn") for path in to])
    output = command("benchmark", "reverse", "--out", out, "--seeds", 2, "--first-seed", 3, code=1)
    assert "held   sft: iterations above 1.5 with every seed: 2, 2" in output.out
    assert "missed still: iterations below 1.5 with every seed: 2, 2" in output.out
    page = (out / "README.md").read_text()
    assert "\n## Not reproduced\n\n- still: iterations below 1.5 with every seed: 2, 2\n" in page
    assert "| sft | learns | 2, 2; 2 | " in page
    kept = json.loads((out / "results.json").read_text())
    assert [line["held"] for line in kept["signature"]] == [True, False]
    assert kept["measured"]["sft"][0]["iterations"] == 2.0 and kept["seeds"] == [3, 4]
    monkeypatch.setattr(catalog, "find", lambda *_: dataclasses.replace(TINY, signature=TINY.signature[:1]))
    command("benchmark", "reverse", "--out", out, "--seeds", 2, "--first-seed", 3)
    assert "Every line of the signature held." in (out / "README.md").read_text()


def test_what_is_published_is_small(tmp_path, monkeypatch):
    monkeypatch.setattr(results_page, "configs_folder", lambda benchmark: tmp_path / "configs")
    (tmp_path / "configs").mkdir()
    for name in ("README.md", "results.json", "reverse.svg"):
        (tmp_path / name).write_text(name)
    assert [path.read_text() for path in results_page.publish(TINY, tmp_path)] == [
        "README.md",
        "results.json",
        "reverse.svg",
    ]
    (tmp_path / "results.json").write_text("x" * 30_001)
    with pytest.raises(ValueError, match=r"results.json: 30,001 bytes; expected at most 30,000"):
        results_page.publish(TINY, tmp_path)


@pytest.mark.benchmark  # matplotlib is there then
def test_figures_are_drawn(tmp_path):
    files = [tmp_path / "a.svg", tmp_path / "a.png"]
    figure.draw(lambda on: figure.plot_all_dots(on, FOUND, ["x"]), files, size=(3, 2))
    assert all(path.stat().st_size > 1000 for path in files)


# ---- what the benchmarks are made of ---------------------------------------------------------------------------------


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_reverse_has_sloppy_demonstrations_and_holds_words_out(tmp_path):
    reverse.write_data(tmp_path, 0)
    shown, prompts, held_out = (read(tmp_path / f"{name}.jsonl") for name in ("demonstrations", "prompts", "held_out"))
    assert {row["prompt"] for row in prompts}.isdisjoint(row["prompt"] for row in held_out)
    assert all(row["answer"] == row["prompt"][:-1][::-1] for row in [*prompts, *held_out])
    likeness = reverse.similarity([row["response"] for row in shown], prompts)
    wrong = 1 - sum(likeness) / len(likeness)
    assert abs(wrong - 0.2 * 9 / 10) < 0.01  # drawn anew from ten letters, a fifth of them


def test_arithmetic_marks_half_of_its_demonstrations_and_keeps_three_kinds_of_sums_apart(tmp_path):
    arithmetic.write_data(tmp_path, 0)
    parts = [read(tmp_path / f"{name}.jsonl") for name in ("demonstrations", "prompts", "held_out")]
    sums = [{row["prompt"] for row in rows} for rows in parts]
    assert [*map(len, sums)] == [8100 - 1700, 1500, 200] and len(set.union(*sums)) == 8100
    answers = [str(sum(map(int, row["prompt"][:-1].split("+")))) for row in parts[0]]
    marked = [row["response"] == f"[{answer}]" for row, answer in zip(parts[0], answers)]
    assert all(mark or row["response"] == answer for mark, row, answer in zip(marked, parts[0], answers))
    assert abs(sum(marked) / len(marked) - 0.5) < 0.02


def test_when_arithmetic_learned_the_format_and_when_the_sums(tmp_path):
    """By hand: the gap is halved at the third value, the lenient reward's rise at the fifth."""
    rows = zip([0.1, 0.2, 0.3, 0.4, 0.7, 0.8], [0.4, 0.4, 0.4, 0.4, 0.7, 0.8])
    rows = [{"step": at, "score/strict": one, "score/lenient": other} for at, (one, other) in enumerate(rows, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic.smooth, "__defaults__", (1,))
        found = arithmetic.curves(FinishedCell("grpo", tmp_path, tmp_path, 0))
    assert (found["half_of_gap"], found["half_of_rise"]) == (2, 4)
    assert arithmetic.smooth([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]


def test_rewards_of_the_benchmarks_by_hand():
    records = [{"prompt": "abc>", "answer": "cba"}] * 5
    texts = ["cba", "cb", "cbaa", "abc", ""]
    assert reverse.similarity(texts, records) == [1.0, 2 / 3, 3 / 4, 1 / 3, 0.0]
    assert perfectible.solved(["12", "12 ", "1"], [{"answer": "12"}] * 3) == [1.0, 0.0, 0.0]
    texts, right = ["[12]", "12", "12 ", "[1]2", "[12]1", "[13]", ""], [{"answer": "12"}] * 7
    assert arithmetic.strict(texts, right) == [1, 0, 0, 0, 0, 0, 0]
    assert arithmetic.lenient(texts, right) == [1, 1, 1, 0, 0, 0, 0]
    texts = texts[:5]
    assert reverse.constant(texts, records) == [1.0] * 5
    flips = reverse.coin([str(number) for number in range(1000)], [{"prompt": "a"}] * 1000)
    assert set(flips) == {0.0, 1.0} and 450 < sum(flips) < 550


def test_perfectible_items_are_solved_in_20_to_80_percent_of_40_samples(tmp_path, monkeypatch):
    """A model that solves sum i in i of 40 samples, in any order, and in i of 8."""

    def sample(model, prompts, *, n, max_new_tokens, seed):
        assert model == str(tmp_path / "sft")
        right = [int(prompt.partition("+")[0]) * (1 if n == 40 else n / 40) for prompt in prompts]
        return [[answers[prompt] if at < many else "?" for at in range(n)] for prompt, many in zip(prompts, right)]

    monkeypatch.setattr(api, "sample", sample)
    perfectible.write_data(tmp_path, 0, numbers=(0, 40), candidates=41 * 41)
    (tmp_path / "data").mkdir()
    rows = [row for row in read(tmp_path / "candidates.jsonl") if row["prompt"].endswith("+1=")]
    answers = {row["prompt"]: row["answer"] for row in rows}
    perfectible.write_rows(tmp_path / "data" / "candidates.jsonl", rows)
    perfectible.choose_items(tmp_path, 0)
    chosen = read(tmp_path / "items" / "items.jsonl")
    assert len(chosen) == 41 // 4 and all(0.2 <= row["before"] <= 0.8 for row in chosen)
    assert all(row["before"] == int(row["prompt"].partition("+")[0]) / 40 for row in chosen)
    perfectible.write_rows(
        tmp_path / "data" / "candidates.jsonl", rows[:0] + [row for row in rows if row not in chosen]
    )
    perfectible.choose_items(tmp_path, 0)  # nothing is chosen anew
    assert read(tmp_path / "items" / "items.jsonl") == chosen


# ---- the benchmarks -------------------------------------------------------------------------------------------------


@pytest.mark.benchmark
@pytest.mark.parametrize("name", catalog.names())
def test_the_short_twin_has_its_signature(name, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    quick = catalog.find(name, quick=True)
    assert quick.quick and quick.signature
    done = reproduce.reproduce(quick, [0], tmp_path)
    assert [verdict for verdict in verdicts(quick.signature, done.results) if not verdict.held] == []


@pytest.mark.parametrize("name", catalog.names())
def test_what_is_committed_is_of_this_benchmark(name):
    benchmark, folder = catalog.find(name), ROOT / "configs" / "benchmarks" / name
    kept = json.loads((folder / "results.json").read_text())
    found = Results(kept["seeds"], kept["measured"])
    assert len(kept["seeds"]) >= 3 and set(kept["measured"]) == {cell.name for cell in benchmark.cells}
    again = [line(found) for line in benchmark.signature]
    assert [(one.line, one.held) for one in again] == [(one["line"], one["held"]) for one in kept["signature"]]
    page = (folder / "README.md").read_text()
    assert page.startswith(f"# {benchmark.title}\n\nAfter {benchmark.after}.\n\n{benchmark.about}\n")
    assert all(one.held or f"- {one.line}: " in page for one in again)
    assert (folder / "results.json").stat().st_size <= 30_000
    assert (folder / f"{name}.svg").stat().st_size <= 100_000


def test_the_command_is_named_by_the_benchmark():
    assert "NAME" in {command.name for command in cli.benchmarks.registered_commands}
