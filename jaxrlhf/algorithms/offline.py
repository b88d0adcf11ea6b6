"""What algorithms share that learn from given responses: how likely a network finds each."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxrlhf.algorithm import read_logprobs
from jaxrlhf.ops.masked import keep
from jaxrlhf.ops.rows import deinterleave, interleave
from jaxrlhf.types import Array, Nets, Preferences, Role, Sequences, Trees


class Likelihood(NamedTuple):
    """How likely a network finds whole responses; each f32[B]."""

    total: Array  # log p, nats
    tokens: Array  # of the response

    @property
    def mean(self) -> Array:
        """log p of a token, nats; 0 of an empty response."""
        return self.total / jnp.maximum(self.tokens, 1.0)


def response_logprobs(nets: Nets, role: Role, trees: Trees, rows: Sequences) -> Array:
    """log p of the whole responses, nats f32[B]."""
    return keep(read_logprobs(nets, role, trees, rows), rows.response_mask).sum(-1)


def pair_likelihoods(nets: Nets, role: Role, trees: Trees, pairs: Preferences) -> tuple[Likelihood, Likelihood]:
    """How likely the chosen and the rejected responses are, in one pass of the model."""
    totals = deinterleave(response_logprobs(nets, role, trees, interleave(pairs.chosen, pairs.rejected)))
    tokens = (side.response_mask.sum(-1, dtype=jnp.float32) for side in (pairs.chosen, pairs.rejected))
    chosen, rejected = map(Likelihood, totals, tokens)
    return chosen, rejected
