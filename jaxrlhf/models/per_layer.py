"""Embeddings that layers have of their own, beside those of the residual stream (Gemma 3n, Gemma 4).

Layer l adds to the residual stream, behind its mlp,

    norm((act(x G_l) * (norm(e C_l / sqrt(D)) + sqrt(P) E_l[tokens]) / sqrt(2)) O_l)

of the embeddings e [B, S, D] that the stream began with; P features a layer. Files have E and C of all layers in one
tensor each. Here each layer has its part, so that no [B, S, layers, P] is held. E is the largest weight of a small
model, and few of its rows are used: training does not gather it over fsdp, but sends tokens and what they find.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.linear import is_split, layout, linear
from jaxrlhf.models.norms import normalize
from jaxrlhf.sharding import gather_over, mesh_axes, scatter_over, spec
from jaxrlhf.types import Array, Params

# (the parameters of a layer's part "per_layer", x [B, T, D] behind its mlp) -> what is added to x; x may have fewer
# columns than the rows, the last
Add = Callable[[Params, Array], Array]


def adding(params: Params, cfg: ModelConfig, tokens: Array, x: Array, activate: Callable[[Array], Array]) -> Add:
    """What each layer adds to rows of ``tokens`` i32[B, S], whose embeddings are ``x`` [B, S, D]; ``params`` of the
    whole model."""
    narrow, root = ("batch", "seq", "per_layer"), math.sqrt(cfg.per_layer_size)

    def inputs(own: Params, columns: int) -> Array:
        since = tokens.shape[1] - columns
        said = linear(own["per_layer_context"], x[:, since:], "bsd,dp->bsp", ("embed", "per_layer"), narrow)
        said = normalize(params["embed"]["per_layer_norm"], said * cfg.hidden_size**-0.5, cfg)
        found = look_up(own["per_layer_tokens"]["embedding"].astype(x.dtype), tokens[:, since:])
        return (said + found * jnp.asarray(root, x.dtype)) * 2**-0.5

    def add(own: Params, behind: Array) -> Array:
        gate = activate(linear(own["per_layer_gate"], behind, "bsd,dp->bsp", ("embed", "per_layer"), narrow))
        y = gate * inputs(own, behind.shape[1])
        y = linear(own["per_layer_out"], y, "bsp,pd->bsd", ("per_layer", "embed"), ("batch", "seq", "hidden"))
        return normalize(own["post_norm"], y, cfg)

    return add


def look_up(table: Array, tokens: Array) -> Array:
    """Rows ``tokens`` i32[B, S] of ``table`` [vocabulary, P]: [B, S, P]. Where fsdp splits the vocabulary, each device
    looks up its own part of it for the tokens of all devices that share the table, and what they find is summed and
    scattered back; backward, gradients are gathered.

    Split over P instead, less would be sent. But a TPU keeps 128 features in a row: where fsdp left 16 of them, it took
    eight times the memory to update such a table."""
    if not is_split(table):
        return table.at[tokens].get(out_sharding=spec("batch", "seq", "per_layer"))
    axes, rows, columns = (tuple(mesh_axes(name)) for name in ("vocab_of_layer", "batch", "seq"))
    rows, columns = (tuple(axis for axis in some if axis in axes) for some in (rows, columns))
    rest = tuple(axis for axis in axes if axis not in rows + columns)

    def own(table: Array, tokens: Array) -> Array:
        size = table.shape[0]
        at = gather_over(gather_over(tokens, rows, 0), columns, 1) - jax.lax.axis_index(axes) * size
        here = (at >= 0) & (at < size)
        found = jnp.where(here[..., None], table.at[jnp.where(here, at, 0)].get(mode="promise_in_bounds"), 0)
        return jax.lax.psum(scatter_over(scatter_over(found, rows, 0), columns, 1), rest)

    given = layout(table), spec("batch", "seq")
    return jax.shard_map(own, in_specs=given, out_specs=spec("batch", "seq", "per_layer"), check_vma=False)(
        table, tokens
    )
