"""Compiler flags of each platform, and the cache of compiled programs. The flags must be in the environment before JAX
makes its backends.

XLA reads XLA_FLAGS and libtpu LIBTPU_INIT_ARGS, and both end the process over a name that they don't know: tests start
them with every flag here (jaxlib 0.10.2, libtpu 0.0.52). A flag that the user has set stays as it is.
"""

import os
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from jaxrlhf.hosts.compiled_cache import verify_entries
from jaxrlhf.hosts.platforms import present


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
# weights are gathered in a scan; they are said so that a run does not depend on the defaults of a version
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
VMEM = "xla_tpu_scoped_vmem_limit_kib"
# device_kind -> half of the KiB of fast memory (VMEM) of its core. XLA gives a fusion 16 MiB on v5e and 32 MiB on v6e,
# of which the products of wide experts (ragged_dot; 2,880 features) take 35 MiB. On v5p they fit
VMEM_OF_EXPERTS = {"TPU v5 lite": 65536, "TPU v6 lite": 65536}


def program_options(
    device_kind: str, experts: bool, environ: Mapping[str, str] = os.environ
) -> dict[str, str | bool] | None:
    """Compiler options of one program, of a model with ``experts`` or without, beside what the user has set."""
    if not experts or device_kind not in VMEM_OF_EXPERTS or VMEM in environ.get("LIBTPU_INIT_ARGS", ""):
        return None
    return {VMEM: str(VMEM_OF_EXPERTS[device_kind])}


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


def use_compilation_cache(least: float = 1.0) -> None:
    """Keep compiled programs between processes, where the user has not chosen a place for them, and verify them.
    ``least``: seconds of compilation from which a program is kept."""
    import jax

    if jax.config.values.get("jax_compilation_cache_dir") is None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/jaxrlhf/xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    verify_entries()


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
