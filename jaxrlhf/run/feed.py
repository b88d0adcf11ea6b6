"""What a run is fed: the algorithm's data as one batch an iteration, and held-out data as a fixed list."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from jaxrlhf.config.batch import rows_taken
from jaxrlhf.data import batches
from jaxrlhf.data.actions import starts
from jaxrlhf.data.batch_kinds import PROMPTS
from jaxrlhf.data.glue import Glue
from jaxrlhf.data.record_kinds import DataKind
from jaxrlhf.data.sources import Source, SourceConfig, open_source
from jaxrlhf.data.summary import Summary
from jaxrlhf.hosts import processes
from jaxrlhf.run.batch_shapes import batch_shapes
from jaxrlhf.run.build import Run
from jaxrlhf.run.transfer import share_of
from jaxrlhf.sharding import batch_shards, prompt_shards
from jaxrlhf.types import Batch, given


class Peeked(NamedTuple):
    """A batch that was read before its turn, and where the streams were then."""

    taken: tuple[Batch, list[dict[str, Any]]]
    state: dict
    epoch: float


class Feed:
    """One stream a kind of data that the algorithm reads, joined into one Batch an iteration."""

    def __init__(self, ready: Run):
        cfg = ready.cfg
        self.ready, self.streams = ready, {}
        self.peeked: Peeked | None = None
        for kind in ready.resolved.kinds:
            self.streams[kind.name] = batches.stream(
                kind,
                training_source(ready, kind),
                ready.tokenizer,
                cfg.data,
                rows=rows_taken(cfg, kind),
                seed=cfg.seed,
                share=share_of(ready.mesh),
                eos=ready.sampler.eos_ids,
            )

    def next(self) -> tuple[Batch, list[dict[str, Any]]]:
        """This process's rows of the next iteration, as NumPy arrays, and the records of its prompts, one each."""
        if self.peeked is not None:
            peeked, self.peeked = self.peeked, None
            return peeked.taken
        merged, records = Batch(), []
        for stream in self.streams.values():
            host = next(stream)
            parts = {name: part for name, part in vars(host.batch).items() if part is not None}
            merged, records = merged.replace(**parts), records + (host.columns or [])
        return merged, records

    def peek(self) -> Batch:
        """The rows that ``next`` gives then; they are not taken yet."""
        if self.peeked is None:
            state, epoch = self.get_state(), self.epoch()
            self.peeked = Peeked(self.next(), state, epoch)
        return self.peeked.taken[0]

    def first_records(self) -> list[dict[str, Any]]:
        """The records of this process's prompts in the next iteration; the stream stays where it is."""
        return self.first()[1]

    def first(self) -> tuple[Batch, list[dict[str, Any]]]:
        """``next``, after which the stream is where it was."""
        state = self.get_state()
        found = self.next()
        self.set_state(state)
        return found

    def shapes(self) -> Iterator[Batch]:
        """A batch (of shapes with layouts, global rows) for every shape that can come: no prompts wider than the bucket
        that holds the longest one."""
        margins = any(stream.margins for stream in self.streams.values())
        longest = self.streams[PROMPTS.name].longest if PROMPTS.name in self.streams else 0
        for batch in batch_shapes(self.ready.resolved, self.ready.mesh, margins):
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

    def epoch(self) -> float:
        """How often the batches taken so far go through the data: that of the first kind that is read."""
        if self.peeked is not None:
            return self.peeked.epoch
        first = next(iter(self.streams.values()))
        return first.taken / first.batches_per_epoch

    def get_state(self) -> dict:
        if self.peeked is not None:
            return self.peeked.state
        return {kind: stream.get_state() for kind, stream in self.streams.items()}

    def set_state(self, state: dict) -> None:
        self.peeked = None
        for kind, stream in self.streams.items():
            stream.set_state(state[kind])


def counts_of(summaries: Iterable[Summary]) -> dict[str, float]:
    """What was left out of the sources, or cut, as metrics."""
    found = {}
    for summary in summaries:
        kind = summary.where.rpartition(".")[2].removeprefix("eval_")
        found |= {f"data/{kind}_{what}": float(n) for what, n in summary.counts.items() if n and what != "kept"}
    return found


def training_source(ready: Run, kind: DataKind) -> Source:
    """The records of one kind that the run learns from: as its section of ``data`` says; where that says nothing of
    prompts, the seeds that an environment's episodes start from."""
    source, where = getattr(ready.cfg.data, kind.name), f"data.{kind.name}"
    if source is None and kind.is_prompt and ready.cfg.acts:
        return starts(ready.cfg.environment.starts)
    return read_source(ready, kind.name, given(source, where), where)


def read_source(ready: Run, kind: str, source: SourceConfig, where: str):
    """The records of one data section, the same on all processes, or a ValueError says where they are not.

    What its rows were recognised as is kept in ``ready.recognised``."""
    data = ready.cfg.data
    found = open_source(source, kind, cache_dir=data.cache_dir, skip_bad=data.skip_bad, path_in_config=where)
    processes.agree(f"{where}: the hash of its records", found.fingerprint[:12], "the same data on all hosts")
    ready.recognised[where] = found.describe()
    return found.with_tools(ready.environment.tools) if ready.environment and kind == PROMPTS.name else found


def describe_data(ready: Run) -> list[str]:
    """What the rows of the sections opened so far were recognised as, a line each; of held-out data only where it is
    not what the training data are."""
    lines = ready.recognised
    same = lambda where: lines.get(where.replace("data.eval_", "data.")) == lines[where] and "eval_" in where
    return [f"{where}: {text}" for where, text in lines.items() if not same(where)]


def glue_of(ready: Run) -> Glue:
    """What encodes the observations of the run's environment."""
    return Glue(ready.tokenizer, ready.cfg.data.chat is not None, ready.sampler.eos_ids)


def training_prompts(ready: Run, size: int, rows: int | None = None) -> batches.FixedBatches:
    """The first ``size`` training prompts, once, in batches of ``rows`` at most; None: of a step's."""
    return fixed_batches(ready, PROMPTS, PROMPTS.name, size, min(size, rows or ready.cfg.batch.prompts_per_step))


def held_out(ready: Run, kind: DataKind, size: int, rows: int) -> batches.FixedBatches:
    """The held-out batches of ``kind``; none where the config names no held-out data of it."""
    if getattr(ready.cfg.data, f"eval_{kind.name}") is None:
        return batches.FixedBatches([])
    return fixed_batches(ready, kind, f"eval_{kind.name}", size, rows)


def fixed_batches(ready: Run, kind: DataKind, section: str, size: int, rows: int) -> batches.FixedBatches:
    """The first ``size`` records of a section of ``data``, once, in batches of ``rows`` rounded up to the mesh."""
    shards = prompt_shards(ready.mesh) if kind.is_prompt else batch_shards(ready.mesh)
    source, where = getattr(ready.cfg.data, section), f"data.{section}"
    return batches.held_out_batches(
        kind,
        read_source(ready, kind.name, source, where),
        ready.tokenizer,
        ready.cfg.data,
        size=size,
        rows=-(-rows // shards) * shards,
        share=share_of(ready.mesh),
        where=where,
        eos=ready.sampler.eos_ids,
    )
