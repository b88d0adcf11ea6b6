"""Launch configs: examples load, mistakes are one line each, and a mesh that the slice does not fit is refused."""

import dataclasses
import runpy
import subprocess
import sys

import pytest

from jaxrlhf.config.load import load_all
from jaxrlhf.errors import ConfigError
from jaxrlhf.launch.cli import PROVIDERS
from jaxrlhf.launch.config import RetryConfig, load_launch
from tests.launch.cases import CASES, GOLDEN, ROOT, rendered


def load(provider: str, *overrides: str):
    return load_launch(ROOT / "launch" / f"{provider}.yaml", provider, ROOT, overrides)


def mistake(provider: str, *overrides: str) -> str:
    """What is said of the example with these overrides: one line, without the path of the example."""
    with pytest.raises(ConfigError) as error:
        load(provider, *overrides)
    (line,) = str(error.value).splitlines()
    return line.removeprefix(f"{ROOT}/launch/{provider}.yaml: ")


@pytest.mark.parametrize("name", CASES)
def test_what_would_be_run_is_as_it_was_read_and_approved(name):
    assert rendered(name) == (GOLDEN / f"{name}.txt").read_text()


def test_every_golden_text_has_its_case():
    assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)


def test_machines_are_counted():
    two = load("tpu_vm", "accelerator=v5p-128", "slices=2", "overrides=[mesh.fsdp=4, batch.sequences_per_step=128]")
    assert (two.machines.devices, two.machines.devices_per_slice, two.machines.hosts) == (128, 64, 32)
    ironwood = load("gke", "accelerator=tpu7x:2x2x1", "overrides=[batch.sequences_per_step=8]")
    assert (ironwood.machines.devices, ironwood.machines.hosts) == (8, 1)
    nodes = load("slurm")
    assert (nodes.machines.devices, nodes.machines.hosts, nodes.machines.kind) == (16, 2, "h100")


def test_run_dir_is_the_launch_s_else_the_config_s():
    assert load("tpu_vm").run_dirs == ("gs://my-bucket/runs/first",)
    assert load("slurm").run_dirs == ("runs/tiny/sft",)
    moved = load("tpu_vm", "run_dir=null", "overrides=[run_dir=gs://b/r, batch.sequences_per_step=16]")
    assert moved.run_dirs == ("gs://b/r",) and moved.arguments[1] == "run_dir=gs://b/r"


CHAIN = "train=[configs/quickstart/sft.yaml, configs/quickstart/rm.yaml, configs/quickstart/ppo.yaml]"
CHAIN_FITS = "overrides=[batch.sequences_per_step=16, batch.preferences_per_step=16, batch.prompts_per_step=64]"


def test_several_configs_are_one_launch_and_each_starts_from_the_moved_run_of_another():
    chain = load("tpu_vm", CHAIN, CHAIN_FITS, "run_dir=gs://b/film/")
    assert chain.run_dirs == ("gs://b/film/sft", "gs://b/film/rm", "gs://b/film/ppo")
    assert chain.arguments[:3] == [f"configs/quickstart/{name}.yaml" for name in ("sft", "rm", "ppo")]
    _, rm, ppo = load_all([ROOT / path for path in chain.arguments[:3]], chain.arguments[3:])
    assert rm.models["reward"].init_from == "gs://b/film/sft"
    assert {role: ppo.models[role].init_from for role in ("policy", "reward")} == {
        "policy": "gs://b/film/sft",
        "reward": "gs://b/film/rm",
    }


def test_a_step_of_a_moved_run_stays_that_step():
    best = ", 'sft:checkpoint.best=eval/loss/policy', 'ppo:models.policy.init_from=runs/quickstart/sft@best']"
    chain = load("tpu_vm", CHAIN, CHAIN_FITS[:-1] + best)
    (start,) = [text for text in chain.arguments if text.startswith("ppo:models.policy.init_from=gs://")]
    assert start.endswith("/first/sft@best")


def test_every_run_of_a_chain_has_to_outlive_the_machines():
    assert mistake("tpu_vm", CHAIN.replace("[", "[configs/tiny/sft.yaml, "), CHAIN_FITS).startswith(
        "train: configs/tiny/sft.yaml: configs/quickstart/sft.yaml is called sft too; expected different file names"
    )
    with pytest.raises(ConfigError) as error:
        load("tpu_vm", CHAIN, CHAIN_FITS, "run_dir=null")
    assert [line.split(": ")[2] for line in str(error.value).splitlines() if ": run_dir: " in line] == [
        f"runs/quickstart/{name}" for name in ("sft", "rm", "ppo")
    ]


