"""Plans of whole configs for slices that are not here, with libtpu; and what is refused in one line without it too."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxrlhf.config.load import load, load_beside
from jaxrlhf.errors import ConfigError
from jaxrlhf.plan import Plan, report
from jaxrlhf.plan.compiled_memory import TooBig, describe
from jaxrlhf.plan.memory_estimate import Memory
from jaxrlhf.plan.target import Target, find_target
from jaxrlhf.sharding import MeshConfig, make_mesh
from jaxrlhf.tpu.peaks import CHIPS, GIB
from tests.support import runs

TINY = runs.ROOT / "configs" / "tiny" / "ppo.yaml"


@pytest.fixture
def libtpu():
    pytest.importorskip("libtpu")


def command(*arguments: str, code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of ``jaxrlhf plan`` in a process of its own: libtpu stays out of this one."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    call = [sys.executable, "-m", "jaxrlhf", "plan", *arguments]
    done = subprocess.run(call, cwd=runs.ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


# ---- with libtpu ----------------------------------------------------------------------------------------------------


@pytest.mark.plan
def test_a_tiny_run_fits_four_chips(libtpu):
    out, err = command(str(TINY), "--topology", "v5e:2x2", "mesh.fsdp=2", "data.prompt_buckets=[8]", "--json")
    assert err == "", "libtpu's own log reaches nobody"
    plan = json.loads(out)
    assert plan["compiled"] and plan["fits"] and (plan["chips"], plan["devices_per_chip"]) == (4, 1)
    assert plan["mesh"] == {"slice": 1, "data": 2, "fsdp": 2, "decode": 1, "expert": 1, "context": 1, "tensor": 1}
    (program,) = plan["programs"]
    assert program["name"] == "iteration" and 0 < program["arguments"] < program["peak"] < 16 * GIB
    counts = {one["kind"]: one for one in program["collectives"]}
    assert counts["all-gather"]["count"] > 8, "weights are gathered in every layer of every pass"
    assert counts["all-reduce"]["bytes"] > 0 and not counts["all-reduce"]["lower_bound"]
    assert any("which starts from runs/tiny/sft" in line for line in plan["shapes"])
    assert 0 < plan["mfu"] < 1 and plan["seconds"] == pytest.approx(sum(one["seconds"] for one in plan["phases"]))


@pytest.mark.plan
@pytest.mark.parametrize(
    "name, devices, each",
    [("v5e:4x4", 16, 1), ("v5litepod-16", 16, 1), ("v5p:2x2x1", 4, 1), ("v4:2x2x1", 4, 1), ("tpu7x:2x2x1", 8, 2)],
)
def test_devices_are_counted_against_chips(libtpu, name, devices, each):
    found = find_target(name)
    assert (len(found.devices), found.devices_per_chip, found.chips * each) == (devices, each, devices)


@pytest.mark.plan
def test_a_mesh_may_split_an_axis_of_the_torus(libtpu):
    """8 is no product of 4, 4 and 4: half of one axis and another."""
    mesh = make_mesh(MeshConfig(1, 8, 8), find_target("v5p:4x4x4").devices)
    assert len({device.id for device in mesh.devices.flat}) == 64 and mesh.shape["fsdp"] == mesh.shape["tensor"] == 8


@pytest.mark.plan
def test_two_slices_are_timed_by_the_network_between_them(libtpu):
    """v5e has 25 Gbit/s a chip there, a 64th of what it has within a slice."""
    more = ["mesh.fsdp=4", "--estimate", "--json"]
    plans = [
        json.loads(command(str(TINY), "--topology", "v5e:2x2", "--slices", n, f"mesh.slices={n}", *more)[0])
        for n in ("1", "2")
    ]
    rows = [[one for one in plan["phases"] if one["name"].endswith(": between slices")] for plan in plans]
    assert rows[0] == [] and {one["name"] for one in rows[1]} >= {"update policy: between slices"}
    for one in rows[1]:
        assert one["bound"] == "between slices" and one["ici"] == 0
        assert one["seconds"] == pytest.approx(one["dcn"] / 3.125e9) and one["dcn"] > 0
    out, _ = command(str(TINY), "--topology", "v5e:2x2", "--slices", "2", "mesh.slices=2", *more[:2])
    assert "update policy: between slices" in out


@pytest.mark.plan
def test_several_slices(libtpu):
    found = find_target("v5e:2x2", 2)
    assert (found.chips, len(found.devices), str(found)) == (8, 8, "2 x v5e:2x2: 8 chips")
    mesh = make_mesh(MeshConfig(1, 2, 2, slices=2), found.devices)
    assert [{device.slice_index for device in row.flat} for row in mesh.devices] == [{0}, {1}], "a row is a slice"
    with pytest.raises(ValueError, match=r"^mesh\.slices: 1: these devices are in 2 slices; nearest: 2$"):
        make_mesh(MeshConfig(1, 8, 1), found.devices)


@pytest.mark.plan
@pytest.mark.parametrize("name", ["v5e:3x3", "v5p:3x5x7"])
def test_a_layout_that_there_is_not_is_one_line(libtpu, name):
    with pytest.raises(ConfigError) as error:
        find_target(name)
    assert str(error.value).startswith(f"--topology: {name}: no slice of this layout; nearest: {name[:4]}")
    assert "\n" not in str(error.value)


@pytest.mark.plan
def test_a_mesh_that_does_not_fit_the_slice_is_one_line(libtpu):
    _, err = command(str(TINY), "--topology", "v5e:2x2", "mesh.data=3", code=2)
    assert err == f"{TINY}: mesh: (data=3, fsdp=1, tensor=1) needs 3 devices; there are 4 in the slice\n"


@pytest.mark.plan
def test_what_is_too_big_is_told_what_to_change(libtpu):
    """8B in float32 with copies of everything on 64 chips of 16 GiB: counted, not compiled."""
    path = str(runs.ROOT / "configs" / "llama3" / "ppo_8b_v5e.yaml")
    more = ["mesh.data=64", "mesh.fsdp=1", "mesh.tensor=1", "remat=none"]
    out, _ = command(path, "--topology", "v5e:8x8", "--estimate", "--json", *more)
    plan = json.loads(out)
    assert not plan["fits"] and plan["hbm"]["needed"] > 100 * GIB and not plan["compiled"]
    again, _ = command(path, "--topology", "v5e:8x8", "--estimate", "--json", *more, *(plan["advice"] or []))
    assert plan["advice"] and json.loads(again)["fits"]


# ---- without --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, near", [("v5ee:2x2", "nearest: v5"), ("v5e", "nearest: v5litepod-1"), ("v5e:8", "as in v5e:16x16")]
)
def test_a_name_that_is_no_topology_is_one_line(name, near):
    with pytest.raises(ConfigError) as error:
        find_target(name)
    text = str(error.value)
    assert text.startswith(f"--topology: {name}: ") and near in text and "\n" not in text


def test_no_libtpu_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'^jaxrlhf plan: libtpu.*pip install "jaxrlhf\[plan\]"$'):
        find_target("v5e:2x2")
    with pytest.raises(ConfigError, match=r"^--slices: 0: expected 1 or more"):
        find_target("v5e:2x2", 0)
    with pytest.raises(ConfigError, match=r"^--slices: 2: how fast v4 slices are joined is not published; nearest: 1$"):
        find_target("v4:2x2x1", 2)


def test_configs_beside_are_those_that_load(tmp_path):
    (tmp_path / "a.yaml").write_text(TINY.read_text())
    (tmp_path / "b.yaml").write_text(TINY.read_text().replace("runs/tiny/ppo", "runs/b"))
    (tmp_path / "c.yaml").write_text("nonsense: [")
    assert [cfg.run_dir for cfg in load_beside(tmp_path / "a.yaml")] == ["runs/b"]


def test_the_report_of_what_does_not_fit(capsys):
    """The numbers of XLA's refusal, a chip with two devices, and no setting that helps."""
    where = Target("tpu7x:2x2x1", CHIPS["tpu7x"], 4, 1, [None] * 8)
    plan = Plan(load(TINY), where, {"data": 8}, ["policy: random"], "batch", 8, Memory(1, 2, 3, 4), None, [], None)
    big = plan._replace(programs=TooBig(100 * GIB, 94 * GIB))
    assert not big.fits and (big.needed, big.available) == (100 * GIB, 94 * GIB)
    assert report.verdict(big) == "DOES NOT FIT: temporaries alone need 200.00 GiB a chip, has 188.00"
    assert report.advice_lines(big) == [
        "no setting of mesh, micro-batch, remat and number formats was found that fits: more chips are needed"
    ]
    assert plan.fits and plan.needed == 5 and report.verdict(plan).startswith("estimated, not compiled: fits: ")


