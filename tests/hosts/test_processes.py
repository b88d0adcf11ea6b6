"""Two processes of four devices each are one run: its numbers, its signals, its deaths, and who is missing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrlhf.hosts import processes
from jaxrlhf.hosts.processes import DistributedConfig
from jaxrlhf.run.transfer import fetch, holders, put, share_of
from tests.support import runs
from tests.support.pair import command, under_way

FUNCTION = ["grpo:models={policy: {init_from: SFT}}", "grpo:rewards.function=tests.support.runs:praise"]
SHORT = ["mesh.fsdp=2", "checkpoint.every=4", "grpo:batch.prompts_per_step=8"]


# ---- training -------------------------------------------------------------------------------------------------------


def base(root: Path) -> Path:
    """Where the runs here start: sft, trained for one iteration by one process of one device."""
    return trained(root, "sft")


def trained(root: Path, name: str, *more: str) -> Path:
    """The folder of the model ``name``, trained for one iteration."""
    folder = root / "distributed"
    command = runs.train(
        *runs.overrides(runs.text(root), folder),
        "iterations=1",
        "eval.every=0",
        *more,
        configs=[runs.tiny_config(name)],
    )
    runs.once(root, f"distributed-{name}", lambda: [runs.process(folder / f"base-{name}", [command])])
    return folder


def grpo(root: Path, name: str, *more: str) -> list[str]:
    """The command that trains ``name``: GRPO with a reward function, but for what ``more`` says."""
    start = base(root)
    function = [text.replace("SFT", str(start / "sft")) for text in FUNCTION]
    arguments = runs.overrides(runs.text(root), start / name, start)
    arguments = [text for text in arguments if not text.startswith("grpo:models.")]
    return runs.train(*arguments, *function, *SHORT, *more, configs=[runs.tiny_config("grpo")])


def with_model(root: Path, name: str) -> list[str]:
    """The command that trains PPO with a reward model that learns, and evaluates pairs."""
    base(root)
    start = trained(root, "rm", "algorithm.normalize_samples=0")
    arguments = runs.overrides(runs.text(root), start / name, start)
    smaller = ["ppo:batch.prompts_per_step=16", "ppo:algorithm.num_epochs=1"]
    return runs.train(*arguments, *SHORT, *smaller, configs=[runs.tiny_config("ppo")])


def pair(root: Path) -> list[runs.Done]:
    """Two processes that trained without a break, for 8 iterations."""
    return runs.once(
        root,
        "distributed-pair",
        lambda: runs.together(root / "distributed/pair", [grpo(root, "whole", "iterations=8")]),
    )


def numbers(run: Path) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key.startswith(("loss/", "score/", "kl/", "eval/", "step"))}
        for row in runs.rows(run)
    ]


@pytest.mark.nightly
def test_two_processes_compute_what_one_does(root):
    done = pair(root)
    assert [one.code for one in done] == [0, 0], done[0].errors + done[1].errors
    (alone,) = runs.once(
        root,
        "distributed-alone",
        lambda: [runs.process(root / "distributed/one", [grpo(root, "alone", "iterations=4")], devices=8)],
    )
    assert alone.code == 0, alone.errors
    expected, found = (numbers(base(root) / name / "grpo") for name in ("alone", "whole"))
    assert [row["step"] for row in expected] == [0, 1, 2, 2, 3, 4, 4]
    for one, two in zip(expected, found):
        assert one.keys() == two.keys() and len(one) > 3
        for key, value in one.items():
            np.testing.assert_allclose(two[key], value, rtol=0, atol=1e-5, err_msg=f"step {one['step']}: {key}")
    assert len({row["score/mean"] for row in expected if "score/mean" in row}) > 1
    samples = [runs.rows(base(root) / name / "grpo", "samples") for name in ("alone", "whole")]
    assert samples[0] == samples[1][: len(samples[0])] and len(samples[0]) > 8


@pytest.mark.nightly
def test_two_processes_compute_what_one_does_with_a_reward_model(root):
    """PPO whose reward model learns too, measured, evaluated and exported by two processes and by one."""
    runs_of = lambda name: base(root) / name / "ppo"
    after = lambda name: [["evaluate", f"{runs_of(name)}", "--json"]]
    export = lambda name: [["export", f"{runs_of(name)}", "--to", f"{base(root) / name}/hf"]]
    commands = lambda name: [with_model(root, name), *after(name), *export(name)]
    two = runs.together(root / "distributed/two-model", commands("two-model"))
    one = runs.process(root / "distributed/one-model", commands("one-model"), devices=8)
    assert [done.code for done in (*two, one)] == [0, 0, 0], two[0].errors + two[1].errors + one.errors
    expected, found = (numbers(runs_of(name)) for name in ("one-model", "two-model"))
    for alone, pair in zip(expected, found, strict=True):
        for key, value in alone.items():
            np.testing.assert_allclose(pair[key], value, rtol=0, atol=1e-5, err_msg=f"step {alone['step']}: {key}")
    reports = [json.loads(done.outputs[1][done.outputs[1].index("{") :])["after"] for done in (two[0], one)]
    assert reports[0].keys() == reports[1].keys() and len(reports[0]) > 3
    for key, value in reports[1].items():
        np.testing.assert_allclose(reports[0][key], value, rtol=0, atol=1e-5, err_msg=key)
    weights = [load_file(base(root) / name / "hf" / "model.safetensors") for name in ("one-model", "two-model")]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        np.testing.assert_allclose(weights[1][name], value, rtol=0, atol=1e-5, err_msg=name)


def test_one_process_writes_and_speaks(root, tmp_path):
    """Of two that train grpo by a reward function."""
    runs.whole(root)
    with under_way(tmp_path, command(root, tmp_path, "grpo", origin=root / "whole" / "sft")) as pair:
        assert pair.ended() == {0: 0, 1: 0}, pair.said()
    folder, (first, second) = tmp_path, (pair.output(number) for number in (0, 1))
    assert "compiled 2 programs" in first and "step 4/4" in first
    gloo = re.compile(r"\[Gloo\].*|\d*")  # its threads write into each other's lines
    assert [line for line in second.splitlines() if not gloo.fullmatch(line)] == []
    steps = [row["step"] for row in runs.rows(folder / "grpo")]
    assert sorted(set(steps)) == list(range(5)) and len(steps) == 4 + 3  # an evaluation at 0, 2, 4
    assert "localhost" not in (folder / "grpo" / "config.yaml").read_text()  # where they met is no part of the run


@pytest.mark.nightly
def test_sigterm_to_one_stops_all_at_one_step_and_the_run_goes_on_bitwise(root):
    """The second process alone gets the signal."""
    pair(root)
    stopped = runs.together(
        root / "distributed/stopped",
        [grpo(root, "parts", "iterations=8")],
        kills={1: ("SIGINT", "grpo", "metrics", 1)},  # which is passed on to all as SIGTERM
        environment={"JAXRLHF_TEST_PACE": "1"},
    )
    assert [one.code for one in stopped] == [75, 130], stopped[0].errors + stopped[1].errors
    said = re.search(r"SIGTERM: stopped at step (\d+); the same command resumes", stopped[0].outputs[0])
    assert said is not None
    step, run = int(said[1]), base(root) / "parts" / "grpo"
    assert 1 <= step < 8 and runs.steps_kept(run)[-1] == step
    resumed = runs.together(root / "distributed/resumed", [grpo(root, "parts", "iterations=8")])
    assert [one.code for one in resumed] == [0, 0], resumed[0].errors + resumed[1].errors
    assert f"resumed from step {step}" in resumed[0].outputs[0]
    whole = base(root) / "whole" / "grpo"
    expected, found = (runs.read_state(side, 8) for side in (whole, run))
    assert expected.keys() == found.keys()
    assert [path for path in expected if expected[path].tobytes() != found[path].tobytes()] == []
    assert runs.rows(run) == runs.rows(whole)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "victim, named",
    [
        (1, r"tasks are unhealthy \(stopped sending heartbeats\):\n1\n"),
        (0, r"leader task was preempted/died|unhealthy \(stopped sending heartbeats\):\n0\n"),
    ],
)
def test_a_killed_process_is_named_and_ends_the_other(root, victim, named):
    pair(root)
    folder, command = root / f"distributed/killed-{victim}", grpo(root, f"killed-{victim}", "iterations=8")
    command.append("distributed.heartbeat_timeout=10")
    killed = {victim: ("SIGKILL", "grpo", "metrics", 1)}
    done = runs.together(folder, [command], kills=killed, environment={"JAXRLHF_TEST_PACE": "1"}, timeout=300)
    assert done[victim].code == -9
    other = done[1 - victim]
    assert other.code not in (0, 75)
    assert re.search(named, other.errors), other.errors
    assert other.ended - done[victim].ended < 60


# ---- rows -----------------------------------------------------------------------------------------------------------


class Device(NamedTuple):
    """Of a mesh that no array is put on."""

    id: int
    process_index: int


@pytest.mark.parametrize(
    "processes, fsdp, tensor, held, share",
    [
        ([0, 0, 0, 0, 1, 1, 1, 1], 2, 1, [[0]] * 4 + [[1]] * 4, ((0, 1, 2, 3), 8)),
        ([0, 0, 1, 1, 0, 0, 1, 1], 1, 1, [[0], [0], [1], [1]] * 2, ((0, 1, 4, 5), 8)),  # as a TPU torus may lie
        ([0, 0, 0, 0, 1, 1, 1, 1], 1, 8, [[0, 1]], ((0,), 1)),  # every process holds every row
        ([0, 0, 1, 1, 0, 0, 1, 1], 1, 4, [[0, 1], [0, 1]], ((0, 1), 2)),
    ],
)
def test_rows_go_where_the_mesh_has_them(processes, fsdp, tensor, held, share, monkeypatch):
    import jax

    from jaxrlhf.run import transfer
    from jaxrlhf.sharding import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor))
    real = transfer.row_layout(mesh, 1)
    places = lambda shape: {
        Device(one.id, processes[one.id]): index for one, index in real.devices_indices_map(shape).items()
    }
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "row_layout", lambda mesh, ndim: SimpleNamespace(devices_indices_map=places))
        assert holders(mesh) == held and share_of(mesh) == share
    rows = np.arange(16, dtype=np.int32).reshape(16, 1)
    whole = put(mesh, rows)  # by the one process that there is
    assert (np.asarray(whole) == rows).all() and (fetch(whole) == rows).all() and jax.process_count() == 1


# ---- meeting ---------------------------------------------------------------------------------------------------------


def test_a_run_whose_coordinator_is_missing_ends_in_one_line(tmp_path):
    address = f"localhost:{runs.free_port()}"
    given = {"coordinator": address, "num_processes": 2, "process_id": 1, "init_timeout": 2}
    command = [sys.executable, "-m", "jaxrlhf", "train", str(runs.tiny_config("sft")), f"run_dir={tmp_path}/run"]
    command += [f"distributed.{key}={value}" for key, value in given.items()]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(runs.ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        f"distributed.coordinator: {address}: process 1 of 2 could not reach process 0 there within 2 s "
        "(distributed.init_timeout): Connection refused\n"
    )
    assert not (tmp_path / "run").exists()


# ---- who is started with whom ---------------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "a[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1"}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        (SLURM, ("SLURM", {"local_device_ids": []})),  # one process a host: it takes all of its devices
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2"}, ("SLURM", {})),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),  # sbatch without srun: one process
        (OPEN_MPI, ("Open MPI", {})),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod that is no part of an indexed job
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None),  # without chips
    ],
)
def test_clusters_are_found_by_what_they_leave_in_the_environment(environment, expected, monkeypatch):
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: [])
    found = processes.detect(environment)
    assert (found and (found.name, dict(found.options))) == expected


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({}, False),  # a TPU VM: JAX asks its metadata
        ({"TPU_SKIP_MDS_QUERY": "1"}, None),
    ],
)
def test_tpu_hosts_join_their_pod(environment, expected, monkeypatch):
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name)
    found = processes.detect(environment)
    assert (found and found.certain) is expected


def test_a_kubernetes_job_needs_its_package(monkeypatch):
    environment = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
    with pytest.raises(
        ValueError, match=r"distributed: Kubernetes \(JOB_COMPLETION_INDEX=0\).*pip install 'jax\[k8s\]'"
    ):
        processes.detect(environment)
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name)
    assert processes.detect(environment) == ("a Kubernetes job", "JOB_COMPLETION_INDEX=0", {}, True)


JAX = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}


@pytest.mark.parametrize(
    "fields, environment, expected",
    [
        ({}, {}, None),
        ({}, JAX, ("h:1", 3, 2)),
        ({"coordinator": "k:2", "process_id": 0}, JAX, ("k:2", 3, 0)),
        ({}, {"JAX_COORDINATOR_ADDRESS": "h:1"}, None),  # for JAX's own detection
        ({"coordinator": "h"}, {}, "distributed.coordinator: h: expected HOST:PORT"),
        ({"coordinator": "h:1", "process_id": 0}, {}, "distributed.num_processes: null: expected a number"),
        ({"coordinator": "h:1", "num_processes": 2}, {}, "distributed.process_id: null: expected a number"),
        (
            {"coordinator": "h:1", "num_processes": 2, "process_id": 2},
            {},
            "distributed.process_id: 2: expected less than",
        ),
        ({"num_processes": 2}, {}, "distributed.num_processes: 2: there is no distributed.coordinator"),
    ],
)
def test_what_the_config_says_goes_before_the_environment(fields, environment, expected):
    cfg = DistributedConfig(**fields)
    if not isinstance(expected, str):
        assert processes.explicit(cfg, environment) == expected
        return
    with pytest.raises(ValueError, match=re.escape(expected)):
        processes.explicit(cfg, environment)


def test_a_plain_run_is_left_alone(monkeypatch):
    import jax

    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("there is nothing to join"))
    processes.start(DistributedConfig(), {})
    processes.start(DistributedConfig(auto=False), SLURM)
    assert not processes.several() and processes.on_main(lambda: 5) == 5
