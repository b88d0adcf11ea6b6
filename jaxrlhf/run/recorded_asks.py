"""What an algorithm asks of its networks, found out without them: networks that only take notes answer it zeros."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import Var

from jaxrlhf.config.roles import trunks_of
from jaxrlhf.run.build import Blueprint
from jaxrlhf.types import (
    Ask,
    Batch,
    DivergenceStats,
    Nets,
    Prompts,
    QStats,
    Role,
    Sequences,
    TokenStats,
    TrainState,
    Trees,
    given,
)

# "states": of a trunk alone; "head": numbers of states that another pass left
Kind = Literal["token_stats", "values", "scores", "rewards", "q", "divergence", "states", "head", "sample"]


def blank_state(drawn: Blueprint) -> TrainState:
    """A state whose parameters are left out: the note takers don't read them."""
    zero = jnp.int32(0)
    roles: dict[Role, Any] = {role: {} for role in drawn.heads}
    return TrainState(zero, zero, roles, roles, {}, drawn.algorithm.controls(drawn.cfg.algorithm))


def note_taker(drawn: Blueprint, note: Callable[[Role, Kind, Any], None]) -> Nets:
    """Nets that answer zeros of the right shapes, and tell ``note`` what they were asked: role, kind, rows (Sequences;
    Prompts where they are to sample)."""
    trunks = trunks_of(drawn.cfg)

    def read(trees: Trees, sequences: Sequences, /, *asks: Ask) -> tuple[Any, ...]:
        whole = {ask.role for ask in asks if ask.role not in trunks}  # their passes leave the states of their trunks
        seen: set[Role] = set()
        each: list[tuple[Role, Kind]] = [(role, ask.what) for ask in asks for role in ask.roles]
        for role, what in each:
            trunk = trunks.get(role)
            if trunk is not None and trunk not in whole:
                note(trunk, "states", sequences)
                whole.add(trunk)
            note(role, what if trunk is None and role not in seen else "head", sequences)
            seen.add(role)
        return tuple(zeros_of(ask, sequences) for ask in asks)

    def sample(role: Role, trees: Trees, prompts: Prompts, seed, step, /) -> Sequences:
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

    return drawn.recipe.nets._replace(read=read, sample=sample)


def zeros_of(ask: Ask, sequences: Sequences) -> Any:
    """The answer to ``ask``, all zeros."""
    a_token, a_row = jnp.zeros(sequences.tokens.shape), jnp.zeros(sequences.tokens.shape[:1])
    zeros: dict[str, Any] = {"values": a_token, "scores": a_row, "rewards": a_token}
    zeros |= {"token_stats": TokenStats(a_token, a_token), "q": QStats(a_token, a_token, a_token)}
    zeros["divergence"] = DivergenceStats(a_token, a_token, a_token, a_token)
    return zeros[ask.what]


def asked_before_scores(drawn: Blueprint, state: TrainState, batch: Batch) -> bool:
    """Whether ``prepare`` asks anything of networks, and no score decides what: then they can be asked before the
    scores are known. ``batch``: with responses. What it asks inside a loop of its own can't be."""
    asked: list[Sequences] = []
    read_of = lambda rows: rows.replace(logprobs=None, scores=None, grades=None, ended=None)  # as networks do
    nets = note_taker(drawn, lambda role, kind, rows: asked.append(read_of(rows)))
    bare = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    def ask(scores, state: TrainState, batch: Batch) -> list[Sequences]:
        graded = {"scores": scores, "grades": dict.fromkeys(drawn.recipe.graders, scores) or None}
        scored = batch.replace(sequences=given(batch.sequences, "batch.sequences").replace(**graded))
        drawn.algorithm.prepare(nets, state, scored, drawn.cfg.algorithm)
        return asked

    rows = given(batch.sequences, "batch.sequences").tokens.shape[:1]
    scores = jax.ShapeDtypeStruct(rows, jnp.float32)
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
