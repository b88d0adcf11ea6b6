"""``python -m tests.support.read_share FOLDER OUT``: reads a Hugging Face folder onto a mesh of all devices, which
several processes may share, and notes what that took: bytes of the file, memory; and the sums of the weights."""

import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.hosts import processes
from jaxrlhf.hosts.processes import DistributedConfig
from jaxrlhf.models.files import hf_config, hf_folder, hf_headers, hf_weights
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


class Watch:
    """The most memory that this process had at once while the block ran, beyond what it had before."""

    def __enter__(self) -> "Watch":
        self.before = self.peak = self.anonymous()
        self.done = False
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done = True
        self.thread.join()
        self.grown = self.peak - self.before

    def look(self) -> None:
        while not self.done:
            self.peak = max(self.peak, self.anonymous())
            time.sleep(0.001)

    def anonymous(self) -> int:
        """Resident bytes that belong to the process alone: the pages of a mapped file do not count, since the system
        takes them back when it wants memory."""
        found = re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())
        assert found is not None, "only Linux says this"
        return int(found[1]) * 1024


def main() -> None:
    where, out = sys.argv[1:]
    processes.start(DistributedConfig())
    folder = hf_folder.locate(where)
    cfg, head = hf_config.read_config(folder)
    opened = hf_headers.open_weights
    hf_headers.open_weights = lambda where: {name: Counting(tensor) for name, tensor in opened(where).items()}
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=-1))):
        # what the first array takes is not the weights'
        jax.device_put(np.zeros(8), jax.local_devices()[0]).block_until_ready()
        with Watch() as memory:
            params = hf_weights.load(folder, cfg, head)
        leaves, structure = jax.tree.flatten(params)
        sums = [float(total) for total in jax.jit(lambda leaves: [jnp.sum(x * x) for x in leaves])(leaves)]
        count = lambda leaf: sum(shard.data.nbytes for shard in leaf.addressable_shards if shard.replica_id == 0)
        held = sum(map(count, leaves))
    told = {"read": Counting.read, "held": held, "grown": memory.grown, "sums": sums, "tree": str(structure)}
    Path(out).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
