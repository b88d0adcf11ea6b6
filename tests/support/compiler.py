"""The compiler of the tests: cheap where a program is run for milliseconds, the default where its output is tested."""

import os

import jax

# What counts is to compile: these flags take a third to a half of the time off. Small programs run as fast.
CHEAP = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
# compiler_options of a program that is tested as users compile it: its cost, or the bits that it computes
DEFAULT: dict[str, bool | int] = {"xla_backend_optimization_level": 3}
WITHOUT_EMITTERS: dict[str, bool | int] = {}
if jax.__version_info__ < (0, 11):  # JAX 0.12 ends the process over this flag, which it no longer has
    CHEAP += " --xla_cpu_use_fusion_emitters=false"
    DEFAULT["xla_cpu_use_fusion_emitters"] = True
    WITHOUT_EMITTERS["xla_cpu_use_fusion_emitters"] = False


def use_cheap_compiler() -> None:
    """For the CPU backend of this process, which reads the flags when it is made. libtpu, which is loaded later, ends
    the process over a flag of CPUs, so that they don't stay in the environment; runs.start passes them on."""
    given = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = CHEAP if given is None else f"{CHEAP} {given}"
    jax.devices("cpu")
    if given is None:
        del os.environ["XLA_FLAGS"]
    else:
        os.environ["XLA_FLAGS"] = given
