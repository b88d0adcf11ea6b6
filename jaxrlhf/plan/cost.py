"""How long an iteration must take at least: matrix products, HBM traffic and network traffic of one device, counted.

Counted by ourselves, since XLA's cost analysis counts the body of a loop once. The rules, for one device:

- a matrix product of T tokens with a weight of n elements is 2 T n FLOPs; backward is twice forward
- a prompt is computed once for all its samples. Attention is counted in full, causal or not: all S x S products of a
  text, P x P of a prompt and T x (P + T) of each response behind it. Splash skips up to half of that, and XLA none
- a token is multiplied with the experts that it chooses, evenly spread; decoding reads those that its tokens choose.
  Where experts are split, tokens are gathered over the axis and their results summed and scattered back
- a linear layer counts what its chunks multiply, and its state, read and written, for each token that is sampled
- rows are split over all but tensor and context, columns over context; heads, mlp and vocabulary over tensor, where it
  divides them; while responses are sampled decode goes with tensor, and rows are split over context
- where columns are split, a device gathers the keys and values of all columns, forward and again backward, and scatters
  their gradients
- a pass whose adapter has magnitudes multiplies the stored weights with A, and squares them
- a pass reads the stored weights, writes and reads them gathered over fsdp, and writes and reads what goes in and out
  of every product once; what one fusion could keep is not counted, but for softmax
- a gather over n devices brings (n - 1) / n of the result, a sum twice that
- gradients are summed within a slice first; what then goes between slices is a phase of its own, after the backward
  pass, though a part of it may run beside it

Every response is taken to be generate.max_new_tokens long: what stops early is faster. A phase takes as long as the
slowest of the three would take alone at its peak, and phases follow each other: a bound, which nothing reaches.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from jaxrlhf.models.config import ModelConfig, head_sizes
from jaxrlhf.models.int8 import Part
from jaxrlhf.models.layer_kinds import attending, layers_with
from jaxrlhf.models.lora import Based
from jaxrlhf.models.parameters import padded_vocab
from jaxrlhf.models.quantized import Quantization
from jaxrlhf.plan.calls import Models, Passes, PlannedPass
from jaxrlhf.plan.mixing import heads_here, kept_bytes, query_features, rule_of_token, state_bytes, token_bytes
from jaxrlhf.plan.muon import newton_schulz_work
from jaxrlhf.plan.roofline import DeviceWork, Phase
from jaxrlhf.plan.weights import Weight, adapted, held, looked_up, matrices, packed, saved, table_of
from jaxrlhf.types import Head, Role

BYTES = {"float32": 4, "bfloat16": 2}
MASTER = BYTES["float32"]  # a weight that learns, its gradient and Adam's second moment
STORED = 12  # bytes moved for each product of a query and a key: f32 written and read, its share bf16 written and read


class Setup(NamedTuple):
    """What the counts depend on, besides the models."""

    mesh: Mapping[str, int]  # devices along the axes of sharding.AXES
    compute: int = 2  # bytes of an activation
    params: int = 4  # bytes of a stored weight of a role that does not learn; of others: float32
    # bytes of a weight's moments, of the roles that learn; under Muon the mean over matrices, with one, and the rest
    moments: Mapping[Role, float] = MappingProxyType({})
    newton_schulz: Mapping[Role, int] = MappingProxyType({})  # steps, of the roles whose matrices learn by Muon
    remat: Literal["none", "full", "dots"] = "none"
    stored_attention: bool = True  # products of queries and keys go through HBM (models/attention.attention)
    int8: tuple[Part, ...] = ()  # what decoding reads as 8 bits
    sums: bool = False  # see sharding.sums_whole
    square: bool = False  # gradients are summed whole: see sharding.whole_square
    bases: Mapping[Role, Based] = MappingProxyType({})  # the roles that share frozen weights
    laid: bool = False  # weights are laid out for decoding: whole, but for tensor and experts
    merged: bool = True  # decoding reads adapters merged into their base; False: beside a quantised one

    @property
    def sent(self) -> int:
        """Bytes that are sent to gather or scatter one."""
        return 2 if self.sums else 1

    def stored(self, role: Role) -> int:
        """Bytes of a stored weight of ``role``; of its base, where it has one."""
        return MASTER if role in self.moments and role not in self.bases else self.params

    def quantization(self, role: Role) -> Quantization | None:
        """How the weights that ``role`` is computed from are quantised."""
        return self.bases[role].quantization if role in self.bases else None

    def decoded_as(self, role: Role) -> Quantization | None:
        """How the layers of ``role`` are quantised that decoding reads; None: they are ``decoded``."""
        return None if self.merged else self.quantization(role)

    @property
    def decoded(self) -> int:
        """Bytes of a weight as decoding reads it."""
        return 1 if "weights" in self.int8 else self.compute

    def cached(self, head_dim: int) -> float:
        """Bytes of a number of the cache; in int8 with the scale that ``head_dim`` of them share."""
        return 1 + 4 / head_dim if "cache" in self.int8 else self.compute

    @property
    def tensor(self) -> int:
        return self.mesh["tensor"]

    @property
    def fsdp(self) -> int:
        """Devices that share a copy of the weights as it is stored."""
        return self.mesh["fsdp"] * self.mesh.get("decode", 1) * self.expert * self.context

    @property
    def expert(self) -> int:
        """Devices that the experts are split over."""
        return self.mesh.get("expert", 1)

    @property
    def context(self) -> int:
        """Devices that share the columns of a row; 1 while responses are sampled."""
        return self.mesh.get("context", 1)

    @property
    def copies(self) -> int:
        return self.mesh["data"] * self.mesh.get("slice", 1)

    @property
    def shards(self) -> int:
        return self.copies * self.fsdp

    def decoding(self) -> "Setup":
        """While responses are sampled: decode groups act as tensor does, and no weight is split over fsdp."""
        group = self.mesh.get("decode", 1)
        mesh = {"data": self.shards // group // self.expert, "fsdp": 1, "tensor": self.tensor * group}
        return self._replace(mesh=mesh | {"expert": self.expert}, params=self.decoded, laid=True)


# ---- weights --------------------------------------------------------------------------------------------------------


def used_and_stored(cfg: ModelConfig, head: Head, setup: Setup, based: Based | None = None) -> tuple[float, float]:
    """(elements of all weights that a device computes with, those that it stores)."""
    used = held(cfg, head, setup.tensor, based, setup.expert)
    if setup.laid:
        return used, used
    kept = 0 if based is not None else looked_up(cfg, setup.tensor) * (1 - 1 / setup.fsdp)  # they are not gathered
    return used - kept, held(cfg, head, setup.tensor, based) / setup.fsdp


def exchanged(cfg: ModelConfig, tokens: float, setup: Setup) -> float:
    """Bytes of what these embeddings say of ``tokens``, that a device receives in one pass: per_layer.look_up."""
    share = 0 if setup.laid else setup.fsdp - 1  # each part of the table says something of every token
    summed = 2 * (setup.tensor - 1) / setup.tensor
    return tokens * cfg.per_layer_size * cfg.num_layers * setup.compute * (share + summed)


# ---- passes ---------------------------------------------------------------------------------------------------------


def forward(cfg: ModelConfig, head: Head, one: PlannedPass, setup: Setup) -> DeviceWork:
    """One forward pass, whose head reads ``one.read`` columns of each row."""
    return layers_forward(cfg, head, one, setup).plus(head_product(cfg, head, one, setup))


def head_product(cfg: ModelConfig, head: Head, one: PlannedPass, setup: Setup) -> DeviceWork:
    """The head's product with ``one.read`` columns of each row."""
    tokens = one.rows / setup.shards * one.read
    last = matrices(cfg, head, setup.tensor)[-1]
    return DeviceWork(2 * tokens * last.size, tokens * (last.inputs * setup.compute + 2 * 4 * last.outputs))


