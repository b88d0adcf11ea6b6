"""How much memory this process and its devices have used so far."""

import contextlib
import os
import resource
import sys
from collections.abc import Sequence
from typing import Any

import jax

UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
GIB = 2**30


def free(devices: Sequence[Any]) -> int | None:
    """Bytes that are free on the fullest of these devices of this process, of CPUs on each of as many; None where it is
    not known."""
    if devices and devices[0].platform == "cpu":
        with contextlib.suppress(ValueError, OSError):
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
        return None
    stats = [device.memory_stats() or {} for device in devices]
    known = [one["bytes_limit"] - one.get("bytes_in_use", 0) for one in stats if "bytes_limit" in one]
    return min(known, default=None)


def used() -> dict[str, float]:
    """The peaks as metrics, in GiB: of the process, and of its fullest device where one keeps account (no CPU does)."""
    found = {"memory/host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT / GIB}
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    return found | ({"memory/device_peak": max(peaks) / GIB} if any(peaks) else {})
