"""A run that is stopped and goes on is the run that was never stopped, bit for bit; on another mesh, to rounding.

Both sides of a comparison of bits are processes with the same settings (see runs.whole and runs.parts).
"""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxrlhf import train as trainer
from jaxrlhf.config.load import load
from jaxrlhf.errors import ConfigError
from tests.support import runs

NAMES = ["sft", "ppo", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("rm", "dpo", "grpo"))]


@pytest.fixture(scope="module")
def whole(root) -> Path:
    """The runs without a break."""
    runs.whole(root)
    return root / "whole"


@pytest.fixture
def parted(root, name) -> Path:
    """The run that was stopped and went on."""
    runs.parts(root) if name in ("sft", "ppo") else runs.halves(root)
    return root / "parts" / name


def extra(run: Path, step: int) -> dict[str, Any]:
    """The JSON of a checkpoint; of its config only what does not differ between the two sides on purpose."""
    found = json.loads((run / "checkpoints" / str(step) / "extra" / "metadata").read_text())
    lines = found["config"].splitlines()
    return found | {"config": [line for line in lines if not line.startswith(("run_dir:", "checkpoint:", "  every:"))]}


@pytest.mark.parametrize("name", NAMES)
def test_the_state_has_the_same_bits(whole, parted, name):
    expected, found = (runs.read_state(run, 4) for run in (whole / name, parted))
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        other = found[path]
        assert (other.dtype, other.shape) == (leaf.dtype, leaf.shape), path
        assert other.tobytes() == leaf.tobytes(), path


def test_the_state_is_all_there_is(whole):
    """So that the comparison compares: roles, both moments and the count of each optimizer, controls, step and seed."""
    found = runs.read_state(whole / "ppo", 4)
    items = {path.split("/")[0] for path in found}
    assert items == {"params.policy", "params.value", "params.reward", "slow.reference", "state"}
    state = {path.removeprefix("state/") for path in found if path.startswith("state/")}
    assert {"step", "seed", "controls/kl_coef"} <= state
    assert found["state/step"] == 4
    for role in ("policy", "value", "reward"):
        weights = [path.split("/", 1)[1] for path in found if path.startswith(f"params.{role}/")]
        for moment in ("mu", "nu"):
            moments = [path for path in state if path.startswith(f"opt_state/{role}/") and f"/{moment}/" in path]
            assert len(moments) == len(weights) > 0
        (count,) = (path for path in state if path.startswith(f"opt_state/{role}/1/") and path.endswith("count"))
        assert found[f"state/{count}"] == 4 * 2 * 2  # iterations x epochs x minibatches


@pytest.mark.parametrize("name", NAMES)
def test_training_changes_what_is_compared(whole, name):
    before, after = (runs.read_state(whole / name, step) for step in (2, 4))
    for path, leaf in after.items():
        moved = leaf.tobytes() != before[path].tobytes()
        constant = path.startswith("slow.") or path.split("/", 1)[1] in ("seed",)
        if constant:
            assert not moved, path
        elif path.startswith("params.") and "bias" not in path:
            assert moved, path


