"""Checkpoints: the whole state and back, which steps stay, what a crash leaves, and what another run takes."""

import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrlhf.log.run_dir import at_step, made_by, split_step
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.rope import RopeScaling
from jaxrlhf.run import failed_save_logs, saved_run, verified_steps
from jaxrlhf.run import state as states
from jaxrlhf.run.checkpoint import Checkpoints, describe_room, restore
from jaxrlhf.sharding import MeshConfig, make_mesh
from jaxrlhf.types import TrainState
from tests.support.disk import full_disk

ADAM = optax.adam(1e-3)
MESHES = {1: MeshConfig(1, 1, 1), 8: MeshConfig(2, 2, 2)}


def mesh_of(devices: int):
    return make_mesh(MESHES[devices], jax.devices()[:devices])


def new_state(value: float, devices: int = 1, trained=("policy",), slow=("reference",)) -> TrainState:
    """A state whose weights are ``value`` and up, split over fsdp and tensor."""
    layout = NamedSharding(mesh_of(devices), P("fsdp", "tensor"))
    weights = lambda at: {"kernel": jax.device_put(value + at + np.arange(8, dtype=np.float32).reshape(4, 2), layout)}
    params = {role: weights(at) for at, role in enumerate(trained)}
    still = {role: weights(100 + at) for at, role in enumerate(slow)}
    with jax.set_mesh(mesh_of(devices)):
        state = states.new_state(7, params, still, dict.fromkeys(trained, ADAM), {"kl_coef": jnp.float32(0.25)})
    return replace(state, step=jnp.int32(value))


def describe(state: TrainState, devices: int = 1) -> TrainState:
    """Shapes and layouts of the state, as they would be on so many devices."""

    def one(x):
        spec = P("fsdp", "tensor") if x.ndim == 2 else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh_of(devices), spec))

    return jax.tree.map(one, state)


