"""Cases lie on one device of the suite's eight."""

import jax
import pytest

from jaxrlhf.benchmarks import case
from jaxrlhf.sharding import make_mesh


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(case, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