@pytest.mark.parametrize("name", NAMES)
def test_data_positions_models_and_config_are_those_of_an_unbroken_run(whole, parted, name):
    assert extra(parted, 4) == extra(whole / name, 4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", ["metrics", "samples"])
def test_rows_are_those_of_an_unbroken_run(whole, parted, name, file):
    expected, found = (runs.rows(run, file) for run in (whole / name, parted))
    assert found == expected
    assert (
        len(expected)
        == {"metrics": 7, "samples": 3 * 8 * (name in ("dpo", "grpo", "ppo")) + 4 * 2 * (name in ("grpo", "ppo"))}[file]
    )


def test_sigterm_saves_and_says_so(root):
    first, _ = runs.parts(root)
    assert first.outputs[0].endswith("SIGTERM: stopped at step 2; the same command resumes\n")
    # checkpoint.every is 3: this one is there because of the signal
    assert runs.steps_kept(root / "killed" / "ppo") == [2]


def test_sigkill_leaves_the_checkpoint_before(root):
    first, second = runs.parts(root)
    killed = root / "killed" / "ppo"
    assert first.code == -9
    # step 3 was written down, and is redone without standing there twice
    assert [row["step"] for row in runs.rows(killed)] == [0, 1, 2, 2, 3]
    assert [row["step"] for row in runs.rows(killed, "samples")][-2:] == [3, 3]
    assert "resumed from step 2" in second.outputs[0]
    assert second.code == 0


@pytest.mark.nightly
def test_a_reward_model_is_normalised_once(root):
    """SIGTERM came before it."""
    said = ["reward model: scores of 200 samples" in output for output in runs.halves(root)[0].outputs]
    assert said == [False, True]


def test_a_resumed_run_says_what_changed_since(root):
    first, second = runs.parts(root)
    stopped, killed = first.outputs
    assert "changed since" not in stopped
    opening, changed, *_ = killed.splitlines()
    assert opening.endswith("4 iterations, going on after 2, seed 0")
    assert changed == "changed since step 2: iterations: 2 -> 4"
    assert [output.count("changed since") for output in (killed, second.outputs[0])] == [1, 0]


def test_a_finished_run_is_left_alone(root):
    *_, last = runs.parts(root)
    assert "parts/sft: all 4 iterations are done; raise iterations= (or epochs=) to go on\n" in last.outputs[0]
    before, after = (
        {path.relative_to(side): path.stat().st_mtime_ns for path in side.rglob("*") if path.is_file()}
        for side in (root / "killed" / "sft", root / "parts" / "sft")
    )
    lock = Path(".lock")  # names the last process
    assert before.pop(lock) != after.pop(lock)
    assert before == after


# ---- another mesh ---------------------------------------------------------------------------------------------------

MESH = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
PMAP = ["mesh.style=pmap"]


def go_on(root: Path, name: str, source: Path, last: int, to: str, devices: int, mesh: list[str]) -> Path:
    """A copy of a run as it was at step ``last``, and gone on with on other devices."""
    folder = root / to / "runs"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    run = runs.copy_run(source, folder / name, last)
    arguments = [*runs.overrides(runs.text(root), folder, root / "whole"), "checkpoint.every=1", "checkpoint.keep=9"]
    command = runs.train(*arguments, *mesh, configs=[runs.tiny_config(name)])
    if devices == jax.device_count():  # this process has imported all of it
        with contextlib.redirect_stdout(io.StringIO()) as output:
            assert trainer.run(load(command[1], command[2:])) == "done"
        said = output.getvalue()
    else:
        done = runs.process(root / to, [command], devices)
        assert done.code == 0, done.errors
        said = done.outputs[0]
    assert f"resumed from step {last}" in said
    return run


def losses(run: Path, step: int) -> dict[str, float]:
    """Loss and score of the iteration, which were computed with the parameters before it."""
    (row,) = (row for row in runs.rows(run) if row["step"] == step and not any("eval/" in key for key in row))
    return {key: value for key, value in row.items() if key.startswith(("loss/", "score/", "policy/entropy"))}


def restored_on(root: Path, whole: Path, name: str, mesh: list[str]) -> Path:
    """The run of one device, gone on with on eight: its losses are the same, to rounding."""
    many = go_on(root, name, whole / name, 2, f"many-{name}-{len(mesh)}", 8, mesh)
    assert losses(many, 3).keys() == losses(whole / name, 3).keys() != set()
    for key, value in losses(whole / name, 3).items():
        np.testing.assert_allclose(losses(many, 3)[key], value, rtol=0, atol=1e-5, err_msg=key)
    return many


def test_a_checkpoint_is_restored_on_another_mesh(root, whole):
    restored_on(root, whole, "sft", MESH)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param("sft", MESH, marks=pytest.mark.nightly),
        pytest.param("ppo", PMAP, marks=pytest.mark.nightly),
        pytest.param("rm", MESH, marks=pytest.mark.nightly),
        pytest.param("rm", PMAP, marks=pytest.mark.nightly),
        pytest.param("ppo", MESH, marks=pytest.mark.nightly),
    ],
)
def test_a_checkpoint_is_restored_on_another_mesh_and_back(root, whole, name, mesh):
    many = restored_on(root, whole, name, mesh)
    one = go_on(
        root,
        name,
        many,
        3,
        f"one-{name}-{len(mesh)}",
        1,
        ["mesh.style=mesh", "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1"],
    )
    for key, value in losses(many, 4).items():
        np.testing.assert_allclose(losses(one, 4)[key], value, rtol=0, atol=1e-5, err_msg=key)
    assert losses(one, 4) != losses(one, 3)


# ---- Muon -----------------------------------------------------------------------------------------------------------


@pytest.mark.nightly  # by day: test_optim, updates alone
def test_a_run_by_muon_goes_on_with_the_same_bits(root, tmp_path):
    """Split over eight devices: four iterations, and two and two; it learns, and another optimizer is refused."""
    options = [*MESH, "optimizer.default.name=muon", "optimizer.default.weight_decay=0.01", "log.trackers=[]"]

    def train(folder: str, iterations: int, *more: str) -> Path:
        cfg = runs.config("sft", root, tmp_path / folder, *options, f"iterations={iterations}", *more)
        assert trainer.run(cfg) == "done"
        return tmp_path / folder / "sft"

    whole, parted = train("whole", 4), [train("parted", count) for count in (2, 4)][1]
    expected, found = (runs.read_state(run, 4) for run in (whole, parted))
    assert found.keys() == expected.keys() and any("/trace/" in path for path in found)
    for path, leaf in expected.items():
        assert found[path].tobytes() == leaf.tobytes(), path
    first, last = (losses(whole, step)["loss/policy"] for step in (1, 4))
    assert last < 0.95 * first
    with pytest.raises(
        ConfigError, match=r'^optimizer\.default\.name: "adamw": the run in .* is at step 4 with "muon"'
    ):
        train("parted", 5, "optimizer.default.name=adamw")
