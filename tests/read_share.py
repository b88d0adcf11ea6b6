"""``python -m tests.read_share FOLDER OUT``: one of several processes reads a Hugging Face folder onto a mesh of them
all, counts the bytes that it takes out of the file, and notes the sums of the weights."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf import distributed
from jaxrlhf.distributed import DistributedConfig
from jaxrlhf.models import hf, hf_config
from jaxrlhf.sharding import MeshConfig, make_mesh


class Counting:
    """A tensor in a file, which counts what is read of it."""

    read = 0

    def __init__(self, tensor: Any):
        self.tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)

    def __getitem__(self, index: Any) -> Any:
        value = self.tensor[index]
        Counting.read += value.nbytes
        return value


def main() -> None:
    folder, out = sys.argv[1:]
    distributed.start(DistributedConfig())
    cfg, head = hf_config.read_config(folder)
    opened = hf.open_weights
    hf.open_weights = lambda where: {name: Counting(tensor) for name, tensor in opened(where).items()}
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    with jax.set_mesh(mesh):
        params = hf.load(folder, cfg, head)
        leaves, structure = jax.tree.flatten(params)
        sums = [float(total) for total in jax.jit(lambda leaves: [jnp.sum(x * x) for x in leaves])(leaves)]
        count = lambda leaf: sum(shard.data.nbytes for shard in leaf.addressable_shards if shard.replica_id == 0)
        held = sum(map(count, leaves))
    Path(out).write_text(json.dumps({"read": Counting.read, "held": held, "sums": sums, "tree": str(structure)}))


if __name__ == "__main__":
    main()