@pytest.mark.parametrize(
    ("provider", "override", "line"),
    [
        # the slice
        ("tpu_vm", "accelerator=v5litpod-16", "accelerator: v5litpod-16: no TPU slice, expected one such"),
        ("tpu_vm", "accelerator=h100:8", "accelerator: h100:8: tpu_vm has TPUs only; nearest: v5litepod-8"),
        ("tpu_vm", "accelerator=tpu7x-8", "accelerator: tpu7x-8: the Cloud TPU API does not have it; expected launch/"),
        ("tpu_vm", "accelerator=v5p:4x4x12", "accelerator: v5p:4x4x12: the Cloud TPU API knows slices by size alone;"),
        ("slurm", "accelerator=v5e-16", "accelerator: v5e-16: slurm has nodes of GPUs; expected NAME:COUNT, as in"),
        ("slurm", "accelerator=h100:0", "accelerator: h100:0: expected at least one device a node, as in h100:8"),
        ("skypilot", "slices=2", "slices: 2: SkyPilot makes one TPU slice; nearest: 1"),
        ("tpu_vm", "slices=0", "slices: 0: expected a number in [1, inf); nearest: 1"),
        # what is needed
        ("tpu_vm", "zone=null", "zone: missing; expected text"),
        ("tpu_vm", "project=null", "project: missing; expected text"),
        ("gke", "gke=null", "gke: missing; expected a section with image"),
        ("gke", "gke={namespace: x}", "gke.image: missing; expected text"),
        ("gke", "secrets=[HF_TOKEN]", "gke.secret: missing; secrets are named; expected the Secret that holds them"),
        ("gke", "capacity=reserved", "gke.reservation: None: capacity is reserved; expected both or neither"),
        ("gke", "gke.grace_seconds=30", "gke.grace_seconds: 30: expected a number in [120, inf); nearest: 120"),
        ("tpu_vm", "train=[]", "train: []: expected at least one training config"),
        # flex-start
        ("tpu_vm", "capacity=flex-start", "tpu_vm.max_run_duration: missing: expected a time up to 7d, as in 24h"),
        ("tpu_vm", "tpu_vm={max_run_duration: 24h}", "tpu_vm.max_run_duration: 24h: capacity is spot; expected capaci"),
        ("slurm", "capacity=flex-start", "capacity: flex-start: slurm does not have it; nearest: on-demand"),
        ("skypilot", "capacity=flex-start", "capacity: flex-start: skypilot does not have it; nearest: on-demand"),
        # words
        ("tpu_vm", "capasity=spot", 'unknown key (value "spot"); nearest: capacity'),
        ("tpu_vm", "capacity=sopt", 'capacity: "sopt": expected one of spot, on-demand, reserved, flex-start; nearest'),
        ("tpu_vm", "tpu_vm={netwrk: a}", 'tpu_vm.netwrk: unknown key (value "a"); nearest: network'),
        ("tpu_vm", "retry.poll=-1", "retry.poll: -1.0: expected a number in [0, inf); nearest: 0"),
        # names
        ("tpu_vm", "name=My_Run", "name: My_Run: expected a DNS label (a-z, 0-9, -; a letter first); nearest: my-run"),
        ("tpu_vm", f"name={'a' * 64}", f"name: {'a' * 64}: {'a' * 64} would have 64 characters; expected 1 fewer"),
        ("gke", f"name={'a' * 50}", f"name: {'a' * 50}: {'a' * 50}-slice-0-3-xxxxx would have 66 characters; expected"),
        # secrets
        (
            "tpu_vm",
            "env={HF_TOKEN: abc}",
            "env.HF_TOKEN: a secret would stand here in the open; expected secrets: [HF_",
        ),
        ("tpu_vm", "env={a b: c}", "env.a b: expected the name of a variable"),
        (
            "tpu_vm",
            "secrets=[NOT_SET_HERE]",
            "secrets: NOT_SET_HERE: not in the environment here; expected export NOT_",
        ),
        # paths that the machines do not have
        (
            "tpu_vm",
            "run_dir=runs/first",
            "run_dir: runs/first: would be lost with the machines; expected a shared one;",
        ),
        (
            "tpu_vm",
            "run_dir=null",
            "run_dir: runs/tiny/sft: would be lost with the machines; expected a shared one; ne",
        ),
        ("tpu_vm", "train=../sft.yaml", "train: ../sft.yaml: not in "),
    ],
)
def test_a_mistake_is_one_line(provider, override, line, monkeypatch):
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    said = mistake(provider, override)
    assert said.removeprefix("capasity: ").startswith(line), said


