"""What algorithms share that learn from given responses and from pairs: how likely a network finds each, what a pair
costs, what is told of it."""

from typing import Literal, NamedTuple, Protocol

import jax.numpy as jnp

from jaxrlhf.algorithm import read_logprobs
from jaxrlhf.ops.losses import bradley_terry, ipo
from jaxrlhf.ops.masked import keep, sums
from jaxrlhf.ops.rows import deinterleave, interleave
from jaxrlhf.types import Array, Batch, Experience, Mean, Nets, Preferences, Role, Sequences, TrainState, Trees, given


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


class PairConfig(Protocol):
    """The fields of a config that say what a pair costs, as DPO has it."""

    @property
    def beta(self) -> float: ...
    @property
    def objective(self) -> Literal["sigmoid", "ipo"]: ...
    @property
    def label_smoothing(self) -> float: ...


def pair_terms(chosen: Array, rejected: Array, margin: Array | None, cfg: PairConfig) -> Array:
    """DPO's loss, or IPO's, of each pair, f32[G], of implicit rewards and margins f32[G]."""
    if cfg.objective == "sigmoid":
        return bradley_terry(chosen, rejected, margin, cfg.label_smoothing)
    return ipo(chosen, rejected, cfg.beta, margin, cfg.label_smoothing)


def reward_metrics(chosen: Array, rejected: Array, real: Array) -> dict[str, Mean]:
    """What is told of implicit rewards f32[G]; ``real``: bool[G], the pairs that count."""
    difference = chosen - rejected
    return {
        "implicit_reward/chosen": sums(chosen, real),
        "implicit_reward/rejected": sums(rejected, real),
        "implicit_reward/margin": sums(difference, real),
        "implicit_reward/accuracy": sums((difference > 0) + 0.5 * (difference == 0), real),
    }


def logprob_metrics(chosen: Likelihood, rejected: Likelihood, real: Array) -> dict[str, Mean]:
    """What is told of the policy's log-probs of both sides."""
    return {"logprobs/chosen": sums(chosen.total, real), "logprobs/rejected": sums(rejected.total, real)}


class PairsExperience(Experience, kw_only=True):
    """Pairs, as they come."""

    pairs: Preferences


def prepare_pairs(nets: Nets, state: TrainState, batch: Batch, cfg: object) -> tuple[PairsExperience, dict[str, Mean]]:
    """Pairs are learned from as they come."""
    return PairsExperience(pairs=given(batch.preferences, "batch.preferences")), {}
