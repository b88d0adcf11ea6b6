"""The second branch of a block: an mlp, or experts behind a router and the expert that they share."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrlhf.models.attention.kernels import Hardware
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.experts import Routed, expert_block
from jaxrlhf.models.families import FAMILIES
from jaxrlhf.models.linear import linear
from jaxrlhf.models.norms import normalize
from jaxrlhf.sharding import constrain
from jaxrlhf.types import Array, Params


def activation_of(cfg: ModelConfig) -> Callable[[Array], Array]:
    """What the family's mlp applies between its maps."""
    family = FAMILIES[cfg.family]
    gelu = functools.partial(jax.nn.gelu, approximate=family.activation == "gelu_tanh")
    return jax.nn.silu if family.activation == "silu" else gelu


Gated = Callable[[Array, Array], Array]  # (gate, up), of one shape -> what a gated mlp multiplies with down


def gated_by(cfg: ModelConfig) -> Gated:
    """How the family's gated mlp, and each of its experts, joins what gate and up make of a token."""
    if FAMILIES[cfg.family].activation == "clamped":
        return clamped_swiglu
    activate = activation_of(cfg)
    return lambda gate, up: activate(gate) * up


def clamped_swiglu(gate: Array, up: Array, alpha: float = 1.702, limit: float = 7.0) -> Array:
    """g sigmoid(alpha g) (u + 1), where g is the gate, at most ``limit``, and u is up, within -/+ ``limit`` (gpt-oss:
    OpenAI 2025, arXiv:2508.10925)."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


def mlp_block(params: Params, cfg: ModelConfig, x: Array) -> Array:
    wide = ("batch", "seq", "mlp")
    y = linear(params["up"], x, "bsd,dm->bsm", ("embed", "mlp"), wide)
    if FAMILIES[cfg.family].gated:
        y = gated_by(cfg)(linear(params["gate"], x, "bsd,dm->bsm", ("embed", "mlp"), wide), y)
    else:
        y = activation_of(cfg)(y)
    return linear(params["down"], y, "bsm,md->bsd", ("mlp", "embed"), ("batch", "seq", "hidden"))


def router_input(params: Params, cfg: ModelConfig, x: Array) -> Array:
    """What a router beside an mlp reads of x [B, S, D]: it normalised, times a learned scale, over the root of D. In
    float32."""
    scale = constrain(params["scale"].astype(jnp.float32), None)
    return normalize({}, x.astype(jnp.float32), cfg) * scale / math.sqrt(cfg.hidden_size)


def shared_expert(params: Params, cfg: ModelConfig, x: Array) -> Array:
    """x [B, S, D] -> [B, S, D]: what the expert of all tokens adds, times the sigmoid of a number that each has.

    Source: Qwen Team 2024, "Qwen1.5-MoE"."""
    share = linear(params["share"], x, "bsd,do->bso", ("embed", "score"), ("batch", "seq", "score"))
    return jax.nn.sigmoid(share) * mlp_block(params, cfg, x)


# (parameters, x [B, S, D] behind the branch's norm, the same before it) -> [B, S, D]: the second branch of a block
Feed = Callable[[Params, Array, Array], Array]


def feed_forward(
    cfg: ModelConfig, hardware: Hardware, note: Callable[[Routed], None] | None = None, kept: Array | None = None
) -> Feed:
    """The mlp of a layer, or its experts, and the one that all tokens share where the family has it.

    Args:
        note: is told what the router said, where there are experts.
        kept: int[B, S, k], the experts to follow: see experts.route. Of fewer columns in x the last ones count."""
    if not cfg.num_experts:
        return lambda params, x, before: mlp_block(params, cfg, x)

    def experts(params: Params, x: Array, asked: Array | None = None) -> Array:
        own = None if kept is None else kept[:, kept.shape[1] - x.shape[1] :]
        y, routed = expert_block(params, cfg, x, gated_by(cfg), hardware, own, asked)
        if note is not None:
            note(routed)
        return y

    def in_place(params: Params, x: Array, before: Array) -> Array:
        y = experts(params, x)
        return y + shared_expert(params["shared"], cfg, x) if "shared" in params else y

    def beside(params: Params, x: Array, before: Array) -> Array:
        asked = router_input(params["router_scale"], cfg, before)
        y = experts(params, normalize(params["expert_norm"], before, cfg), asked)
        own = normalize(params["mlp_norm"], mlp_block(params, cfg, x), cfg)
        return own + normalize(params["expert_post_norm"], y, cfg)

    return beside if FAMILIES[cfg.family].experts_beside else in_place
