"""What algorithms ask of networks, bound to the run's models: see types.Nets."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.heads import gathered_head, lm_logits, scalar, scale_gradient
from jaxrlhf.models.parameters import padded_vocab
from jaxrlhf.models.response_packing import Places, apart, places, side_by_side
from jaxrlhf.models.transformer import Runtime, forward, forward_responses
from jaxrlhf.ops.logprobs import chunked_token_stats, stored_logits
from jaxrlhf.ops.masked import at_last
from jaxrlhf.ops.rows import group_rows, repeat_rows
from jaxrlhf.ops.sampling import Sampling, shape_logits
from jaxrlhf.types import Array, Nets, Role, Sequences, TokenStats


def segments(sequences: Sequences) -> Array:
    """i32[B, S]: which document of its row a token belongs to; 0 is padding, which is never attended."""
    if sequences.segment_ids is not None:
        return sequences.segment_ids
    return sequences.valid.astype(jnp.int32)


class Reading(NamedTuple):
    """What a pass leaves of responses: in R rows of C columns as it computed them, which are B rows of T, or packed."""

    states: Array  # [R, 1 + C, D]: of the prompts' last column, and of the responses
    tokens: Array  # i32[R, C]
    where: Places | None  # their places if they are packed

    def before(self) -> Array:
        """[R, C, D]: the state before each response token was read."""
        before = self.states[:, :-1]
        return before if self.where is None else jnp.where(self.where.index[..., None] == 0, self.states[:, :1], before)

    def index(self, columns: Array) -> Array:
        """i32, broadcastable to [R, columns]: how many response tokens precede those in ``columns``."""
        return columns if self.where is None else self.where.index.at[:, columns].get(mode="clip")

    def rows(self, x: Array) -> Array:
        """[R, C] -> [B, T]."""
        return x if self.where is None else apart(x, self.where)

    def at_last(self, x: Array, valid: Array) -> Array:
        """[R, 1 + C] -> [B]: at each row's last token, of those that ``valid`` bool[B, 1 + T] marks; 0 if there is
        none."""
        every = x if self.where is None else jnp.concatenate([self.prompts(x), self.rows(x[:, 1:])], axis=1)
        return jnp.where(at_last(valid), every, 0.0).sum(-1)

    def prompts(self, x: Array) -> Array:
        """[R, 1 + C] -> [B, 1]: what belongs to the prompts' last column."""
        assert self.where is not None
        return repeat_rows(x[:, :1], self.where.column.shape[1])


class Trunk(NamedTuple):
    """What a bare head stands on."""

    role: Role  # whose trunk it is
    gradient: float = 1.0  # share of the head's gradient that reaches it


def widen(x: Array, sequences: Sequences) -> Array:
    """f32[B, S] of the responses' columns alone; the prompts' are 0."""
    return jnp.pad(x, ((0, 0), (sequences.response_start, 0)))


def make_nets(
    configs: dict[Role, ModelConfig],
    runtime: Runtime,
    sampling: Sampling,
    sample: Callable,
    trunks: Mapping[Role, Trunk] = MappingProxyType({}),
) -> Nets:
    """Nets for models of these (resolved) shapes. ``sampling``: how responses are sampled, so what log-probs are of;
    ``sample``: Nets.sample; ``trunks``: of the roles that are a bare head."""

    def read(role, trees, sequences: Sequences) -> Reading:
        role, start = trunks[role].role if role in trunks else role, sequences.response_start
        params, cfg = trees[role], configs[role]
        tokens, valid, copies = sequences.tokens, sequences.valid, sequences.copies
        if sequences.segment_ids is not None or start == 1:
            states = forward(params, cfg, tokens, segments(sequences), runtime)[:, start - 1 :]
            return Reading(states, tokens[:, start:], None)
        if sequences.width is None:
            states = forward_responses(params, cfg, tokens, valid, start, copies, runtime)
            return Reading(states, tokens[:, start:], None)
        where = places(group_rows(valid[:, start:], copies), sequences.width)
        states = forward_responses(params, cfg, tokens, valid, start, copies, runtime, where)
        return Reading(states, side_by_side(tokens[:, start:], where), where)

    def token_stats(role, trees, sequences: Sequences) -> TokenStats:
        return stats_of(read(role, trees, sequences), role, trees, sequences)

    def stats_of(reading: Reading, role, trees, sequences: Sequences) -> TokenStats:
        cfg, head = configs[role], gathered_head(trees[role], runtime.compute)

        def logits_of(hidden, columns):
            logits = lm_logits(head, cfg, hidden)
            keep = reading.tokens.at[:, columns].get(mode="clip") if sampling.top_k or sampling.top_p < 1 else None
            return shape_logits(logits, sampling, reading.index(columns), keep)

        stored = stored_logits(runtime.hardware.platform)
        stats = chunked_token_stats(reading.before(), reading.tokens, logits_of, padded_vocab(cfg), stored)
        return jax.tree.map(lambda x: widen(reading.rows(x), sequences), stats)

    def values(role, trees, sequences: Sequences) -> Array:
        return values_of(read(role, trees, sequences), role, trees, sequences)

    def values_of(reading: Reading, role, trees, sequences: Sequences) -> Array:
        states = reading.before()
        if role in trunks:
            states = scale_gradient(states, trunks[role].gradient)
        return widen(reading.rows(scalar(trees[role], states)), sequences)

    def policy_and_value(trees, sequences: Sequences) -> tuple[TokenStats, Array]:
        reading = read("policy", trees, sequences)
        shared = "value" in trunks and trunks["value"].role == "policy"
        other = reading if shared else read("value", trees, sequences)
        return stats_of(reading, "policy", trees, sequences), values_of(other, "value", trees, sequences)

    def scores(role, trees, sequences: Sequences) -> Array:
        reading = read(role, trees, sequences)
        every = scalar(trees[role], reading.states)
        return reading.at_last(every, sequences.valid[:, sequences.response_start - 1 :])

    return Nets(token_stats, values, policy_and_value, scores, sample)
