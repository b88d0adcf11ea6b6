"""Endless streams of token batches for training, and fixed lists of them for evaluation.

The order is a function of (data, seed, batch size) alone: a stream shuffles all the data afresh every epoch and cuts
the endless row of epochs into global batches, of which each process makes its own blocks of rows. So the state is the
number of batches taken, a run resumes on any number of processes, and no data is lost at the end of an epoch.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.data.document_packing import pack
from jaxrlhf.data.examples import Examples, make_examples
from jaxrlhf.data.record_kinds import DataKind
from jaxrlhf.data.sources import DataConfig, Source
from jaxrlhf.data.summary import Summary
from jaxrlhf.data.tokenizer import pad_id
from jaxrlhf.data.truncate import Sides
from jaxrlhf.types import Batch

READ_AHEAD = 2  # batches made, each in a thread, while the devices work


class Share(NamedTuple):
    """Which rows of the global batch a process makes: of ``total`` equal blocks of rows, these."""

    blocks: tuple[int, ...] = (0,)  # ascending; on a mesh whose devices are not in the processes' order, not neighbours
    total: int = 1

    def positions(self, rows: int) -> np.ndarray:
        """i[rows here]: the rows in the global batch of ``rows``."""
        size = rows // self.total
        return np.concatenate([np.arange(block * size, (block + 1) * size) for block in self.blocks])


class HostBatch(NamedTuple):
    """This process's rows of one global batch, as NumPy arrays: i32 tokens, bool masks."""

    batch: Batch
    columns: list[dict[str, Any]] | None  # prompts only: the records of the rows, without those that fill up
    counts: dict[str, int]  # of these rows: rows (without those that fill up), examples, truncated (examples)
    real: int  # rows of the global batch that do not fill it up; they come first


WHOLE = Share()


class FixedBatches(list[HostBatch]):
    """A list of batches, and what became of the rows of their source."""

    def __init__(self, batches: Iterable[HostBatch], summary: Summary | None = None):
        super().__init__(batches)
        self.summary = summary


