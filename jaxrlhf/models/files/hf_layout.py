"""Where each leaf of the parameters is in the tensors of a Hugging Face folder, by the tables in models/families."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.families import FAMILIES, Module
from jaxrlhf.models.layer_kinds import layers_with
from jaxrlhf.models.parameters import Leaf, parameter_table
from jaxrlhf.types import Head

# leaves that files call by their names; the others are weights and biases
OWN_NAMES = ("A_log", "dt_bias", "sinks", "layer_scalar")
SCORE = Module("score", "score embed")  # the scalar head, in every family; classes of transformers have no bias there


class LeafTensors(NamedTuple):
    """The tensor, one a layer, or one an expert of it, that holds a leaf."""

    name: str
    dims: tuple[tuple[str, ...], ...]  # the tensor's dimensions, each the leaf's axes that it is made of
    axes: tuple[str, ...]  # the leaf's, without layers, and without experts where each has a tensor
    sizes: dict[str, int]  # of those axes in the file: the vocabulary is not padded there
    layers: Sequence[int] | None  # the numbers of the layers that it stands in
    before: int = 0  # where the leaf begins along the ``part`` of a fused tensor
    total: int = 0  # and how long that is
    experts: int | None = None  # where each has a tensor of its own

    def own(self) -> int:
        """The leaf's share of ``total``; 0 where the tensor is not fused."""
        fused = [dim[dim.index("part") + 1 :] for dim in self.dims if "part" in dim]
        return math.prod(self.sizes[axis] for axis in fused[0]) if fused else 0

    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor, its other parts included; a dimension "1" is of that size."""

        def one(dim: tuple[str, ...]) -> int:
            mine = math.prod(self.sizes[axis] for axis in dim if axis not in ("part", "1"))
            return mine // self.own() * self.total if "part" in dim else mine

        return tuple(map(one, self.dims))

    def names(self) -> Iterator[str]:
        """The tensor's name for each layer, and each expert of it."""
        return map(self.name_at, places(self.stacked))

    @property
    def stacked(self) -> tuple[int, ...]:
        """The leaf's first dimensions, for each place in which there is a tensor."""
        layers = None if self.layers is None else len(self.layers)
        return tuple(size for size in (layers, self.experts) if size is not None)

    def name_at(self, place: tuple[int, ...]) -> str:
        """The tensor's name for a layer, by its place among those that have it, and an expert, where there are any."""
        layer = place if self.layers is None else (self.layers[place[0]], *place[1:])
        return self.name.format(**dict(zip(("layer", "expert"), layer)))


def places(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All indices of an array of this shape, one at a time: np.ndindex would first hold those of each dimension, and a
    config may claim any number of layers."""
    if not shape:
        yield ()
    for first in range(shape[0]) if shape else ():
        for rest in places(shape[1:]):
            yield first, *rest


def dotted(path) -> str:
    return ".".join(key.key for key in path)


def leaves_of(cfg: ModelConfig, head: Head) -> dict[str, Leaf]:
    """Path -> Leaf."""
    is_leaf = lambda x: isinstance(x, Leaf)
    flat = jax.tree_util.tree_leaves_with_path(parameter_table(cfg, head), is_leaf=is_leaf)
    return {dotted(path): leaf for path, leaf in flat}


def find_sources(cfg: ModelConfig, head: Head, split: bool = False) -> dict[str, LeafTensors]:
    """Path of a leaf -> its tensors, for every leaf but the bias of a scalar head; parts of a tensor in their order.

    ``split``: in files whose experts have a tensor each."""
    leaves = leaves_of(cfg, head)
    leaves.pop("head.bias", None)
    names = FAMILIES[cfg.family].hf
    modules = {**names.modules, **(names.split if split else {}), **({"head": SCORE} if head == "scalar" else {})}
    order = {path: place for place, path in enumerate(modules)}
    found, length = {}, {}
    for path, leaf in sorted(leaves.items(), key=lambda item: order[item[0].rpartition(".")[0]]):
        module, _, kind = path.rpartition(".")
        place = path.split(".")[1] if leaf.axes[0] == "layers" else None
        source = make_source(modules[module], kind, leaf, cfg, place)
        found[path] = source._replace(before=length.get(source.name, 0))
        length[source.name] = found[path].before + source.own()
    return {path: source._replace(total=length[source.name]) for path, source in found.items()}


def score_bias(cfg: ModelConfig) -> LeafTensors:
    """Where the bias of a scalar head is, in files that have one."""
    return make_source(SCORE, "bias", leaves_of(cfg, "scalar")["head.bias"], cfg)._replace(total=1)


def make_source(module: Module, kind: str, leaf: Leaf, cfg: ModelConfig, stack: str | None = None) -> LeafTensors:
    """Where ``leaf``, the ``kind`` of ``module``, is, but for its place among parts; ``stack`` of the layers that it
    is in."""
    layers = None if stack is None or "{layer}" not in module.name else layers_with(cfg, stack)
    experts = cfg.num_experts if "{expert}" in module.name else None
    count = (layers is not None) + (experts is not None)
    axes = leaf.axes[count:]
    sizes = dict(zip(axes, leaf.shape[count:], strict=True))
    for name in {"vocab", "vocab_of_layer"} & {*sizes}:
        sizes[name] = cfg.vocab_size or sizes[name]
    dims = tuple(tuple(dim.split(".")) for dim in module.layout.split())
    dims = tuple(dim for dim in dims if set(dim) - {"part", "1"} <= set(axes))  # a bias has some of the weight's
    ending = f".{kind}" if kind in OWN_NAMES else module.bias if kind == "bias" else module.weight
    return LeafTensors(module.name + ending, dims, axes, sizes, layers, experts=experts)
