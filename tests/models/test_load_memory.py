"""How much reading weights takes, of files and of memory: processes of their own load a model and are watched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import sharding
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.models.files import hf_weights
from jaxrlhf.sharding import MeshConfig
from tests.models import test_gguf
from tests.support import runs
from tests.support.tiny import parameters

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SHAPE = resolve(ModelConfig(vocab_size=8192, hidden_size=512, num_layers=8, num_heads=8, mlp_size=1536))  # 34M


@pytest.fixture
def home(tmp_path, monkeypatch):
    """GGUF files are unpacked below it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def safetensors(folder):
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        hf_weights.save(parameters(SHAPE, "lm", 0), SHAPE, "lm", folder)
    return str(folder)


def quantised(folder):
    """The same shape as a GGUF file whose matrices have eight bits a weight."""
    rng = np.random.default_rng(0)
    rows, dim, mlp = len(test_gguf.vocabulary()[0]), SHAPE.hidden_size, SHAPE.mlp_size
    shapes = {"token_embd": (rows, dim), "output_norm": (dim,)}
    parts = {
        **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (dim, dim)),
        **dict.fromkeys(("ffn_gate", "ffn_up"), (mlp, dim)),
        "ffn_down": (dim, mlp),
        "attn_norm": (dim,),
        "ffn_norm": (dim,),
    }
    shapes |= {f"blk.{layer}.{part}": shape for layer in range(SHAPE.num_layers) for part, shape in parts.items()}
    tensors = {f"{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    numbers = {
        "block_count": SHAPE.num_layers,
        "embedding_length": dim,
        "feed_forward_length": mlp,
        "attention.head_count": SHAPE.num_heads,
        "attention.head_count_kv": SHAPE.num_heads,
        "rope.dimension_count": SHAPE.head_dim,
        "attention.key_length": SHAPE.head_dim,
        "attention.value_length": SHAPE.head_dim,
    }
    folder.mkdir()
    return test_gguf.write(folder / "model.gguf", tensors, test_gguf.Q8_0, **numbers)


def told(where: str, out: Path, processes: int, devices: int) -> list[dict]:
    """What tests.support.read_share notes in each of ``processes``, which share the model."""
    joint = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(runs.ROOT)}
    if processes > 1:
        joint |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{runs.free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, "-m", "tests.support.read_share", where]
    started = [
        subprocess.Popen([*command, f"{out}{number}"], env=os.environ | joint | {"JAX_PROCESS_ID": str(number)})
        for number in range(processes)
    ]
    assert [process.wait(200) for process in started] == [0] * processes
    return [json.loads(Path(f"{out}{number}").read_text()) for number in range(processes)]


@pytest.mark.nightly  # 135 MB are written and read
@pytest.mark.parametrize("write", [safetensors, quantised])
def test_loading_holds_no_second_copy(tmp_path, home, write):
    """At most 1.3 times the float32 weights: them, and the one leaf that is being put together."""
    (found,) = told(write(tmp_path / "model"), tmp_path / "told", processes=1, devices=1)
    assert found["held"] > 100e6
    assert 0.9 * found["held"] < found["grown"] <= 1.3 * found["held"]


@pytest.mark.nightly  # by day: one process, above
def test_each_process_reads_and_holds_its_share_of_the_weights(tmp_path):
    """Two processes of four devices, a model split over the eight: each takes half of the file, no byte is lost, and
    neither has memory for more than its half and the part of a leaf that is being put together."""
    found = told(safetensors(tmp_path / "model"), tmp_path / "told", processes=2, devices=4)
    params = parameters(SHAPE, "lm", 0)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for one in found:
        assert 0.45 * size < one["read"] < 0.55 * size, (one["read"], size)
        np.testing.assert_allclose(one["sums"], [float(jnp.sum(x * x)) for x in jax.tree.leaves(params)], rtol=1e-5)
        assert 0.9 * one["held"] < one["grown"] <= 1.3 * one["held"], (one, size)
    assert sum(one["held"] for one in found) == size