def layers_forward(cfg: ModelConfig, head: Head, one: PlannedPass, setup: Setup) -> DeviceWork:
    """``forward`` without the head's product; its weights are gathered here with the others."""
    tokens = one.tokens / setup.shards
    inside = matrices(cfg, head, setup.tensor)[:-1]
    products = attention(cfg, one, setup).plus(delta_rule(cfg, one, setup))
    moved = (
        sum(weight.layers * (weight.inputs + weight.outputs) for weight in inside)
        + 6 * cfg.num_layers * cfg.hidden_size
    )
    size, stored = used_and_stored(cfg, head, setup)
    kind = setup.decoded_as(one.role) if setup.laid else setup.quantization(one.role)
    tensor, sent = setup.tensor, setup.sent * (size - stored) / size
    less, wide = functools.partial(saved, cfg, head, tensor, kind), packed(cfg, head, tensor, kind)[0]  # widened in use
    gathered = 2 * (size * setup.compute - less(setup.compute)) if stored < size else 0
    read = stored * setup.stored(one.role) - less(setup.stored(one.role)) * stored / size + 2 * wide * setup.compute
    return DeviceWork(
        flops=2 * tokens * sum(weight.size for weight in inside) + products.flops,
        hbm=tokens * moved * setup.compute + products.hbm + read + gathered,
        ici=setup.sent * (size - stored) * setup.compute
        - sent * less(setup.compute)
        + tensor_sums(cfg, tokens, setup)
        + exchanged(cfg, tokens, setup),
    ).plus(keys_gathered(cfg, one, setup))


