"""A limit of memory for code that may ask for any amount."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

STATE = Path("/proc/self/statm")  # its first number: pages that the process has mapped


@contextlib.contextmanager
def at_most(more: int) -> Iterator[None]:
    """In this block the process gets ``more`` bytes of memory besides what it has; what asks for more is a MemoryError.
    Of all threads: nothing else of any size is to go on meanwhile. Systems without /proc have no limit."""
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    if not STATE.exists():
        yield
        return
    limit = int(STATE.read_text().split()[0]) * resource.getpagesize() + more
    if before != resource.RLIM_INFINITY:
        limit = min(limit, before)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, most))
