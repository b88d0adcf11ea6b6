"""LoRA: low-rank adapters beside frozen linear maps (Hu et al. 2021, arXiv:2106.09685).

    y = x W + (alpha / rank) (x A) B

A role with an adapter learns A and B alone. W is in the frozen base, which several roles share. Their parameters are
put together by ``assemble``, which copies nothing; ``linear`` adds the product where it finds A and B beside a kernel.
With ``dora`` each output has a magnitude that learns, too: see dora.py.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.errors import nearest
from jaxrlhf.models.config import MLP, ModelConfig
from jaxrlhf.models.dora import with_scales
from jaxrlhf.models.layer_kinds import Part, part_of
from jaxrlhf.models.linear import DORA_SCALE, LORA_A, LORA_B, MAGNITUDE, layout
from jaxrlhf.models.parameters import Leaf, draw_table, inputs, parameter_table, scalar_table
from jaxrlhf.models.quantized import PACKED, Quantization, unpacked
from jaxrlhf.sharding import explicit
from jaxrlhf.types import Array, Head, Params, Role, Trees

ALL = "all-linear"
BASE = "base_"  # in front of the role at whose start it begins: the name of a base in TrainState.slow
# target -> the part of a layer that it is in
TARGETS: dict[str, Part] = {
    **dict.fromkeys(("query", "key", "value", "out"), "attention"),
    **dict.fromkeys(("gate", "up", "down"), "mlp"),
    **{f"delta_{name}": "delta" for name in ("query", "key", "value", "decay", "beta", "gate", "out")},
    **{f"per_layer_{name}": "per_layer" for name in ("gate", "out")},
}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The adapter of one role. It learns; the weights that the role starts from are frozen."""

    rank: int = 16  # columns of A, rows of B
    alpha: float = 32.0  # the product of A and B counts alpha / rank times
    targets: tuple[str, ...] = (ALL,)  # query, key, value, out, gate, up, down, delta_*, per_layer_*; all-linear: all
    dropout: float = 0.0  # only 0: a policy must give what it sampled the same log-probs when it learns
    rslora: bool = False  # count the product alpha / sqrt(rank) times (Kalajdzievski 2023)
    dora: bool = False  # learn each output's magnitude apart from its direction (Liu et al. 2024), as PEFT's use_dora
    init: Literal["kaiming_uniform", "gaussian"] = "kaiming_uniform"  # of A, as PEFT has it; B starts at 0
    init_from: str | None = None  # a folder that PEFT (or export --adapter) wrote, in place of new A and B

    @property
    def shape(self) -> tuple:
        """What two adapters have in common whose leaves may take each other's place."""
        return self.rank, self.scale, frozenset(self.targets), self.dora

    @property
    def scale(self) -> float:
        """By how much the product of A and B is multiplied."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Based(NamedTuple):
    """A role that is computed from frozen weights that it shares, and from leaves of its own."""

    base: Role  # the name of the frozen weights in TrainState.slow
    lora: LoraConfig | None  # None: it is the base with the adapter off
    quantization: Quantization | None = None  # of the base's linear maps


def targets_of(cfg: ModelConfig, lora: LoraConfig) -> tuple[str, ...]:
    """The linear maps of each layer that have an adapter, in the order of TARGETS.

    Raises ValueError, in one line, for one that the model lacks, and for a rank that is more than its width."""
    if cfg.family == MLP:
        raise ValueError("adapter: a model of observations has none; expected null")
    layers = parameter_table(cfg, "lm")["layers"]
    there = [name for name in TARGETS if stacks_with(layers, name)]
    for name in lora.targets:
        if name not in (ALL, *there):
            known = f"choices: {', '.join([ALL, *there])}"
            raise ValueError(f"adapter.targets: {name}: a {cfg.family} has no such map; {nearest(name, there, known)}")
    if lora.rank > cfg.hidden_size:
        raise ValueError(
            f"adapter.rank: {lora.rank}: more than hidden_size; expected at most {cfg.hidden_size}; "
            f"nearest: {cfg.hidden_size}"
        )
    return tuple(name for name in there if ALL in lora.targets or name in lora.targets)


def stacks_with(layers: Mapping[str, Mapping], target: str) -> list[str]:
    """The stacks of ``layers`` that hold the linear map ``target``."""
    return [stack for stack, maps in layers.items() if part_of(stack) == TARGETS[target] and target in maps]


# ---- leaves ---------------------------------------------------------------------------------------------------------


def adapter_table(cfg: ModelConfig, lora: LoraConfig) -> dict:
    """The Leafs of an adapter: {"layers": {"attention": {"query": {"lora_a", "lora_b"}, ...}, "mlp": ...}}.

    A is [layers, inputs, rank] and B [layers, rank, outputs], with the kernel's axes of inputs and outputs; with
    ``dora`` a "magnitude_change" [layers, outputs] is beside them. A starts as PEFT's: uniform within 1 / sqrt(inputs),
    or normal with deviation 1 / rank. Raises ValueError as targets_of."""
    layers, found = parameter_table(cfg, "lm")["layers"], {}
    places = [(stack, target) for target in targets_of(cfg, lora) for stack in stacks_with(layers, target)]
    for stack, name in places:
        kernel = layers[stack][name]["kernel"]
        ins = 1 + inputs(kernel.axes[1:])
        fan_in = math.prod(kernel.shape[1:ins])
        uniform = lora.init == "kaiming_uniform"
        deviation = 1 / math.sqrt(3 * fan_in) if uniform else 1 / lora.rank
        a = Leaf(
            (*kernel.shape[:ins], lora.rank),
            (*kernel.axes[:ins], "rank"),
            deviation,
            "uniform" if uniform else "normal",
        )
        b = Leaf((kernel.shape[0], lora.rank, *kernel.shape[ins:]), ("layers", "rank", *kernel.axes[ins:]), "zeros")
        found.setdefault(stack, {})[name] = {LORA_A: a, LORA_B: b}
        if lora.dora:
            shape, axes = (kernel.shape[0], *kernel.shape[ins:]), ("layers", *kernel.axes[ins:])
            found[stack][name][MAGNITUDE] = Leaf(shape, axes, "zeros")
    return {"layers": found}


def own_table(cfg: ModelConfig, head: Head, lora: LoraConfig | None) -> dict:
    """The Leafs that a role on a shared base has of its own: its adapter, and its head where that is no language
    model's."""
    table = {} if lora is None else adapter_table(cfg, lora)
    return table if head == "lm" else table | {"head": scalar_table(cfg)}


