"""What `jaxrlhf generate` writes, for tests of what is served."""

from functools import cache
from pathlib import Path

import jax
import pytest

from jaxrlhf.generate.config import GenerateConfig
from jaxrlhf.serve import writer
from jaxrlhf.serve.writer import Response, Writer
from jaxrlhf.sharding import make_mesh


@cache
def kept_writer(folder: Path, cfg: GenerateConfig, seed: int, samples: int) -> Writer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        return Writer(str(folder), cfg, seed, samples, width=256)


def generated(folder: Path, prompt: str, cfg: GenerateConfig, seed: int = 0, samples: int = 1) -> list[Response]:
    """The responses to a prompt, on one device."""
    (responses,) = kept_writer(folder, cfg, seed, samples)([{"prompt": prompt}])
    return responses
