"""Compaction: once few rows are live, decoding goes on with these alone.

Every device must go on with as many rows as the others, and none may move between devices. So rows are compacted
within lines, each of which keeps equally many places:

- A prompt is a line, and its samples are the places.
- Where each prompt has one sample, a device is a line, and the prompts that it holds are the places.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.generate.sampler import Sampler
from jaxrlhf.generate.state import Decoding, LoopRows
from jaxrlhf.ops.rows import by_device, group_rows, of_devices, ungroup_rows
from jaxrlhf.sharding import split_over
from jaxrlhf.types import Array

take = jax.vmap(lambda x, at: x.at[at].get())  # [L, P, ...], i32[L, K] -> [L, K, ...]
put = jax.vmap(lambda x, at, new: x.at[at].set(new, unique_indices=True))  # the same places of x, replaced


class Lines(NamedTuple):
    """L lines of P places each, of which ``kept`` go on."""

    of: Literal["prompt", "device"]
    group: int  # prompt: lines, the G prompts; device: rows at a place, more than one where prompts stand abreast
    kept: int


def lines_of(state: Decoding, sampler: Sampler) -> Lines | None:
    """The lines in which half of the rows go on; None where a line has one place."""
    prompts, copies, _ = state.hidden.shape
    if copies > 1 and sampler.samples_per_prompt > 1:
        return Lines("prompt", prompts, copies // 2)
    half = prompts // split_over("batch") // 2
    return Lines("device", copies, half) if half else None


def to_lines(x: Array, lines: Lines) -> Array:
    """[B, ...] -> [L, P, ...], or [L, P, rows at a place, ...] where a line is a device."""
    if lines.of == "prompt":
        return group_rows(x, len(x) // lines.group)
    return by_device(group_rows(x, lines.group))


def to_rows(x: Array, lines: Lines) -> Array:
    """to_lines, undone: [L, P, ...] -> [B, ...]."""
    return ungroup_rows(x if lines.of == "prompt" else of_devices(x))


def all_ended(rows: LoopRows, lines: Lines) -> Array:
    """bool[L, P]: all rows at the place have ended."""
    done = to_lines(rows.done, lines)
    return done if lines.of == "prompt" else done.all(2)


def live_places(rows: LoopRows, lines: Lines) -> Array:
    """i32[L, kept]: the live places of each line in their order, then as many that have ended as make up ``kept``."""
    return jnp.argsort(all_ended(rows, lines), axis=1, stable=True)[:, : lines.kept]


def compact(state: Decoding, prompt: Array, places: Array, lines: Lines) -> tuple[Decoding, Array]:
    """The state of the rows at ``places`` alone, i32[L, kept], and their prompts; ``prompt``: see decode_step."""
    rows = jax.tree.map(lambda x: to_rows(take(to_lines(x, lines), places), lines), state.rows)
    if lines.of == "device":
        some = lambda x: of_devices(take(by_device(x), places))
        hidden, caches, prompt = jax.tree.map(some, (state.hidden, state.caches, prompt))
        return Decoding(state.index, hidden, caches, rows), prompt
    caches = [cache.of_samples(places) for cache in state.caches]
    return Decoding(state.index, take(state.hidden, places), caches, rows), prompt


def put_back(rows: LoopRows, compacted: LoopRows, places: Array, lines: Lines) -> LoopRows:
    """``rows`` as they were before compaction, with what has become of those at ``places``."""

    def one(x: Array, new: Array) -> Array:
        return to_rows(put(to_lines(x, lines), places, to_lines(new, lines)), lines)

    return jax.tree.map(one, rows, compacted)
