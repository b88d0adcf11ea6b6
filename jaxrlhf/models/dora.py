"""DoRA: adapters whose directions and magnitudes learn apart (Liu et al. 2024, arXiv:2402.09353).

    y = (x W + x A B) m / c,  c = ||W + A B|| of each output, over the inputs (equation 5)

c is not differentiated (section 4.3). m starts as ||W||, so that a new adapter computes what its base does. What learns
is m - ||W||: it starts at 0 whatever the base is, and an adapter of zeros is the base alone. B holds alpha / rank here.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrlhf.models.linear import DORA_SCALE, LORA_A, LORA_B, MAGNITUDE, layout
from jaxrlhf.models.quantized import Packed, unpacked
from jaxrlhf.sharding import explicit
from jaxrlhf.types import Array, Params

# c^2 is a sum whose terms may cancel: of these float32 knows about so much. A smaller c would be rounding alone.
RESOLUTION = 1e-6


def with_scales(maps: Mapping[str, Params]) -> Params:
    """The linear maps of one stack of layers, with m / c, f32[layers, outputs], in place of the magnitude where there
    is one."""
    learns = lambda one: isinstance(one, dict) and MAGNITUDE in one
    return {name: with_scale(one) if learns(one) else one for name, one in maps.items()}


def with_scale(params: Params) -> Params:
    """A linear map with m / c, computed a layer at a time, so that one quantised kernel alone is wide. Where c is 0,
    nothing has a direction, and the scale is 1."""
    arrays = jax.lax.stop_gradient((params["kernel"], params[LORA_A], params[LORA_B]))
    of_base, of_both = jax.lax.map(lambda layer: both_norms(*layer), arrays)
    inverse = jnp.where(of_both > 0, 1 / jnp.where(of_both > 0, of_both, 1), 0)
    rest = {name: x for name, x in params.items() if name != MAGNITUDE}
    # 1 to the bit where A B and the learned part of m are 0
    return rest | {DORA_SCALE: 1 + ((of_base - of_both) + params[MAGNITUDE].astype(jnp.float32)) * inverse}


def both_norms(kernel: Array | Packed, a: Array, b: Array) -> tuple[Array, Array]:
    """(||W||, ||W + A B||), f32[outputs], of one layer's kernel [inputs, outputs], A [inputs, rank], B [rank, outputs].

    W + A B is never there: of an output j, c^2 = ||W_j||^2 + B_j . (2 A^T W_j + A^T A B_j)."""
    kernel, a, b = (unpacked(x, jnp.float32) for x in (kernel, a, b))
    ins = a.ndim - 1
    every = tuple(range(ins))
    where, square = None, None
    if explicit():  # each device has its part of the inputs, and the parts are summed
        parts = layout(kernel).partitions
        a = jax.sharding.reshard(a, PartitionSpec(*parts[:ins], None))
        where, square = PartitionSpec(None, *parts[ins:]), PartitionSpec(None, None)
        b = jax.sharding.reshard(b, where)
    product = functools.partial(jax.lax.dot_general, precision=jax.lax.Precision.HIGHEST)
    across = product(a, kernel, ((every, every), ((), ())), out_sharding=where)
    within = product(product(a, a, ((every, every), ((), ())), out_sharding=square), b, (((1,), (0,)), ((), ())))
    own, added = squares(kernel, ins), (b * within).sum(0)
    both = jnp.maximum(own + 2 * (b * across).sum(0) + added, RESOLUTION * (own + added))
    return jnp.sqrt(own), jnp.sqrt(both)


def squares(kernel: Array, ins: int) -> Array:
    """Of each output of one layer's kernel the sum of its squared weights."""
    return jnp.square(kernel).sum(tuple(range(ins)))


@functools.partial(jax.jit, static_argnums=1)
def base_norms(kernel: Array | Packed, ins: int) -> Array:
    """||W|| f32[layers, outputs] of a stacked kernel with ``ins`` axes of inputs."""
    return jax.lax.map(lambda layer: jnp.sqrt(squares(unpacked(layer, jnp.float32), ins)), kernel)


def moved(own: Params, base: Params, other: Params) -> Params:
    """The leaves ``own`` of an adapter on ``base`` with the same magnitudes m on ``other``."""

    def over(own: Params, base: Params, other: Params) -> Params:
        found = {name: over(x, base[name], other[name]) for name, x in own.items() if isinstance(x, dict)}
        if MAGNITUDE in own:
            ins = own[LORA_A].ndim - 2
            change = base_norms(base["kernel"], ins) - base_norms(other["kernel"], ins)
            found[MAGNITUDE] = own[MAGNITUDE] + change
        return own | found

    return own | {"layers": over(own["layers"], base["layers"], other["layers"])} if "layers" in own else own