FITS = "batch.sequences_per_step=64"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["overrides=[mesh.fsdp=32]"],
            "mesh: (data=-1, fsdp=32, tensor=1) needs a multiple of 32 devices; there are 16 in these machines",
        ),
        (
            ["overrides=[mesh.data=8, mesh.fsdp=4]"],
            "mesh: (data=8, fsdp=4, tensor=1) needs 32 devices; there are 16 in these",
        ),
        (["overrides=[]"], "batch.sequences_per_step: 8: 8 rows do not divide over 1 minibatch x 16 batch shards"),
        (["overrides=[batch.sequences_per_step=16, iterations=0]"], "iterations: 0: expected a number in [1, inf)"),
    ],
)
def test_a_mesh_or_batch_that_the_slice_does_not_fit_is_refused(overrides, line):
    assert line in mistake("tpu_vm", *overrides)


def test_axes_that_talk_in_every_layer_stay_inside_a_slice():
    fits = ["slices=4", "overrides=[mesh.fsdp=16, batch.sequences_per_step=64]"]
    assert load("tpu_vm", *fits).machines.devices == 64
    crosses = ["slices=4", "overrides=[mesh.fsdp=32, batch.sequences_per_step=64]"]
    said = mistake("tpu_vm", *crosses)
    assert "mesh: (slices=4, data=-1, fsdp=32, tensor=1) needs a multiple of 128 devices" in said
    other = mistake("tpu_vm", "slices=4", "overrides=[mesh.slices=2, batch.sequences_per_step=64]")
    assert other == "mesh.slices: 2: these machines are 4 slices; nearest: 4"


def test_weights_and_data_that_are_only_here_are_refused():
    role = "models.policy={init_from: runs/tiny/sft}"
    more = f"overrides=['{role}', tokenizer.train_vocab_size=null, batch.sequences_per_step=16]"
    assert mistake("tpu_vm", more).startswith("models.policy.init_from: runs/tiny/sft: is not sent to the machines;")
    assert load("slurm", more).run_dirs  # nodes share a file system with us
    data = "overrides=['data.demonstrations={path: /data/a.jsonl}', batch.sequences_per_step=16]"
    assert mistake("tpu_vm", data).startswith("data.demonstrations.path: /data/a.jsonl: is not sent to the machines;")


@pytest.mark.parametrize("duration", ["8d", "0h", "24", "1 day", "169h"])
def test_machines_are_lent_for_seven_days_at_most(duration):
    said = mistake("tpu_vm", "capacity=flex-start", f"tpu_vm={{max_run_duration: {duration}}}".replace("24}", "'24'}"))
    assert said == f"tpu_vm.max_run_duration: {duration}: expected a time up to 7d, as in 24h"


def test_all_mistakes_are_told_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        load("tpu_vm", "zone=null", "name=A", "env={MY_SECRET: x}")
    assert len(str(error.value).splitlines()) == 3


def test_waits_that_tests_shorten_are_sane_by_default():
    retry = RetryConfig()
    assert 10 <= retry.poll <= 60 and retry.wait <= retry.longest_wait
    assert all(value > 0 for value in dataclasses.astuple(retry))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_script_prints_the_golden_text_and_runs_nothing(provider, tmp_path, monkeypatch, capsys):
    """With a PATH that holds none of the programs."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [f"launch/{provider}.py", f"launch/{provider}.yaml", "--dry-run"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(f"launch/{provider}.py", run_name="__main__")
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    assert out.replace(str(ROOT), "/ROOT") == (GOLDEN / f"{provider}.txt").read_text()


def test_the_script_refuses_in_one_line(tmp_path):
    command = [sys.executable, "launch/gke.py", "launch/gke.yaml", "name=A_B"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("launch/gke.yaml: name: A_B: expected a DNS label") and done.stderr.count("\n") == 1
