"""From hidden states to what is asked of them: next-token logits, or one number per token."""

import jax
import jax.numpy as jnp

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.linear import halfway, linear
from jaxrlhf.sharding import constrain, used_often
from jaxrlhf.types import Array, Params

IMPOSSIBLE = -1e30  # the logit of a padded vocabulary row: finite, so that 0 x it is 0


def gathered_head(params: Params, dtype, width: int | None = None) -> Params:
    """The parameters that lm_logits reads, cast and whole along ``embed``: for use many times after one gather.
    ``width``: only of so many rows of the vocabulary, padding included, the first."""
    if "head" in params:
        kernel = first_rows(params["head"]["kernel"].astype(dtype), ("embed", "vocab"), width)
        kernel = halfway(kernel, ("embed", "vocab"))
        return {"head": {"kernel": used_often(kernel, None, "vocab")}}
    table = first_rows(params["embed"]["tokens"]["embedding"].astype(dtype), ("vocab", "embed"), width)
    table = halfway(table, ("vocab", "embed"))
    return {"embed": {"tokens": {"embedding": used_often(table, "vocab", None)}}}


def first_rows(weights: Array, axes: tuple[str, str], width: int | None) -> Array:
    """``weights``, laid out as ``axes``, with the first ``width`` rows along vocab; None: with all."""
    if width is None or weights.shape[axes.index("vocab")] == width:
        return weights
    together = constrain(weights, *(None if axis == "vocab" else axis for axis in axes))
    return constrain(jax.lax.slice_in_dim(together, 0, width, axis=axes.index("vocab")), *axes)


def lm_logits(params: Params, cfg: ModelConfig, hidden: Array) -> Array:
    """f32[B, S, padded vocabulary] from hidden [B, S, D]; rows that pad the vocabulary can't be sampled."""
    out = ("batch", "seq", "vocab")
    if "head" in params:
        logits = linear(params["head"], hidden, "bsd,dv->bsv", ("embed", "vocab"), out, jnp.float32)
    else:
        tied = {"kernel": params["embed"]["tokens"]["embedding"]}
        logits = linear(tied, hidden, "bsd,vd->bsv", ("vocab", "embed"), out, jnp.float32)
    if cfg.logit_softcap is not None:
        logits = cfg.logit_softcap * jnp.tanh(logits / cfg.logit_softcap)
    if logits.shape[-1] == cfg.vocab_size:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < cfg.vocab_size, logits, IMPOSSIBLE)


def scale_gradient(x: Array, share: float) -> Array:
    """``x`` itself; backward, ``share`` of its gradient."""
    same = jax.custom_vjp(lambda x: x)
    same.defvjp(lambda x: (x, None), lambda _, grad: (grad * share,))
    return same(x)  # type: ignore[return-value]


def scalar(params: Params, hidden: Array) -> Array:
    """f32[B, S]: one number per token from hidden [B, S, D]."""
    y = linear(params["head"], hidden, "bsd,do->bso", ("embed", "score"), ("batch", "seq", "score"), jnp.float32)
    return constrain(y[..., 0], "batch", "seq")
