"""The compiled programs of an iteration: one, or two where the host scores responses between them.

Arguments may be arrays or shapes with layouts (jax.ShapeDtypeStruct), so that what trains and what plans compile alike.
"""

import jax
import jax.numpy as jnp
from jax.stages import Compiled

from jaxrlhf.build import Blueprint
from jaxrlhf.feed import layout
from jaxrlhf.step import Recipe, make_iteration, make_learn, make_rollout
from jaxrlhf.types import Batch, TrainState


def compile_programs(drawn: Blueprint, state: TrainState, batch: Batch) -> dict[str, Compiled]:
    """What an iteration runs, by name, in order: "iteration", or "rollout" and "learn"."""
    if drawn.cfg.rewards.function is None:
        return {"iteration": compile_whole(drawn.recipe, state, batch)}
    rollout, learn = compile_halves(drawn.recipe, drawn.mesh, state, batch)
    return {"rollout": rollout, "learn": learn}


def compile_whole(recipe: Recipe, state: TrainState, batch: Batch) -> Compiled:
    """The iteration as one program that the state is donated to."""
    return jax.jit(make_iteration(recipe), donate_argnums=0).lower(state, batch).compile()


def compile_halves(
    recipe: Recipe, mesh: jax.sharding.Mesh, state: TrainState, batch: Batch
) -> tuple[Compiled, Compiled]:
    """(rollout, learn): the second is given the first's responses, and scores f32[B] laid out as their rows.

    The state is donated to the second only: the first leaves it whole, should a reward function raise."""
    lowered = jax.jit(make_rollout(recipe)).lower(state, batch)
    rollout = lowered.compile()
    described = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    sequences = jax.tree.map(described, lowered.out_info, rollout.output_shardings)
    scores = jax.ShapeDtypeStruct(sequences.ended.shape, jnp.float32)
    sequences = sequences.replace(scores=described(scores, layout(mesh, scores)))
    learn = jax.jit(make_learn(recipe), donate_argnums=0).lower(state, batch.replace(sequences=sequences))
    return rollout, learn.compile()
