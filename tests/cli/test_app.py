"""The command line: what each command calls, exit codes, one-line errors, and that --help loads nothing heavy."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from jaxrlhf import user_code
from jaxrlhf.cli import exits
from jaxrlhf.evaluate.report import Options

ROOT = Path(__file__).parents[2]
SFT = """
run_dir: {name}
iterations: 2
algorithm: {{name: sft}}
models: {{policy: {{init_from: somewhere}}}}
data: {{demonstrations: {{path: a.jsonl}}}}
"""


@pytest.fixture
def sft(tmp_path):
    """Two good configs, first.yaml and second.yaml."""
    for name in ("first", "second"):
        (tmp_path / f"{name}.yaml").write_text(SFT.format(name=name))
    return tmp_path / "first.yaml"


@pytest.fixture
def calls(monkeypatch):
    """Puts fakes in the place of what the commands call; every call is noted here."""
    noted = []

    def fake(name, result):
        def call(*args):
            noted.append((name, *args))
            return result(*args) if callable(result) else result

        return call

    def module(name, **functions):
        stand_in = types.ModuleType(name)
        for key, result in functions.items():
            setattr(stand_in, key, fake(key, result))
        monkeypatch.setitem(sys.modules, name, stand_in)
        monkeypatch.setattr(importlib.import_module("jaxrlhf"), name.rpartition(".")[2], stand_in, raising=False)

    def train(cfg, text, stop):
        if "stop" in cfg.run_dir:
            return "preempted"
        if "late" in cfg.run_dir:
            return "out of time"
        if "alarm" in cfg.run_dir:
            return "alarmed"
        if "last" in cfg.run_dir:
            stop.asked = "Ctrl-C"  # in its last iteration
        return "done"

    module("jaxrlhf.train", run=train)
    module(
        "jaxrlhf.evaluate.report",
        evaluate_run=lambda run, options: {"eval/score/mean": 1.5, "run": run, "step": 4},
        print_report=lambda report: print("the report", report),
    )
    sys.modules["jaxrlhf.evaluate.report"].Options = Options  # type: ignore[attr-defined]
    module("jaxrlhf.plan.dry_run", dry_run=lambda configs: [f"looked at {cfg.run_dir}" for _, cfg in configs])
    module("jaxrlhf.run.export", export=("step 4", ["a note"]), export_adapter=("step 4", ["a note"]))
    return noted


@pytest.fixture
def run(command):
    """The command, of which the parts that work are stand-ins here."""
    return command


# ---- train ----------------------------------------------------------------------------------------------------------


def test_train_runs_the_configs_in_order_with_their_overrides(sft, calls, run):
    second = sft.parent / "second.yaml"
    run("train", sft, second, "seed=3", "second:iterations=9")
    assert [(name, cfg.run_dir, cfg.seed, cfg.iterations, text) for name, cfg, text, _ in calls] == [
        ("run", "first", 3, 2, sft.read_text()),
        ("run", "second", 3, 9, second.read_text()),
    ]


def test_a_mistake_in_the_last_config_stops_before_the_first_runs(sft, calls, run):
    second = sft.parent / "second.yaml"
    out, err = run("train", sft, second, "second:seed=x", code=2)
    assert (out, err) == ("", 'command line: seed: "x": expected an integer\n')
    out, err = run("train", sft, second, "second:mesh.data=3", code=2)
    assert err.startswith(f"{second}: mesh: (data=3, fsdp=1, tensor=1) needs 3 devices") and err.count("\n") == 1
    assert calls == []


def test_preemption_exits_with_75_and_leaves_the_rest(sft, calls, run):
    run("train", sft, sft.parent / "second.yaml", "first:run_dir=stop", code=75)
    assert [cfg.run_dir for _, cfg, *_ in calls] == ["stop"]


def test_a_run_that_is_out_of_time_exits_with_0_and_leaves_the_rest(sft, calls, run):
    run("train", sft, sft.parent / "second.yaml", "first:run_dir=late", code=0)
    run("train", sft, sft.parent / "second.yaml", "first:run_dir=alarm", code=1)
    assert [cfg.run_dir for _, cfg, *_ in calls] == ["late", "alarm"]


def test_ctrl_c_in_the_last_iteration_of_a_run_stops_before_the_next(sft, calls, run):
    out, _ = run("train", sft, sft.parent / "second.yaml", "first:run_dir=last", code=130)
    assert [cfg.run_dir for _, cfg, *_ in calls] == ["last"]
    assert out == f"Ctrl-C: stopped before {sft.parent / 'second.yaml'}; the same command resumes\n"


def test_check_looks_and_trains_nothing(sft, calls, run):
    second = sft.parent / "second.yaml"
    assert run("train", sft, second, "--check", "seed=3")[0] == "looked at first\nlooked at second\n"
    assert [name for name, *_ in calls] == ["dry_run"] and calls[0][1][0][1].seed == 3


def test_train_needs_a_config(calls, run):
    assert "no config file" in run("train", "seed=3", code=2)[1]


def test_a_library_error_keeps_its_traceback(sft, calls, monkeypatch, run):
    def broken(cfg, text, stop):
        return int("not a number")

    monkeypatch.setattr(sys.modules["jaxrlhf.train"], "run", broken)
    with pytest.raises(ValueError, match="invalid literal"):
        run("train", sft)


@pytest.mark.parametrize("ours", [True, False])
def test_what_the_file_system_refuses_is_one_line(sft, calls, monkeypatch, run, ours):
    """But not in a user's own function."""

    def broken(cfg, text, stop):
        raise OSError(28, "No space left on device", "runs/a/metrics.jsonl")

    monkeypatch.setattr(sys.modules["jaxrlhf.train"], "run", broken)
    if ours:
        monkeypatch.setattr(user_code, "PACKAGE", ROOT)
        assert run("train", sft, code=1)[1] == "runs/a/metrics.jsonl: No space left on device\n"
        return
    with pytest.raises(OSError, match="No space left"):
        run("train", sft)


