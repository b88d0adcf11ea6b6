"""Held-out evaluation: what the algorithm measures on data that it never learned from, during a run and after it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import checkpoint
from jaxrlhf.algorithms import find
from jaxrlhf.algorithms.rm import score_pairs
from jaxrlhf.build import Run, abstract_state, build
from jaxrlhf.config import ROWS_KEY, Config, load
from jaxrlhf.feed import KIND_OF, held_out, put
from jaxrlhf.generate import GenerateConfig
from jaxrlhf.step import make_evaluation
from jaxrlhf.types import Mean, Sequences, TrainState


class Result(NamedTuple):
    """One evaluation."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]  # prompt, response, score, split


class HeldOut:
    """The held-out batches of a run and the program that evaluates on them."""

    def __init__(self, ready: Run, size: int | None = None):
        cfg = ready.cfg
        self.ready, self.size = ready, size or cfg.eval.size
        field = ready.algorithm.batch(cfg.algorithm)[0]
        self.kind = KIND_OF[field]
        rows = min(getattr(cfg.batch, ROWS_KEY[field]), self.size)
        self.batches = held_out(ready, self.kind, self.size, rows)
        self.program = jax.jit(make_evaluation(ready.recipe))

    def run(self, state: TrainState) -> Result | None:
        """Metrics over all held-out batches, and the first sampled responses. None without held-out data."""
        if not self.batches:
            return None
        total: dict[str, Mean] = {}
        samples: list[dict[str, Any]] = []
        for host in self.batches:
            means, sequences = self.program(state, put(self.ready.mesh, host.batch))
            means = jax.device_get(means)
            total = {name: total[name] + mean if name in total else mean for name, mean in means.items()}
            if sequences is not None:
                samples += sample_rows(self.ready, sequences, host.counts["rows"], "eval")
        metrics = {name: float(mean.total) / max(float(mean.count), 1e-8) for name, mean in total.items()}
        return Result(metrics, samples)


def sample_rows(ready: Run, sequences: Sequences, count: int, split: str) -> list[dict[str, Any]]:
    """The first ``count`` rows as text: prompt, response, score, split."""
    rows = jax.tree.map(lambda x: np.asarray(jax.device_get(x))[:count], sequences)
    decode = lambda ids: ready.tokenizer.decode(ids, skip_special_tokens=True)
    texts = []
    for i in range(len(rows.tokens)):
        prompt = rows.tokens[i][rows.valid[i] & ~rows.response_mask[i]]
        row = {"prompt": decode(prompt), "response": decode(rows.tokens[i][rows.response_mask[i]])}
        if rows.scores is not None:
            row["score"] = round(float(rows.scores[i]), 4)
        texts.append(row | {"split": split})
    return texts
