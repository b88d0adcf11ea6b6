"""Compiler flags: what is set where, that the user's stay, and that XLA and libtpu know their names."""

import os
import subprocess
import sys
import types
from platform import libc_ver

import pytest

from jaxrlhf.hosts import compiler_flags, heap, platforms
from jaxrlhf.hosts.compiler_flags import GPU, GPU_DETERMINISTIC, TPU, present, program_options, set_flags

ALL = [*GPU, *GPU_DETERMINISTIC, *TPU]


def test_flags_of_absent_platforms_are_not_set():
    environ: dict[str, str] = {}
    assert set_flags(set(), True, environ) == [] and environ == {}


def test_each_platform_has_its_own():
    gpu, tpu = {}, {}
    assert set_flags({"gpu"}, False, gpu) == list(GPU)
    assert gpu == {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=true"}
    assert set_flags({"tpu"}, True, tpu) == list(TPU)
    assert tpu == {
        "LIBTPU_INIT_ARGS": "--xla_tpu_enable_latency_hiding_scheduler=true "
        "--xla_tpu_enable_async_collective_fusion=true"
    }
    both = {}
    assert set_flags({"gpu", "tpu"}, True, both) == [*GPU, *TPU, *GPU_DETERMINISTIC]
    assert both["XLA_FLAGS"].split() == [*gpu["XLA_FLAGS"].split(), "--xla_gpu_deterministic_ops=true"]


def test_what_the_user_set_stays():
    mine = "--xla_dump_to=/somewhere  --xla_gpu_enable_latency_hiding_scheduler=false"
    environ = {"XLA_FLAGS": mine, "OTHER": "1"}
    assert set_flags({"gpu"}, True, environ) == list(GPU_DETERMINISTIC)
    assert environ["XLA_FLAGS"].split() == [*mine.split(), "--xla_gpu_deterministic_ops=true"]
    assert environ["OTHER"] == "1"
    before = dict(environ)
    assert set_flags({"gpu"}, True, environ) == [] and environ == before  # twice is once


def test_programs_of_experts_have_more_fast_memory():
    assert program_options("TPU v6 lite", True, {}) == {"xla_tpu_scoped_vmem_limit_kib": "65536"}
    assert program_options("TPU v6 lite", False, {}) is None and program_options("cpu", True, {}) is None
    assert program_options("TPU v5", True, {}) is None  # v5p: as libtpu has it
    mine = {"LIBTPU_INIT_ARGS": "--xla_tpu_scoped_vmem_limit_kib=1"}
    assert program_options("TPU v6 lite", True, mine) is None


def test_a_longer_name_is_another_flag():
    environ = {"XLA_FLAGS": "--xla_gpu_deterministic_ops_of_mine=1"}
    assert set_flags({"gpu"}, True, environ) == [*GPU, *GPU_DETERMINISTIC]


@pytest.mark.parametrize(
    "installed, asked, found",
    [
        (set(), "", set()),
        ({"jax_cuda13_plugin"}, "", {"gpu"}),
        ({"jax_cuda12_plugin", "libtpu"}, "", {"gpu", "tpu"}),
        ({"jax_cuda12_plugin", "libtpu"}, "cpu", set()),
        ({"jax_cuda12_plugin", "libtpu"}, "cuda,cpu", {"gpu"}),
        ({"libtpu"}, "tpu", {"tpu"}),
        (set(), "tpu", set()),
    ],
)
def test_platforms_that_are_here(monkeypatch, installed, asked, found):
    finder = types.SimpleNamespace(find_spec=lambda name: object() if name in installed else None)
    monkeypatch.setattr(platforms, "importlib", types.SimpleNamespace(util=finder))
    assert present({"JAX_PLATFORMS": asked} if asked else {}) == found


@pytest.mark.parametrize(
    "installed, files, environ, changed",
    [
        ({"libtpu"}, (), {}, True),
        (set(), (), {}, False),
        ({"libtpu"}, ("accel0",), {}, False),
        ({"libtpu"}, (), {"TPU_WORKER_ID": "0"}, False),
        ({"libtpu"}, (), {"JAX_PLATFORMS": "tpu,cpu"}, False),
        ({"libtpu", "jax_cuda13_plugin"}, ("nvidia0",), {}, False),
        ({"libtpu", "jax_cuda13_plugin"}, (), {}, True),
        ({"jax_cuda13_plugin"}, (), {}, False),
    ],
)
def test_libtpu_is_left_alone_where_there_is_no_tpu(monkeypatch, tmp_path, installed, files, environ, changed):
    for name in files:
        (tmp_path / name).touch()
    finder = types.SimpleNamespace(find_spec=lambda name: object() if name in installed else None)
    monkeypatch.setattr(platforms, "importlib", types.SimpleNamespace(util=finder))
    monkeypatch.setattr(platforms, "TPU_FILES", (f"{tmp_path}/accel*",))
    monkeypatch.setattr(platforms, "GPU_FILES", (f"{tmp_path}/nvidia*",))
    monkeypatch.setattr(platforms, "has_tpu", lambda: platforms.has_files(platforms.TPU_FILES))
    before = dict(environ)
    assert platforms.skip_absent_tpu(environ) == changed
    assert environ == (before | {"JAX_PLATFORMS": "cpu"} if changed else before)


@pytest.mark.parametrize(
    "vendor, device, tpu",
    [("0x1ae0", "0x0063", True), ("0x1ae0", "0x0042", False), ("0x1ae0", "0x001f", False), ("0x8086", "0x0063", False)],
)
def test_a_tpu_is_found_on_the_pci_bus(monkeypatch, tmp_path, vendor, device, tpu):
    monkeypatch.setattr(platforms, "TPU_FILES", ())
    (tmp_path / "0000:00:04.0").mkdir()
    (tmp_path / "0000:00:04.0" / "vendor").write_text(vendor + "\n")
    (tmp_path / "0000:00:04.0" / "device").write_text(device + "\n")
    assert platforms.has_tpu(str(tmp_path)) == tpu


@pytest.mark.parametrize(
    "asked, line",
    [
        (
            "cuda",
            "JAX_PLATFORMS: cuda: no plugin of JAX is installed for it; expected cpu, or pip install 'jaxrlhf[cuda]'",
        ),
        (
            "tpu,cpu",
            "JAX_PLATFORMS: tpu: no plugin of JAX is installed for it; expected cpu, or pip install 'jaxrlhf[tpu]'",
        ),
        ("cpu", None),
        ("", None),
        ("METAL,cpu", None),  # others' plugins are not known here
    ],
)
def test_a_platform_without_a_plugin_is_one_line(monkeypatch, asked, line):
    finder = types.SimpleNamespace(find_spec=lambda name: None)
    monkeypatch.setattr(platforms, "importlib", types.SimpleNamespace(util=finder))
    monkeypatch.setenv("JAX_PLATFORMS", asked)
    if line is None:
        compiler_flags.prepare()
        return
    with pytest.raises(ValueError) as error:
        compiler_flags.prepare()
    assert str(error.value) == line


BACKEND = "import jax; print(jax.device_count())"  # that of the CPU, which reads all XLA_FLAGS
LIBTPU = "from jaxrlhf.plan.target import find_target; print(len(find_target('v5e:2x2').devices))"


def started(code: str, **environ: str) -> subprocess.CompletedProcess:
    ours = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    return subprocess.run(
        [sys.executable, "-c", code], env=ours | {"JAX_PLATFORMS": "cpu"} | environ, capture_output=True, text=True
    )


FAULTS = """
import os, resource
from jaxrlhf.hosts import heap
print(heap.keep_memory(os.environ))
import jax
stored = lambda x: jax.numpy.full((8192, 8), x) @ jax.numpy.full((8, 2048), x)
program = jax.jit(lambda x: (stored(x) @ jax.numpy.full((2048, 1), x)).sum())
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
seen = []
for x in range(8):  # one may not have freed all that it used when the next begins
    program(float(x)).block_until_ready()
    seen.append(faults())
print(min(after - before for before, after in zip(seen[1:], seen[2:])))
"""


@pytest.mark.skipif(libc_ver()[0] != "glibc" or (os.cpu_count() or 1) > heap.FEW_CORES, reason="heaps of each thread")
def test_a_program_that_runs_again_finds_its_memory_where_it_left_it():
    """64 MB are 16,384 pages of 4 kB, of which none is asked for again."""
    kept, faults = started(FAULTS).stdout.split()
    assert kept == "True" and int(faults) < 100


HOLES = """
import os, sys
from jaxrlhf.hosts import heap
if sys.argv[1:]:
    heap.keep_memory(os.environ)
blocks = [bytearray(300_000) for _ in range(400)]
del blocks[::2]
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before = resident()
print(heap.fill_holes(), before - resident())
blocks += [bytearray(300_000) for _ in range(100)]
import jax
print(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((500, 500))))
"""


@pytest.mark.nightly  # by day: flags, above
@pytest.mark.skipif(libc_ver()[0] != "glibc" or (os.cpu_count() or 1) > heap.FEW_CORES, reason="heaps of each thread")
def test_holes_are_taken_where_there_is_one_heap():
    """200 of 300 kB, whose whole pages the system gets back; what is asked for afterwards is given."""
    environ = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = lambda *asked: subprocess.run(
        [sys.executable, "-c", HOLES, *asked], capture_output=True, text=True, env=environ
    )
    run = lambda *asked: process(*asked).stdout
    taken, given_back, total = run("kept").split()
    assert int(taken) > 0.9 * 200 * 300_000 and float(total) == 500**3
    assert int(given_back) > 0.8 * 200 * 300_000
    assert run().split()[0] == "0"


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "LD_PRELOAD"])
def test_who_has_chosen_what_malloc_does_is_left_alone(name):
    assert not heap.keep_memory({name: "", "HOME": "/"})
    if name == "MALLOC_ARENA_MAX" and libc_ver()[0] == "glibc":  # one that changes nothing of this
        kept, faults = started(FAULTS, MALLOC_ARENA_MAX="4").stdout.split()
        assert kept == "False" and int(faults) > 10_000