def magnitudes(cfg: ModelConfig, role: Role, setup: Setup) -> DeviceWork:
    """The norms of W and of W + A B of all maps whose outputs have magnitudes (models/dora.py), once a pass: a device
    reads its part of W twice, which is float32 in between where it is quantised. The sums over devices, of a number for
    each output and row of B, are left out."""
    based = setup.bases.get(role)
    if based is None or based.lora is None or not based.lora.dora:
        return DeviceWork()
    size = adapted(cfg, based.lora, setup.tensor)[0] / setup.fsdp
    each = 2 * setup.stored(role)
    if based.quantization is not None:
        wide, small = packed(cfg, "lm", setup.tensor, based.quantization)
        each = small / wide + 3 * MASTER  # written, and read twice
    return DeviceWork(2 * size * (based.lora.rank + 1), size * each)


def attention(cfg: ModelConfig, one: PlannedPass, setup: Setup) -> DeviceWork:
    """The products of queries and keys of all attention layers, and of their softmax and values."""
    pairs = one.pairs / setup.shards
    stored = pairs * heads_here(cfg, setup.tensor)[0] * sum(attending(cfg).values()) * STORED * setup.stored_attention
    return DeviceWork(4 * pairs * query_features(cfg, setup.tensor), stored)


def keys_of_rows(cfg: ModelConfig, one: PlannedPass, setup: Setup) -> float:
    """Bytes of one layer's keys and values of all columns of a device's rows; of the layer that has the most."""
    each = max(heads_here(cfg, setup.tensor, kind.type)[1] * head_sizes(cfg, kind.type)[1] for kind in attending(cfg))
    return one.tokens / setup.shards * setup.context * 2 * each * setup.compute


def keys_gathered(cfg: ModelConfig, one: PlannedPass, setup: Setup) -> DeviceWork:
    """Keys and values of all attention layers brought from the devices that have the other columns; as much is sent to
    scatter their gradients."""
    if setup.context == 1:
        return DeviceWork()
    each = token_bytes(cfg, setup.tensor, lambda dim: setup.compute, again=True)
    size = one.tokens / setup.shards * setup.context * each
    return DeviceWork(0, 2 * size, size * (setup.context - 1) / setup.context)


def delta_rule(cfg: ModelConfig, one: PlannedPass, setup: Setup) -> DeviceWork:
    """The gated delta rule of all linear layers."""
    count = one.tokens / setup.shards * len(layers_with(cfg, "delta"))
    return DeviceWork(*rule_of_token(cfg, setup.tensor)).times(count)


def tensor_sums(cfg: ModelConfig, tokens: float, setup: Setup) -> float:
    """Bytes for the sums behind attention and mlp of each layer, and an mlp beside experts, where tensor splits them;
    where experts are split also for the tokens of the devices that share them, and the results."""
    tensor, others = setup.tensor, setup.expert - 1 if cfg.num_experts else 0
    state = cfg.num_layers * tokens * cfg.hidden_size * setup.compute
    # the sum behind the experts is of all tokens that were gathered
    both = bool(cfg.shared_expert_size or cfg.expert_size)
    return state * ((2 + both + others) * 2 * (tensor - 1) / tensor + 2 * others)


