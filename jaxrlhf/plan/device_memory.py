"""The memory of the devices here, and what is refused because it can never fit into it."""

import contextlib
import math
import os
from typing import Any, NamedTuple

import jax

from jaxrlhf.config.batch import columns_of, rows_of
from jaxrlhf.errors import ConfigError
from jaxrlhf.run.build import Run
from jaxrlhf.run.initial_state import abstract_state
from jaxrlhf.sharding import current
from jaxrlhf.tpu.peaks import GIB


class Room(NamedTuple):
    """Bytes that a device has, or that all devices share."""

    bytes: int
    shared: bool
    name: str


def room_of(device: Any) -> Room | None:
    """The memory of the device; of CPUs that of the machine. None where it is not known."""
    if device.platform == "cpu":
        with contextlib.suppress(ValueError, OSError):
            return Room(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), True, "of the machine")
        return None
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return Room(limit, False, f"of a {device.device_kind}") if limit else None


def need_room(ready: Run) -> None:
    """Raises ConfigError, before anything is allocated, where the state or the token ids of a batch alone are more than
    the devices have: a lower bound of what training takes."""
    need_room_for_batch(ready)
    with current(ready.mesh):
        planned = abstract_state(ready)
    trees = {**planned.params, **planned.slow}
    largest = max(trees, key=lambda role: bytes_on_device(trees[role]))
    refuse(ready, f"models.{largest}", "weights and moments of the run", bytes_on_device(planned))


def need_room_for_batch(ready: Run) -> None:
    """Raises ConfigError where the token ids of one iteration's rows alone do not fit."""
    rows, devices = rows_of(ready.resolved).items(), ready.mesh.devices.size
    ids = sum(columns_of(ready.cfg, field, count, False) for field, count in rows)
    refuse(ready, "batch", "the token ids of a batch", 4 * ids // devices)  # int32


def refuse(ready: Run, key: str, what: str, need: int) -> None:
    """Raises ConfigError where ``need`` bytes a device are more than this process's devices have."""
    mine = [device for device in ready.mesh.devices.flat if device.process_index == jax.process_index()]
    room = room_of(mine[0]) if mine else None
    if room is None:
        return
    total, each = (need * len(mine), "") if room.shared else (need, " a device")
    if total > room.bytes:
        raise ConfigError(
            f"{key}: {what} alone are {total / GIB:,.1f} GiB{each}, more than the {room.bytes / GIB:.1f} GiB "
            f"{room.name}; expected smaller sizes, or more devices"
        )


def bytes_on_device(tree: Any) -> int:
    """Bytes of the parts of its arrays on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
