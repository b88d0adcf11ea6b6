"""This machine: what it is, and what it reaches with nothing but matrix products, and nothing but memory traffic."""

import datetime
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SECONDS = 1.0  # of repetitions, about, of each


class Sizes(NamedTuple):
    """What is multiplied and moved: enough that handing it to the device takes no time beside it."""

    squares: tuple[int, ...]  # sides of the matrices
    stream: int  # float32 elements of an array, more than caches hold


CPU, ACCELERATOR = Sizes((1024, 2048, 3072), 2**26), Sizes((4096, 8192), 2**28)


def describe() -> dict[str, Any]:
    """What the numbers are of."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "platform": jax.devices()[0].platform,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def cpu_model() -> str:
    """As the kernel calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The git commit of this package's checkout, "+" behind it where files differ; None where there is no checkout."""
    where = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", where, *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    found = git("rev-parse", "--short=12", "HEAD")
    if found is None or git("ls-files", "--error-unmatch", __file__) is None:  # of another project, say, around a venv
        return None
    return found + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def peak_rss() -> int:
    """Bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_peak() -> int | None:
    """Bytes of device memory that were in use at most, on the fullest device; None where the backend does not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    return max(peaks, default=None)


def matmul_peak(dtype: str) -> float:
    """FLOPs a second of one device in products of square matrices of ``dtype``, the best size and repetition; at the
    precision that programs have by default."""
    product = jax.jit(jnp.matmul)
    best = 0.0
    for side in sizes().squares:
        x = jax.random.normal(jax.random.key(0), (side, side), dtype)  # of constants GPUs make more
        best = max(best, 2 * side**3 / fastest(lambda: product(x, x)))  # noqa: B023
    return best


def memory_bandwidth() -> float:
    """Bytes a second of one device that reads two large arrays and writes a third."""
    add = jax.jit(lambda a, b: a + 2 * b, donate_argnums=0)
    stream = sizes().stream
    held = [jnp.ones(stream, jnp.float32)]
    other = jnp.ones(stream, jnp.float32)

    def step() -> jax.Array:
        held[0] = add(held[0], other)
        return held[0]

    return 3 * 4 * stream / fastest(step)


def sizes() -> Sizes:
    return CPU if jax.default_backend() == "cpu" else ACCELERATOR


def fastest(step: Callable[[], jax.Array]) -> float:
    """Seconds of the fastest of repeated calls, the first (which compiles) left out."""
    jax.block_until_ready(step())
    found, end = [], time.perf_counter() + SECONDS
    while len(found) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        jax.block_until_ready(step())
        found.append(time.perf_counter() - started)
    return min(found)
