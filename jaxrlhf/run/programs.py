"""From functions of (state, batch) to the compiled programs of an iteration: jit on a mesh, or a literal pmap.

Arguments may be arrays or shapes with layouts (jax.ShapeDtypeStruct), so that what trains and what plans compile alike.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrlhf.config.batch import rows_of
from jaxrlhf.data.batch_kinds import PROMPTS
from jaxrlhf.hosts.compiler_flags import program_options
from jaxrlhf.models.experts import has_experts
from jaxrlhf.precomputed_answers import Answered
from jaxrlhf.run.batch_shapes import (
    acting_shapes,
    context_shapes,
    context_widths,
    conversation_shapes,
    episode_shapes,
)
from jaxrlhf.run.build import Blueprint
from jaxrlhf.run.pool import Pool, make_fill
from jaxrlhf.run.recorded_asks import asked_before_scores
from jaxrlhf.sharding import DEVICES, is_pmap, row_layout
from jaxrlhf.step import make_act, make_extend, make_iteration, make_learn, make_read, make_rollout
from jaxrlhf.types import Acting, Batch, Prompts, Sequences, TrainState, given

Given = Batch | Answered | Acting | Prompts | tuple[Pool | None, Batch]  # what programs are given beside the state


class Program(NamedTuple):
    """A compiled function of (state, batch); of (state, answers.Answered) where networks were read before."""

    run: Callable[[TrainState, Any], Any]
    out: Any  # what it returns, as ShapeDtypeStructs laid out as there
    compiled: jax.stages.Compiled  # what XLA made of it


def compile_programs(drawn: Blueprint, state: TrainState, batch: Batch) -> dict[str, Program]:
    """What an iteration runs, by name, in order: "iteration"; or "rollout", "read" where networks can be read while
    the host scores the responses (rewards.overlap), and "learn"; or "act" and "learn" around an environment; or
    "rollout", "turn N" for each width N of what came before a later turn, and "learn" around one of text; or, with
    batch.max_rollouts, "rollout", "begin" and "fill", which gather groups, and "learn"."""
    if drawn.cfg.acts and drawn.recipe.algorithm.online:
        return compile_acting(drawn, state, batch)
    if drawn.cfg.converses and drawn.recipe.algorithm.online:
        return compile_turns(drawn, state, batch)
    if drawn.cfg.batch.max_rollouts > 1:
        return compile_resampled(drawn, state, batch)
    if not drawn.cfg.rewards.on_host or not drawn.recipe.algorithm.online:
        return {"iteration": compile_whole(drawn, state, batch)}
    return compile_parts(drawn, state, batch)


def compile_whole(drawn: Blueprint, state: TrainState, batch: Batch) -> Program:
    """The iteration as one program that the state is donated to: (state, metrics, responses or None)."""
    iteration = make_iteration(drawn.recipe)
    return compile_program(iteration, drawn.mesh, state, batch, rows=(False, False, True), donate=True)


def compile_parts(drawn: Blueprint, state: TrainState, batch: Batch) -> dict[str, Program]:
    """The programs around the host's scores: the last is given the first's responses, scores f32[B] laid out as their
    rows, and the answers of the one between them.

    The state is donated to the last only: the others leave it whole, should a reward function raise."""
    rollout = compile_program(make_rollout(drawn.recipe), drawn.mesh, state, batch, rows=True, donate=False)
    found, batch = {"rollout": rollout}, batch.replace(sequences=rollout.out)
    if overlaps(drawn) and asked_before_scores(drawn, state, batch):
        found["read"] = compile_program(make_read(drawn.recipe), drawn.mesh, state, batch, rows=True, donate=False)
    batch = batch.replace(sequences=scored_shapes(drawn, rollout.out))
    rows = Answered(batch, found["read"].out) if "read" in found else batch
    learn = compile_program(make_learn(drawn.recipe), drawn.mesh, state, rows, rows=(False, False), donate=True)
    return found | {"learn": learn}


def scored_shapes(drawn: Blueprint, sequences: Sequences) -> Sequences:
    """Sampled ``sequences``, as shapes with layouts, with what the host's graders give."""
    scores = jax.ShapeDtypeStruct(
        given(sequences.ended, "ended").shape, jnp.float32, sharding=row_layout(drawn.mesh, 1)
    )
    return sequences.replace(scores=scores, grades=dict.fromkeys(drawn.recipe.graders, scores) or None)


def compile_resampled(drawn: Blueprint, state: TrainState, batch: Batch) -> dict[str, Program]:
    """The programs of an iteration that gathers its groups from several rollouts: run/pool.py."""
    mesh, fill = drawn.mesh, make_fill(drawn.recipe)
    rollout = compile_program(make_rollout(drawn.recipe), mesh, state, batch, rows=True, donate=False)
    sequences = scored_shapes(drawn, rollout.out) if drawn.cfg.rewards.on_host else rollout.out
    batch = batch.replace(sequences=sequences)
    begin = compile_program(fill, mesh, state, (None, batch), rows=None, donate=False)
    pool: Pool = begin.out[0]
    more = compile_program(fill, mesh, state, (pool, batch), rows=None, donate=False)
    learned = batch.replace(prompts=pool.prompts, sequences=pool.sequences)
    learn = compile_program(make_learn(drawn.recipe), mesh, state, learned, rows=(False, False), donate=True)
    return {"rollout": rollout, "begin": begin, "fill": more, "learn": learn}