def same(first: TrainState, second: TrainState) -> None:
    """Raises AssertionError where two states differ in any bit."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def save(run: Path, steps, scores=None, **options) -> Checkpoints:
    """Save the states of these steps, with eval/score where ``scores`` has one; closed again."""
    saved, scores = Checkpoints(run, **options), scores or {}
    for step in steps:
        metrics = {"eval/score": scores[step]} if step in scores else None
        saved.save(step, new_state(step), {"number": step}, metrics)
    saved.close()
    return saved


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


# ---- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 8), (8, 1), (8, 8)])
def test_a_state_comes_back_on_the_mesh_that_is_asked_for(tmp_path, before, after):
    state = new_state(3, before)
    saved = Checkpoints(tmp_path)
    saved.save(3, state, {"data": {"position": [1, 2]}})
    saved.close()
    found = restore(tmp_path, 3, describe(state, after))
    same(found, state)
    assert saved_run.read_extra(tmp_path, 3)[1] == {"data": {"position": [1, 2]}}
    assert len(found.params["policy"]["kernel"].sharding.device_set) == after
    assert len(found.opt_state["policy"][0].mu["kernel"].sharding.device_set) == after


@pytest.mark.parametrize("background", [True, False])
def test_a_state_that_is_donated_after_save_is_what_was_saved(tmp_path, background):
    state = new_state(3)
    expected = jax.tree.map(np.array, state)
    saved = Checkpoints(tmp_path, background=background)
    saved.save(3, state, {})
    if not background:  # all of it is on disk already
        same(restore(tmp_path, 3, describe(expected)), expected)
    jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)(state))
    saved.close()
    same(restore(tmp_path, 3, describe(expected)), expected)


def test_a_state_without_controls(tmp_path):
    state = replace(new_state(1), controls={}, slow={})
    saved = Checkpoints(tmp_path)
    saved.save(1, state, {})
    saved.close()
    same(restore(tmp_path, 1, describe(state)), state)


def test_other_roles_than_the_saved_ones_are_one_line(tmp_path):
    save(tmp_path, [1])
    wanted = new_state(1, trained=("policy", "reward"), slow=("reference",))
    with pytest.raises(
        ValueError, match=r"step 1 has no params\.reward, as the config wants; it has params\.policy, slow"
    ):
        restore(tmp_path, 1, describe(wanted))


# ---- which of them stay ---------------------------------------------------------------------------------------------


def test_the_last_ones_stay(tmp_path):
    save(tmp_path, range(1, 6), keep=2)
    assert steps_of(tmp_path) == [4, 5]
    assert verified_steps.newest(tmp_path) == 5


@pytest.mark.parametrize(("mode", "stay"), [("max", [2, 5]), ("min", [3, 5])])
def test_the_best_one_stays_too(tmp_path, mode, stay):
    save(tmp_path, range(1, 6), {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.4, 5: 0.3}, keep=1, best="eval/score", mode=mode)
    assert steps_of(tmp_path) == stay


def test_the_best_is_remembered_by_the_next_process(tmp_path):
    options = {"keep": 1, "best": "eval/score"}
    save(tmp_path, [1, 2], {1: 0.9, 2: 0.2}, **options)
    save(tmp_path, [3, 4], {3: 0.5, 4: 0.3}, **options)
    assert steps_of(tmp_path) == [1, 4]


def test_a_checkpoint_that_was_not_measured_is_not_the_best(tmp_path):
    save(tmp_path, range(1, 7), {2: 0.5, 4: 0.4}, keep=2, best="eval/score")
    assert steps_of(tmp_path) == [2, 5, 6]


MEASURED = {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.1, 5: 0.3}


def measured(run: Path, mode: str, best: str | None = "eval/score") -> str:
    """A run with five checkpoints, and what its config says of the best."""
    save(run, range(1, 6), MEASURED, keep=5, best=best, mode=mode)
    (run / "config.yaml").write_text(json.dumps({"checkpoint": {"best": best, "mode": mode}}))
    return str(run)


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 4)])
def test_a_name_says_which_checkpoint(tmp_path, mode, best):
    """Of equal ones the later is the best, as for what stays."""
    run = measured(tmp_path / "run", mode)
    assert [saved_run.find_step(name) for name in (run, f"{run}@best", f"{run}@3")] == [5, best, 3]
    assert saved_run.read_extra(f"{run}@3") == (3, {"number": 3}) and saved_run.is_run(f"{run}@best")
    assert saved_run.describe_step(run, best) == f"step {best}, the best by eval/score"
    assert saved_run.describe_step(run, 5) == "step 5"


@pytest.fixture(scope="module")
def run_of_five(tmp_path_factory) -> str:
    return measured(tmp_path_factory.mktemp("five") / "run", "max")


@pytest.mark.parametrize("wrong", ["7", "bset", "-1", "1.5", "", "latest"])
def test_a_wrong_step_is_one_line_with_the_steps_there_are(run_of_five, wrong):
    run = run_of_five
    with pytest.raises(ValueError) as error:
        saved_run.find_step(f"{run}@{wrong}")
    there = f"no step {wrong}; {run} has: 1, 2, 3, 4, 5; best: 2 by eval/score"
    nothing = f"no step behind the @; expected {run}, {run}@best or {run}@STEP"  # "$STEP" of a shell, say
    assert str(error.value) == f"{run}@{wrong}: {there if wrong else nothing}"


def test_a_run_that_measured_nothing_has_no_best(tmp_path):
    run = measured(tmp_path / "run", "max", best=None)
    with pytest.raises(
        ValueError, match=r"@best: no step of it was measured by checkpoint\.best .* has: 1, 2, 3, 4, 5$"
    ):
        saved_run.find_step(f"{run}@best")


def test_a_folder_may_have_an_at_in_its_name(tmp_path):
    run = measured(tmp_path / "me@2", "max")
    other = measured(tmp_path / "me", "max")
    assert split_step(run) == (run, "") and saved_run.find_step(run) == 5
    assert split_step(f"{run}@best") == (run, "best") and split_step(f"{other}@3") == (other, "3")
    assert split_step("me@example.com/run") == ("me@example.com/run", "")
    assert at_step(run, "3") == f"{run}@3" and at_step("hub/name", "") == "hub/name"
    for name in (f"{run}@2", "hub/name", "gguf:a.gguf"):
        with pytest.raises(ValueError, match=r"^--step 3: .*: expected a run directory"):
            at_step(name, "3")
    made = {"runs/a": 1, "runs/me@2": 2}
    names = {"runs/a": "runs/a", "runs/a@best": "runs/a", "runs/me@2@7": "runs/me@2", "runs/me@2": "runs/me@2"}
    assert {name: made_by(name, made) for name in names} == names
    assert made_by("runs/b@best", made) is made_by(None, made) is None


def test_another_measure_of_the_best_does_not_count_what_was_measured_before(tmp_path):
    save(tmp_path, [1, 2], {1: 0.9, 2: 0.2}, keep=1, best="eval/score")
    saved = Checkpoints(tmp_path, keep=1, best="eval/loss", mode="min")
    for step in (3, 4):
        saved.save(step, new_state(step), {}, {"eval/loss": 0.1 * step})
    saved.close()
    assert steps_of(tmp_path) == [3, 4]


# ---- crashes --------------------------------------------------------------------------------------------------------


def test_what_a_crash_left_half_written_is_no_checkpoint_and_goes(tmp_path):
    save(tmp_path, [1, 2])
    half = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "2", half)
    (half / "commit_success.txt").unlink(missing_ok=True)
    assert verified_steps.newest(tmp_path) == 2
    same(restore(tmp_path, 2, describe(new_state(2))), new_state(2))  # for a reader it may be one being written
    assert half.exists()
    saved = Checkpoints(tmp_path)
    assert saved.latest() == 2
    saved.save(3, new_state(3), {})
    saved.close()
    assert steps_of(tmp_path) == [2, 3]


def large_state(step: int) -> TrainState:
    return replace(new_state(step), slow={"reference": {"kernel": jnp.zeros(10**5) + jnp.arange(10**5)}})


@pytest.mark.parametrize("background", [True, False])
def test_a_save_that_fails_is_tried_again_at_the_next(tmp_path, background):
    run = tmp_path / "run"
    saved = Checkpoints(run, background=background)
    assert saved.save(1, large_state(1), {}) is None
    saved.wait()
    with full_disk():
        lines = [saved.save(2, large_state(2), {})]
        while saved.sealing and saved.sealing.is_alive():  # until it has failed
            time.sleep(0.01)
    lines.append(saved.save(3, large_state(3), {}))
    (line,) = (line for line in lines if line)
    assert line.startswith(
        f"{run}: a checkpoint could not be written: File too large; once it can be, the same command"
    )
    assert line.endswith("; training goes on, and the next save is another try (1 of 3 failed)") and "\n" not in line
    saved.close()
    assert steps_of(run) == [1, 3] and saved.failures == 0
    assert verified_steps.newest(run) == 3
    same(restore(run, 3, describe(large_state(3))), large_state(3))


def test_a_failed_save_counts_once_and_leaves_nothing_to_the_next(tmp_path, caplog):
    """Orbax raises an error of its metadata again in the next save. 40 arrays, not one byte of which can be written."""
    many = lambda step: replace(new_state(step), slow={"reference": {f"{i}": jnp.zeros(2000) + i for i in range(40)}})
    run = tmp_path / "run"
    saved, lines = Checkpoints(run, keep=3), []
    assert saved.save(1, many(1), {}) is None
    saved.wait()
    with full_disk(0):
        lines.append(saved.save(2, many(2), {}))
        while saved.sealing and saved.sealing.is_alive():
            time.sleep(0.01)
    lines += [saved.save(step, many(step), {}) for step in (3, 4)]
    saved.close()
    (line,) = filter(None, lines)
    assert "(1 of 3 failed)" in line and steps_of(run) == [1, 3, 4]
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_parts_of_a_failed_save_that_end_later_say_nothing(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    for _ in range(2):
        failed_save_logs.silence()
    closed = RuntimeError("Event loop is closed")
    of_ours = SimpleNamespace(object=print, exc_value=closed)
    other = SimpleNamespace(object=None, exc_value=RuntimeError("x"))
    for event in (SimpleNamespace(object=None, exc_value=closed), of_ours, other):
        sys.unraisablehook(event)  # type: ignore[arg-type]
    assert told == [of_ours, other]


def test_nothing_is_saved_whose_rows_are_not_written(tmp_path):
    """Else they were lost: a run that goes on from this step does not make them again."""
    saved = Checkpoints(tmp_path / "run", background=False)

    def refuse() -> None:
        raise OSError(28, "No space left on device")

    line = saved.save(1, new_state(1), {}, first=refuse)
    assert line and "a checkpoint could not be written: No space left on device" in line
    saved.close()
    assert steps_of(tmp_path / "run") == []


def test_what_a_failed_save_left_and_still_writes_to_goes_later(tmp_path, monkeypatch):
    run, path_type, calls = tmp_path / "run", type(epath.Path(tmp_path)), []
    rmtree = path_type.rmtree

    def busy_once(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 1:
            raise OSError("Directory not empty")
        rmtree(self, *args, **kwargs)

    saved = Checkpoints(run, background=False)
    saved.save(1, new_state(1), {})
    saved.wait()
    monkeypatch.setattr(path_type, "rmtree", busy_once)
    with full_disk():
        saved.save(2, large_state(2), {})
        while saved.sealing and saved.sealing.is_alive():
            time.sleep(0.01)
    (run / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir(exist_ok=True)
    saved.save(3, new_state(3), {})
    saved.close()
    assert steps_of(run) == [1, 3] and len(calls) > 1


@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_stays_full_is_one_line(tmp_path, background):
    """After three saves."""
    run = tmp_path / "run"
    saved, lines = Checkpoints(run, background=background), []
    with full_disk(), pytest.raises(OSError) as error:
        for step in range(1, 5):
            lines.append(saved.save(step, large_state(step), {}))
    said = f"{run}: a checkpoint could not be written: File too large; once it can be, the same command starts again"
    assert str(error.value) == said and [line for line in lines if line and line.startswith(said)] == lines[-2:]
    assert verified_steps.newest(run) is None
    deadline = time.monotonic() + 30
    while (
        list((run / "checkpoints").iterdir()) and time.monotonic() < deadline
    ):  # orbax may still write to the last one
        saved.sweep()
        time.sleep(0.01)
    assert list((run / "checkpoints").iterdir()) == []


def test_little_room_is_warned_of_before_training(tmp_path, monkeypatch):
    state, usage = large_state(1), shutil.disk_usage(tmp_path)
    needed = sum(x.nbytes for x in jax.tree.leaves(state))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * needed))
    assert describe_room(tmp_path, state, 2) == [] == describe_room("gs://bucket/run", state, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * needed - 1))
    (line,) = describe_room(tmp_path, state, 2)
    sizes = "0.0012 GB are free, and a checkpoint takes 0.0004 GB, of which checkpoint.keep: 2 stay; expected 0.0012 GB"
    assert line == f"warning: {tmp_path}: {sizes}"


def test_a_run_without_a_checkpoint_is_one_line(tmp_path):
    assert verified_steps.newest(tmp_path) is None
    for make in (lambda: None, lambda: Checkpoints(tmp_path).close()):
        make()
        with pytest.raises(FileNotFoundError, match=r"no checkpoint in it; a run saves one every checkpoint\.every"):
            saved_run.read_extra(tmp_path)


# ---- what other runs take -------------------------------------------------------------------------------------------


def test_one_role_is_read_alone(tmp_path):
    state = new_state(5, trained=("policy", "value"))
    saved = Checkpoints(tmp_path)
    saved.save(5, state, {"number": 5})
    saved.close()
    assert saved_run.read_extra(tmp_path) == (5, {"number": 5})
    for role in ("policy", "value"):  # nothing else is needed on disk
        shutil.rmtree(tmp_path / "checkpoints" / "5" / "state", ignore_errors=True)
        found = saved_run.restore_role(tmp_path, 5, role, describe(state).params[role])
        np.testing.assert_array_equal(found["kernel"], state.params[role]["kernel"])
    found = saved_run.restore_role(tmp_path, 5, "reference", describe(state).slow["reference"])
    np.testing.assert_array_equal(found["kernel"], state.slow["reference"]["kernel"])


@pytest.mark.parametrize(
    "cfg",
    [
        ModelConfig(vocab_size=64, hidden_size=16, num_layers=1, num_heads=4),
        ModelConfig(family="gpt2", vocab_size=64, hidden_size=16, num_layers=1, num_heads=4),
        ModelConfig(vocab_size=64, hidden_size=16, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32)),
    ],
    ids=["llama", "gpt2", "scaled"],
)
def test_shapes_of_models_go_through_json(cfg):
    cfg = resolve(cfg)
    record = json.loads(json.dumps(saved_run.models_record({"reward": cfg}, {"reward": "scalar"}, {})))
    assert saved_run.model_of(record["reward"]) == (cfg, "scalar")
    changed = replace(cfg, num_layers=7)
    assert saved_run.models_record({"reward": changed}, {"reward": "scalar"}, {}) != record
    bare = saved_run.models_record({"value": cfg}, {"value": "bare"}, {"value": "policy"})
    assert bare["value"]["trunk"] == "policy" and saved_run.model_of(bare["value"]) == (cfg, "scalar")


@pytest.mark.parametrize(
    ("role", "held", "found"),
    [
        ("reward", ["policy", "reward"], "reward"),
        ("reward", ["policy"], "policy"),
        ("value", ["policy", "reward"], "policy"),
        ("policy", ["reward"], "reward"),
        ("reward_1", ["policy", "reward"], "reward"),
        ("reward_1", ["reward_0", "reward_1"], "reward_1"),
    ],
)
def test_which_role_another_starts_from(role, held, found):
    assert saved_run.find_role(dict.fromkeys(held), role) == found


def test_one_model_does_not_start_from_several():
    with pytest.raises(
        ValueError, match="reward: an ensemble there; expected one of reward_0, reward_1, or a list of 2"
    ):
        saved_run.find_role(dict.fromkeys(["reward_0", "reward_1"]), "reward")


def test_no_role_to_start_from():
    with pytest.raises(ValueError, match="a run without models has nothing to start policy from"):
        saved_run.find_role({}, "policy")


def test_a_run_is_a_config_and_checkpoints(tmp_path):
    assert not saved_run.is_run(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    assert not saved_run.is_run(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert saved_run.is_run(tmp_path)