def base_table(cfg: ModelConfig, heads: set[Head]) -> dict:
    """The Leafs of a base that roles with these heads share: a language model, or its trunk where none of them is."""
    table = parameter_table(cfg, "lm")
    return table if "lm" in heads else {name: part for name, part in table.items() if name != "head"}


def init_adapter(cfg: ModelConfig, lora: LoraConfig, key: Array, dtype=jnp.float32) -> Params:
    """A new adapter: A random, B zero, so that the model computes what its base does."""
    return draw_table(adapter_table(cfg, lora), key, dtype)


# ---- a role's parameters --------------------------------------------------------------------------------------------


def params_of(role: Role, trees: Trees, bases: Mapping[Role, Based]) -> Params:
    """The parameters of ``role``: what it learned or was given, on its base where ``bases`` says that it has one."""
    own = trees.of(role)
    if role not in bases or is_whole(own):
        return own
    base, lora, _ = bases[role]
    return assemble(trees.slow[base], own, 1.0 if lora is None else lora.scale)


def bases_in(slow: Mapping[Role, Params]) -> dict[Role, Params]:
    """The bases among the slow trees."""
    return {name: tree for name, tree in slow.items() if name.startswith(BASE)}


def acting_as(role: Role, other: Role, trees: Trees, bases: Mapping[Role, Based]) -> Params:
    """Leaves with which ``role`` computes what ``other`` does. On one base these are the other's adapter, or one that
    is 0: a program that was compiled for ``role`` takes them. Else they are a whole model."""
    if role not in bases or other not in bases or bases[role].base != bases[other].base:
        return params_of(other, trees, bases)
    if bases[other].lora is None:
        return jax.tree.map(jnp.zeros_like, trees.of(role))
    ours, theirs = bases[role].lora, bases[other].lora
    alike = ours is not None and theirs is not None and ours.shape == theirs.shape
    return trees.of(other) if alike else params_of(other, trees, bases)


def is_whole(own: Params) -> bool:
    """Whether these leaves are a whole model."""
    return "embed" in own


def assemble(base: Params, own: Params, scale: float) -> Params:
    """``base`` with the leaves of ``own`` in it; B is multiplied by ``scale``, and a magnitude becomes the scale of a
    map's outputs."""
    if "head" in own:
        base = {name: part for name, part in base.items() if name != "head"}

    def over(base: Params, own: Params) -> Params:
        new = {name: over(base.get(name, {}), part) if isinstance(part, dict) else part for name, part in own.items()}
        return base | new | ({LORA_B: own[LORA_B] * scale} if LORA_B in own else {})

    whole = over(base, own)
    if "layers" not in own:
        return whole
    return whole | {"layers": {stack: with_scales(maps) for stack, maps in whole["layers"].items()}}


def merged(params: Params, dtype=jnp.float32) -> Params:
    """``params`` whose kernels hold their adapters: W + A B, times the scales of outputs where there are any, computed
    in float32 and then of ``dtype``. Those of all layers, or of one. A quantised W is added as the numbers that it
    stands for."""
    if LORA_A in params:
        kernel, a, b = (unpacked(params[name], jnp.float32) for name in ("kernel", LORA_A, LORA_B))
        stacked = a.ndim + b.ndim - 2 != kernel.ndim
        dimensions = (((a.ndim - 1,), (1,)), ((0,), (0,))) if stacked else (((a.ndim - 1,), (0,)), ((), ()))
        where = layout(kernel) if explicit() else None
        product = jax.lax.dot_general(a, b, dimensions, precision=jax.lax.Precision.HIGHEST, out_sharding=where)
        rest = {name: x for name, x in params.items() if name not in (LORA_A, LORA_B, DORA_SCALE)}
        whole = kernel + product
        if DORA_SCALE in params:
            ins = range(int(stacked), a.ndim - 1)
            whole = whole * jnp.expand_dims(params[DORA_SCALE], tuple(ins))
        return rest | {"kernel": whole.astype(dtype)}
    one = lambda part: unpacked(part, dtype) if isinstance(part, PACKED) else part
    return {name: merged(part, dtype) if isinstance(part, dict) else one(part) for name, part in params.items()}


@functools.partial(jax.jit, static_argnums=(2, 3))
def merged_at_once(base: Params, own: Params, scale: float, dtype) -> Params:
    """``base`` with the adapter of ``own`` ``merged`` into it, outside a program, as one: a base in 4 bits has 40
    operations a map, each of which would compile."""
    return merged(assemble(base, own, scale), dtype)
