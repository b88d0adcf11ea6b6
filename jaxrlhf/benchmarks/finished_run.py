"""A finished run, read for what a benchmark measures: its state, what its reward models say of rows, and how likely its
policy holds their tokens."""

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrlhf.algorithms.grading import members_of
from jaxrlhf.config.load import load
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.data.encode import encode_demonstration
from jaxrlhf.evaluate.against_reference import PolicyEvaluation
from jaxrlhf.models.heads import lm_logits
from jaxrlhf.models.transformer import Runtime, forward
from jaxrlhf.run import checkpoint
from jaxrlhf.run.build import Run, build
from jaxrlhf.run.initial_state import abstract_state, initial_state
from jaxrlhf.run.kept_programs import shared
from jaxrlhf.run.saved_run import find_step
from jaxrlhf.run.transfer import put
from jaxrlhf.sharding import current
from jaxrlhf.types import Ask, Sequences, TrainState

ROWS = 256  # that are scored at a time


def opened(run_dir: Path) -> tuple[Run, TrainState]:
    """(the run made ready, its last state); use them under ``sharding.current(ready.mesh)``."""
    ready = build(resolve_config(load(run_dir / "config.yaml")), keep=False)
    with current(ready.mesh):
        return ready, checkpoint.restore(str(run_dir), find_step(str(run_dir)), abstract_state(ready))


def member_scores(run_dir: Path, rows: Any) -> np.ndarray:
    """f32[members, rows]: what each reward model of a run gives to each of ``rows``, Sequences of NumPy arrays."""
    ready, state = opened(run_dir)
    asks = [Ask(role, "scores") for role in members_of(ready.recipe.nets)]
    read = lambda trees, part: ready.recipe.nets.read(trees, part, *asks)
    found = []
    with current(ready.mesh):
        for at in range(0, len(rows.tokens), ROWS):
            part: Sequences = put(ready.mesh, jax.tree.map(operator.itemgetter(slice(at, at + ROWS)), rows))
            program = shared("member scores", ready, lambda: jax.jit(read), part)
            found.append(jax.device_get(program(state.trees, part)))
    return np.concatenate(found, axis=1)


def played(cfg: Config, samples: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The conversations of the policy that ``cfg`` starts from, in its environment, ``samples`` about each held-out
    prompt, as rows of samples.jsonl; and what is measured of them."""
    ready = build(resolve_config(cfg), keep=False)
    with current(ready.mesh):
        policy = PolicyEvaluation(ready, judge=False, samples=samples)
        found = policy.run(initial_state(ready))
        return found.rows, policy.metrics(found)


def token_ranks(run_dir: Path, rows: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """i32[response tokens] for each of ``rows``, records with ``prompt`` and ``response``: which rank each token of the
    response, and the EOS behind it, has in the policy's distribution there. Of a policy with weights of its own."""
    ready, state = opened(run_dir)
    cfg, encode = ready.configs["policy"], lambda row: encode_demonstration(row, ready.tokenizer, "response")
    encoded = [encode(row) for row in rows]
    tokens, valid = np.zeros((2, len(rows), max(len(one.tokens) for one in encoded)), np.int32)
    for at, one in enumerate(encoded):
        tokens[at, : len(one.tokens)], valid[at, : len(one.tokens)] = one.tokens, 1

    read = lambda params, tokens, valid: lm_logits(params, cfg, forward(params, cfg, tokens, valid, Runtime()))
    with current(ready.mesh):
        there = put(ready.mesh, (tokens, valid))
        logits = np.asarray(shared("logits", ready, lambda: jax.jit(read), *there)(state.trees.of("policy"), *there))
    ranks = ranks_in(logits[:, :-1], tokens[:, 1:])
    return [row[: len(mask) - 1][mask[1:]] for row, (_, mask, *_) in zip(ranks, encoded, strict=True)]


def ranks_in(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """i32[B, S]: 1 where no token has a larger logit than the token itself; logits f32[B, S, V], tokens i32[B, S]."""
    own = np.take_along_axis(logits, tokens[..., None], axis=-1)
    return 1 + (logits > own).sum(-1, dtype=np.int32)
