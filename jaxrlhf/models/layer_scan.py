"""A row through all layers: one compiled body for each round of their pattern, or a body for each layer."""

from collections.abc import Callable

import jax

from jaxrlhf.models.config import LayerType
from jaxrlhf.models.layer_kinds import Kinds, part_of
from jaxrlhf.models.parameters import layer_at
from jaxrlhf.types import Array, Mean, Params

# type of layers -> (keys, values) [B, S, N, K] of the last layer of this type, where later layers read them
Memory = dict[LayerType, tuple[Array, Array]]


def through_layers(
    layer_of: Callable,
    stacked: Params,
    kept: Array | None,
    kinds: Kinds,
    x: Array,
    memory: Memory,
    since: int,
    scanned: bool,
) -> tuple[Array, dict[str, Mean]]:
    """(the columns of ``x`` from ``since`` after all layers, the sum of what was measured of each); ``layer_of``:
    (kind, inside a scan, since) to a function of (a layer's parameters, its part of ``kept`` [layers, ...]), x and a
    Memory, to x, the Memory behind the layer, and what was measured.

    Where kinds of layers alternate, one step of the scan is one round of their pattern: each layer's kind is known
    while tracing, and the program grows with the pattern, not with the model. Layers behind the last whole round follow
    the scan, all of them where it is not wanted: what is kept of those for the backward pass is not copied into and out
    of stacks, and the last of them computes no more than is asked for. Layers that read ``memory`` come last, and have
    rounds and stacks of their own. ``memory``: arrays of its shapes, whatever they hold; {} where nothing is read."""
    count = len(kinds)
    first = next((at for at, kind in enumerate(kinds) if kind.reads), count)
    measured = []
    for start, stop in ((0, first), (first, count)) if first < count else ((0, count),):
        own = kinds[start:stop]
        stacks = {kind.stack(part) for kind in own for part in kind.parts}
        params = {name: part for name, part in stacked.items() if name in stacks}
        theirs = None if kept is None else kept[start:stop]
        last = since if stop == count else 0
        x, memory, told = through_segment(layer_of, params, theirs, own, x, memory, last, scanned)
        measured += told
    return x, jax.tree.map(lambda *layers: sum(layers), *measured)


def through_segment(
    layer_of: Callable,
    stacked: Params,
    kept: Array | None,
    kinds: Kinds,
    x: Array,
    memory: Memory,
    since: int,
    scanned: bool,
) -> tuple[Array, Memory, list[dict[str, Mean]]]:
    """``through_layers`` of layers that all read the memory, or all do not: what is read is no part of the carry, whose
    values a scan keeps for its backward pass, step by step."""
    count, reads = len(kinds), kinds[0].reads
    period = next(size for size in range(1, count + 1) if kinds == (kinds[:size] * count)[:count])
    rounds = count // period if scanned else 0
    behind, pattern = range(rounds * period, count), kinds[:period]
    fixed, carried = (memory, {}) if reads else ({}, memory)

    def one_layer(kind, scanned, since, given, carry):
        x, carried, told = layer_of(kind, scanned, since)(given, carry[0], fixed | carry[1])
        return (x, {} if reads else carried), told

    def one_round(carry, params):
        measured, (layers, kept) = [], params
        for i, kind in enumerate(pattern):
            given = layer_at(layers, pattern, i), None if kept is None else kept[i]
            carry, told = one_layer(kind, True, 0, given, carry)
            measured.append(told)
        return carry, measured

    measured, carry = [], (x, carried)
    if rounds and period == 1:  # as they are stacked: what the backward pass reads of them is then no copy
        step = lambda carry, given: one_layer(pattern[0], True, 0, given, carry)
        carry, told = jax.lax.scan(step, carry, (stacked, kept))
        measured = [jax.tree.map(lambda y: y.sum(0), told)]
    elif rounds:
        each = {name: rounds_of(part, rounds, of_round(name, pattern)) for name, part in stacked.items()}
        carry, found = jax.lax.scan(one_round, carry, (each, rounds_of(kept, rounds, period)))
        measured = [jax.tree.map(lambda y: y.sum(0), told) for told in found]
    for i in behind:
        given = layer_at(stacked, kinds, i), None if kept is None else kept[i]
        carry, told = one_layer(kinds[i], False, since if i == behind[-1] else 0, given, carry)
        measured.append(told)
    x, carried = carry
    return x if behind else x[:, since:], fixed | carried, measured


def of_round(stack: str, pattern: Kinds) -> int:
    """How many layers of a round have a part in this stack."""
    part = part_of(stack)
    return [kind.stack(part) for kind in pattern if part in kind.parts].count(stack)


def rounds_of(stacked: Params, rounds: int, each: int) -> Params:
    """The stacked layers of one branch as ``rounds`` rounds of ``each``; those behind the last round left out."""
    return jax.tree.map(lambda w: w[: rounds * each].reshape(rounds, each, *w.shape[1:]), stacked)
