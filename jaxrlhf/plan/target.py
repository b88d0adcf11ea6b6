"""A TPU slice that is not here: devices that programs can be compiled for, and nothing can run on."""

import importlib.util
import os
from typing import Any, NamedTuple

import jax

from jaxrlhf.errors import ConfigError, one_line
from jaxrlhf.tpu.peaks import CHIPS, Chip
from jaxrlhf.tpu.slices import find_slice

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


class Target(NamedTuple):
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


def find_target(name: str, slices: int = 1) -> Target:
    """The slice called ``name``, by any of its names: see tpu.slices.find_slice.

    Raises ConfigError, in one line, for one that there is not, and where libtpu is not installed."""
    try:
        each = find_slice(name)
    except ValueError as error:
        raise ConfigError(f"--topology: {error}") from None
    if slices < 1:
        raise ConfigError(f"--slices: {slices}: expected 1 or more; nearest: 1")
    chip = CHIPS[each.generation.name]
    if slices > 1 and chip.dcn is None:
        raise ConfigError(f"--slices: {slices}: how fast {chip.name} slices are joined is not published; nearest: 1")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError('jaxrlhf plan: libtpu, which compiles for TPUs, is not here; pip install "jaxrlhf[plan]"')
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    from jax.experimental.topologies import get_topology_desc

    more = {**chip.options} | ({"num_slices": slices} if slices > 1 else {})
    try:
        found = get_topology_desc(topology_name=each.topology, platform="tpu", **more)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"--topology: {name}: {one_line(error)}") from None
    return Target(each.topology, chip, slices * each.chips, slices, list(found.devices))
