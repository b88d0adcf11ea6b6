"""The matrix products of a traced program, counted in its jaxpr: what it would do before any compiler has seen it.

A product of [M, K] and [K, N] is 2 M N K FLOPs; all else is free. A scan does its body as often as it is long, a while
loop as often as its condition lets it at most, a switch its costliest branch. Shapes are those of all devices together.
"""

import math
from typing import Any, NamedTuple

from jax.extend.core import Literal, Var

UNCOUNTED = {"conv_general_dilated", "ragged_dot_general", "pallas_call", "custom_call", "triangular_solve"}


class Counter(NamedTuple):
    """What a while loop counts its trips with."""

    trips: int  # at most
    start: Any  # the variable or the number that it goes on from
    end: Any  # the variable that it leaves


def flops(jaxpr: Any) -> int:
    """FLOPs of the matrix products of a Jaxpr or ClosedJaxpr.

    Raises ValueError for a primitive that multiplies in another way, and for a while loop with products whose trips
    nothing bounds."""
    total, loops = 0, {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name != "while":
            total += of_equation(eqn)
        elif trip := flops(eqn.params["cond_jaxpr"]) + flops(eqn.params["body_jaxpr"]):
            # loops that go on with one counter share its trips: at worst all are made where a trip costs most
            found = counter(eqn)
            before = loops.get(found.start, 0) if isinstance(found.start, Var) else 0
            loops[found.end] = max(before, found.trips * trip)
            total += loops[found.end] - before
    return total


def of_equation(eqn: Any) -> int:
    """FLOPs of one equation that is no while loop, with all that it calls."""
    name, params = eqn.primitive.name, eqn.params
    if name in UNCOUNTED:
        raise ValueError(f"{name}: nobody has said how to count it")
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "cond":
        return max(map(flops, params["branches"]))
    inside = sum(flops(part) for value in params.values() for part in jaxprs(value))
    if name == "scan":
        return params["length"] * inside
    if name == "shard_map":  # each device's part
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]) * inside
    return inside


def jaxprs(value: Any) -> list[Any]:
    """The programs in a parameter of an equation: one, or a tuple of some."""
    return [part for part in (value if isinstance(value, tuple) else (value,)) if hasattr(part, "eqns")]


def counter(loop: Any) -> Counter:
    """What bounds the trips of a while loop: "counter < number", alone or among other conditions that all must hold.

    Raises ValueError where no such comparison is found."""
    condition = loop.params["cond_jaxpr"].jaxpr
    made = {eqn.outvars[0]: eqn for eqn in condition.eqns}
    wanted, carried = list(condition.outvars), condition.invars[loop.params["cond_nconsts"] :]
    while wanted:
        eqn = made.get(wanted.pop())
        if eqn is None:
            continue
        if eqn.primitive.name in ("and", "convert_element_type"):
            wanted += [var for var in eqn.invars if isinstance(var, Var)]
        elif eqn.primitive.name == "lt" and eqn.invars[0] in carried and isinstance(eqn.invars[1], Literal):
            place, bound = carried.index(eqn.invars[0]), int(eqn.invars[1].val)
            start = loop.invars[loop.params["cond_nconsts"] + loop.params["body_nconsts"] + place]
            trips = bound - int(start.val) if isinstance(start, Literal) else bound  # it counts up from 0 or more
            return Counter(trips, start, loop.outvars[place])
    raise ValueError(f"a while loop without a bound: {condition}")
