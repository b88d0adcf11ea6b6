"""A feed-forward network over observations, for control: it sees the last observation alone, and no tokens."""

import operator

import jax
import jax.numpy as jnp

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.linear import linear
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.sharding import constrain
from jaxrlhf.types import Array, Params


def observed_states(params: Params, cfg: ModelConfig, observations: Array, runtime: Runtime) -> Array:
    """Final hidden states [B, S, hidden_size] of observations f32[B, S, D], each by itself: num_layers layers of tanh.

    Raises ValueError, in one line, for observations of another size than the model's."""
    if observations.shape[-1] != cfg.observation_size:
        raise ValueError(f"observations of {observations.shape[-1]} numbers: the model reads {cfg.observation_size}")
    hidden = ("batch", "seq", "hidden")
    x = constrain(observations.astype(runtime.compute), "batch", "seq", None)
    x = jnp.tanh(linear(params["observations"], x, "bso,od->bsd", ("observation", "embed"), hidden))
    for at in range(cfg.num_layers - 1):
        layer = jax.tree.map(operator.itemgetter(at), params["layers"])
        y = linear(layer, x, "bsd,dm->bsm", ("embed", "mlp"), ("batch", "seq", "mlp"))
        x = constrain(jnp.tanh(y), *hidden)
    return x
