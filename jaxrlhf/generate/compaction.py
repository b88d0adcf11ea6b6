"""Compaction: decoding goes on with the rows that have not ended."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxrlhf.generate.sampler import Sampler
from jaxrlhf.generate.state import Decoding, Rows
from jaxrlhf.ops.rows import by_device, group_rows, of_devices, ungroup_rows
from jaxrlhf.sharding import split_over
from jaxrlhf.types import Array


class Half(NamedTuple):
    """How half of the rows go on: they stand in lines, of each of which ``few`` do."""

    few: int
    lines: Callable[[Array], Array]  # [B, ...] -> [lines, places, ...]; of the half too
    rows: Callable[[Array], Array]  # the inverse
    done: Callable[[Rows], Array]  # bool[lines, places]
    keep: Callable[[Decoding, Array, Array], tuple[Decoding, Array]]  # (state, prompt, i32[lines, few]), of these


def half_of(state: Decoding, sampler: Sampler) -> Half | None:
    """The half that decoding goes on with; None where it is to go on as it is."""
    prompts, copies, _ = state.hidden.shape
    if not sampler.halvings:
        return None
    if copies > 1 and sampler.samples_per_prompt > 1:
        return half_of_samples(prompts, copies // 2)
    few = prompts // split_over("batch") // 2
    return half_of_prompts(copies, few) if few else None


def half_of_samples(prompts: int, few: int) -> Half:
    """A prompt is a line, and its samples are what stands in it."""
    take, lines = jax.vmap(lambda x, at: x.at[at].get()), lambda x: group_rows(x, len(x) // prompts)

    def keep(state: Decoding, prompt: Array, which: Array) -> tuple[Decoding, Array]:
        own = jax.vmap(lambda x, at: x.at[:, at].get())
        owned = lambda x: jax.tree.map(lambda x: own(x, which), x)
        caches = [cache._replace(key=owned(cache.key), value=owned(cache.value)) for cache in state.caches]
        rows = jax.tree.map(lambda x: ungroup_rows(take(lines(x), which)), state.rows)
        return Decoding(state.index, take(state.hidden, which), caches, rows), prompt

    return Half(few, lines, ungroup_rows, lambda rows: lines(rows.done), keep)


def half_of_prompts(copies: int, few: int) -> Half:
    """A device is a line, and the prompts that it has are what stands in it, each with its ``copies`` rows."""
    take = jax.vmap(lambda x, at: x.at[at].get())
    lines, rows = lambda x: by_device(group_rows(x, copies)), lambda x: ungroup_rows(of_devices(x))

    def keep(state: Decoding, prompt: Array, which: Array) -> tuple[Decoding, Array]:
        some = lambda x: of_devices(take(by_device(x), which))
        hidden, caches, prompt = jax.tree.map(some, (state.hidden, state.caches, prompt))
        left = jax.tree.map(lambda x: rows(take(lines(x), which)), state.rows)
        return Decoding(state.index, hidden, caches, left), prompt

    return Half(few, lines, rows, lambda rows: lines(rows.done).all(2), keep)
