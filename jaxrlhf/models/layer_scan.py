"""A row through all layers: one compiled body for each round of their pattern, or a body for each layer."""

from collections.abc import Callable

import jax

from jaxrlhf.models.config import LayerTypes, branch_of
from jaxrlhf.models.parameters import layer_at
from jaxrlhf.types import Array, Mean, Params


def through_layers(
    layer_of: Callable, stacked: Params, kept: Array | None, kinds: LayerTypes, x: Array, since: int, scanned: bool
) -> tuple[Array, dict[str, Mean]]:
    """(the columns of ``x`` from ``since`` after all layers, the sum of what was measured of each); ``layer_of``:
    (kind, inside a scan, since) to a function of (a layer's parameters, its part of ``kept`` [layers, ...]) and x, to
    both.

    Where kinds of layers alternate, one step of the scan is one round of their pattern: each layer's kind is known
    while tracing, and the program grows with the pattern, not with the model. Layers behind the last whole round follow
    the scan, all of them where it is not wanted: what is kept of those for the backward pass is not copied into and out
    of stacks, and the last of them computes no more than is asked for."""
    count = len(kinds)
    period = next(size for size in range(1, count + 1) if kinds == (kinds[:size] * count)[:count])
    rounds = count // period if scanned else 0
    behind, pattern = range(rounds * period, count), kinds[:period]

    def one_round(x, params):
        measured, (layers, kept) = [], params
        for i, kind in enumerate(pattern):
            given = layer_at(layers, pattern, i), None if kept is None else kept[i]
            x, told = layer_of(kind, True)(given, x)
            measured.append(told)
        return x, measured

    measured = []
    if rounds and period == 1:  # as they are stacked: what the backward pass reads of them is then no copy
        x, told = jax.lax.scan(lambda x, given: layer_of(pattern[0], True)(given, x), x, (stacked, kept))
        measured = [jax.tree.map(lambda y: y.sum(0), told)]
    elif rounds:
        each = {name: rounds_of(part, rounds, of_round(name, pattern)) for name, part in stacked.items()}
        x, found = jax.lax.scan(one_round, x, (each, rounds_of(kept, rounds, period)))
        measured = [jax.tree.map(lambda y: y.sum(0), told) for told in found]
    for i in behind:
        given = layer_at(stacked, kinds, i), None if kept is None else kept[i]
        x, told = layer_of(kinds[i], False, since if i == behind[-1] else 0)(given, x)
        measured.append(told)
    total = jax.tree.map(lambda *layers: sum(layers), *measured)
    return x if behind else x[:, since:], total


def of_round(name: str, pattern: LayerTypes) -> int:
    """How many layers of a round have the branch ``name``; each has an mlp."""
    return len(pattern) if name == "mlp" else [branch_of(kind) for kind in pattern].count(name)


def rounds_of(stacked: Params, rounds: int, each: int) -> Params:
    """The stacked layers of one branch as ``rounds`` rounds of ``each``; those behind the last round left out."""
    return jax.tree.map(lambda w: w[: rounds * each].reshape(rounds, each, *w.shape[1:]), stacked)
