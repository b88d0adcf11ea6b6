"""Freed memory on CPUs: glibc keeps it for the next program, instead of giving it back to the system."""

import ctypes
import gc
import os
import sys
from collections.abc import MutableMapping

from jaxrlhf.hosts.platforms import present

# numbers of glibc's malloc.h: nothing is mapped apart, and the end of the heap is never given back
KEPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}
# only the main thread's heap can hold what is large, so that all share it; but threads that compile then wait for each
# other (2 of them took 1.3 times as long), so that many do not
ONE_HEAP, FEW_CORES = {"M_ARENA_MAX": (-8, 1)}, 4
CHOSEN = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_")  # how variables begin by which a user says it otherwise


def keep_memory(environ: MutableMapping[str, str]) -> bool:
    """Have malloc keep what is freed for whoever asks next; False where it isn't glibc's, the user has chosen, or there
    is an accelerator. Call it before NumPy is imported: its threads have heaps of their own.

    On CPUs a program's temporaries are allocated anew each time it runs. glibc would take them from the system and give
    them back, and each of their pages be zeroed again: 1.5 million faults, and 6 of 32 seconds of both cores, an
    iteration of GRPO with a model of 135M parameters."""
    if sys.platform != "linux" or any(name.startswith(CHOSEN) for name in environ) or present(environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    few = (os.cpu_count() or 1) <= FEW_CORES
    asked = KEPT | (ONE_HEAP if few else {})
    kept = mallopt is not None and all(mallopt(number, value) for number, value in asked.values())
    heap["shared"] = kept and few
    return kept


heap = {"shared": False}  # whether keep_memory made one of all threads' heaps
BLOCKS = [2**power for power in range(26, 8, -1)]  # bytes: from 64 MB to 512, less than which malloc need not look for


class Heap(ctypes.Structure):
    """glibc's struct mallinfo2, of the main thread's heap, in bytes."""

    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]

    @property
    def holes(self) -> int:
        """What is free between blocks in use."""
        return self.fordblks - self.keepcost


def fill_holes() -> int:
    """Take the free blocks between those in use for good, their pages given back to the system: bytes that were taken.

    Call it once programs are compiled: compiling leaves hundreds of megabytes in tens of thousands of holes, which
    malloc goes through, in one list by size and under one lock, for whatever a product asks for. An iteration of GRPO
    (4 layers of 256) took 1.08 of the time of one whose programs were read from the cache (3.5 % of all cycles in
    malloc, 0.2 % there) and 1.00 after this. 0 where ``keep_memory`` did not make one heap of all."""
    libc = ctypes.CDLL(None)
    if not heap["shared"] or getattr(libc, "mallinfo2", None) is None:
        return 0
    libc.mallinfo2.restype, libc.sbrk.restype, libc.malloc.restype = Heap, ctypes.c_void_p, ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    gc.collect()
    before = libc.mallinfo2().holes
    libc.malloc_trim(0)
    for size in BLOCKS:
        behind = libc.sbrk(0) - libc.mallinfo2().keepcost  # all blocks: what is free from here on is one piece
        while (block := libc.malloc(size)) and block < behind:
            pass
        libc.free(block)
    return before - libc.mallinfo2().holes