def test_training_that_breaks_down_is_one_line_too(sft, calls, monkeypatch, run):
    def broken(cfg, text, stop):
        raise FloatingPointError("step 3: loss/policy is nan")

    monkeypatch.setattr(sys.modules["jaxrlhf.train"], "run", broken)
    with pytest.raises(FloatingPointError):  # raised outside the package: not its words
        run("train", sft)
    monkeypatch.setattr(exits, "PACKAGE", Path(__file__).parent)
    assert run("train", sft, code=1)[1] == "step 3: loss/policy is nan\n"


def test_the_traceback_of_a_mistake_can_be_asked_for(sft, calls, monkeypatch, run):
    monkeypatch.setenv("JAXRLHF_TRACEBACK", "1")
    with pytest.raises(ValueError, match="expected an integer"):
        run("train", sft, "seed=x")


# ---- evaluate, export -------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "runs" / "good"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("")
    return path


def test_evaluate_prints_a_report_or_json(run_dir, calls, run):
    report = {"eval/score/mean": 1.5, "run": str(run_dir), "step": 4}
    told = run("evaluate", run_dir)[0]
    assert told.startswith(f"the report {report}\n\nkept as {run_dir}/evaluations/000004-")
    told, said = run("evaluate", run_dir, "--json", "--no-judge", "--samples", "3")
    assert json.loads(told) == report and said == ""
    asked = [call[1:] for call in calls if call[0] == "evaluate_run"]
    assert asked == [(str(run_dir), Options()), (str(run_dir), Options(judge=False, samples=3))]
    files = sorted((run_dir / "evaluations").glob("000004-*.json"))
    assert len(files) == 2
    assert {json.loads(file.read_text())["options"].get("samples") for file in files} == {None, 3}


def test_evaluate_passes_a_judge_on(run_dir, calls, run):
    run("evaluate", run_dir, "--judge", "llm:m@http://a/v1")
    assert calls[0] == ("evaluate_run", str(run_dir), Options(llm="llm:m@http://a/v1"))


def test_evaluate_passes_on_how_to_sample(run_dir, calls, run):
    run("evaluate", run_dir, "--sampling", "temperature=0.6", "top_p=0.95", "--no-judge")
    assert calls[0][-1].sampling == ("temperature=0.6", "top_p=0.95")
    assert "--sampling top_p: expected KEY=VALUE" in run("evaluate", run_dir, "--sampling", "top_p", code=2)[1]
    assert "top_p=1: expected one run, or --sampling before" in run("evaluate", run_dir, "top_p=1", code=2)[1]


