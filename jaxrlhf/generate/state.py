"""What the decode loop carries."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxrlhf.generate.sampler import Sampler
from jaxrlhf.models.decoding import LayerCache
from jaxrlhf.models.experts import OWN
from jaxrlhf.sharding import constrain
from jaxrlhf.types import Array


class LoopRows(NamedTuple):
    """What belongs to the rows of the decode loop: B = G prompts x n samples."""

    tokens: Array  # i32[B, T]
    logprobs: Array  # f32[B, T]
    mask: Array  # bool[B, T]: sampled before the row ended, the ending token included
    done: Array  # bool[B]
    stop_states: tuple[Array, ...]  # i32[B] a stop text
    noise: Array  # f32[B, T]: what tokens are chosen by
    routing: Array | None = None  # [B, T, layers * k]: as that of Sequences


class Decoding(NamedTuple):
    """What the decode loop carries."""

    index: Array  # i32[]: response tokens sampled so far
    hidden: Array  # [G, n, D]: state before the next token of each response
    caches: list[LayerCache]
    rows: LoopRows


def blank_rows(prompt: Array, noise: Array, sampler: Sampler, routing: Array | None = None) -> LoopRows:
    """The rows before their first tokens: prompt bool[B, P], the columns that hold tokens; noise f32[B, T]; routing of
    the prompts [B, P, layers * k], where it is kept."""
    size, room = noise.shape
    empty = lambda dtype: constrain(jnp.zeros((size, room), dtype), "batch", None)
    row = lambda start: constrain(jnp.broadcast_to(jnp.asarray(start, jnp.int32), size), "batch")
    return LoopRows(
        tokens=empty(jnp.int32) + sampler.pad_id,
        logprobs=empty(jnp.float32),
        mask=empty(bool),
        done=~prompt.any(axis=1),  # a row without a prompt fills up a batch: no response
        stop_states=tuple(row(stop.start) for stop in sampler.stops),
        noise=noise,
        routing=None if routing is None else blank_routing(routing, room),
    )


def blank_routing(prompt: Array, room: int) -> Array:
    """[B, room, layers * k] of tokens that are still to come."""
    rows, _, choices = prompt.shape
    return constrain(jnp.full((rows, room, choices), OWN, prompt.dtype), "batch", None, None)