class Stream(Iterator[HostBatch]):
    """Batches without end; ``batches_per_epoch`` of them are the data once. ``summary`` is about the data set."""

    def __init__(self, layout: "Layout", seed: int, where: str):
        import grain

        self.summary = layout.summary()
        self.rows = len(layout.units)  # of an epoch
        self.examples = layout.examples
        self.batches_per_epoch = self.rows / layout.rows
        self.longest = int(layout.examples.lengths[layout.examples.kept].max())  # tokens of the longest row
        self.margins = layout.examples.margins  # whether preferences say by how much
        self._where = where
        self._order = _hash(
            layout.kind.name, layout.examples.source.fingerprint, seed, layout.rows, layout.order_hash()
        )
        shuffle_seed = int(_hash(layout.kind.name, seed)[:8], 16)  # streams of one run don't share their shuffles
        dataset = (
            grain.MapDataset.range(len(layout.units))
            .shuffle(seed=shuffle_seed)  # by epoch: grain adds its number to the seed
            .repeat()
            .batch(layout.rows, drop_remainder=True, batch_fn=np.asarray)  # there is none: the epochs follow each other
            .map(layout.assemble)
            .to_iter_dataset(grain.ReadOptions(num_threads=READ_AHEAD, prefetch_buffer_size=READ_AHEAD))
        )
        self._batches = iter(dataset)

    def __next__(self) -> HostBatch:
        return next(self._batches)

    @property
    def taken(self) -> int:
        """Batches taken so far, before a resumption too."""
        return self._batches.get_state()["next_index"]

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON: read ahead of it doesn't count. The same on every process."""
        return {"order": self._order, "position": self._batches.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``get_state`` was called. Raises ValueError when that was in another order of other data."""
        if state.get("order") != self._order:
            raise ValueError(
                f"{self._where}: the saved position is in another order of the data: its rows, the tokenizer or the "
                "limits on length are not those of the run so far; expected the same, or another run_dir"
            )
        self._batches.set_state(dict(state["position"]))


def stream(
    kind: DataKind,
    source: Source,
    tokenizer: Any,
    cfg: DataConfig,
    *,
    rows: int,
    seed: int,
    share: Share = WHOLE,
    eos: Sequence[int] | None = None,
    where: str = "",
) -> Stream:
    """Batches without end of one kind of data. Packed documents keep their row for the whole run; it is the rows that
    are shuffled.

    Args:
        rows: of the global batch.
        share: which of them are made here.
        eos: ids that end a turn; the tokenizer's own by default.
        where: the prefix of error messages; by default the kind's section.
    """
    where = where or f"data.{kind.name}"
    layout = _layout(kind, source, tokenizer, cfg, rows, share, eos, where).best()
    return Stream(layout.packed(seed) if layout.packs else layout, seed, where)


def count_rows(
    kind: DataKind,
    source: Source,
    tokenizer: Any,
    cfg: DataConfig,
    *,
    seed: int,
    eos: Sequence[int] | None = None,
    where: str,
) -> int:
    """Rows of an epoch of the stream that these make: records that are kept, or what they are packed into."""
    layout = _layout(kind, source, tokenizer, cfg, 1, WHOLE, eos, where).best()
    return len((layout.packed(seed) if layout.packs else layout).units)


def held_out_batches(
    kind: DataKind,
    source: Source,
    tokenizer: Any,
    cfg: DataConfig,
    *,
    size: int,
    rows: int,
    share: Share = WHOLE,
    eos: Sequence[int] | None = None,
    where: str | None = None,
) -> FixedBatches:
    """The first ``size`` usable records once, in their order, for evaluation; every process gets as many batches.

    The last batch is filled up with rows whose masks are all False (their tokens are padding); ``counts["rows"]`` says
    how many rows of this process are real, and they come first.
    """
    where = f"data.eval_{kind.name}" if where is None else where
    if size < 1:
        raise ValueError(f"eval.size: {size}, expected at least 1")
    layout = _layout(kind, source, tokenizer, cfg, rows, share, eos, where)
    layout = dataclasses.replace(layout, units=layout.units[:size])
    if layout.packs:
        layout = layout.packed(None)
    used = sum(map(len, layout.units))
    return FixedBatches(
        (layout.held_out(at) for at in range(0, len(layout.units), rows)),
        layout.summary()._replace(used=used),
    )


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the units of a data set become the rows of this process."""

    kind: DataKind
    examples: Examples
    units: list[np.ndarray]  # what fills one row: the records (one, or several in a packed row)
    rows: int  # of the global batch
    here: np.ndarray  # the rows of it that this process makes
    pad: int
    cfg: DataConfig
    make: "Maker"

    @property
    def packs(self) -> bool:
        """Whether several records go into a row."""
        return self.cfg.pack and self.kind.make_packed is not None

    def packed(self, seed: int | None) -> "Layout":
        """The same records with several in a row, in an order that ``seed`` decides (None: their own)."""
        records = np.concatenate(self.units)
        if seed is not None:
            records = np.random.default_rng(int(_hash("pack", seed)[:8], 16)).permutation(records)
        rows = pack(self.examples.lengths[records], self.examples.max_length)
        return dataclasses.replace(self, units=[records[row] for row in rows], make=self.kind.make_packed)

    def best(self) -> "Layout":
        """The share data.keep_top of the records, those with the highest returns, in the order of the source; of equal
        ones the first."""
        rank, share = self.kind.rank, self.cfg.keep_top
        if rank is None or share == 1:
            return self
        returns = np.array([rank(record) for record in self.records(range(len(self.units)))])
        kept = np.sort(np.argsort(-returns, kind="stable")[: math.ceil(share * len(returns))])
        summary = self.examples.summary
        counts = {**summary.counts, "kept": len(kept), "outranked": len(returns) - len(kept)}
        examples = dataclasses.replace(self.examples, summary=summary._replace(counts=counts))
        return dataclasses.replace(self, examples=examples, units=[self.units[unit] for unit in kept])

    def summary(self) -> Summary:
        """What became of the source's rows; of packed ones also into how many rows they went."""
        packed = len(self.units) if self.make is self.kind.make_packed else None
        return self.examples.summary._replace(packed=packed)

    def records(self, units: Iterable[int]) -> list[dict[str, Any]]:
        """The records of the units."""
        return [self.examples.source[int(index)] for unit in units for index in self.units[unit]]

    def sides(self, units: Iterable[int]) -> list[Sides]:
        """The records of the units as token rows."""
        return [self.examples.sides_at(int(index)) for unit in units for index in self.units[unit]]

    def assemble(self, units: np.ndarray) -> HostBatch:
        """This process's rows of the global batch with ``units`` (fewer than ``rows`` at the end of an evaluation)."""
        mine = units[self.here[self.here < len(units)]]
        batch, columns = self.make(self, units, mine)
        records = np.concatenate([self.units[unit] for unit in mine]) if len(mine) else np.zeros(0, np.int64)
        truncated = int(self.examples.truncated[records].sum())
        counts = {"rows": len(mine), "examples": len(records), "truncated": truncated}
        return HostBatch(batch, columns, counts, len(units))

    def held_out(self, first: int) -> HostBatch:
        """The batch that starts with unit ``first``. No two rows of an evaluation have one sample id, so none share
        noise: not across batches, where prompts are equal, or on several processes."""
        host = self.assemble(np.arange(first, min(first + self.rows, len(self.units))))
        if (prompts := host.batch.prompts) is None:
            return host
        return host._replace(batch=Batch(prompts=prompts.replace(sample_id=prompts.sample_id + np.int32(first))))

    @property
    def local(self) -> int:
        """Rows that this process makes."""
        return len(self.here)

    def order_hash(self) -> str:
        digest = hashlib.sha256()
        for unit in self.units:
            digest.update(unit.tobytes() + b"|")
        return digest.hexdigest()


# (layout, units of the global batch, those of this process) -> its arrays, and the records where rewards want them
Maker = Callable[[Layout, np.ndarray, np.ndarray], tuple[Batch, list[dict[str, Any]] | None]]


def _layout(
    kind: DataKind,
    source: Source,
    tokenizer: Any,
    cfg: DataConfig,
    rows: int,
    share: Share,
    eos: Sequence[int] | None,
    where: str,
) -> Layout:
    if rows < 1 or rows % share.total:
        raise ValueError(
            f"{where}: {rows} rows a batch, expected a positive multiple of the {share.total} batch shards"
        )
    examples = make_examples(kind, source, tokenizer, cfg, where, None if kind.is_prompt else eos)
    units, here = list(examples.kept[:, None]), share.positions(rows)
    return Layout(kind, examples, units, rows, here, pad_id(tokenizer), cfg, kind.make)


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
