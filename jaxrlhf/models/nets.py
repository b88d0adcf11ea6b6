"""What algorithms ask of networks, bound to the run's models: see types.Nets."""

from collections.abc import Callable

import jax.numpy as jnp

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.heads import gathered_head, lm_logits, scalar
from jaxrlhf.models.transformer import Runtime, forward, padded_vocab
from jaxrlhf.ops.logprobs import chunked_token_stats, states_before
from jaxrlhf.ops.masked import at_last
from jaxrlhf.ops.sampling import Sampling, shape_logits
from jaxrlhf.types import Array, Nets, Role, Sequences, TokenStats


def segments(sequences: Sequences) -> Array:
    """i32[B, S]: which document of its row a token belongs to; 0 is padding, which is never attended."""
    if sequences.segment_ids is not None:
        return sequences.segment_ids
    return sequences.valid.astype(jnp.int32)


def make_nets(configs: dict[Role, ModelConfig], runtime: Runtime, sampling: Sampling, sample: Callable) -> Nets:
    """Nets for models of these (resolved) shapes. ``sampling``: how responses are sampled, so what log-probs are of;
    ``sample``: Nets.sample."""

    def states(role, trees, sequences: Sequences) -> Array:
        return forward(trees[role], configs[role], sequences.tokens, segments(sequences), runtime)

    def token_stats(role, trees, sequences: Sequences) -> TokenStats:
        cfg, start = configs[role], sequences.response_start
        tokens = sequences.tokens[:, start:]
        head = gathered_head(trees[role], runtime.compute)

        def logits_of(hidden, columns):
            logits = lm_logits(head, cfg, hidden)
            keep = tokens.at[:, columns].get(mode="clip") if sampling.top_k or sampling.top_p < 1 else None
            return shape_logits(logits, sampling, columns, keep)

        before = states_before(states(role, trees, sequences))[:, start:]
        stats = chunked_token_stats(before, tokens, logits_of, padded_vocab(cfg))
        widen = lambda x: jnp.pad(x, ((0, 0), (start, 0)))
        return TokenStats(widen(stats.logprobs), widen(stats.entropy))

    def values(role, trees, sequences: Sequences) -> Array:
        return scalar(trees[role], states_before(states(role, trees, sequences)))

    def scores(role, trees, sequences: Sequences) -> Array:
        every = scalar(trees[role], states(role, trees, sequences))
        return jnp.where(at_last(sequences.valid), every, 0.0).sum(-1)

    return Nets(token_stats, values, scores, sample)
