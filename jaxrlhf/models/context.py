"""The pass of a model over rows whose columns the mesh axis ``context`` splits.

Tokens, masks and what is computed of each token are whole on every device, as they are one number a token; what has
features is split. So a log-prob, which is about the token behind its state, is of the next column wherever that stands.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jaxrlhf.models.attention.context import column_order, in_order, spread, within_split_rows
from jaxrlhf.models.attention.kernels import choose_kernel
from jaxrlhf.models.config import MLP, ModelConfig
from jaxrlhf.models.experts import OWN
from jaxrlhf.models.transformer import (
    NO_ROUTING,
    Routing,
    Runtime,
    check_length,
    hidden_states,
    matching_heads,
    positions_of,
    product,
)
from jaxrlhf.sharding import constrain, split_over
from jaxrlhf.types import Array, Params


class SplitRows(NamedTuple):
    """Rows of ``size`` columns, padded to equal chunks that lie as attention.context.column_order says."""

    size: int
    devices: int

    @property
    def padded(self) -> int:
        chunks = 2 * self.devices
        return -(-self.size // chunks) * chunks

    def spread(self, x: Array, fill: int = 0) -> Array:
        """[B, size, ...] in order -> [B, padded, ...] as they lie, whole on every device."""
        behind = ((0, 0), (0, self.padded - self.size)) + ((0, 0),) * (x.ndim - 2)
        return spread(jnp.pad(x, behind, constant_values=fill), self.devices)

    def in_order(self, x: Array) -> Array:
        """[B, padded], a number for each column as they lie -> [B, size] in order, whole on every device."""
        return in_order(constrain(x, "batch", None), self.devices)[:, : self.size]

    def columns(self) -> Array:
        """i32[padded]: which column of the row stands where."""
        return jnp.asarray(column_order(self.padded, self.devices))


def split_rows(columns: int) -> SplitRows | None:
    """How the current mesh splits rows of so many columns; None: not at all."""
    devices = split_over("seq")
    return SplitRows(columns, devices) if devices > 1 else None


def forward_split(
    params: Params,
    cfg: ModelConfig,
    tokens: Array,
    segment_ids: Array,
    split: SplitRows,
    runtime: Runtime,
    routing: Routing = NO_ROUTING,
) -> Array:
    """Final hidden states [B, padded, D] of whole rows, columns as ``split`` has them: tokens, segment_ids i32[B, S].

    Raises ValueError as transformer.forward, and for a model with linear layers."""
    check_length(cfg, split.size)
    if (problem := refusal(cfg)) is not None:
        raise ValueError(f"mesh.context: {split.devices}: {problem}; nearest: 1")
    lay = lambda x: constrain(x, "batch", "seq", *(None,) * (x.ndim - 2))
    kernel = choose_kernel(runtime.attention, runtime.hardware, cfg, runtime.compute)
    padded = jnp.pad(segment_ids, ((0, 0), (0, split.padded - split.size)))
    how = product(cfg) | {"interpret": runtime.interpret, "gather_again": runtime.remat == "none"}
    attend_to = lambda kind, window: matching_heads(cfg, within_split_rows(kernel, padded, window, **how))
    routing = routing._replace(
        counted=lay(split.spread(segment_ids > 0)),
        kept=None if routing.kept is None else lay(split.spread(routing.kept, OWN)),
    )
    positions = lay(split.spread(positions_of(segment_ids)))
    return hidden_states(
        params, cfg, lay(split.spread(tokens)), positions, attend_to, no_recurrence, runtime, routing=routing
    )


def refusal(cfg: ModelConfig) -> str | None:
    """What keeps a model from being computed over split columns; None where nothing does."""
    if cfg.family == MLP:
        return "networks of observations have no columns to share"
    if "linear" in (cfg.layer_types or ()):
        return f"a {cfg.family} has linear layers, whose states pass from column to column"
    return None


def no_recurrence(*_, **__):
    """Stands for what linear layers begin with, where no model has any."""
    raise AssertionError("linear layers are refused")
