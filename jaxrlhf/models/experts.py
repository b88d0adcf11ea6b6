"""Mixtures of experts: a router sends each token to a few of a layer's feed-forward networks.

    y = sum over the chosen experts e of weight(e) x expert_e(x)

No token is dropped: rows are sorted by expert, and each expert multiplies the rows that chose it, however many these
are. On a mesh the experts are split over the axis ``expert``, and rows too. Each device gathers the rows of its expert
group, computes those of its own experts, and the parts are summed and scattered back. That sends no more bytes than
trading rows (all-to-all) does without dropping any; benchmarks/README.md has the numbers.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxrlhf.models.attention.kernels import Hardware
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.cpu import experts_in_blocks
from jaxrlhf.models.grouped import bring_back, dispatch, group_of, grouped_product, make_groups
from jaxrlhf.models.linear import PRODUCT, layout, linear
from jaxrlhf.sharding import constrain, explicit, gather_over, scatter_over, spec
from jaxrlhf.types import Array, Mean, Params

OWN = -1  # in place of an expert's number in kept choices: the router's own choice


def has_experts(tree: Any) -> bool:
    """Whether parameters of experts are among the leaves."""
    paths = (path for path, _ in jax.tree_util.tree_leaves_with_path(tree))
    return any(getattr(key, "key", None) == "experts" for path in paths for key in path)


class Routed(NamedTuple):
    """What a router said of the tokens of one layer."""

    logits: Array  # f32[B, S, E]
    probs: Array  # f32[B, S, E]: their softmax
    own: Array  # i32[B, S, k]: the most probable experts
    choice: Array  # i32[B, S, k]: those that computed the token: ``own``, or what was kept of another pass
    weight: Array  # f32[B, S, k]: of each of them


def routing_dtype(cfg: ModelConfig):
    """The smallest integers that hold every expert's number, and OWN."""
    return jnp.int8 if cfg.num_experts <= 128 else jnp.int16


def router_load(routed: Routed, counted: Array, kept: Array | None = None) -> dict[str, Mean]:
    """What is measured of one layer's router over the tokens that are ``counted``, bool[B, S]: means over tokens.

    - load_balance: E sum_e f_e P_e, f the choices of an expert a token, P its mean probability; k where all is even
    - router_z: the squared logsumexp of the logits
    - expert_load_max: the choices of the busiest expert, as a multiple of the mean
    - expert_load_entropy: of the shares of the choices, nats
    - routing_replaced: with ``kept`` choices, the share of them that the router would not have made

    Source: Fedus et al. 2021 (arXiv:2101.03961), equations 4 to 6; Zoph et al. 2022 (arXiv:2202.08906), equation 5."""
    mask, experts, k = counted.astype(jnp.float32), routed.probs.shape[-1], routed.choice.shape[-1]
    count = mask.sum()
    average = lambda x: (x * mask[..., None]).sum((0, 1)) / jnp.maximum(count, 1.0)
    chosen = average((routed.choice[..., None] == jnp.arange(experts)).sum(2, dtype=jnp.float32))
    share = chosen / k
    found = {
        "load_balance": experts * (chosen * average(routed.probs)).sum(),
        "router_z": average(jnp.square(jax.nn.logsumexp(routed.logits, -1))[..., None])[0],
        "expert_load_max": experts * share.max(),
        "expert_load_entropy": -jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0).sum(),
    }
    if kept is not None:
        ours = (kept[..., None] == routed.own[:, :, None]).any(-1) | (kept == OWN)
        found["routing_replaced"] = average(1.0 - ours.astype(jnp.float32)).mean()
    return {name: Mean(value * count, count) for name, value in found.items()}


def route(params: Params, cfg: ModelConfig, x: Array, kept: Array | None = None) -> Routed:
    """The experts of each token of x [B, S, D], in float32 whatever the dtype of x.

    ``kept``: int[B, S, k], the choice to follow where it is not OWN. The weights are always the router's own, so that
    it learns. Source: Shazeer et al. 2017 (arXiv:1701.06538); softmax before top-k as in Qwen3 and Mixtral."""
    wide = x.astype(jnp.float32)
    with jax.default_matmul_precision("float32"):
        logits = linear(params, wide, "bsd,de->bse", ("embed", "routes"), ("batch", "seq", "routes"), jnp.float32)
    probs = jax.nn.softmax(logits)
    own = jax.lax.top_k(jax.lax.stop_gradient(probs), cfg.experts_per_token)[1]
    choice = own if kept is None else jnp.where(kept == OWN, own, kept.astype(jnp.int32))
    weight = of_choice(probs[:, :, None], choice)
    if cfg.normalize_routing:
        weight = weight / weight.sum(-1, keepdims=True)
    return Routed(logits, probs, own, choice, weight)


def of_choice(values: Array, choice: Array) -> Array:
    """What ``values`` [..., E] say of each expert of ``choice`` i32[..., k]. A comparison in place of a gather, whose
    gradient would be a scatter."""
    return jnp.where(choice[..., None] == jnp.arange(values.shape[-1]), values, 0.0).sum(-1)


