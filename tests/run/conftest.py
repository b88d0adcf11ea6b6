from pathlib import Path

import jax
import pytest

from jaxrlhf.run import build
from jaxrlhf.sharding import make_mesh
from tests.support import runs
from tests.test_minimal import write_models


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory) -> Path:
    """Hugging Face folders of a language model (lm) and a reward model (scalar)."""
    made = tmp_path_factory.mktemp("models")
    write_models(made, runs.text(root))
    return made


@pytest.fixture
def built_on_one_device(monkeypatch) -> None:
    """Runs train on one of the eight devices; what they saved is exported from all."""
    monkeypatch.setattr(build, "make_mesh", lambda cfg, *_: make_mesh(cfg, jax.devices()[:1]))
