"""What a run is fed: the algorithm's data as one batch an iteration, and held-out data as a fixed list."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config.batch import KIND_OF, ROWS_KEY, fields_read
from jaxrlhf.config.record import Config
from jaxrlhf.data import batches
from jaxrlhf.data.sources import SourceConfig, open_source
from jaxrlhf.data.summary import Summary
from jaxrlhf.hosts import processes
from jaxrlhf.models.files import hf
from jaxrlhf.run.build import Run
from jaxrlhf.sharding import batch_shards, row_layout
from jaxrlhf.types import Batch, Preferences, Prompts, Sequences, Unpaired

Rows = TypeVar("Rows")
STREAMS: dict[str, Callable[..., batches.Stream]] = {
    "prompts": batches.prompt_stream,
    "demonstrations": batches.demonstration_stream,
    "preferences": batches.preference_stream,
    "unpaired": batches.unpaired_stream,
}


class Feed:
    """One stream a kind of data that the algorithm reads, joined into one Batch an iteration."""

    def __init__(self, ready: Run):
        cfg = ready.cfg
        self.ready, self.streams = ready, {}
        for field in ready.algorithm.batch(cfg.algorithm):
            kind = KIND_OF[field]
            self.streams[kind] = STREAMS[kind](
                read_source(ready, kind, getattr(cfg.data, kind), f"data.{kind}"),
                ready.tokenizer,
                cfg.data,
                rows=getattr(cfg.batch, ROWS_KEY[field]),
                seed=cfg.seed,
                share=share_of(ready.mesh),
                **({} if kind == "prompts" else {"eos": ready.sampler.eos_ids}),
            )

    def next(self) -> tuple[Batch, list[dict[str, Any]]]:
        """This process's rows of the next iteration, as NumPy arrays, and the records of its prompts, one each."""
        merged, records = Batch(), []
        for stream in self.streams.values():
            host = next(stream)
            parts = {name: part for name, part in vars(host.batch).items() if part is not None}
            merged, records = merged.replace(**parts), records + (host.columns or [])
        return merged, records

    def first_records(self) -> list[dict[str, Any]]:
        """The records of this process's prompts in the next iteration; the stream stays where it is."""
        state = self.get_state()
        _, records = self.next()
        self.set_state(state)
        return records

    def shapes(self) -> Iterator[Batch]:
        """A batch (of shapes with layouts, global rows) for every shape that can come: no prompts wider than the bucket
        that holds the longest one."""
        margins = any(stream.margins for stream in self.streams.values())
        longest = self.streams["prompts"].longest if "prompts" in self.streams else 0
        for batch in batch_shapes(self.ready.cfg, self.ready.mesh, margins):
            yield batch
            if batch.prompts is not None and batch.prompts.tokens.shape[1] >= longest:
                return

    def rows(self) -> int:
        """Rows of an epoch: of the source whose passes are counted."""
        return next(iter(self.streams.values())).rows

    def counts(self) -> dict[str, float]:
        """What was left out of the data, as metrics: data/prompts_dropped, ..."""
        return counts_of(self.summaries())

    def summaries(self) -> list[Summary]:
        """What became of the rows of each source."""
        return [stream.summary for stream in self.streams.values()]

    def epoch(self, step: int) -> float:
        """How often the first ``step`` iterations go through the data: that of the first kind that is read."""
        return step / next(iter(self.streams.values())).batches_per_epoch

    def get_state(self) -> dict:
        return {kind: stream.get_state() for kind, stream in self.streams.items()}

    def set_state(self, state: dict) -> None:
        for kind, stream in self.streams.items():
            stream.set_state(state[kind])


def counts_of(summaries: Iterable[Summary]) -> dict[str, float]:
    """What was left out of the sources, or cut, as metrics."""
    found = {}
    for summary in summaries:
        kind = summary.where.rpartition(".")[2].removeprefix("eval_")
        found |= {f"data/{kind}_{what}": float(n) for what, n in summary.counts.items() if n and what != "kept"}
    return found


def batch_shapes(cfg: Config, mesh: Mesh, margins: bool = False) -> Iterator[Batch]:
    """What one iteration can be given, as shapes with layouts: one a prompt bucket, the smallest first.

    ``margins``: whether the preferences say by how much."""

    def rows(dtype, *shape: int):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=row_layout(mesh, len(shape)))

    def whole(count: int, packed: bool = False) -> Sequences:
        shape = (count, cfg.data.max_length)
        segments = rows(np.int32, *shape) if packed else None
        return Sequences(rows(np.int32, *shape), rows(bool, *shape), rows(bool, *shape), segments)  # type: ignore[arg-type]

    fields, batch = fields_read(cfg), Batch()
    if "sequences" in fields:
        batch = batch.replace(sequences=whole(cfg.batch.sequences_per_step, cfg.data.pack))
    if "preferences" in fields:
        count = cfg.batch.preferences_per_step
        margin = rows(np.float32, count) if margins else None
        batch = batch.replace(preferences=Preferences(whole(count), whole(count), margin))
    if "unpaired" in fields:
        count = cfg.batch.unpaired_per_step
        batch = batch.replace(unpaired=Unpaired(whole(count), rows(bool, count), whole(count)))  # type: ignore[arg-type]
    if "prompts" not in fields:
        yield batch
        return
    count = cfg.batch.prompts_per_step
    for width in cfg.data.prompt_buckets:
        prompts = Prompts(rows(np.int32, count, width), rows(bool, count, width), rows(np.int32, count))  # type: ignore[arg-type]
        yield batch.replace(prompts=prompts)


