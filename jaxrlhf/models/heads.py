"""From hidden states to what is asked of them: next-token logits, or one number per token."""

import jax
import jax.numpy as jnp

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.linear import halfway, linear
from jaxrlhf.sharding import constrain, used_often
from jaxrlhf.types import Array, Params

IMPOSSIBLE = -1e30  # the logit of a padded vocabulary row: finite, so that 0 x it is 0


def gathered_head(params: Params, dtype) -> Params:
    """The parameters that lm_logits reads, cast and whole along ``embed``: for use many times after one gather."""
    if "head" in params:
        kernel = halfway(params["head"]["kernel"].astype(dtype), ("embed", "vocab"))
        return {"head": {"kernel": used_often(kernel, None, "vocab")}}
    table = halfway(params["embed"]["tokens"]["embedding"].astype(dtype), ("vocab", "embed"))
    return {"embed": {"tokens": {"embedding": used_often(table, "vocab", None)}}}


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