def backward(cfg: ModelConfig, head: Head, one: PlannedPass, setup: Setup) -> DeviceWork:
    """The backward pass of ``forward``: twice its products, and gradients scattered; of a frozen weight neither its
    gradient's product nor a gradient. It reads weights as ``recomputed`` gathered them."""
    once, based = forward(cfg, head, one, setup), setup.bases.get(one.role)
    data = setup.mesh["data"]
    size, stored = (elements * setup.compute for elements in used_and_stored(cfg, head, setup, based))
    scattered = max(setup.sent, 1 + setup.square) * (size - stored) + 2 * stored * (data - 1) / data
    sums, frozen = tensor_sums(cfg, one.tokens / setup.shards, setup), 0.0
    if based is not None:
        *inside, last = matrices(cfg, head, setup.tensor)
        frozen = 2 * one.tokens / setup.shards * sum(weight.size for weight in inside)
        frozen += 2 * one.rows / setup.shards * one.read * last.size * (head == "lm")
    sums += keys_gathered(cfg, one, setup).ici + exchanged(cfg, one.tokens / setup.shards, setup)
    return DeviceWork(2 * once.flops - frozen, 2 * once.hbm + 2 * size, scattered + sums)


def between_slices(cfg: ModelConfig, head: Head, one: PlannedPass, setup: Setup) -> DeviceWork:
    """The gradients of ``backward``, summed within each slice, summed over the slices: each device has its part."""
    slices = setup.mesh.get("slice", 1)
    stored = used_and_stored(cfg, head, setup, setup.bases.get(one.role))[1]
    part = stored * setup.compute / setup.mesh["data"]
    return DeviceWork(dcn=2 * part * (slices - 1) / slices)


def recomputed(cfg: ModelConfig, head: Head, one: PlannedPass, setup: Setup) -> DeviceWork:
    """What the backward pass does again: the head's logits where they are chunked, and the gathering of weights; under
    remat full all layers, under dots attention's products."""
    again = head_product(cfg, head, one, setup) if head in ("lm", "action") else DeviceWork()
    if setup.remat == "full":
        return again.plus(layers_forward(cfg, head, one, setup))
    size, stored = (elements * setup.compute for elements in used_and_stored(cfg, head, setup))
    share = 1 - saved(cfg, head, setup.tensor, setup.quantization(one.role), setup.compute) / size
    work = DeviceWork(0, 2 * size if stored < size else 0, setup.sent * (size - stored))
    again = again.plus(work.times(share)).plus(keys_gathered(cfg, one, setup))
    again = again.plus(delta_rule(cfg, one, setup))  # chunks are always computed again
    return again if setup.remat == "none" else again.plus(attention(cfg, one, setup))


def optimizer(cfg: ModelConfig, head: Head, moments: float, setup: Setup, based: Based | None = None) -> DeviceWork:
    """One step of Adam or Muon: the weights that a device stores, their gradient and moments, read and written."""
    stored = used_and_stored(cfg, head, setup, based)[1]
    return DeviceWork(hbm=stored * 2 * (2 * MASTER + moments))


def gather_for_decoding(cfg: ModelConfig, setup: Setup) -> DeviceWork:
    """decoding.decode_layout: every weight of the policy, cast and gathered over what is left of fsdp, once a
    rollout, after decode groups traded parts of it."""
    tensor, group, kind = setup.decoding().tensor, setup.mesh.get("decode", 1), setup.quantization("policy")
    size = held(cfg, "lm", tensor, None, setup.expert)
    stored = held(cfg, "lm", tensor) / setup.mesh["fsdp"] / setup.expert / setup.context
    received = setup.sent * (size - stored) + stored * (group - 1) / group
    each = setup.decoded - saved(cfg, "lm", tensor, setup.decoded_as("policy"), setup.decoded) / size
    kept = setup.stored("policy") - saved(cfg, "lm", tensor, kind, setup.stored("policy")) / size
    return DeviceWork(0, stored * kept + 2 * size * each, received * each)


def prefill(cfg: ModelConfig, one: PlannedPass, setup: Setup) -> DeviceWork:
    """The prompts to sample from, read with weights that are gathered already."""
    return layers_forward(cfg, "lm", one, setup.decoding())


def decode_step(cfg: ModelConfig, one: PlannedPass, setup: Setup) -> DeviceWork:
    """One token of each response: all weights and caches are read, a prompt's once for all its responses."""
    setup = setup.decoding()
    tensor, prompts = setup.tensor, one.rows / setup.shards
    tokens = prompts * one.copies
    weights = sum(weight.size for weight in matrices(cfg, "lm", tensor))
    read = sum(read_of(weight, cfg, tokens, setup) for weight in matrices(cfg, "lm", tensor)) * setup.decoded
    if (kind := setup.decoded_as(one.role)) is not None:  # widened before they are multiplied
        read += 2 * packed(cfg, "lm", tensor, kind)[0] * setup.compute - saved(cfg, "lm", tensor, kind, setup.decoded)
    pairs = tokens * (one.columns + one.read)
    states = tokens * state_bytes(cfg, tensor) * len(layers_with(cfg, "delta"))  # written; read with the caches
    logits = chosen_from(cfg, one, setup)
    return DeviceWork(
        flops=2 * tokens * weights + 4 * pairs * query_features(cfg, tensor) + 6 * states / MASTER,
        hbm=read + cache_bytes(cfg, one, setup, again=True) + states + 3 * logits,
        ici=tensor_sums(cfg, tokens, setup) + logits * (tensor - 1) / tensor,
    )


