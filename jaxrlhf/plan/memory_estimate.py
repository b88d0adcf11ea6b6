"""How much HBM a device needs, estimated without compiling: what a search tries hundreds of settings with.

The arguments (weights, moments) are exact. Of the temporaries it takes the largest of three: the rollout's (weights
laid out for decoding, the cache), those of scoring all rows at once, and an update's (gradients, what a micro-batch
keeps for the backward pass). The compiler knows better: a plan is what it says, and the search ends with it.
"""

import functools
import math
from typing import NamedTuple

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.layer_kinds import attending, layers_with
from jaxrlhf.models.lora import Based, base_table
from jaxrlhf.models.parameters import padded_vocab, parameter_table
from jaxrlhf.ops.logprobs import STORED_LOGITS
from jaxrlhf.plan.calls import Models, Passes, PlannedPass
from jaxrlhf.plan.cost import MASTER, Setup, cache_bytes, chosen_from, heads_here, keys_of_rows
from jaxrlhf.plan.expert_rows import expert_rows
from jaxrlhf.plan.mixing import query_features, stream_bytes
from jaxrlhf.plan.muon import newton_schulz_bytes
from jaxrlhf.plan.stored import leaves, local, stored_of
from jaxrlhf.plan.weights import adapted, held, matrices, packed, saved, stored_packed, table_of
from jaxrlhf.types import Head


class Memory(NamedTuple):
    """Bytes of one device."""

    arguments: float
    rollout: float  # temporaries, like the next two
    scoring: float
    update: float

    @property
    def peak(self) -> float:
        return self.arguments + max(self.rollout, self.scoring, self.update)


@functools.cache
def stored(cfg: ModelConfig, head: Head, fsdp: int, tensor: int, based: Based | None = None) -> int:
    """Elements of a role's own weights that one device stores: of a model, or of what it has beside its base."""
    return stored_of(table_of(cfg, head, based), fsdp, tensor)


@functools.cache
def outside(cfg: ModelConfig, head: Head, tensor: int) -> int:
    """Elements of the weights that stand in no layer, on one device, gathered over fsdp."""
    table = leaves(parameter_table(cfg, head)).values()
    return sum(math.prod(local(leaf, tensor).values()) for leaf in table if "layers" not in leaf.axes)


def estimate(passes: Passes, models: Models, setup: Setup) -> Memory:
    """The memory that the iteration of ``passes`` needs on one device."""
    shards = setup.fsdp, setup.tensor
    own = {role: stored(*model, *shards, setup.bases.get(role)) for role, model in models.items()}
    arguments = bases_bytes(models, setup)
    for role, count in own.items():
        arguments += count * ((MASTER if role in setup.bases else setup.stored(role)) + setup.moments.get(role, 0))
    rollout = max((rollout_of(one, models[one.role][0], setup) for one in passes.rollout), default=0.0)
    scoring = max((working(one, *models[one.role], setup) for one in passes.prepare), default=0.0)
    copies = 2 if passes.micros > 1 else 1
    gradients = copies * sum(own[role] for role in setup.moments) * MASTER
    saved = sum(kept(one, models[one.role][0], setup) for one in passes.micro if one.role in setup.moments)
    busy = max((working(one, *models[one.role], setup, True) for one in passes.micro), default=0.0)
    # matrices are orthogonalised after the backward pass
    tables = [table_of(*models[role], setup.bases.get(role)) for role in setup.newton_schulz]
    orthogonal = max((newton_schulz_bytes(table, setup.mesh) for table in tables), default=0.0)
    return Memory(arguments, rollout, scoring, gradients + max(saved + busy, orthogonal))


def bases_bytes(models: Models, setup: Setup) -> float:
    """Bytes of the frozen weights that roles share, each base once, on one device."""
    total = 0.0
    for base in {based.base for based in setup.bases.values()}:
        members = [role for role, based in setup.bases.items() if based.base == base and role in models]
        table = base_table(models[members[0]][0], {models[role][1] for role in members})
        size, small = stored_of(table, setup.fsdp, setup.tensor), 0.0
        if (kind := setup.quantization(members[0])) is not None:
            cfg = models[members[0]][0]
            size -= packed(cfg, "lm", setup.tensor, kind)[0] // setup.fsdp
            small = stored_packed(cfg, setup.tensor, setup.fsdp, kind)
        total += small + size * setup.params
    return total


