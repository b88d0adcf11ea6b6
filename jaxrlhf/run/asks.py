"""What an algorithm asks of its networks, found out without them: networks that only take notes answer it zeros."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import Var

from jaxrlhf.config.roles import trunks_of
from jaxrlhf.run.build import Blueprint
from jaxrlhf.types import Batch, Nets, Prompts, Role, Sequences, TokenStats, TrainState

# "states": of a trunk alone; "head": numbers of states that another pass left
Kind = Literal["token_stats", "values", "scores", "states", "head", "sample"]


def blank_state(drawn: Blueprint) -> TrainState:
    """A state whose parameters are left out: the note takers don't read them."""
    zero = jnp.int32(0)
    roles: dict[Role, Any] = {role: {} for role in drawn.heads}
    return TrainState(zero, zero, roles, roles, {}, drawn.algorithm.controls(drawn.cfg.algorithm))


def note_taker(drawn: Blueprint, note: Callable[[Role, Kind, Any], None]) -> Nets:
    """Nets that answer zeros of the right shapes, and tell ``note`` what they were asked: role, kind, rows (Sequences;
    Prompts where they are to sample)."""
    trunks = trunks_of(drawn.cfg)

    def token_stats(role, trees, sequences: Sequences) -> TokenStats:
        note(role, "token_stats", sequences)
        return TokenStats(jnp.zeros(sequences.tokens.shape), jnp.zeros(sequences.tokens.shape))

    def values(role, trees, sequences: Sequences):
        if role in trunks:
            note(trunks[role], "states", sequences)
        note(role, "head" if role in trunks else "values", sequences)
        return jnp.zeros(sequences.tokens.shape)

    def policy_and_value(trees, sequences: Sequences):
        stats = token_stats("policy", trees, sequences)
        if "value" not in trunks:
            return stats, values("value", trees, sequences)
        note("value", "head", sequences)
        return stats, jnp.zeros(sequences.tokens.shape)

    def scores(role, trees, sequences: Sequences):
        note(role, "scores", sequences)
        return jnp.zeros(sequences.tokens.shape[:1])

    def sample(role, trees, prompts: Prompts, seed, step) -> Sequences:
        note(role, "sample", prompts)
        rows, columns = prompts.tokens.shape
        shape = (rows * drawn.sampler.samples_per_prompt, columns + drawn.sampler.max_new_tokens)
        return Sequences(
            tokens=jnp.zeros(shape, jnp.int32),
            valid=jnp.ones(shape, bool),
            response_mask=jnp.ones(shape, bool),
            logprobs=jnp.zeros(shape),
            ended=jnp.ones(shape[:1], bool),
            response_start=columns,
            copies=drawn.sampler.copies,
        )

    return Nets(token_stats, values, policy_and_value, scores, sample)


def asked_before_scores(drawn: Blueprint, state: TrainState, batch: Batch) -> bool:
    """Whether ``prepare`` asks anything of networks, and no score decides what: then they can be asked before the
    scores are known. ``batch``: with responses. What it asks inside a loop of its own can't be."""
    asked: list[Sequences] = []
    read_of = lambda rows: rows.replace(logprobs=None, scores=None, ended=None)  # as networks do
    nets = note_taker(drawn, lambda role, kind, rows: asked.append(read_of(rows)))
    bare = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    def ask(scores, state: TrainState, batch: Batch) -> list[Sequences]:
        scored = batch.replace(sequences=batch.sequences.replace(scores=scores))
        drawn.algorithm.prepare(nets, state, scored, drawn.cfg.algorithm)
        return asked

    scores = jax.ShapeDtypeStruct(batch.sequences.tokens.shape[:1], jnp.float32)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        closed = jax.make_jaxpr(ask)(scores, bare(state), bare(batch))
    return bool(asked) and is_made_without(closed, closed.jaxpr.invars[0])


def is_made_without(closed: Any, first: Var) -> bool:
    """Whether all that a ClosedJaxpr returns is made of its other variables than ``first``, and nothing of it inside a
    loop (which it then holds for a constant)."""
    jaxpr = closed.jaxpr
    constants = [var for var, value in zip(jaxpr.constvars, closed.consts) if not isinstance(value, Tracer)]
    others = {*jaxpr.invars, *constants} - {first}
    for eqn in jaxpr.eqns:
        if all(var in others for var in eqn.invars if isinstance(var, Var)):
            others.update(eqn.outvars)
    return all(var in others for var in jaxpr.outvars if isinstance(var, Var))
