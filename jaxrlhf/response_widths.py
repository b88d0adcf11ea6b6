"""How wide packed responses are computed: as narrow as those at hand allow, of a few widths that are compiled.

A program has shapes; how much was said it learns while it runs. So each part of the rows is computed by one of a few
branches, each of which has columns for so many response tokens to a prompt.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxrlhf.ops.rows import group_rows, join_rows, reorder, size_order, split_rows
from jaxrlhf.types import Array, Ask, Nets, Sequences, Trees

T = TypeVar("T")


def can_pack(sequences: Sequences) -> bool:
    """Whether the rows are prompts with responses, and not documents."""
    return sequences.segment_ids is None and sequences.response_start > 1


def widths_of(most: int, number: int) -> list[int]:
    """``number`` widths in equal steps up to ``most`` columns."""
    return sorted({-(-most * step // number) for step in range(1, number + 1)})


def columns_needed(sequences: Sequences) -> Array:
    """i32[B / copies]: response tokens to every prompt."""
    start, copies = sequences.response_start, sequences.copies
    return group_rows(sequences.valid[:, start:], copies).sum((1, 2), dtype=jnp.int32)


def alike_in_parts(sequences: Sequences | None, parts: int, number: int) -> Array | None:
    """The order of rows (ops.rows.reorder) in which the prompts of each of ``parts`` parts have like many response
    tokens, so that narrower widths hold them; None where there is nothing to pack, or one part."""
    if number == 1 or parts == 1 or sequences is None or not can_pack(sequences):
        return None
    return size_order(columns_needed(sequences), parts)


def at_least_width(sequences: Sequences | None, number: int, compute: Callable[[Any], T]) -> T:
    """``compute(sequences)`` in the narrowest of ``number`` widths that holds the responses to every prompt; as they
    are where there is nothing to pack.

    ``compute`` must not be differentiated from outside: it would keep what the branches of all widths need."""
    if number == 1 or sequences is None or not can_pack(sequences):
        return compute(sequences)
    start, copies = sequences.response_start, sequences.copies
    *narrow, _ = widths_of(copies * (sequences.tokens.shape[1] - start), number)
    needed = columns_needed(sequences).max()
    packed = [lambda rows, width=width: compute(rows.replace(width=width)) for width in narrow]
    which = sum((needed > width).astype("int32") for width in narrow)
    return jax.lax.switch(which, [*packed, compute], sequences)  # in all columns there is nothing to pack


def packed_nets(nets: Nets, parts: int, number: int) -> Nets:
    """``nets`` for what is not differentiated: they read rows in ``parts`` parts, each packed by itself."""

    def read(trees: Trees, sequences: Sequences, /, *asks: Ask) -> tuple[Any, ...]:
        if not can_pack(sequences):
            return nets.read(trees, sequences, *asks)
        one = lambda rows: at_least_width(rows, number, lambda packed: nets.read(trees, packed, *asks))
        order, together = alike_in_parts(sequences, parts, number), sequences.copies
        if order is None:
            return one(sequences)
        step = lambda _, rows: (None, one(rows))
        _, found = jax.lax.scan(step, None, split_rows(reorder(sequences, order, together), parts, together))
        return reorder(join_rows(found, together), jnp.argsort(order, axis=1), together)

    return nets._replace(read=read)
