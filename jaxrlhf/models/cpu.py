"""What is computed in another way on a CPU, and why. Results differ by rounding only.

The core asks these functions by name. Two more rules for CPUs stay where they are computed: ops.logprobs.pick (a gather
in place of a comparison) and linear.by_output (the product behind ``decodes_by_output``).
"""

from jaxrlhf.models.attention.kernels import Hardware
from jaxrlhf.sharding import split_over

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
