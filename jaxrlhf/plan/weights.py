"""The weights of a model, as one device multiplies with them, holds them and quantises them."""

import functools
import math
from typing import NamedTuple

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.lora import Based, LoraConfig, own_table, stacks_with, targets_of
from jaxrlhf.models.parameters import inputs, padded_vocab, parameter_table
from jaxrlhf.models.quantized import Quantization, block_of, bytes_each, inputs_of, is_quantized
from jaxrlhf.plan.stored import leaves, local
from jaxrlhf.types import Head


class Weight(NamedTuple):
    """A matrix of a model as one device multiplies with it: gathered over fsdp, split over tensor. Of experts, all of
    a layer together, on a device that has all of them."""

    size: int  # elements that a token is multiplied with, of all layers
    inputs: int  # features that go in, of a device
    outputs: int
    layers: int  # that it stands in; 1: the head
    held: int  # elements that there are, of all layers
    experts: bool = False


@functools.cache
def matrices(cfg: ModelConfig, head: Head, tensor: int) -> tuple[Weight, ...]:
    """All that tokens are multiplied with, the head last."""
    found, table = [], leaves(parameter_table(cfg, head))
    for name, leaf in table.items():
        if not name.endswith("kernel"):
            continue
        sizes = local(leaf, tensor)
        layers, experts = sizes.pop("layers", 1), sizes.pop("expert", 0)
        chosen = cfg.experts_per_token if experts else 1
        inner = math.prod(sizes.values())
        axis = "embed_of_expert" if experts else "embed"
        embed = sizes.pop(axis)
        other = inner // embed
        rest = [name for name in leaf.axes if name not in ("layers", "expert")]
        ends = (embed, other) if rest[0] == axis else (other, embed)
        moved = [chosen * size for size in ends]
        held = inner * layers * max(experts, 1)
        found.append(Weight(inner * layers * chosen, moved[0], moved[1], layers, held, bool(experts)))
    if head == "lm" and cfg.tie_embeddings:
        rows = local(table["embed.tokens.embedding"], tensor)["vocab"]
        found.append(Weight(rows * cfg.hidden_size, cfg.hidden_size, rows, 1, rows * cfg.hidden_size))
    return tuple(found)


@functools.cache
def held(cfg: ModelConfig, head: Head, tensor: int, based: Based | None = None, expert: int = 1) -> int:
    """Elements of all weights on one device, gathered over fsdp; of a role with a base, of its own."""
    share = lambda leaf: expert if "expert" in leaf.axes else 1
    table = leaves(table_of(cfg, head, based)).values()
    return sum(math.prod(local(leaf, tensor).values()) // share(leaf) for leaf in table)


@functools.cache
def active(cfg: ModelConfig, head: Head) -> int:
    """Elements of the weights that compute one token: all but those of the experts that it does not choose."""
    table = leaves(parameter_table(cfg, head)).values()
    unused = lambda leaf: math.prod(leaf.shape) * (cfg.num_experts - cfg.experts_per_token) // cfg.num_experts
    return held(cfg, head, 1) - sum(unused(leaf) for leaf in table if "expert" in leaf.axes)


def looked_up(cfg: ModelConfig, tensor: int) -> int:
    """Elements of the embeddings that layers have of their own, on one device with all features."""
    return padded_vocab(cfg) // (1 if padded_vocab(cfg) % tensor else tensor) * cfg.per_layer_size * cfg.num_layers


@functools.cache
def packed(cfg: ModelConfig, head: Head, tensor: int, kind: Quantization | None) -> tuple[int, float]:
    """(elements of the weights that are quantised, their bytes), of those ``held`` by one device."""
    found = [
        (math.prod(local(leaf, tensor).values()), bytes_each(leaf, kind))
        for name, leaf in leaves(parameter_table(cfg, head)).items()
        if kind is not None and is_quantized(name.rpartition(".")[2], leaf)
    ]
    return sum(size for size, _ in found), sum(size * each for size, each in found)


def stored_packed(cfg: ModelConfig, tensor: int, fsdp: int, kind: Quantization) -> float:
    """Bytes of the quantised weights of a base as one device stores them: scales are whole where their number along
    the features that fsdp splits is no multiple of its devices."""
    total = 0.0
    for name, leaf in leaves(parameter_table(cfg, "lm")).items():
        if not is_quantized(name.rpartition(".")[2], leaf):
            continue
        size, codes = math.prod(local(leaf, tensor).values()), 1 if kind == "int8" else 0.5
        at, summed = leaf.axes.index("embed"), inputs_of(leaf)
        along = leaf.shape[at]  # how many scales there are along these features
        if at in summed and kind == "int8":
            along = 1
        elif at == summed[-1]:
            along //= block_of(along)
        total += size * (codes / fsdp + (bytes_each(leaf, kind) - codes) / (1 if along % fsdp else fsdp))
    return total


def saved(cfg: ModelConfig, head: Head, tensor: int, kind: Quantization | None, each: float) -> float:
    """Bytes that quantised weights take less, of those ``held`` by one device, than with ``each``."""
    size, small = packed(cfg, head, tensor, kind)
    return size * each - small


@functools.cache
def adapted(cfg: ModelConfig, lora: LoraConfig, tensor: int) -> tuple[int, int]:
    """(elements of the kernels that have an adapter, features that come out of them), of all layers, on one device with
    all of fsdp's."""
    layers, elements, outputs = parameter_table(cfg, "lm")["layers"], 0, 0
    for target in targets_of(cfg, lora):
        for stack in stacks_with(layers, target):
            leaf = layers[stack][target]["kernel"]
            count, *sizes = local(leaf, tensor).values()
            elements += count * math.prod(sizes)
            outputs += count * math.prod(sizes[inputs(leaf.axes[1:]) :])
    return elements, outputs


def table_of(cfg: ModelConfig, head: Head, based: Based | None) -> dict:
    """The Leafs that a role has of its own: all of a model, or what it has beside its base."""
    return parameter_table(cfg, head) if based is None else own_table(cfg, head, based.lora)
