"""The leaves of a parameter table as one device stores them."""

import math

from jaxrlhf.models.parameters import Leaf
from jaxrlhf.sharding import RULES


def leaves(table: dict) -> dict[str, Leaf]:
    """The parameter table, flat: "layers.mlp.up.kernel" -> Leaf."""
    found: dict[str, Leaf] = {}
    for name, part in table.items():
        inside = {"": part} if isinstance(part, Leaf) else leaves(part)
        found |= {f"{name}.{rest}".rstrip("."): leaf for rest, leaf in inside.items()}
    return found


def local(leaf: Leaf, tensor: int) -> dict[str, int]:
    """Logical axis -> its size on one device."""
    split = lambda name, size: "tensor" in (RULES[name] or ()) and size % tensor == 0
    return {name: size // tensor if split(name, size) else size for name, size in zip(leaf.axes, leaf.shape)}


def stored_of(table: dict, fsdp: int, tensor: int) -> int:
    """Elements of the Leafs in ``table`` that one device stores."""
    total = 0
    for leaf in leaves(table).values():
        size = math.prod(local(leaf, tensor).values())
        total += size // fsdp if any("fsdp" in (RULES[name] or ()) for name in leaf.axes) else size
    return total
