"""The kinds of a model's layers, and the stacks that hold their parameters.

A layer has parts: what mixes its columns, its mlp, and in some families more. The parameters of a part are stacked over
all layers whose part has the same shapes.
"""

import collections
from collections.abc import Sequence
from typing import Literal, NamedTuple

from jaxrlhf.models.config import LayerType, LayerTypes, ModelConfig, layer_types_of
from jaxrlhf.models.families import FAMILIES

Part = Literal["attention", "delta", "mlp", "per_layer", "output"]
PARTS: tuple[Part, ...] = ("attention", "delta", "mlp", "per_layer", "output")


class LayerKind(NamedTuple):
    """What is known of a layer while tracing."""

    type: LayerType
    apart: bool = False  # its attention has heads of other sizes than that of local layers
    reads: bool = False  # it attends to the keys and values of an earlier layer, and makes none
    beside: tuple[Part, ...] = ()  # the parts that it has beside attention (or a delta net) and an mlp

    @property
    def mixing(self) -> Part:
        """The part that mixes columns."""
        return "delta" if self.type == "linear" else "attention"

    @property
    def parts(self) -> tuple[Part, ...]:
        """All that it has."""
        return (self.mixing, "mlp", *self.beside)

    def stack(self, part: Part) -> str:
        """The name of the stack that holds a part of the layer."""
        return f"{'reader_' * self.reads}{'global_' * (self.apart and part == 'attention')}{part}"


Kinds = tuple[LayerKind, ...]


def part_of(stack: str) -> Part:
    """Which part of a layer a stack holds."""
    return next(part for part in PARTS if stack.endswith(part))


def kinds_of(cfg: ModelConfig, types: LayerTypes | None = None) -> Kinds:
    """The kind of every layer; ``types``: layer_types_of the model, or those of its first layers."""
    types = layer_types_of(cfg) if types is None else types
    family, first = FAMILIES[cfg.family], cfg.num_layers - cfg.shared_kv_layers
    own: tuple[Part, ...] = ("per_layer",) if cfg.per_layer_size else ()
    last: tuple[Part, ...] = ("output",) if family.layer_scalar else ()
    one = lambda at, kind: LayerKind(kind, family.uneven and kind == "global", at >= first, own + last)
    return tuple(one(at, kind) for at, kind in enumerate(types))


def count_kinds(cfg: ModelConfig) -> dict[LayerKind, int]:
    """How many layers of each kind there are. A file may claim any number of layers: without types they are alike."""
    if not cfg.layer_types:
        return dict.fromkeys(kinds_of(cfg, ("global",)), cfg.num_layers)
    return collections.Counter(kinds_of(cfg))


def layers_with(cfg: ModelConfig, stack: str) -> Sequence[int]:
    """The numbers of the layers that a stack holds a part of."""
    part = part_of(stack)
    if not cfg.layer_types:
        return range(cfg.num_layers if stack in ("attention", "mlp") else 0)
    kinds = enumerate(kinds_of(cfg))
    return [at for at, kind in kinds if part in kind.parts and kind.stack(part) == stack]


def stacks_of(cfg: ModelConfig) -> list[str]:
    """The names of all stacks of a model's layers."""
    kinds = count_kinds(cfg)
    return list(dict.fromkeys(kind.stack(part) for part in PARTS for kind in kinds if part in kind.parts))


def attending(cfg: ModelConfig) -> dict[LayerKind, int]:
    """How many layers of attention of each kind there are."""
    return {kind: count for kind, count in count_kinds(cfg).items() if kind.mixing == "attention"}
