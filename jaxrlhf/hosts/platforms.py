"""Which accelerators JAX may find on this machine, known before any backend is made."""

import glob
import importlib.util
import os
from collections.abc import MutableMapping
from pathlib import Path


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
