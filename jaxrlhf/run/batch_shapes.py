"""The shapes and layouts of the batches that one iteration can be given."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config.batch import rows_taken
from jaxrlhf.config.environment import spaces_of
from jaxrlhf.config.resolved import Resolved
from jaxrlhf.response_widths import widths_of
from jaxrlhf.run.build import Blueprint
from jaxrlhf.sharding import row_layout
from jaxrlhf.types import Acting, Batch, Prompts, Sequences, given


def batch_shapes(resolved: Resolved, mesh: Mesh, margins: bool = False) -> Iterator[Batch]:
    """What one iteration can be given, as shapes with layouts: one a prompt bucket, the smallest first.

    ``margins``: whether the preferences say by how much."""

    def rows(dtype, *shape: int) -> Any:  # stands for an array
        return jax.ShapeDtypeStruct(shape, dtype, sharding=row_layout(mesh, len(shape)))

    cfg, kinds = resolved.cfg, resolved.kinds
    learned = {kind.field: kind.shapes(rows, rows_taken(cfg, kind), cfg.data, margins) for kind in kinds if kind.shapes}
    batch = Batch(**learned)
    if (spaces := spaces_of(cfg)) is not None:
        seen = lambda side: side.replace(observations=rows(np.float32, *side.tokens.shape, spaces.observation))
        is_side = lambda part: isinstance(part, Sequences)
        batch = jax.tree.map(lambda part: seen(part) if is_side(part) else part, batch, is_leaf=is_side)
    if not any(kind.is_prompt for kind in kinds):
        yield batch
        return
    count = cfg.batch.prompts_per_step
    for width in cfg.data.prompt_buckets:
        prompts = Prompts(rows(np.int32, count, width), rows(bool, count, width), rows(np.int32, count))
        yield batch.replace(prompts=prompts)


def acting_shapes(drawn: Blueprint, episodes: int) -> Acting:
    """So many episodes while they wait for an action, as shapes with layouts."""
    rows, size = row_shapes(drawn, episodes), given(spaces_of(drawn.cfg), "environment.id").observation
    return Acting(rows(np.float32, size), rows(np.int32), rows(np.int32))


def episode_shapes(drawn: Blueprint, episodes: int) -> Sequences:
    """So many whole episodes, as shapes with layouts: what run/episodes.py makes."""
    rows, size = row_shapes(drawn, episodes), given(spaces_of(drawn.cfg), "environment.id").observation
    columns = 2 + drawn.sampler.max_new_tokens
    return played_shapes(drawn, episodes, columns).replace(observations=rows(np.float32, columns, size))


def context_widths(drawn: Blueprint, columns: int) -> list[int]:
    """The widths in which what came before a later turn is read, behind prompts of so many ``columns``."""
    if drawn.cfg.environment.max_turns == 1:
        return []
    room = drawn.cfg.generate.max_new_tokens
    return [columns + width for width in widths_of(room, min(drawn.cfg.environment.context_widths, room))]


def context_shapes(drawn: Blueprint, count: int, width: int) -> Prompts:
    """So many rows of what came before a turn, as shapes with layouts."""
    rows = row_shapes(drawn, count)
    return Prompts(rows(np.int32, width), rows(bool, width), rows(np.int32))


def conversation_shapes(drawn: Blueprint, prompts: Prompts) -> Sequences:
    """The whole rows that begin with ``prompts``, as shapes with layouts: what run/turns.py makes."""
    count, start = prompts.tokens.shape
    columns = start + drawn.cfg.generate.max_new_tokens
    rows = played_shapes(drawn, count * drawn.sampler.samples_per_prompt, columns)
    return rows.replace(response_start=start, copies=drawn.sampler.copies)


def played_shapes(drawn: Blueprint, count: int, columns: int) -> Sequences:
    """So many rows that an environment has answered, as shapes with layouts."""
    rows = row_shapes(drawn, count)
    numbers, mask = rows(np.float32, columns), rows(bool, columns)
    return Sequences(
        tokens=rows(np.int32, columns),
        valid=mask,
        response_mask=mask,
        logprobs=numbers,
        scores=rows(np.float32) if drawn.cfg.environment_scores else None,
        ended=rows(bool),
        rewards=numbers,
    )


def row_shapes(drawn: Blueprint, count: int) -> Callable[..., Any]:
    """(dtype, *shape of a row) -> a ShapeDtypeStruct of ``count`` rows."""
    layout = lambda shape: row_layout(drawn.mesh, 1 + len(shape))
    return lambda dtype, *shape: jax.ShapeDtypeStruct((count, *shape), dtype, sharding=layout(shape))