def read_of(weight: Weight, cfg: ModelConfig, tokens: float, setup: Setup) -> float:
    """Elements that a device reads for one token of each of ``tokens`` rows: of experts its part of those that some row
    of the devices that share them chooses."""
    if not weight.experts:
        return weight.held
    missed = (1 - cfg.experts_per_token / cfg.num_experts) ** (tokens * setup.expert)
    return weight.held / setup.expert * (1 - missed)


def chosen_from(cfg: ModelConfig, one: PlannedPass, setup: Setup) -> float:
    """Bytes of the logits that a device chooses tokens from: whole rows, which it shares with those that have the rest
    of the vocabulary where they divide (generate.loop.choose_tokens); ``setup`` is decoding's."""
    rows, spread = one.rows * one.copies, setup.shards * setup.tensor
    return rows / (setup.shards if rows % spread else spread) * padded_vocab(cfg) * 4


def cache_bytes(cfg: ModelConfig, one: PlannedPass, setup: Setup, again: bool = False) -> float:
    """The keys, values and states that a device holds while it samples, or with ``again`` reads for one token of each
    row; ``setup`` is decoding's."""
    columns = one.rows / setup.shards * (one.columns + one.copies * one.read)
    kept = one.rows / setup.shards * one.copies * kept_bytes(cfg, setup.tensor, setup.compute)
    keys = columns * token_bytes(cfg, setup.tensor, setup.cached, again)
    return keys + kept * len(layers_with(cfg, "delta"))


# ---- an iteration ---------------------------------------------------------------------------------------------------


def phases(passes: Passes, models: Models, setup: Setup) -> list[Phase]:
    """The phases of an iteration, in order; the roles of ``setup.moments`` learn."""
    found: list[Phase] = []
    add = lambda name, work, useful=None: found.append(Phase(name, work, work.flops if useful is None else useful))
    for one in passes.rollout:
        cfg, _ = models[one.role]
        add("gather weights for decoding", gather_for_decoding(cfg, setup).plus(magnitudes(cfg, one.role, setup)))
        add("prefill", prefill(cfg, one, setup))
        add(f"decode {one.read} tokens", decode_step(cfg, one, setup).times(one.read))
    for one in passes.prepare:
        norms = magnitudes(models[one.role][0], one.role, setup)
        add(f"{NAMES[one.kind]} {one.role}", forward(*models[one.role], one, setup).plus(norms))
    count = passes.updates * passes.micros
    for one in passes.micro:
        part, norms = (*models[one.role], one, setup), magnitudes(models[one.role][0], one.role, setup)
        add(f"update {one.role}: forward", forward(*part).plus(norms).times(count))
        if one.role in setup.moments:
            add(f"update {one.role}: recomputed", recomputed(*part).times(count), 0.0)
            add(f"update {one.role}: backward", backward(*part).times(count))
            add(f"update {one.role}: between slices", between_slices(*part).times(count))
        elif one.kind == "divergence":  # a chunk's logits are of both models, also when they are computed again
            add(f"update {one.role}: recomputed", head_product(*part).times(count), 0.0)
    for role, moments in setup.moments.items():
        step = optimizer(*models[role], moments, setup, setup.bases.get(role))
        muon = role in setup.newton_schulz
        add(f"update {role}: {'weights' if muon else 'Adam'}", step.times(passes.updates))
        if muon:
            table = table_of(*models[role], setup.bases.get(role))
            own = newton_schulz_work(table, setup.newton_schulz[role], setup.mesh, setup.fsdp, setup.tensor)
            add(f"update {role}: Newton-Schulz", DeviceWork(*own).times(passes.updates))
    return [phase for phase in found if any(phase.work)]


NAMES = {
    "token_stats": "log-probs of",
    "divergence": "distributions of",
    "values": "values of",
    "scores": "scores of",
    "states": "states of",
    "head": "values of",
}
