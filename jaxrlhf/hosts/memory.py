"""How much memory this process and its devices have used so far."""

import resource
import sys

import jax

UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
GIB = 2**30


def used() -> dict[str, float]:
    """The peaks as metrics, in GiB: of the process, and of its fullest device where one keeps account (no CPU does)."""
    found = {"memory/host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT / GIB}
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    return found | ({"memory/device_peak": max(peaks) / GIB} if any(peaks) else {})
