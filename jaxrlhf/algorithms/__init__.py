"""The table of algorithms. To add one: a file with an ALGORITHM, a row here, a YAML, a test file."""

import importlib

from jaxrlhf.algorithms import dpo, grpo, ppo, rm, sft
from jaxrlhf.types import Algorithm

ALGORITHMS: dict[str, Algorithm] = {
    "sft": sft.ALGORITHM,
    "rm": rm.ALGORITHM,
    "ppo": ppo.ALGORITHM,
    "grpo": grpo.ALGORITHM,
    "dpo": dpo.ALGORITHM,
}


def find(name: str) -> Algorithm:
    """The record called ``name``: a row of ALGORITHMS, or ``package.module:NAME`` from outside the package.

    Raises KeyError for a name that is neither, ImportError or AttributeError where the module has no such record."""
    if ":" not in name:
        return ALGORITHMS[name]
    module, attribute = name.split(":", 1)
    return getattr(importlib.import_module(module), attribute)