def expert_block(
    params: Params,
    cfg: ModelConfig,
    x: Array,
    gated: Callable[[Array, Array], Array],
    hardware: Hardware,
    kept: Array | None = None,
    asked: Array | None = None,
) -> tuple[Array, Routed]:
    """x [B, S, D] -> ([B, S, D], what the router said): the feed-forward part of a layer with experts.

    params: {"router", "experts": {"gate", "up", "down"}}, and "expert_scale" where what each expert makes is multiplied
    by a number of its own; ``gated`` joins what gate and up make of a token; ``kept`` as in ``route``; ``asked``: what
    the router reads in place of x."""
    routed = route(params["router"], cfg, x if asked is None else asked, kept)
    if "expert_scale" in params:
        scale = constrain(params["expert_scale"]["scale"].astype(jnp.float32), None)
        routed = routed._replace(weight=routed.weight * of_choice(scale, routed.choice))
    own = [params["experts"][name] for name in ("gate", "up", "down")]
    maps = [(part["kernel"], bias_of_experts(part, axis)) for part, axis in zip(own, ("mlp", "mlp", None))]
    one = functools.partial(own_experts, cfg=cfg, gated=gated, blocks=experts_in_blocks(hardware))
    if not explicit():
        return one(x, routed.choice, routed.weight, maps, inside=Inside()), routed
    rows = spec("batch", "seq", "hidden")
    inside = Inside(*map(names_of, (*layout(maps[0][0]).partitions,)))
    mapped = jax.shard_map(
        functools.partial(one, inside=inside),
        in_specs=(rows, rows, rows, jax.tree.map(layout, maps)),
        out_specs=rows,
        check_vma=False,
    )
    return mapped(x, routed.choice, routed.weight, maps), routed


def bias_of_experts(params: Params, axis: str | None) -> Array | None:
    """The biases [E, M] of one map of all experts, M laid out as ``axis`` is; None where it has none."""
    return constrain(params["bias"], "expert", axis) if "bias" in params else None


class Inside(NamedTuple):
    """The mesh axes that split an expert kernel: its experts, its features of the residual stream, its own."""

    expert: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()


def names_of(part: str | Sequence[str] | None) -> tuple[str, ...]:
    """One entry of a PartitionSpec as the axes that it names."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def own_experts(
    x: Array,
    choice: Array,
    weight: Array,
    maps: Sequence[tuple[Array, Array | None]],
    *,
    cfg: ModelConfig,
    gated: Callable[[Array, Array], Array],
    blocks: bool,
    inside: Inside,
) -> Array:
    """What one device computes: x [b, S, D], choice and weight [b, S, k], and its parts of the kernels and biases of
    gate, up ([e, d, m], [e, m]) and down ([e, m, d], [e, D]) -> [b, S, D], summed over all experts."""
    shape = x.shape
    flat = lambda y: y.reshape(-1, y.shape[-1])
    x, choice, weight = (gather_over(flat(y), inside.expert, 0) for y in (x, choice, weight))
    count = maps[0][0].shape[0]
    first = jax.lax.axis_index(inside.expert) * count if inside.expert else 0
    groups = make_groups(choice - first, count, cfg.num_experts, blocks)
    rows = dispatch(x, groups, cfg.experts_per_token)
    of_group = lambda group: (group[..., None] == jnp.arange(count)).astype(jnp.float32)  # one-hot; of none here: zeros

    def product(rows: Array, kernel: Array, axis: int) -> Array:
        """``kernel`` is gathered again where it is needed backward, and never kept."""
        one = lambda rows, kernel: grouped_product(
            rows, gather_over(kernel.astype(rows.dtype), inside.embed, axis), groups
        )
        one = jax.checkpoint(one, prevent_cse=False) if inside.embed else one
        return checkpoint_name(one(rows, kernel), PRODUCT)

    def biased(rows: Array, kernel: Array, bias: Array | None) -> Array:
        """``product`` and the bias of each row's expert: a product too, whose gradient is no scatter."""
        y = product(rows, kernel, 1)
        return y if bias is None else y + (of_group(group_of(groups, choice - first)) @ bias).astype(y.dtype)

    (gate, gate_bias), (up, up_bias), (down, down_bias) = maps
    hidden = gated(biased(rows, gate, gate_bias), biased(rows, up, up_bias))
    each = bring_back(product(hidden, down, 2), groups, weight.shape)
    y = jnp.einsum("nkd,nk->nd", each.astype(jnp.float32), weight)
    if down_bias is not None:
        whose = jax.lax.axis_index(inside.mlp) == 0 if inside.mlp else True  # each device has part of the sum before it
        y += jnp.where(whose, jnp.einsum("nke,nk->ne", of_group(choice - first), weight) @ down_bias, 0.0)
    y = y.astype(x.dtype)
    y = jax.lax.psum(y, inside.mlp) if inside.mlp else y
    return scatter_over(y, inside.expert, 0).reshape(shape)