def compile_acting(drawn: Blueprint, state: TrainState, batch: Batch) -> dict[str, Program]:
    """The programs around an environment: "act" is run once a step of it, "learn" once its episodes are whole."""
    episodes = rows_of(drawn.resolved)[PROMPTS.field]
    batch = batch.replace(sequences=episode_shapes(drawn, episodes))
    learn = compile_program(make_learn(drawn.recipe), drawn.mesh, state, batch, rows=(False, False), donate=True)
    return {"act": compile_act(drawn, state, episodes), "learn": learn}


def compile_turns(drawn: Blueprint, state: TrainState, batch: Batch) -> dict[str, Program]:
    """The programs around an environment of text: "rollout" samples first responses, "turn N" the later ones, "learn"
    is given whole rows."""
    prompts = given(batch.prompts, "batch.prompts")
    rollout = compile_program(make_rollout(drawn.recipe), drawn.mesh, state, batch, rows=True, donate=False)
    found = {"rollout": rollout}
    for width in context_widths(drawn, prompts.tokens.shape[1]):
        context = context_shapes(drawn, len(rollout.out.tokens), width)
        extend = make_extend(drawn.recipe)
        found[turn_name(width)] = compile_program(extend, drawn.mesh, state, context, rows=True, donate=False)
    batch = batch.replace(sequences=conversation_shapes(drawn, prompts))
    learn = compile_program(make_learn(drawn.recipe), drawn.mesh, state, batch, rows=(False, False), donate=True)
    return found | {"learn": learn}


def turn_name(width: int) -> str:
    """What the program of later turns is called that reads so many columns before them."""
    return f"turn {width}"


def compile_act(drawn: Blueprint, state: TrainState, episodes: int) -> Program:
    """What chooses the policy's next action in so many episodes, which leaves the state whole."""
    acting = acting_shapes(drawn, episodes)
    return compile_program(make_act(drawn.recipe), drawn.mesh, state, acting, rows=True, donate=False)


def overlaps(drawn: Blueprint) -> bool:
    """Whether networks are to be read while the host scores. Where the run does not say: not on CPUs, whose cores the
    function shares (with one that takes no time, iterations took 1.04 of the time)."""
    asked = drawn.cfg.rewards.overlap
    return drawn.mesh.devices.flat[0].platform != "cpu" if asked is None else asked


def compile_program(
    function: Callable[[TrainState, Any], Any],
    mesh: Mesh,
    state: TrainState,
    batch: Given,
    rows: Any,
    donate: bool,
) -> Program:
    """``function`` compiled for these arguments, the state donated if so asked.

    ``rows``: a prefix of what it returns, True where that has a row for each row of the batch; the rest is the same on
    every device. The mesh of ``make_mesh`` says which way to go."""
    donated = (0,) if donate else ()
    if is_pmap(mesh):
        assert not isinstance(batch, tuple), "groups of several rollouts are gathered on a mesh"
        return map_program(function, mesh, state, batch, rows, donated)
    lowered = jax.jit(function, donate_argnums=donated).lower(state, batch)
    compiled = lowered.compile(options_of(mesh, state))
    described = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return Program(compiled, jax.tree.map(described, lowered.out_info, compiled.output_shardings), compiled)


def options_of(mesh: Mesh, state: TrainState) -> dict[str, str | bool] | None:
    """Compiler options of the programs that are given ``state``."""
    return program_options(mesh.devices.flat[0].device_kind, has_experts(state))


def map_program(
    function,
    mesh: Mesh,
    state: TrainState,
    batch: Given,
    rows: Any,
    donated: tuple[int, ...],
) -> Program:
    """compile_program by jax.pmap: the state is whole on every device, which sees its own part of the rows."""
    out_axes = jax.tree.map(lambda is_rows: 0 if is_rows else None, rows)
    options: dict[str, Any] = {"devices": mesh.devices.flatten().tolist(), "donate_argnums": donated}
    program = jax.pmap(function, DEVICES, in_axes=(None, 0), out_axes=out_axes, **options)
    lowered = program.lower(state, split_rows(batch, mesh.size))
    compiled = lowered.compile(options_of(mesh, state))

    def run(state: TrainState, batch: Given):
        return join_rows(compiled(state, split_rows(batch, mesh.size)), rows)

    return Program(run, join_rows(lowered.out_info, rows), compiled)


def split_rows(batch: Given, parts: int) -> Given:
    """[B, ...] -> [parts, B / parts, ...], of arrays or of ShapeDtypeStructs."""
    return jax.tree.map(lambda x: reshaped(x, (parts, x.shape[0] // parts, *x.shape[1:])), batch)


def join_rows(out: Any, rows: Any) -> Any:
    """[parts, B / parts, ...] -> [B, ...], where ``rows`` says so."""
    one = lambda x: reshaped(x, (x.shape[0] * x.shape[1], *x.shape[2:]))
    return jax.tree.map(lambda is_rows, part: jax.tree.map(one, part) if is_rows else part, rows, out)


def reshaped(x: Any, shape: tuple[int, ...]) -> Any:
    return x.reshape(shape) if isinstance(x, jax.Array) else jax.ShapeDtypeStruct(shape, x.dtype)
