"""Which passes of which networks an iteration makes: asked of the algorithm itself, with networks that only take notes.

So a plan knows no algorithm, and one from outside the package is planned like those of the table.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.run.build import Blueprint
from jaxrlhf.run.recorded_asks import Kind, blank_state, note_taker
from jaxrlhf.sharding import context_of
from jaxrlhf.step import make_rollout, split
from jaxrlhf.types import Batch, Head, Prompts, Role, Sequences


class PlannedPass(NamedTuple):
    """One pass of a network over rows, all devices together."""

    role: Role
    kind: Kind
    rows: int  # sample: prompts
    columns: int  # of a row; sample: of a prompt
    read: int  # columns that logits (values, scores, head: a number) are computed of; sample: tokens that are sampled
    copies: int = 1  # rows that have the same prompt; sample: responses a prompt
    prompt: int = 0  # columns of a row in front of its response, read once for all copies; 0: it is one text

    @property
    def tokens(self) -> float:
        """Columns that layers compute, sample: of the prompts. See transformer.forward_responses."""
        return self.rows / self.copies * self.prompt + self.rows * (self.columns - self.prompt)

    @property
    def pairs(self) -> float:
        """Products of a query and a key: a prompt's with itself, a response's with its prompt and itself."""
        return self.rows / self.copies * self.prompt**2 + self.rows * (self.columns - self.prompt) * self.columns


Models = Mapping[Role, tuple[ModelConfig, Head]]


def models_of(drawn: Blueprint) -> Models:
    """The shape and the head of every role."""
    return {role: (drawn.configs[role], head) for role, head in drawn.heads.items()}


class Passes(NamedTuple):
    """The passes of one iteration."""

    rollout: list[PlannedPass]
    prepare: list[PlannedPass]
    micro: list[PlannedPass]  # forward in the loss of one micro-batch; each trained role's is differentiated
    updates: int  # optimizer steps
    micros: int  # micro-batches of an update


def passes_of(drawn: Blueprint, batch: Batch) -> Passes:
    """The passes of an iteration that is given ``batch`` (shapes). No mesh may be set: nothing is laid out here."""
    notes: list[PlannedPass] = []
    nets = note_taker(drawn, lambda role, kind, rows: notes.append(shape_of_pass(drawn, role, kind, rows)))
    recipe = drawn.recipe._replace(nets=nets)
    bare = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    state, batch = jax.eval_shape(lambda: blank_state(drawn)), bare(batch)
    if drawn.algorithm.online:
        sequences = jax.eval_shape(make_rollout(recipe), state, batch)
        if drawn.cfg.rewards.on_host:
            scores = jax.ShapeDtypeStruct(sequences.ended.shape, jnp.float32)
            grades = dict.fromkeys(drawn.recipe.graders, scores) or None
            sequences = sequences.replace(scores=scores, grades=grades)
        batch = batch.replace(sequences=sequences)
    rollout, notes[:] = list(notes), []
    prepare = lambda state, batch: drawn.algorithm.prepare(nets, state, batch, drawn.cfg.algorithm)[0]
    experience = jax.eval_shape(prepare, state, batch)
    prepared, notes[:] = list(notes), []
    (epochs, minibatches, _), parts = drawn.resolved.updates, recipe.num_micro
    first = lambda rows, parts: jax.tree.map(lambda x: x[0], split(rows, parts))
    part = jax.eval_shape(lambda rows: first(first(rows, minibatches), parts), experience)
    loss = lambda state, part: drawn.algorithm.loss(nets, state.trees, part, drawn.cfg.algorithm)
    jax.eval_shape(loss, state, part)
    return Passes(rollout, prepared, list(notes), epochs * minibatches, parts)


def shape_of_pass(drawn: Blueprint, role: Role, kind: Kind, rows: Sequences | Prompts) -> PlannedPass:
    """The pass of a network that was asked for ``kind`` of ``rows``."""
    count, columns = rows.tokens.shape
    if isinstance(rows, Prompts):
        return PlannedPass(role, kind, count, columns, drawn.sampler.max_new_tokens, drawn.sampler.samples_per_prompt)
    start = rows.response_start
    read = columns - start + (kind == "scores")  # a score is read at the last token, which may be the prompt's
    if kind == "head":
        return PlannedPass(role, kind, count, 0, read)
    read = 0 if kind == "states" else read
    if context_of(drawn.mesh) > 1:  # of all columns, and a prompt's for each of its responses
        return PlannedPass(role, kind, count, columns, read and columns)
    if rows.segment_ids is not None or start == 1:
        return PlannedPass(role, kind, count, columns, read)
    return PlannedPass(role, kind, count, columns, read, rows.copies, start)
