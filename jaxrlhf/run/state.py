"""The training state: made from parameters, described without making it, and moved from one head to another."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.lora import init_adapter
from jaxrlhf.models.parameters import Leaf, draw_table, init
from jaxrlhf.models.quantized import Quantization, is_quantized, pack, packed_tree
from jaxrlhf.sharding import concrete
from jaxrlhf.types import Array, Head, Params, Role, TrainState

draw = jax.jit(init, static_argnums=(0, 1, 3))  # one program for all seeds and for all runs of a process
draw_adapter = jax.jit(init_adapter, static_argnums=(0, 1))
pack_jit = jax.jit(pack, static_argnums=(1, 2))


def new_state(
    seed: int,
    params: dict[Role, Params],
    slow: dict[Role, Params],
    optimizers: Mapping[Role, optax.GradientTransformation],
    controls: dict[str, Array],
) -> TrainState:
    """The state at step 0. Optimizer moments are laid out as the parameters are."""
    opt_state = {role: jax.jit(optimizer.init)(params[role]) for role, optimizer in optimizers.items()}
    return TrainState(jnp.int32(0), jnp.int32(seed), params, slow, opt_state, controls)


def abstract_params(cfg: ModelConfig, head: Head, dtype, mesh) -> Params:
    """Shapes, dtypes and layouts of a model's parameters on ``mesh`` (which is the current one), nothing allocated."""
    return concrete(jax.eval_shape(lambda: init(cfg, head, jax.random.key(0), dtype)), mesh)


def abstract_table(table: dict, dtype, mesh) -> Params:
    """``abstract_params`` of the Leafs in ``table``."""
    return concrete(jax.eval_shape(lambda: draw_table(table, jax.random.key(0), dtype)), mesh)


def abstract_base(table: dict, kind: Quantization | None, dtype, mesh) -> Params:
    """``abstract_table`` of a base whose layers are quantised."""
    make = lambda: packed_tree(draw_table(table, jax.random.key(0), dtype), table, kind)
    return concrete(jax.eval_shape(make), mesh)


def pack_leaf(name: str, leaf: Leaf, x: Array, kind: Quantization | None) -> Any:
    """The parameter ``x`` as a base holds it; where it is quantised, the wide array is deleted."""
    if kind is None or not is_quantized(name, leaf):
        return x
    packed = jax.block_until_ready(pack_jit(x, leaf, kind))
    x.delete()
    return packed


def describe_state(
    params: dict[Role, Params],
    slow: dict[Role, Params],
    optimizers: Mapping[Role, optax.GradientTransformation],
    controls: Callable[[], dict[str, Array]],
    mesh,
) -> TrainState:
    """``new_state`` of abstract parameters: what a checkpoint is restored into."""
    make: Callable = lambda params, slow: new_state(0, params, slow, optimizers, controls())
    return concrete(jax.eval_shape(make, params, slow), mesh)


def new_head(cfg: ModelConfig, head: Head, key: Array, dtype, zero: bool) -> Params:
    """A head on a trunk ("bare", "action") as parameters.init would have it, or at 0 (``zero``: a value model that
    knows nothing)."""
    params = draw(cfg, head, key, dtype)
    return jax.tree.map(jnp.zeros_like, params) if zero else params


def change_head(params: Params, cfg: ModelConfig, old: Head, new: Head, key: Array, zero: bool = False) -> Params:
    """The same trunk under another head; a new one is a new_head.

    Raises ValueError where a language-model head is wanted that the trunk does not hold (scalar to untied lm)."""
    if (new, old) in (("bare", "scalar"), ("action", "action")):
        return {"head": params["head"]}
    if old == new:
        return params
    trunk = {name: part for name, part in params.items() if name != "head"}
    if new == "lm":
        if not cfg.tie_embeddings:
            raise ValueError("a scalar-headed model with untied embeddings has no language-model head to start from")
        return trunk
    return trunk | new_head(cfg, "bare", key, jax.tree.leaves(trunk)[0].dtype, zero)


def copy(params: Params) -> Params:
    """New buffers: a reference that aliases the policy would be donated with it."""
    return jax.tree.map(jnp.copy, params)
