"""On an NVIDIA GPU: its kernels, and whole runs, against what the CPU computes. Run by ``pytest -m gpu`` alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import test_kernels
from tests.support import runs

pytestmark = pytest.mark.gpu
BF16 = jnp.bfloat16
NAMES = ("sft", "rm", "grpo", "ppo")
GPU = {
    "JAX_PLATFORMS": "cuda",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",  # float32 as CPUs have it: by default products are of 10 bits
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",  # they run for milliseconds
}


@pytest.fixture(scope="module", autouse=True)
def gpu(request):
    if request.config.option.markexpr != "gpu" or jax.default_backend() != "gpu":
        pytest.skip("no GPU, or not asked for by -m gpu")


@pytest.mark.parametrize("name", ["plain", "one kv head", "wide window"])
def test_cudnn_computes_what_we_do(name):
    test_kernels.compare(test_kernels.CASES[name], functools.partial(test_kernels.by_kernel, "cudnn"), BF16, 0.02)


@pytest.mark.parametrize("name", ["plain", "narrow window", "wide window"])
def test_cudnn_computes_groups_as_we_do(name):
    by_cudnn = functools.partial(test_kernels.groups_by, "cudnn")
    test_kernels.compare_groups(test_kernels.GROUPS[name], by_cudnn, BF16, 0.02)


@pytest.fixture(scope="module")
def folders(root):
    """Runs of four algorithms on the GPU, one after the other, and one of them in two parts; and on the CPU."""
    text = runs.text(root)
    configs = [path for path in runs.ALL if path.stem in NAMES]
    whole = lambda where, *more: runs.train(*runs.overrides(text, root / where), *more, configs=configs)
    part = runs.overrides(text, root / "gpu-parts", root / "gpu")
    ppo = [path for path in configs if path.stem == "ppo"]
    commands = [whole("gpu", "deterministic=true")]
    commands += [runs.train(*part, "deterministic=true", *more, configs=ppo) for more in (["ppo:iterations=2"], [])]
    started = runs.start(root / "on-gpu", commands, more=GPU), runs.start(root / "on-cpu", [whole("cpu")])
    gpu, cpu = (runs.finish(process, 500) for process in started)
    assert (gpu.code, cpu.code) == (0, 0), gpu.errors[-3000:] + cpu.errors[-3000:]
    return root / "gpu", root / "cpu", root / "gpu-parts"


@pytest.mark.parametrize("name", NAMES)
def test_a_run_on_a_gpu_is_that_of_a_cpu(folders, name):
    """To rounding, all metrics of four iterations and two evaluations; and where there are samples, their tokens."""
    gpu, cpu, _ = folders
    found, wanted = runs.rows(gpu / name), runs.rows(cpu / name)
    assert len(found) == len(wanted) > 4
    for mine, theirs in zip(found, wanted):
        assert mine.keys() == theirs.keys()
        numbers = [key for key, value in theirs.items() if isinstance(value, int | float)]
        assert numbers
        for key in numbers:
            np.testing.assert_allclose(mine[key], theirs[key], rtol=2e-3, atol=2e-3, err_msg=f"{key} of {theirs}")
    if name in ("grpo", "ppo"):
        texts = lambda run: [row["response"] for row in runs.rows(run / name, "samples")]
        assert texts(gpu) == texts(cpu)


def test_a_run_on_a_gpu_goes_on_with_the_same_bits(folders):
    gpu, _, parts = folders
    expected, found = (runs.read_state(side / "ppo", 4) for side in (gpu, parts))
    assert found.keys() == expected.keys()
    assert [path for path in expected if found[path].tobytes() != expected[path].tobytes()] == []
