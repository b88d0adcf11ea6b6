"""How much memory reading weights takes: a process of its own loads a model, and is watched while it does."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxrlhf import sharding
from jaxrlhf.models import hf
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.sharding import MeshConfig
from tests.models import test_gguf
from tests.tiny import parameters

SHAPE = resolve(ModelConfig(vocab_size=8192, hidden_size=512, num_layers=16, num_heads=8, mlp_size=1536))  # 59M
WATCHED = """
import json, os, re, sys, threading, time
import jax
from jaxrlhf.models import hf, hf_config, hf_folder
from jaxrlhf import sharding

def anonymous():  # bytes that belong to the process alone: the pages of a mapped file do not count
    with open("/proc/self/status") as status:
        return int(re.search(r"RssAnon:\\s*(\\d+)", status.read())[1]) * 1024

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

jax.config.update("jax_platforms", "cpu")
with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig())):
    folder = hf_folder.locate(sys.argv[1])
    cfg, head = hf_config.read_config(folder)
    warm = jax.device_put(jax.numpy.zeros(8)).block_until_ready()
    before = peak = anonymous()
    done = False
    thread = threading.Thread(target=watch)
    thread.start()
    params = hf.load(folder, cfg, head)
    done = True
    thread.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"grown": peak - before, "size": size}))
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """GGUF files are unpacked below it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def safetensors(folder):
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        hf.save(parameters(SHAPE, "lm", 0), SHAPE, "lm", folder)
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("write", [safetensors, quantised])
def test_loading_holds_no_second_copy(tmp_path, home, write):
    """At most 1.3 times the float32 weights: them, and the one leaf that is being put together."""
    where = write(tmp_path / "model")
    found = subprocess.run([sys.executable, "-c", WATCHED, where], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout.splitlines()[-1])
    assert told["size"] > 150e6
    assert 0.9 * told["size"] < told["grown"] <= 1.3 * told["size"]
