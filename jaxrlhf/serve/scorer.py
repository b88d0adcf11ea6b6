"""Text in, scores out: what a reward model says of responses."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxrlhf.data import encode
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.hosts import compiler_flags
from jaxrlhf.models.attention.kernels import hardware_of
from jaxrlhf.models.nets import make_nets, no_sampling
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.run.transfer import put
from jaxrlhf.serve.writer import read_model
from jaxrlhf.sharding import MeshConfig, batch_shards, make_mesh
from jaxrlhf.types import Ask, Params, Role, Sequences, Trees

ROWS = 32  # responses that are scored at a time, on one device or on all


class Scorer:
    """The reward model of a run (or another of its ``role``s that has a scalar head), or a Hugging Face folder of a
    sequence classifier with one label. ``rows``: of every batch, so that there is one program a width; by default
    batches have as many rows as are needed, up to ROWS.

    Raises ValueError, in one line, where ``name`` holds no such model."""

    def __init__(self, name: str, role: Role = "reward", rows: int | None = None):
        compiler_flags.use_compilation_cache()
        self.mesh = make_mesh(MeshConfig())
        with jax.set_mesh(self.mesh):
            self.model = read_model(name, self.mesh, role=role)
        self.shards = batch_shards(self.mesh)
        self.rows, self.full = max((rows or ROWS) // self.shards, 1) * self.shards, rows is not None
        runtime = Runtime(hardware=hardware_of(self.mesh.devices.flat[0]))
        nets = make_nets({"reward": self.model.config}, runtime, Sampling(), no_sampling)

        def scores(params: Params, sequences: Sequences) -> jax.Array:
            (scores,) = nets.read(Trees({"reward": params}, {}), sequences, Ask("reward", "scores"))
            return scores

        self.program = jax.jit(scores)

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> list[float]:
        """The score of each record of prompt and response, both texts, or of ``messages`` that end with the response.

        A row is encoded as in training: the response ends with an ending token, but for a run with data.append_eos
        false."""
        return self.score(self.encode(records))

    def encode(self, records: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
        """i32[S] of each record. Raises ValueError for one that can't be encoded."""
        tokenizer, eos, append_eos = self.model.tokenizer, self.model.ids.eos, self.model.append_eos
        turns = encode.as_turns if self.model.chat else dict
        encoded = lambda record: encode.encode_demonstration(turns(record), tokenizer, "response", eos, append_eos)
        return [encoded(record).tokens for record in records]

    def score(self, rows: Sequence[np.ndarray]) -> list[float]:
        """The score of each encoded row."""
        return [float(score) for batch in self.batches(rows) for score in batch]

    def batches(self, rows: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """f32 scores of the rows, a batch at a time; widths and numbers of rows are powers of two: few programs."""
        for at in range(0, len(rows), self.rows):
            some = rows[at : at + self.rows]
            count = (
                self.rows
                if self.full
                else min(self.shards * 2 ** math.ceil(math.log2(-(-len(some) // self.shards))), self.rows)
            )
            width = max(32, 2 ** math.ceil(math.log2(max(map(len, some)))))
            tokens = np.full((count, width), tokenizers.pad_id(self.model.tokenizer), np.int32)
            valid = np.zeros((count, width), bool)
            for row, ids in enumerate(some):
                tokens[row, : len(ids)], valid[row, : len(ids)] = ids, True
            sequences = Sequences(tokens, valid, valid)  # type: ignore[arg-type]
            with jax.set_mesh(self.mesh):
                found = self.program(self.model.params, put(self.mesh, sequences))
            yield np.asarray(jax.device_get(found), np.float32)[: len(some)]
