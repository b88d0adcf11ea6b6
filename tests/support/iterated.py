"""Iterations of a run's own programs, without its loop."""

from typing import Any

import jax

from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.run.build import build
from jaxrlhf.run.feed import Feed
from jaxrlhf.run.initial_state import initial_state
from jaxrlhf.run.programs import compile_programs
from jaxrlhf.run.scoring import joined
from jaxrlhf.run.transfer import fetch_all, put
from jaxrlhf.sharding import current, for_programs
from jaxrlhf.types import Sequences, TrainState, given


def iterated(
    cfg: Config, devices: int = 1, count: int = 1
) -> tuple[TrainState, dict[str, float], Sequences, list[dict[str, Any]]]:
    """The state, the last metrics, the last responses and the record of each, after ``count`` iterations on so many
    devices."""
    ready = build(resolve_config(cfg), jax.devices()[:devices], keep=False)
    feed = Feed(ready)
    with current(ready.mesh):
        state = for_programs(initial_state(ready), ready.mesh)
        one = joined(ready, compile_programs(ready, state, next(feed.shapes())))
        for _ in range(count):
            host, records = feed.next()
            state, metrics, sequences = one(state, put(ready.mesh, host), records)
        records = [record for record in records for _ in range(ready.sampler.samples_per_prompt)]
        return jax.device_get(state), jax.device_get(metrics), fetch_all(given(sequences, "sequences")), records
