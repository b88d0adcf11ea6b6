"""A TPU slice that is not here: devices that programs can be compiled for, and nothing can run on."""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax

from jaxrlhf.chips import CHIPS, Chip
from jaxrlhf.config_errors import ConfigError, one_line, suggest

# libtpu looks for the TPU it is on, and says at length that there is none; what it is told here changes no topology
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is opened, so nothing collides
}


class Slice(NamedTuple):
    """One or more slices of a topology."""

    name: str
    chip: Chip
    chips: int  # of all slices
    slices: int
    devices: list[Any]  # compile-only

    @property
    def devices_per_chip(self) -> int:
        return len(self.devices) // self.chips

    def __str__(self) -> str:
        each = self.devices_per_chip
        slices = f"{self.slices} x " if self.slices > 1 else ""
        return f"{slices}{self.name}: {self.chips} chips" + (f", {each} devices each" if each > 1 else "")


def find_slice(name: str, slices: int = 1) -> Slice:
    """The slice called "v5e:8x8": a chip of chips.CHIPS and its layout, in chips.

    Raises ConfigError, in one line, for one that there is not, and where libtpu is not installed."""
    shape = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
    if not shape or shape.group(1) not in CHIPS:
        near = suggest(name.partition(":")[0], list(CHIPS))
        raise ConfigError(f"--topology: {name}: expected a chip and its layout, as in v5e:8x8; {near}")
    if slices < 1:
        raise ConfigError(f"--slices: {slices}: expected 1 or more; nearest: 1")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError('jaxrlhf plan: libtpu, which compiles for TPUs, is not here; pip install "jaxrlhf[plan]"')
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    chip, layout = CHIPS[shape.group(1)], [int(size) for size in shape.group(2).split("x")]
    more = {**chip.options} | ({"num_slices": slices} if slices > 1 else {})
    try:
        found = topologies.get_topology_desc(topology_name=name, platform="tpu", **more)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f"--topology: {name}: {one_line(error)}; some that there are: {', '.join(chip.layouts)}"
        ) from None
    return Slice(name, chip, slices * math.prod(layout), slices, list(found.devices))