def test_the_whole_run_in_hours_and_chip_hours(monkeypatch):
    """Worked by hand: 400 iterations of 9 s at best take 1 h; at half the speed 2 h; on 4 chips 4 and 8 chip-hours."""
    where = Target("v5e:2x2", CHIPS["v5e"], 4, 1, [None] * 4)
    cfg = load(TINY, ["iterations=400"])
    plan = Plan(cfg, where, {"data": 4}, [], "batch", 8, Memory(1, 2, 3, 4), None, [], None)
    monkeypatch.setattr(Plan, "seconds", 9.0)
    monkeypatch.setattr(Plan, "mfu", 0.5)
    monkeypatch.setattr(report, "reached", lambda: (0.5, 1.0))
    assert report.whole_run(plan) == (
        "the run, 400 iterations on 4 chips: 60 min to 2 h, 4 to 8 chip-hours, without evaluation, saving and compiling"
    )
    told = report.as_json(plan)
    assert (told["run_seconds"], told["run_chip_hours"]) == ([3600, 7200], [4, 8])
    assert [report.duration(seconds) for seconds in (0.5, 119, 120, 7199)] == ["0.5 s", "119 s", "2 min", "120 min"]


@pytest.mark.parametrize(
    ("text", "why"),
    [("INTERNAL: RET_CHECK failure\nat some line", "INTERNAL: RET_CHECK failure"), (None, "it has no text")],
)
def test_a_program_that_cannot_be_printed_keeps_its_memory(monkeypatch, capsys, text, why):
    """A real program, whose text XLA fails to make."""
    program = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((256,), jnp.float32)).compile()
    readable = describe("iteration", program)
    assert readable.collectives == [] and readable.unread == "" and readable.arguments == 1024

    def as_text(self):
        if text:
            raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(type(program), "as_text", as_text)
    found = describe("iteration", program)
    assert found == readable._replace(collectives=None, unread=why)
    where = Target("v5e:1x1", CHIPS["v5e"], 1, 1, [None])
    plan = Plan(load(TINY), where, {"data": 1}, [], "batch", 8, Memory(1, 2, 3, 4), [found], [], None)
    monkeypatch.setattr(Plan, "mfu", 0.5)
    report.print_plan(plan)
    assert f"iteration: its collectives could not be read from what libtpu made: {why}\n" in capsys.readouterr().out
    (program_json,) = report.as_json(plan)["programs"]
    assert program_json["collectives"] is None and program_json["arguments"] == 1024


@pytest.mark.nightly  # by day: the calibration itself, below
def test_the_command_shows_its_calibration():
    out, _ = command("--calibration", "--json")
    found = json.loads(out)
    training, decoding = found["training"], found["decoding"]
    assert len(training) >= 8 and len(decoding) >= 4
    assert all(row["ratio"] == pytest.approx(row["published"] / row["predicted"]) for row in training)
    assert all(row["ratio"] == pytest.approx(row["predicted"] / row["published"]) for row in decoding)
    shown, _ = command("--calibration")
    assert all(name in shown for name in ("MaxText 16B", "SGL-JAX"))


def test_the_command_needs_a_config_and_a_slice():
    assert "expected one config and a TPU slice" in command(str(TINY), code=2)[1]