def read_source(ready: Run, kind: str, source: SourceConfig, where: str):
    """The records of one data section, the same on all processes, or a ValueError says where they are not.

    What its rows were recognised as is kept in ``ready.recognised``."""
    data = ready.cfg.data
    found = open_source(source, kind, cache_dir=data.cache_dir, skip_bad=data.skip_bad, path_in_config=where)
    processes.agree(f"{where}: the hash of its records", found.fingerprint[:12], "the same data on all hosts")
    ready.recognised[where] = found.describe()
    return found


def describe_data(ready: Run) -> list[str]:
    """What the rows of the sections opened so far were recognised as, a line each; of held-out data only where it is
    not what the training data are."""
    lines = ready.recognised
    same = lambda where: lines.get(where.replace("data.eval_", "data.")) == lines[where] and "eval_" in where
    return [f"{where}: {text}" for where, text in lines.items() if not same(where)]


def training_prompts(ready: Run, size: int, rows: int | None = None) -> batches.FixedBatches:
    """The first ``size`` training prompts, once, in batches of ``rows`` at most; None: of a step's."""
    return fixed_batches(ready, "prompts", "data.prompts", size, min(size, rows or ready.cfg.batch.prompts_per_step))


def held_out(ready: Run, kind: str, size: int, rows: int) -> batches.FixedBatches:
    """The held-out batches of ``kind``; none where the config names no held-out data of it."""
    if getattr(ready.cfg.data, f"eval_{kind}") is None:
        return batches.FixedBatches([])
    return fixed_batches(ready, kind, f"data.eval_{kind}", size, rows)


def fixed_batches(ready: Run, kind: str, where: str, size: int, rows: int) -> batches.FixedBatches:
    """The first ``size`` records of the data section ``where``, once, in batches of ``rows`` rounded up to the mesh."""
    source, shards = getattr(ready.cfg.data, where.removeprefix("data.")), batch_shards(ready.mesh)
    return batches.held_out_batches(
        kind,
        read_source(ready, kind, source, where),
        ready.tokenizer,
        ready.cfg.data,
        size=size,
        rows=-(-rows // shards) * shards,
        share=share_of(ready.mesh),
        where=where,
        **({} if kind == "prompts" else {"eos": ready.sampler.eos_ids}),
    )


def holders(mesh: Mesh) -> list[list[int]]:
    """The processes, ascending, whose devices hold each block of a batch's rows: one a block, but several where other
    axes of the mesh go over processes too."""
    total = batch_shards(mesh)
    found: list[set[int]] = [set() for _ in range(total)]
    for device, index in row_layout(mesh, 1).devices_indices_map((total,)).items():
        found[index[0].start or 0].add(device.process_index)
    return [sorted(processes) for processes in found]


def share_of(mesh: Mesh) -> batches.Share:
    """The rows of a batch that lie on this process's devices."""
    held, me = holders(mesh), jax.process_index()
    return batches.Share(tuple(block for block, processes in enumerate(held) if me in processes), len(held))


def put(mesh: Mesh, batch: Rows) -> Rows:
    """Host rows (a record of arrays) onto the mesh; every process brings its share."""
    share = share_of(mesh)

    def one(x):
        x = np.asarray(x)
        size = len(x) // len(share.blocks)
        block = lambda index: share.blocks.index((index[0].start or 0) // size)
        part = lambda index: x[block(index) * size : (block(index) + 1) * size]
        return jax.make_array_from_callback((size * share.total, *x.shape[1:]), row_layout(mesh, x.ndim), part)

    return jax.tree.map(one, batch)


def fetch(rows: Rows) -> Rows:
    """The inverse of ``put``: this process's rows as NumPy arrays."""

    def one(x) -> np.ndarray:
        parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}  # once where it is replicated
        return np.concatenate([np.asarray(parts[first]) for first in sorted(parts)])

    return jax.tree.map(one, rows)


def fetch_all(rows: Rows) -> Rows:
    """All processes' rows as NumPy arrays, on each of them; all have to call it."""
    return jax.tree.map(hf.fetch, rows)