def test_evaluate_passes_the_best_of_on(run_dir, calls, run):
    run("evaluate", run_dir, "--best-of", "16,1,4", "--gold", "my:gold")
    assert calls[0] == ("evaluate_run", str(run_dir), Options(best_of=(1, 4, 16), gold="my:gold"))
    for text in ("1,x", "0,4", "1,,2"):
        assert (
            f"--best-of {text}: expected numbers of samples, as in 1,4,16,64"
            in run("evaluate", run_dir, "--best-of", text, code=2)[1]
        )


def test_export_passes_role_and_folder(run_dir, calls, run):
    out, _ = run("export", run_dir, "--role", "reward", "--to", "there")
    assert calls == [("export", str(run_dir), "reward", "there", False)]
    assert out == f"reward of {run_dir}, step 4, written to there\na note\n"


@pytest.mark.parametrize("words", [["evaluate"], ["export", "--to", "there"]])
def test_a_missing_run_names_the_nearest(words, run_dir, calls, run):
    wrong = run_dir.parent / "goood"
    _, err = run(words[0], wrong, *words[1:], code=2)
    assert err == f"{wrong}: no run directory (config.yaml is not in it); nearest: {run_dir}\n"
    assert calls == []


# ---- the process ----------------------------------------------------------------------------------------------------

HELP = """
import sys
sys.argv = ["jaxrlhf", *sys.argv[1:], "--help"]
from jaxrlhf.cli.app import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {"jax", "jaxlib", "flax", "optax", "orbax", "transformers", "tokenizers", "tensorflow_datasets", "grain",
         "numpy", "pydantic", "yaml", "etils", "tensorflow", "torch", "tensorboardX"}
print("HEAVY", sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
"""


def test_help_is_quick_and_loads_nothing_heavy():
    seconds = []
    for command in ([], ["train"], ["generate"]):
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", HELP, *command], cwd=ROOT, capture_output=True, text=True, check=True
        )
        seconds.append(time.monotonic() - begin)
        for name in command or ("train", "preflight", "generate", "evaluate", "export"):
            assert name in done.stdout
        allowed = ("HEAVY []", "HEAVY ['pydantic']") if command else ("HEAVY []",)  # typer imports it for arguments
        assert done.stdout.splitlines()[-1] in allowed
    assert min(seconds) < 2


@pytest.mark.parametrize("module", ["launch.config", "launch", "tpu.slices", "tpu.peaks", "errors", "cli.app"])
def test_what_runs_on_a_small_machine_loads_no_jax(module):
    code = f"import sys, jaxrlhf.{module}; print(sorted({{'jax', 'flax', 'transformers'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_python_m_is_the_same_command(tmp_path):
    command = [sys.executable, "-m", "jaxrlhf", "train", str(tmp_path / "no.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{tmp_path / 'no.yaml'}: no such file\n"


def test_one_function_tells_paths_from_overrides():
    """KEY=VALUE is an override, in whichever order; nothing else in the commands looks for the sign."""
    from jaxrlhf.cli.setup import split_arguments

    assert split_arguments(["a=1", "b.yaml", "ppo:c.d=x=y", "e.yaml"]) == (["b.yaml", "e.yaml"], ["a=1", "ppo:c.d=x=y"])
    assert split_arguments(None) == ([], [])
    sources = {path.name: path.read_text() for path in (ROOT / "jaxrlhf" / "cli").glob("*.py")}
    assert [name for name, text in sources.items() if '"=" ' in text] == ["setup.py"]


@pytest.mark.parametrize(("argument", "code"), [("train", 75), ("generate", -signal.SIGTERM)])
def test_sigterm_while_the_command_is_imported(tmp_path, argument, code):
    """Before its own handlers are there: launchers run training that ends with 75 again."""
    (tmp_path / "typer.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(30)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "jaxrlhf", argument, "no.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, "SIGTERM: stopped\n" if code == 75 else "")
