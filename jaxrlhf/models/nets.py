"""What algorithms ask of networks, bound to the run's models: see types.Nets."""

from collections.abc import Callable

import jax.numpy as jnp

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.heads import gathered_head, lm_logits, scalar
from jaxrlhf.models.transformer import Runtime, forward, forward_responses, padded_vocab
from jaxrlhf.ops.logprobs import chunked_token_stats
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
        """[B, S - start + 1, D]: column j is the state before the response token of column start + j was read."""
        params, cfg, start = trees[role], configs[role], sequences.response_start
        if sequences.segment_ids is None and start > 1:
            return forward_responses(params, cfg, sequences.tokens, sequences.valid, start, sequences.copies, runtime)
        return forward(params, cfg, sequences.tokens, segments(sequences), runtime)[:, start - 1 :]

    def widen(x: Array, sequences: Sequences) -> Array:
        return jnp.pad(x, ((0, 0), (sequences.response_start, 0)))

    def token_stats(role, trees, sequences: Sequences) -> TokenStats:
        cfg, start = configs[role], sequences.response_start
        tokens = sequences.tokens[:, start:]
        head = gathered_head(trees[role], runtime.compute)

        def logits_of(hidden, columns):
            logits = lm_logits(head, cfg, hidden)
            keep = tokens.at[:, columns].get(mode="clip") if sampling.top_k or sampling.top_p < 1 else None
            return shape_logits(logits, sampling, columns, keep)

        before = states(role, trees, sequences)[:, :-1]
        stats = chunked_token_stats(before, tokens, logits_of, padded_vocab(cfg))
        return TokenStats(widen(stats.logprobs, sequences), widen(stats.entropy, sequences))

    def values(role, trees, sequences: Sequences) -> Array:
        return widen(scalar(trees[role], states(role, trees, sequences)[:, :-1]), sequences)

    def scores(role, trees, sequences: Sequences) -> Array:
        every = scalar(trees[role], states(role, trees, sequences))
        return jnp.where(at_last(sequences.valid[:, sequences.response_start - 1 :]), every, 0.0).sum(-1)

    return Nets(token_stats, values, scores, sample)
