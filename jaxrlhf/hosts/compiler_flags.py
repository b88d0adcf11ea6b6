"""Compiler flags of each platform, in one place, and what becomes of freed memory. The flags must be in the environment
before JAX makes its backends.

XLA reads XLA_FLAGS and libtpu LIBTPU_INIT_ARGS, and both end the process over a name that they don't know: tests start
them with every flag here (jaxlib 0.10.2, libtpu 0.0.52). A flag that the user has set stays as it is.
"""

import ctypes
import gc
import glob
import importlib.util
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import NamedTuple


class Flag(NamedTuple):
    """``--name=value``, where it is read, and why it is set."""

    variable: str
    name: str
    value: str
    why: str


GPU = (
    Flag(
        "XLA_FLAGS",
        "xla_gpu_enable_latency_hiding_scheduler",
        "true",
        "gathers and sums between GPUs start early and run beside the matmuls; by default they are waited for",
    ),
)
GPU_DETERMINISTIC = (
    Flag(
        "XLA_FLAGS",
        "xla_gpu_deterministic_ops",
        "true",
        "scatters and autotuned matmuls add in one order: a resumed run has the bits of one that never stopped",
    ),
)
# libtpu 0.0.52 does both without being told, and nothing else that schedules collectives changed a program whose
# weights are gathered in a scan; they are said so that a run does not hang on the defaults of a version
TPU = (
    Flag(
        "LIBTPU_INIT_ARGS",
        "xla_tpu_enable_latency_hiding_scheduler",
        "true",
        "gathers and sums between chips start early and run beside the matmuls",
    ),
    Flag(
        "LIBTPU_INIT_ARGS",
        "xla_tpu_enable_async_collective_fusion",
        "true",
        "a gather is woven into the matmul that runs beside it, whose steps it shares",
    ),
)


def present(environ: MutableMapping[str, str]) -> set[str]:
    """The platforms, "gpu" and "tpu", that JAX has a plugin for here and is not told to leave alone.

    Nothing is loaded: a backend that is made has read its flags."""
    installed = lambda *names: any(importlib.util.find_spec(name) for name in names)
    found = {"gpu"} if installed("jax_cuda12_plugin", "jax_cuda13_plugin") else set()
    found |= {"tpu"} if installed("libtpu") else set()
    asked = {"gpu" if name == "cuda" else name for name in environ.get("JAX_PLATFORMS", "").split(",") if name}
    return found & asked if asked else found


# what GKE, Cloud TPU and their launchers say in the environment
TPU_VARIABLES = ("TPU_", "MEGASCALE_", "LIBTPU_", "PJRT_")
TPU_FILES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
GOOGLE, NETWORK_AND_DISK = "0x1ae0", {"0x0042", "0x001f"}  # PCI vendor; its devices that CPU machines have too
GPU_FILES = ("/dev/nvidia[0-9]*", "/dev/dxg")  # dxg: of Windows' Linux


def has_files(patterns: tuple[str, ...]) -> bool:
    return any(map(glob.glob, patterns))


def has_tpu(pci: str = "/sys/bus/pci/devices") -> bool:
    """Whether a TPU may be attached, by its device files or as a device of Google's on the PCI bus."""
    read = lambda file: Path(file).read_text().strip()
    devices = [os.path.dirname(file) for file in glob.glob(f"{pci}/*/vendor") if read(file) == GOOGLE]
    return has_files(TPU_FILES) or any(read(f"{device}/device") not in NETWORK_AND_DISK for device in devices)


def skip_absent_tpu(environ: MutableMapping[str, str]) -> bool:
    """Have JAX start on the CPU where libtpu is installed and the machine has neither a TPU nor a GPU that a plugin is
    installed for; whether that was so.

    JAX would load libtpu, which looks for a TPU for seconds and prints an error of five lines. Where JAX_PLATFORMS is
    set, or a variable of a TPU's, nothing is changed. Call it before JAX is imported."""
    found = present(environ)
    if environ.get("JAX_PLATFORMS") or "tpu" not in found or any(name.startswith(TPU_VARIABLES) for name in environ):
        return False
    if has_tpu() or ("gpu" in found and has_files(GPU_FILES)):
        return False
    environ["JAX_PLATFORMS"] = "cpu"
    return True


def set_flags(platforms: set[str], deterministic: bool, environ: MutableMapping[str, str]) -> list[Flag]:
    """Adds to ``environ`` the flags of ``platforms`` that it does not hold: those that were added."""
    wanted = [*(GPU if "gpu" in platforms else ()), *(TPU if "tpu" in platforms else ())]
    wanted += GPU_DETERMINISTIC if deterministic and "gpu" in platforms else ()
    added = []
    for flag in wanted:
        given = environ.get(flag.variable, "").split()
        if flag.name in {text.lstrip("-").partition("=")[0] for text in given}:
            continue
        environ[flag.variable] = " ".join([*given, f"--{flag.name}={flag.value}"])
        added.append(flag)
    return added


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


def use_compilation_cache() -> None:
    """Keep compiled programs between processes, where the user has not chosen a place for them."""
    import jax

    if jax.config.values.get("jax_compilation_cache_dir") is None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/jaxrlhf/xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


EXTRA = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}  # what JAX_PLATFORMS names -> our extra that installs its plugin


def prepare(deterministic: bool = False) -> None:
    """``set_flags`` for the platforms of this machine. Call it before anything asks JAX for its devices.

    Raises ValueError, in one line, for a platform in JAX_PLATFORMS that no plugin is installed for."""
    found = present(os.environ)
    for name in os.environ.get("JAX_PLATFORMS", "").split(","):
        if name in EXTRA and {"cuda": "gpu"}.get(name, name) not in found:
            raise ValueError(
                f"JAX_PLATFORMS: {name}: no plugin of JAX is installed for it; expected cpu, or "
                f"pip install 'jaxrlhf[{EXTRA[name]}]'"
            )
    set_flags(present(os.environ), deterministic, os.environ)
