"""What Muon costs: the one moment that it keeps of a matrix, and the products of Newton-Schulz on whole matrices."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jaxrlhf.models.matrices import layer_matrices
from jaxrlhf.models.parameters import Leaf
from jaxrlhf.plan.stored import leaves, stored_of

BYTES = 4  # of a number while it is orthogonalised


class Stack(NamedTuple):
    """The whole matrices of one leaf that a device orthogonalises."""

    count: int
    small: int  # the shorter side
    large: int


def stacks(table: dict, mesh: Mapping[str, int]) -> Iterator[Stack]:
    """Of each leaf that Muon takes; layers are padded to a multiple of the devices of a slice, as
    ops.newton_schulz.orthogonalized has it. ``mesh``: devices along its axes."""
    found = leaves(table)
    expert = mesh.get("expert", 1)
    for path, axes in layer_matrices(table).items():
        shape = found[".".join(path)].shape
        devices = math.prod(mesh.get(axis, 1) for axis in ("data", "fsdp", "decode", "context", "tensor"))
        layers = -(-shape[0] // (devices * (expert if axes.stack == 1 else 1)))
        yield Stack(layers * (shape[1] // expert if axes.stack == 2 else 1), *sorted(axes.sizes(shape)))


def matrices_of(table: dict) -> dict[str, Leaf]:
    """The Leafs in ``table`` that Muon takes, by their dotted paths."""
    found = leaves(table)
    return {name: found[name] for name in map(".".join, layer_matrices(table))}


def newton_schulz_work(
    table: dict, steps: int, mesh: Mapping[str, int], fsdp: int, tensor: int
) -> tuple[float, float, float]:
    """(FLOPs, bytes of HBM, bytes received within the slice) of one update on one device.

    A step is X X^T, A A and the product with X: 4 m^2 n + 2 m^3 for m <= n. What a device stores goes through an
    all-to-all within ``fsdp`` and one within ``tensor``, there and back, and is gathered from copies of the weights."""
    flops, hbm = 0.0, 0.0
    for count, m, n in stacks(table, mesh):
        flops += count * steps * (4 * m * m * n + 2 * m**3)
        hbm += count * steps * BYTES * (3 * m * n + 4 * m * m)
    sent = 2 * (1 - 1 / fsdp) + 2 * (1 - 1 / tensor) + 1 - 1 / mesh["data"]
    return flops, hbm, sent * BYTES * stored_of(matrices_of(table), fsdp, tensor)


def newton_schulz_bytes(table: dict, mesh: Mapping[str, int]) -> float:
    """Temporaries of the largest leaf on one device: its momentum, X, the next X, and two squares."""
    return max((count * BYTES * (3 * m * n + 2 * m * m) for count, m, n in stacks(table, mesh)), default=0.0)