def rollout_of(one: PlannedPass, cfg: ModelConfig, setup: Setup) -> float:
    """Weights in decoding's layout, the caches of the prompts and of their responses, the logits of one token; or the
    prompts being read."""
    setup = setup.decoding()
    weights = held(cfg, "lm", setup.tensor, None, setup.expert) * setup.decoded
    weights -= saved(cfg, "lm", setup.tensor, setup.decoded_as(one.role), setup.decoded)
    if "weights" in setup.int8:  # tokens are looked up in wide embeddings
        weights += padded_vocab(cfg) * cfg.hidden_size / setup.tensor * setup.compute
    logits = chosen_from(cfg, one, setup)
    return weights + cache_bytes(cfg, one, setup) + max(2 * logits, layer_activations(one, cfg, setup))


def working(one: PlannedPass, cfg: ModelConfig, head: Head, setup: Setup, backward: bool = False) -> float:
    """One pass: a layer's activations and weights, the embedding, the head's weights and logits; with their gradients
    where it is a ``backward`` one."""
    tensor = setup.tensor
    share = lambda weight: setup.expert if weight.experts else 1
    inside = matrices(cfg, head, tensor)[:-1]
    layer = sum(weight.held / share(weight) for weight in inside) / cfg.num_layers * setup.compute
    models = 2 if one.kind == "divergence" else 1  # whose logits a chunk has
    whole = models * one.rows * one.read * padded_vocab(cfg) / setup.shards / tensor
    chunk = min(STORED_LOGITS, whole) * 4 * 2
    weights = 2 * layer + outside(cfg, head, tensor) * setup.compute
    logits = chunk if head in ("lm", "action") else 0
    return layer_activations(one, cfg, setup, backward) + (2 if backward else 1) * (weights + logits)


def layer_activations(one: PlannedPass, cfg: ModelConfig, setup: Setup, backward: bool = False) -> float:
    """What is alive inside one layer: the residual stream, the mlp's width or the rows of experts, the products of
    queries and keys; where columns are split, the keys and values of all of them. ``backward``: their gradients too."""
    tokens, times = one.tokens / setup.shards, 2 if backward else 1
    dense = (weight for weight in matrices(cfg, "lm", setup.tensor)[:-1] if not weight.experts)
    wide = times * tokens * setup.compute * 2 * max(weight.inputs + weight.outputs for weight in dense)
    rows = expert_rows(one, cfg, setup)
    mixing = max(stored_products(one, cfg, setup), chunk_states(one, cfg, setup))
    mixing += keys_of_rows(cfg, one, setup) * (setup.context > 1)
    stream = tokens * setup.compute * 2 * cfg.hidden_size
    return times * (stream + mixing) + max(wide, rows.backward if backward else rows.forward)


def stored_products(one: PlannedPass, cfg: ModelConfig, setup: Setup) -> float:
    """One layer's products of queries and keys and their shares; none where a kernel keeps them on the chip."""
    heads, _ = heads_here(cfg, setup.tensor)
    return one.pairs / setup.shards * heads * (4 + setup.compute) * setup.stored_attention


def chunk_states(one: PlannedPass, cfg: ModelConfig, setup: Setup) -> float:
    """One linear layer's streams in float32, and its states before each chunk, which its backward pass needs."""
    return one.tokens / setup.shards * stream_bytes(cfg, setup.tensor) if layers_with(cfg, "delta") else 0.0


def kept(one: PlannedPass, cfg: ModelConfig, setup: Setup) -> float:
    """What a forward pass keeps for its backward pass, of all layers: activations, never a gathered weight."""
    tokens, rows = one.tokens / setup.shards, expert_rows(one, cfg, setup)
    dense = (weight for weight in matrices(cfg, "lm", setup.tensor)[:-1] if not weight.experts)
    wide = sum(weight.layers * weight.outputs for weight in dense)
    layers, mixed = cfg.num_layers, sum(attending(cfg).values())
    if setup.remat == "full":
        return tokens * cfg.hidden_size * layers * setup.compute
    if setup.remat == "dots":
        gathered = 0 if setup.stored_attention else query_features(cfg, setup.tensor)  # kept: see kernels.SAVED
        return tokens * (cfg.hidden_size * layers + wide + gathered) * setup.compute + layers * rows.kept_products
    based = setup.bases.get(one.role)
    if based is not None and based.lora is not None and based.lora.dora:  # outputs before they are scaled
        wide += adapted(cfg, based.lora, setup.tensor)[1] / 2
    every = tokens * (layers * (2 * 4 + 4 * setup.compute) * cfg.hidden_size + 2 * wide * setup.compute)
    mixing = stored_products(one, cfg, setup) * mixed + chunk_states(one, cfg, setup) * (layers - mixed)
    return every + mixing + layers * rows.kept_all
