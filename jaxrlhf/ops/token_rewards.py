"""From one score a sequence to a reward for every response token: the KL penalty is added here."""

import jax
import jax.numpy as jnp

from jaxrlhf.ops import masked
from jaxrlhf.types import Array


def missing_eos(scores: Array, ended: Array, penalty: float | Array) -> Array:
    """f32[B]: ``scores`` less ``penalty`` (in score units) where a response did not end by itself (``ended``: bool[B]).

    It is the score that pays, before KL shaping, so that the penalty is seen wherever the score is.
    """
    assert scores.shape == ended.shape, (scores.shape, ended.shape)
    return scores.astype(jnp.float32) - jnp.where(ended, 0.0, penalty)


def score_to_rewards(scores: Array, kl_penalty: Array, mask: Array) -> Array:
    """Reward of every response token: the KL penalty, paid as it occurs, and the score on the last token.

        r_t = -kl_penalty_t + score * [t is the last token of the response]

    Args:
        scores: [B], one number per sequence.
        kl_penalty: [B, S], nats times kl_coef, already multiplied.
        mask: bool[B, S], the response tokens; EOS is one of them, and is where the score lands.

    Returns:
        f32[B, S], 0 outside the mask, and float32 even for integer scores: in an integer array 0.7 would become 0.
        An empty response gets nothing.

    Source: Ziegler et al. 2019 (arXiv:1909.08593), equation 2; Stiennon et al. 2020 (arXiv:2009.01325).
    """
    assert kl_penalty.shape == mask.shape, (kl_penalty.shape, mask.shape)
    assert scores.shape == mask.shape[:1], (scores.shape, mask.shape)
    penalty = masked.keep(kl_penalty, mask)
    score = jnp.where(masked.at_last(mask), scores.astype(jnp.float32)[:, None], 0.0)
    return score - penalty


def returns_to_go(rewards: Array) -> Array:
    """f32[B, S]: the sum of a row's ``rewards`` (f32[B, S], 0 outside the response) from each token on."""
    return jax.lax.cumsum(rewards, axis=1, reverse=True)
