"""Which records are used, and how they are cut: decided once, over the whole data set, before any batch is made.

Nothing is lost silently: every record is measured, and what is dropped, cut or skipped is counted.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrlhf.data import verified_cache
from jaxrlhf.data.chat import date_of, is_dated
from jaxrlhf.data.encode import as_turns
from jaxrlhf.data.record_kinds import BadRecord, DataKind
from jaxrlhf.data.sources import DataConfig, Source, cache_folder
from jaxrlhf.data.summary import Summary, quantiles
from jaxrlhf.data.tokenizer import eos_ids, fingerprint, leading_ids, start_id, unreadable, why_unreadable
from jaxrlhf.data.truncate import Encoder, Sides, longest, truncate

FORMAT = 9  # of the cached measures; raise it when the same record would give other tokens
KEPT_ROWS, KEPT_NUMBERS = 2**15, 2**23  # of one source, kept in memory once encoded: the bound is the lower one
TOO_LONG, IDENTICAL, BAD, EMPTY, UNCUTTABLE = 0, -1, -2, -3, -4  # in place of a length


@dataclasses.dataclass(frozen=True)
class Examples:
    """A source as token rows."""

    source: Source
    sides: Callable[[Mapping[str, Any]], Sides]  # a record as token rows, cut to max_length
    sides_at: Callable[[int], Sides]  # those of the record with this index; the latest are kept in memory
    max_length: int
    lengths: np.ndarray  # i32[records]: tokens of the longest side once cut, or why the record is not used
    truncated: np.ndarray  # bool[records]
    kept: np.ndarray  # i64[kept]: the records that are used, in the order of the source
    margins: bool  # whether the pairs that are used say by how much: all of them, or none
    summary: Summary  # what became of the records

    @property
    def counts(self) -> Mapping[str, int]:
        """kept, truncated, dropped (too long), uncuttable (too long to be cut), empty (nothing to learn), identical
        (pairs), skipped (bad)."""
        return self.summary.counts


def make_examples(
    kind: DataKind, source: Source, tokenizer: Any, cfg: DataConfig, where: str, eos: Sequence[int] | None = None
) -> Examples:
    """Measures every record of ``source`` (or reads the measures of an earlier run back).

    Raises:
        ValueError: a limit that makes no sense, a record that can't be used (unless cfg.skip_bad), or nothing is left.
    """
    max_length = _longest(kind, cfg)
    eos = eos_ids(tokenizer) if eos is None else tuple(eos)
    encode = _readable(lambda record: kind.encode(record, tokenizer, cfg, eos), tokenizer)
    convert = as_turns if cfg.chat is not None else dict
    cut = lambda record: truncate(convert(record), encode, tokenizer, max_length)

    def sides(record: Mapping[str, Any]) -> Sides:
        found = cut(record)
        assert found is not None, record  # it was measured, and is not used then
        return found

    # the next epoch does not encode them again
    sides_at = functools.lru_cache(_rows_kept(tokenizer, max_length))(lambda index: sides(source[index]))
    key = _measure_key(kind, source, tokenizer, cfg, max_length, eos)
    measures = _cached(
        cfg.cache_dir, key, lambda: _measure(kind, source, lambda record: encode(convert(record)), cut, max_length, cfg)
    )
    lengths, truncated = measures[:, 0], measures[:, 1].astype(bool)
    kept = np.flatnonzero(lengths > 0)
    counts = {
        "kept": len(kept),
        "truncated": int(truncated[kept].sum()),
        "dropped": int((lengths == TOO_LONG).sum()),
        "uncuttable": int((lengths == UNCUTTABLE).sum()),
        "empty": int((lengths == EMPTY).sum()),
        "identical": int((lengths == IDENTICAL).sum()),
        "skipped": int((lengths == BAD).sum()) + source.skipped,
    }
    limit_key = "data.prompt_buckets" if kind.is_prompt else "data.max_length"
    bad = source.first_bad or _first_bad(source, lambda record: encode(convert(record)), lengths)
    summary = Summary(where, counts, *quantiles(measures[measures[:, 2] > 0, 2]), max_length, limit_key, bad)
    if not len(kept):
        raise ValueError(
            f"{where}: none of its {summary.read:,} rows is left ({summary.reasons()}; {summary.lengths()}); "
            f"{summary.way_out()}"
        )
    margins = _all_or_none(measures[kept, 3], kept, source, where)
    return Examples(source, sides, sides_at, max_length, lengths, truncated, kept, margins, summary)


def _rows_kept(tokenizer: Any, max_length: int) -> int:
    """How many encoded rows stay in memory: of tokens, and in an environment of what was observed after each."""
    numbers = max_length * (1 + (getattr(tokenizer, "observation_size", None) or 0))
    return min(KEPT_ROWS, KEPT_NUMBERS // numbers)


def _all_or_none(margins: np.ndarray, kept: np.ndarray, source: Source, where: str) -> bool:
    """Whether the records have a margin. Raises ValueError where some do and others do not: to take it as 0, or to use
    no margin at all, would each be another loss than the data mean."""
    without = kept[margins == 0]
    if 0 < len(without) < len(kept):
        raise ValueError(
            f"{where}: margin is missing in {len(without)} of {len(kept)} pairs (the first is record {without[0]} of "
            f'{source.name}), expected one in all or in none; {where}.fields: {{margin: ""}} leaves it out'
        )
    return len(without) == 0


def _first_bad(source: Source, encode: Encoder, lengths: np.ndarray) -> str:
    """Why the first bad record is bad; "" where there is none."""
    for index in np.flatnonzero(lengths == BAD)[:1]:
        try:
            encode(source[int(index)])
        except BadRecord as error:
            return _at(source, int(index), error)
    return ""


def _at(source: Source, index: int, error: BadRecord) -> str:
    """What is wrong, with the place in front where it does not say it."""
    return str(error) if source.name in str(error) else f"record {index} of {source.name}: {error}"


def _longest(kind: DataKind, cfg: DataConfig) -> int:
    if not kind.is_prompt:
        if cfg.max_length < 2:
            raise ValueError(
                f"data.max_length: {cfg.max_length}, expected at least 2 (a prompt token and a response token)"
            )
        return cfg.max_length
    buckets = tuple(cfg.prompt_buckets)
    if not buckets or buckets[0] < 1 or any(low >= high for low, high in itertools.pairwise(buckets)):
        raise ValueError(f"data.prompt_buckets: {list(buckets)}, expected rising positive numbers")
    return buckets[-1]


def _readable(encode: Callable[[Mapping[str, Any]], Sides], tokenizer: Any) -> Callable[[Mapping[str, Any]], Sides]:
    """``encode``, which raises BadRecord for a record with a token that some model of the run cannot read."""

    def one(record: Mapping[str, Any]) -> Sides:
        sides = encode(record)
        for side in sides:
            if why := why_unreadable(tokenizer, side.tokens):
                raise BadRecord(why)
        return sides

    return one


def _measure(
    kind: DataKind,
    source: Source,
    encode: Encoder,
    cut: Callable[[Mapping[str, Any]], Sides | None],
    max_length: int,
    cfg: DataConfig,
) -> np.ndarray:
    """i32[records, 4]: length, or why the record is not used; 1 where it is cut; length before that (0: unknown); 1
    where it has a margin."""
    measures = np.zeros((len(source), 4), np.int32)
    for index in range(len(source)):
        try:
            record = source[index]
            sides = encode(record)
        except BadRecord as error:
            if not cfg.skip_bad:
                raise BadRecord(_at(source, index, error)) from None
            measures[index] = BAD, 0, 0, 0
            continue
        whole = longest(sides)
        too_long = whole > max_length
        if too_long and cfg.too_long == "drop":
            measures[index] = TOO_LONG, 0, whole, 0
            continue
        shorter = cut(record) if too_long else sides
        used = UNCUTTABLE if shorter is None else _used(kind, shorter)
        measures[index] = used, too_long, whole, record.get("margin") is not None
    return measures


def _used(kind: DataKind, sides: Sides) -> int:
    """Tokens of the longest side, or why there is nothing to learn from them."""
    if not kind.is_prompt and not all(side.response_mask.any() for side in sides):
        return EMPTY
    if len(sides) == 2 and np.array_equal(sides[0].tokens, sides[1].tokens):
        seen = [side.observations for side in sides]
        if seen[0] is None or np.array_equal(seen[0], seen[1]):  # type: ignore[arg-type]
            return IDENTICAL
    return longest(sides)


def _measure_key(
    kind: DataKind, source: Source, tokenizer: Any, cfg: DataConfig, max_length: int, eos: Sequence[int]
) -> str:
    text = [fingerprint(tokenizer), tokenizer.chat_template, leading_ids(tokenizer), start_id(tokenizer), list(eos)]
    text.append(date_of(tokenizer) if is_dated(tokenizer) else None)
    rules: list[Any] = [
        FORMAT,
        kind.name,
        kind.field,
        max_length,
        cfg.too_long,
        cfg.loss_on,
        cfg.append_eos,
        cfg.skip_bad,
    ]
    rules.append(cfg.chat is not None)
    if unreadable(tokenizer):
        rules.append(sorted(unreadable(tokenizer)))
    return hashlib.sha256(json.dumps([source.fingerprint, text, rules]).encode()).hexdigest()


def _cached(cache_dir: str | None, key: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Measures from the cache folder, where they are there and whole."""
    path = os.path.join(cache_folder(cache_dir), "lengths", f"{key}.measures")
    if (data := verified_cache.read_signed(path)) is not None:
        return np.load(io.BytesIO(data), allow_pickle=False)
    measures, buffer = compute(), io.BytesIO()
    np.save(buffer, measures)
    verified_cache.write_signed(path, buffer.getvalue())
    return measures
