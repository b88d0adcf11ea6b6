"""The arithmetic that an iteration cannot do without, counted on the tokens that it really has.

The rules: every valid token of a pass counts once, and a prompt that several rows of the pass begin with counts once
for all of them, in sampling, in scoring and in training; a multiplication and its addition are 2 FLOPs; a token attends
to itself and to what is before it (in a local layer, in its window; in a linear one three products with the state stand
for that); the head reads what is asked of it, logits and
values at response tokens, a score once a response; a trained role pays three times its forward pass an epoch, and
nothing is computed twice. Padding, recomputation, masked halves of attention and prompts read once a sample are what
programs do besides.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrlhf.models.config import ModelConfig, head_sizes
from jaxrlhf.models.layer_kinds import LayerKind, attending, layers_with
from jaxrlhf.plan.calls import models_of
from jaxrlhf.plan.cost import Setup, read_of
from jaxrlhf.plan.mixing import layer_token_bytes, state_bytes
from jaxrlhf.plan.weights import matrices
from jaxrlhf.run.build import Blueprint
from jaxrlhf.run.recorded_asks import Kind, blank_state, note_taker
from jaxrlhf.types import Batch, Head, Role, Sequences, given


class Document(NamedTuple):
    """One prompt with its response, wherever it stands."""

    prompt: bytes  # its tokens
    prompt_tokens: int
    response_tokens: int  # all behind the prompt
    read: int  # of them, those that count (response_mask)


class NetworkCall(NamedTuple):
    """One pass of a network over rows (NumPy) of the iteration."""

    role: Role
    kind: Kind
    rows: Sequences


class IterationWork(NamedTuple):
    """Of one iteration."""

    rollout: float  # FLOPs
    prepare: float
    update: float
    response_tokens: int
    sampled_share: float  # of the rows x steps of the sampler, those that sample a token of a response
    update_tokens: int  # valid tokens of the rows that the first trained role learns from, all epochs
    update_share: float  # of these rows' columns, those that hold a valid token
    distinct_share: float  # of these rows' columns, those that the rules above count

    @property
    def flops(self) -> float:
        return self.rollout + self.prepare + self.update


def documents(rows: Sequences) -> list[Document]:
    """What stands in the rows (NumPy). A prompt ends where the first token of ``response_mask`` is."""
    segments = rows.valid.astype(np.int32) if rows.segment_ids is None else rows.segment_ids
    found = []
    for tokens, mask, row in zip(rows.tokens, rows.response_mask, segments):
        for number in range(1, int(row.max(initial=0)) + 1):
            here = row == number
            inside, ids = mask[here], tokens[here]
            size = int(inside.argmax()) if inside.any() else len(ids)
            if len(ids):
                found.append(Document(ids[:size].tobytes(), size, len(ids) - size, int(inside.sum())))
    return found


def pairs(start: int, count: int, window: int = 0) -> int:
    """Products of a query and a key of ``count`` tokens behind ``start`` others; ``window``: tokens that each sees at
    most, itself included (0: all)."""
    seen = np.arange(start, start + count) + 1
    return int((np.minimum(seen, window) if window else seen).sum())


def products(cfg: ModelConfig, spans: list[tuple[int, int]], features: Callable[[LayerKind], float]) -> float:
    """``pairs`` of all spans (start, count), in all attention layers, each times the ``features`` of its kind."""
    window = lambda kind: cfg.sliding_window if kind.type == "local" else 0
    return sum(
        count * features(kind) * sum(pairs(*span, window(kind)) for span in spans)
        for kind, count in attending(cfg).items()
    )


def forward_flops(cfg: ModelConfig, head: Head, kind: Kind, found: Iterable[Document]) -> float:
    """FLOPs of one pass over the documents. ``kind`` "sample": what sampling them takes."""
    found = list(found)
    *inside, last = matrices(cfg, head, 1)
    if kind == "head":
        return 2.0 * last.size * sum(one.read for one in found)
    spans = [(0, size) for size in {one.prompt: one.prompt_tokens for one in found}.values()]
    spans += [(one.prompt_tokens, one.response_tokens) for one in found]
    tokens = sum(count for _, count in spans)
    read = {"scores": len(found), "states": 0}.get(kind, sum(one.read for one in found))
    multiplied = tokens * sum(weight.size for weight in inside) + read * last.size
    state = cfg.linear_value_heads * cfg.linear_key_dim * cfg.linear_value_dim
    return float(
        2 * multiplied
        + 4 * products(cfg, spans, lambda kind: cfg.num_heads * head_sizes(cfg, kind.type)[1])
        + 6 * tokens * state * len(layers_with(cfg, "delta"))
    )


def calls_of(drawn: Blueprint, batch: Batch) -> tuple[list[NetworkCall], list[NetworkCall]]:
    """The passes over whole rows that an iteration makes of ``batch`` (NumPy; as it leaves it, with the responses and
    their scores): (in prepare, in the loss of one epoch). Asked of the algorithm, as plan/calls.py does. No mesh may be
    set."""
    if batch.sequences is not None and not drawn.cfg.rewards.on_host:
        batch = batch.replace(sequences=batch.sequences.replace(scores=None))  # the reward model's
    asked: list[tuple[Role, Kind]] = []
    rows: list[Sequences] = []
    prepared: list[int] = []

    def note(role: Role, kind: Kind, sequences: Any) -> None:
        asked.append((role, kind))
        rows.append(sequences.replace(logprobs=None, scores=None, ended=None))

    nets = note_taker(drawn, note)

    def ask(batch: Batch) -> list[Sequences]:
        state, cfg = blank_state(drawn), drawn.cfg.algorithm
        experience, _ = drawn.algorithm.prepare(nets, state, batch, cfg)
        prepared.append(len(rows))
        drawn.algorithm.loss(nets, state.trees, experience, cfg)
        return rows

    seen = jax.device_get(jax.jit(ask)(batch))
    calls = [NetworkCall(role, kind, one) for (role, kind), one in zip(asked, seen, strict=True)]
    return calls[: prepared[0]], calls[prepared[0] :]


def count_work(drawn: Blueprint, batch: Batch) -> IterationWork:
    """The work of the iteration that made ``batch`` (NumPy), its sequences the sampled ones where it samples."""
    models, epochs = models_of(drawn), drawn.resolved.updates.epochs
    prepared, learned = calls_of(drawn, batch)
    flops = lambda call: forward_flops(*models[call.role], call.kind, documents(call.rows))
    share = lambda role: 3 if role in drawn.recipe.optimizers else 1
    rollout, tokens, row_steps = 0.0, 0, 0
    if drawn.algorithm.online:
        sequences = given(batch.sequences, "batch.sequences")
        mask = sequences.response_mask
        rollout = forward_flops(*models["policy"], "sample", documents(sequences))
        tokens, row_steps = int(mask.sum()), len(mask) * decode_steps(sequences)
    first = next(call.role for call in learned if call.role in drawn.recipe.optimizers)
    main = [call.rows for call in learned if call.role == first]
    columns, found = sum(rows.tokens.size for rows in main), [documents(rows) for rows in main]
    valid = sum(int(rows.valid.sum()) for rows in main)
    repeated = sum(repeats(each) for each in found)
    return IterationWork(
        rollout=rollout,
        prepare=sum(map(flops, prepared)),
        update=epochs * sum(share(call.role) * flops(call) for call in learned),
        response_tokens=tokens,
        sampled_share=tokens / row_steps if row_steps else 1.0,
        update_tokens=epochs * valid,
        update_share=valid / columns,
        distinct_share=(valid - repeated) / columns,
    )


def repeats(found: list[Document]) -> int:
    """Prompt tokens that are there once more than the rules count."""
    distinct = {one.prompt: one.prompt_tokens for one in found}
    return sum(one.prompt_tokens for one in found) - sum(distinct.values())


def decode_steps(sequences: Sequences) -> int:
    """Tokens that the sampler chose one after the other: those of the longest response."""
    return int(sequences.response_mask.sum(1).max())


def decode_bytes(drawn: Blueprint, sequences: Sequences) -> float:
    """Bytes that a step of the sampler reads, the mean over its steps: the policy's weights once, and the keys and
    values of the tokens before it, of the rows that have not ended, in the compute format or in int8; of these rows the
    states of linear layers too, which are written back."""
    cfg, asked = drawn.configs["policy"], drawn.cfg
    setup = Setup({}, np.dtype(asked.precision.compute).itemsize, int8=asked.generate.int8)
    found = [one for one in documents(sequences) if one.response_tokens]
    spans = [(one.prompt_tokens, one.response_tokens) for one in found]
    steps = decode_steps(sequences)
    rows = float(sequences.response_mask.sum()) / steps
    weights = sum(read_of(weight, cfg, rows, setup) for weight in matrices(cfg, "lm", 1))
    seen = products(cfg, spans, lambda kind: layer_token_bytes(cfg, 1, kind.type, setup.cached)) / steps
    states = (
        2 * state_bytes(cfg, 1) * len(layers_with(cfg, "delta")) * sum(one.response_tokens for one in found) / steps
    )
    return weights * setup.decoded + seen + states
