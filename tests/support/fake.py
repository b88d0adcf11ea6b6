"""Networks that answer what they are told to, and responses with random answers: for what an algorithm does itself."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.types import Ask, Nets, Prompts, Sequences, TokenStats, TrainState, Trees

PROMPT, ROOM = 3, 5
LENGTHS = [5, 1, 0, 3, 4, 5]  # of the responses; one is empty


def answering(**how: Callable[[Any, Sequences], Any]) -> Nets:
    """Networks that answer each of these asks with a function of (the role's parameters, rows), and no other."""

    def read(trees: Trees, rows: Sequences, /, *asks: Ask) -> tuple[Any, ...]:
        for ask in asks:
            assert ask.what in how, f"asked {ask.role} for {ask.what}"
        return tuple(how[ask.what](trees.of(ask.role), rows) for ask in asks)

    return Nets(read, no_sample)


def no_sample(*_: Any) -> Any:
    pytest.fail("nothing is sampled here")


# Networks whose parameters are their answers: each role's parameters hold the arrays.
FAKE = answering(
    token_stats=lambda params, rows: TokenStats(params["logprobs"], params["entropy"]),
    values=lambda params, rows: params["values"],
    scores=lambda params, rows: params["scores"],
    rewards=lambda params, rows: params["rewards"],
)


@dataclasses.dataclass
class Case:
    """Everything that prepare and loss read, as NumPy arrays."""

    mask: np.ndarray
    ended: np.ndarray
    sampled: np.ndarray  # log-probs of the sampler
    policy: np.ndarray  # of the trainer's policy
    reference: np.ndarray
    entropy: np.ndarray
    values: np.ndarray
    scores: np.ndarray

    def sequences(self, **fields) -> Sequences:
        tokens = jnp.zeros(self.mask.shape, jnp.int32)
        mask = jnp.array(self.mask)
        given = {"logprobs": jnp.array(self.sampled), "ended": jnp.array(self.ended), "response_start": PROMPT} | fields
        return Sequences(tokens, jnp.ones_like(mask), mask, **given)

    def params(self) -> dict:
        policy = {"logprobs": jnp.array(self.policy), "entropy": jnp.array(self.entropy)}
        return {"policy": policy, "value": {"values": jnp.array(self.values)}}

    def slow(self) -> dict:
        reference = {"logprobs": jnp.array(self.reference), "entropy": jnp.array(self.entropy)}
        return {"reference": reference, "reward": {"scores": jnp.array(self.scores)}}

    def state(self, kl_coef: float) -> TrainState:
        controls = {"kl_coef": jnp.float32(kl_coef)}
        return TrainState(jnp.int32(0), jnp.int32(0), self.params(), self.slow(), {}, controls)

    def sampler_ratio(self) -> np.ndarray:
        """[B, S] in float64: the trainer's probability of each response token over the sampler's, 0 elsewhere."""
        found = np.zeros(self.mask.shape)
        for where in zip(*np.nonzero(self.mask)):
            found[where] = np.exp(float(self.policy[where]) - float(self.sampled[where]))
        return found


def make_case(seed: int = 0, junk: float = 0.0) -> Case:
    """Random numbers on the response tokens, ``junk`` elsewhere. Row 0 has a tool's token amid its response."""
    rng = np.random.default_rng(seed)
    columns = np.arange(PROMPT + ROOM)
    mask = (columns >= PROMPT) & (columns < PROMPT + np.array(LENGTHS)[:, None])
    mask[0, PROMPT + 2] = False
    fill = lambda x: np.where(mask, x, junk).astype(np.float32)
    draw = lambda scale, shift=0.0: rng.normal(shift, scale, mask.shape)
    ended = np.array([False, True, False, True, True, False])
    reference = draw(0.7, -2.0)
    sampled, policy = reference + draw(0.3), reference + draw(0.3)
    scores = rng.normal(0.5, 1.0, len(LENGTHS)).astype(np.float32)
    sampled, policy, reference = fill(sampled), fill(policy), fill(reference)
    return Case(mask, ended, sampled, policy, reference, fill(np.abs(draw(1.0))), fill(draw(0.5)), scores)


def prompts_of(rows: int) -> Prompts:
    """As many prompts as ``prepare`` needs to know the size of a group."""
    return Prompts(jnp.zeros((rows, 1), jnp.int32), jnp.ones((rows, 1), bool), jnp.arange(rows))