def test_the_command_line_asks_for_it_before_numpy_starts_its_threads():
    code = """
import sys
from jaxrlhf.cli import app
from jaxrlhf.hosts import heap
heap.keep_memory = lambda environ: print("numpy" in sys.modules, "HOME" in environ)
sys.argv = ["jaxrlhf", "plan", "--help"]
app.main()
"""
    assert started(code).stdout.splitlines()[0] == "False True"


def test_xla_knows_them():
    flags = " ".join(f"--{flag.name}={flag.value}" for flag in ALL if flag.variable == "XLA_FLAGS")
    assert started(BACKEND, XLA_FLAGS=flags).stdout.strip() == "1"
    assert started(BACKEND, XLA_FLAGS=flags + " --xla_gpu_no_such_flag=true").returncode != 0


@pytest.mark.plan
def test_libtpu_knows_them():
    pytest.importorskip("libtpu")
    flags = " ".join(f"--{flag.name}={flag.value}" for flag in TPU)
    assert started(LIBTPU, LIBTPU_INIT_ARGS=flags).stdout.strip() == "4"
    assert started(LIBTPU, LIBTPU_INIT_ARGS=flags + " --xla_tpu_no_such_flag=true").returncode != 0


@pytest.mark.plan
def test_without_them_gathers_are_waited_for():
    """What they do, as options of a program: with both, libtpu's own choice; without one, nothing runs beside."""
    pytest.importorskip("libtpu")
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxrlhf.plan.target import find_target
    from jaxrlhf.sharding import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig(1, 4, 1), find_target("v5e:2x2").devices)
    given = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    def layers(weights, x):
        whole = lambda weight: jax.sharding.reshard(weight, P(None, None))
        step = lambda x, pair: (x + jax.nn.silu(x @ whole(pair[0])) @ whole(pair[1]), None)
        return jax.lax.scan(step, x, weights)[0]

    with jax.set_mesh(mesh):
        pair = given((4, 1024, 4096), P(None, "fsdp", None)), given((4, 4096, 1024), P(None, "fsdp", None))
        lowered = jax.jit(layers).lower(pair, given((4096, 1024), P("fsdp", None)))
    text = lambda **options: str(lowered.compile(compiler_options=options).as_text())
    woven = "async_collective_fusion"
    default = text()
    assert woven in default
    assert text(**{flag.name: flag.value for flag in TPU}) == default
    for flag in TPU:
        assert woven not in text(**{flag.name: "false"})


def test_training_sets_them_before_there_is_a_backend(tmp_path):
    """The command line, with a plugin that is only pretended: deterministic comes from the config."""
    config = """
run_dir: r
iterations: 1
deterministic: true
algorithm: {name: sft}
models: {policy: {architecture: {}}}
tokenizer: {train_vocab_size: 300}
data: {demonstrations: {path: nowhere.jsonl}}
batch: {sequences_per_step: 8}
"""
    (tmp_path / "a.yaml").write_text(config)
    code = """
import os, sys, jax
from jaxrlhf import train
from jaxrlhf.cli import app
from jaxrlhf.hosts import compiler_flags
compiler_flags.present = lambda environ: {"gpu"}
seen = []
def run(cfg, raw, *more):
    print(os.environ["XLA_FLAGS"])
    return "done"
train.run = run
counted = jax.device_count
def count():
    print("devices after", os.environ.get("XLA_FLAGS"))
    return counted()
jax.device_count = count
sys.argv = ["jaxrlhf", "train", sys.argv[1]]
app.main()
"""
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.yaml")], env=environ, capture_output=True, text=True
    )
    flags = "--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_deterministic_ops=true"
    assert ran.stdout.splitlines() == [f"devices after {flags}", flags], ran.stderr
