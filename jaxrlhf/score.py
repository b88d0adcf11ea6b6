"""An iteration whose scores only the host can compute: two programs, with the user's reward function between them."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.build import Run
from jaxrlhf.feed import fetch, put
from jaxrlhf.programs import compile_halves
from jaxrlhf.types import Batch, Metrics, Sequences, TrainState

Records = list[dict[str, Any]]


class Scored(NamedTuple):
    """Responses that the host has scored."""

    sequences: Sequences  # scores f32[B], laid out as rows; 0 in rows that fill up a batch
    seconds: float  # spent in the function


def score(ready: Run, sequences: Sequences, records: Records) -> Scored:
    """The run's reward function on this process's responses, special tokens left out.

    ``records``: those of this process's prompts, without the ones that fill up; the samples of a prompt are contiguous.
    Raises ValueError, in one line, where the function does not answer with numbers."""
    assert ready.reward_function is not None, "the reward model scores"
    rows = fetch((sequences.tokens, sequences.response_mask))
    each = ready.sampler.samples_per_prompt
    copies = [dict(record) for record in records for _ in range(each)]  # the function's own: it may change them
    decode = lambda ids: ready.tokenizer.decode(ids, skip_special_tokens=True)
    responses = [decode(tokens[mask]) for tokens, mask, _ in zip(*rows, copies)]
    scores = np.zeros(len(rows[0]), np.float32)
    started = time.perf_counter()
    if responses:  # a process may have none in the last batch of an evaluation
        scores[: len(responses)] = ready.reward_function(responses, copies)
    seconds = time.perf_counter() - started
    return Scored(sequences.replace(scores=put(ready.mesh, scores)), seconds)


def compile_scored(ready: Run, state: TrainState, batch: Batch) -> Callable:
    """(state, batch, records) -> (state, metrics, responses with their scores), compiled for the shapes given."""
    rollout, learn = compile_halves(ready, state, batch)

    def iteration(state: TrainState, batch: Batch, records: Records) -> tuple[TrainState, Metrics, Sequences]:
        sequences, seconds = score(ready, rollout.run(state, batch), records)
        state, metrics = learn.run(state, batch.replace(sequences=sequences))
        return state, metrics | {"time/rewards": seconds}, sequences

    return iteration
