"""What TPU chips can do at best, as their maker publishes it: what a plan measures a program against.

All numbers are of a chip, whatever number of devices JAX shows on it. Read in November 2026 on
https://cloud.google.com/tpu/docs/ (pages v4, v5e, v5p, v6e, tpu7x, "System architecture"), but for the interconnect of
v4, which is that of https://jax-ml.github.io/scaling-book/tpus (6 links of 45 GB/s). ``dcn`` is on the pages v5p and
tpu7x (50 and 100 Gbit/s a chip, v6e likewise) and v5e (6.4 Tbit/s a pod of 256); of v4 none is published.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from jaxrlhf.tpu.slices import GENERATIONS


class Chip(NamedTuple):
    """Peaks of one chip. ``ici`` is one way, half of what is published as bidirectional: what a chip can receive."""

    name: str  # as topologies are called: v5e:8x8
    flops: float  # bfloat16, a second
    bandwidth: float  # HBM bytes a second
    ici: float  # bytes a second over all links
    dcn: float | None  # bytes a second between slices, over the data-center network; None: not published
    options: Mapping[str, str] = MappingProxyType({})  # of the compiler's topology, where its default is another

    @property
    def hbm(self) -> float:
        """Bytes."""
        return GENERATIONS[self.name].hbm_gb * GIB


GIB = 2**30
CHIPS = {
    chip.name: chip
    for chip in (
        # megacore: both cores of a chip are one device, as they are on a machine
        Chip("v4", 275e12, 1200e9, 270e9, None, {"chip_config_name": "megacore"}),
        Chip("v5e", 197e12, 819e9, 200e9, 3.125e9),
        Chip("v5p", 459e12, 2765e9, 600e9, 6.25e9),
        Chip("v6e", 918e12, 1638e9, 400e9, 12.5e9),
        Chip("tpu7x", 2307e12, 7380e9, 600e9, 12.5e9),  # two devices a chip
    )
}
