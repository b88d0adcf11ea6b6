"""Dynamic sampling: the groups of an iteration, gathered from several rollouts (DAPO, Yu et al. 2025, arXiv:2503.14476,
section 3.2).

A group whose responses all earn the same teaches nothing. So an iteration goes on with further prompts until the groups
that differ fill it, or until batch.max_rollouts: each program has fixed shapes, and the host asks between two rollouts
how many groups there are. Groups keep the order of the data. What is still missing then has no response and counts for
nothing; groups beyond what an iteration holds are dropped, and counted.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import struct

from jaxrlhf.ops.masked import sums
from jaxrlhf.ops.rows import group_rows, lay_rows, repeat_rows
from jaxrlhf.ops.selection import fill_groups, take_groups
from jaxrlhf.sharding import constrain
from jaxrlhf.step import Recipe
from jaxrlhf.types import Array, Batch, Mean, Metrics, Prompts, Sequences, TrainState, given


class Pool(struct.PyTreeNode):
    """The groups found so far, of ``G`` prompts with ``n`` responses each."""

    prompts: Prompts  # [G, P]
    sequences: Sequences  # [G * n, S]: no response in the groups from ``filled`` on
    scores: Array  # f32[G * n]
    filled: Array  # i32[]: groups that differ; they come first
    equal: Array  # f32[]: groups dropped, whose responses all earned the same
    surplus: Array  # f32[]: groups dropped, as the pool was full
    rollouts: Array  # f32[]
    sampled: Mean  # of the scores of all responses


def make_fill(recipe: Recipe) -> Callable[[TrainState, tuple[Pool | None, Batch]], tuple[Pool, Metrics]]:
    """(state, (the groups of earlier rollouts, a batch with sampled responses)) -> (the groups of all, metrics).

    The batch has scores where the host computes them."""
    informative = given(recipe.algorithm.informative, "algorithm.informative")

    def fill(state: TrainState, both: tuple[Pool | None, Batch]) -> tuple[Pool, Metrics]:
        pool, batch = both
        prompts, sequences = given(batch.prompts, "batch.prompts"), given(batch.sequences, "batch.sequences")
        count = len(prompts.tokens)
        size = len(sequences.tokens) // count
        differ, scores = informative(recipe.nets, state, batch, recipe.cfg)
        answered = sequences.response_mask.any(-1)
        there = constrain(group_rows(answered, size).any(1), None)
        differ = constrain(differ, None) & there
        before = Pool(prompts, sequences, scores, *nothing_yet()) if pool is None else pool
        order, total = fill_groups(before.filled, differ)
        take = lambda old, new, each: take_groups(old, new, order, each)
        kept, filled = jnp.arange(count) < total, jnp.minimum(total, count)
        sequences = take(before.sequences, sequences, size)
        mask = sequences.response_mask & repeat_rows(lay_rows(kept), size)[:, None]
        pool = Pool(
            prompts=take(before.prompts, prompts, 1),
            sequences=sequences.replace(response_mask=mask),
            scores=take(before.scores, scores, size),
            filled=filled,
            equal=before.equal + jnp.sum(there & ~differ, dtype=jnp.float32),
            surplus=before.surplus + (total - filled).astype(jnp.float32),
            rollouts=before.rollouts + 1.0,
            sampled=before.sampled + sums(scores, answered & ~jnp.isnan(scores)),
        )
        return pool, metrics_of(pool, count)

    return fill


def nothing_yet() -> tuple[Array, Array, Array, Array, Mean]:
    """The counts of a pool before the first rollout."""
    zero = jnp.float32(0)
    return jnp.int32(0), zero, zero, zero, Mean(zero, zero)


def metrics_of(pool: Pool, count: int) -> Metrics:
    """What became of the groups of an iteration that learns from ``count`` of them."""
    return {
        "rollout/count": pool.rollouts,
        "rollout/equal_groups": pool.equal,
        "rollout/surplus_groups": pool.surplus,
        "rollout/missing_groups": (count - pool.filled).astype(jnp.float32),
        "rollout/score_mean": pool.sampled.value(),
    }
