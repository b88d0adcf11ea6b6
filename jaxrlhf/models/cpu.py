"""What is computed in another way on a CPU, and why. Results differ by rounding only.

The core asks these functions by name. Two more rules for CPUs stay where they are computed: ops.logprobs.pick (a gather
in place of a comparison) and linear.by_output (the product behind ``decodes_by_output``).
"""

import jax
import jax.numpy as jnp

from jaxrlhf.models.attention.kernels import Hardware
from jaxrlhf.sharding import explicit, split_over
from jaxrlhf.types import Array

# Rows of a device. XLA's product of few rows is up to twice as fast with the weights on its left, each row of them read
# once and in order. With 64 rows, rollouts took 1.04 to 1.35 of the time.
FEW_ROWS = 32
# Layers. A shallow model compiles as fast without a scan, and updates in 0.8 to 0.9 of the time: copying what the scan
# keeps for the backward pass costs more than a layer's work.
SHALLOW = 12
# Columns of a micro-batch. Activations of more leave a core's caches (fastest at hidden sizes 128 to 576).
MICRO_BATCH_COLUMNS = 640


def decodes_by_output(rows: int, hardware: Hardware) -> bool:
    """Whether decoding ``rows`` rows reads kernels that begin with the axes of their result (linear.out_first)."""
    return hardware.platform == "cpu" and rows <= FEW_ROWS * split_over("batch")


def prompts_abreast(prompts: int, copies: int, hardware: Hardware) -> int:
    """How many prompts stand in a row while their responses are decoded, as decoding.abreast lays them out.

    Two on a CPU where each prompt has one response. For products with no more batch dimensions than (prompt, head), XLA
    transposes all keys for every token: 0.61 ms a layer and token in place of 0.25."""
    alone = copies == 1 and hardware.platform == "cpu"
    return 2 if alone and prompts % (2 * split_over("batch")) == 0 else 1


def writes_row_by_row(hardware: Hardware) -> bool:
    """Whether keys and values, which go to a column of each row's own, are written a row after the other.

    For one scatter XLA copies the whole cache: 270 ms a token (32 rows of 256 columns, 30 layers) in place of 1."""
    return hardware.platform == "cpu"


def scans_layers(num_layers: int, hardware: Hardware) -> bool:
    """Whether one compiled body serves all layers, where the run does not say."""
    return hardware.platform != "cpu" or num_layers > SHALLOW


def experts_in_blocks(hardware: Hardware) -> bool:
    """Whether the rows of each expert are multiplied block after block, not by ragged_dot.

    XLA:CPU lowers ragged_dot to a product of all rows with all experts: 16 times the work at 16 experts."""
    return hardware.platform == "cpu"


def not_before(x: Array, after: Array) -> Array:
    """The integers ``x``, as they are, where XLA must compute ``after`` first; on every platform.

    An optimization barrier says so, but XLA:CPU drops it before it merges what is equal and orders the operations: it
    would make wide numbers of the 4 or 8 bits of all layers at once, and keep them for the backward pass. There the
    lowest bits of one number of ``after`` are made 0 in a way that XLA does not see through, and joined to ``x``. In
    place of 7.5 layers a gradient then takes 1.6 beside its arguments, in 0.4 to 1 of the time."""
    device = jax.sharding.get_abstract_mesh().abstract_device  # None: no mesh is current
    platform = jax.default_backend() if device is None else device.platform
    return joined(x, after) if platform == "cpu" else jax.lax.optimization_barrier((x, after))[0]


def joined(x: Array, after: Array) -> Array:
    """``not_before`` on a CPU: each device waits for its own part of ``after``."""

    def one(x: Array, after: Array) -> Array:
        number = after[(0,) * after.ndim]
        bits = jax.lax.bitcast_convert_type(number, jnp.dtype(f"uint{8 * number.dtype.itemsize}")) & 127
        return x | jnp.minimum(bits.astype(jnp.int32), 0).astype(x.dtype)

    if not explicit():
        return one(x, after)
    own, other = (jax.typeof(part).sharding.spec for part in (x, after))
    return jax.shard_map(one, in_specs=(own, other), out_specs=own, check_vma=False)(x, after)
