"""A policy that converses with an environment of text: rows token by token, limits, one width and several, stopped and
resumed."""

from pathlib import Path

import jax
import numpy as np
import pytest

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
from tests.support import conversing

START = 4  # columns of a prompt
ENDS = (0, 1, 2, 3, 4)  # tokens that end a response: EOS, and the stop texts a, b, c, d


def iterated(
    cfg: Config, devices: int = 1, count: int = 1
) -> tuple[TrainState, dict[str, float], Sequences, list[dict]]:
    """The state, metrics, conversations and their records after ``count`` iterations on so many devices."""
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("conversing")


@pytest.fixture(scope="module")
def conversed(folder):
    return iterated(conversing.config(folder, "ppo", **{"environment.arguments": {"price": 0.25}}))


def split(sequences: Sequences, row: int) -> list[tuple[bool, list[int]]]:
    """(by the policy, tokens) of each turn behind the prompt of a row."""
    columns = np.flatnonzero(sequences.valid[row, START:]) + START
    assert columns.tolist() == list(range(START, START + len(columns))), "a gap that is attended by nothing"
    turns: list[tuple[bool, list[int]]] = []
    for column in columns:
        own = bool(sequences.response_mask[row, column])
        if not turns or turns[-1][0] != own:
            turns.append((own, []))
        turns[-1][1].append(int(sequences.tokens[row, column]))
    return turns


def test_a_row_is_prompt_response_observation_response(conversed):
    """Row by row: what the environment showed, which tokens are the policy's, and where its rewards are."""
    _, metrics, rows, records = conversed
    letters, kinds = " " + conversing.LETTERS, set()
    for row, record in enumerate(records):
        assert [letters[t] for t in rows.tokens[row, :START][rows.valid[row, :START]]] == list(record["prompt"])
        turns = split(rows, row)
        whole = turns[0][1][-1] in ENDS  # else turn_tokens cut it
        assert [own for own, _ in turns] == ([True, False, True] if whole else [True])
        first = START + len(turns[0][1]) - 1
        assert rows.rewards[row, first] == -0.25
        if whole:
            assert "".join(letters[t] for t in turns[1][1]) == f"{record['secret']}>"
            right = letters[turns[2][1][0]] == record["secret"]
            last = START + sum(len(tokens) for _, tokens in turns) - 1
            assert rows.rewards[row, last] == float(right) and rows.scores[row] == right - 0.25
            assert rows.ended[row] == (turns[2][1][-1] in ENDS)
            kinds.add((right, bool(rows.ended[row])))
        else:
            assert len(turns[0][1]) == 4 and rows.scores[row] == -0.25 and not rows.ended[row]
            kinds.add((None, False))
    assert len(kinds) >= 3, f"only {kinds} came up"
    assert not rows.rewards[~rows.response_mask].any() and not rows.logprobs[~rows.response_mask].any()
    assert metrics["return/mean"] == pytest.approx(rows.scores.mean(), rel=1e-6)
    assert metrics["response/length_mean"] == pytest.approx(rows.response_mask.sum(1).mean())
    assert metrics["turns/cut"] == pytest.approx(1 - rows.ended.mean())
    shown = rows.valid[:, START:] & ~rows.response_mask[:, START:]
    assert metrics["turns/observation_tokens"] == pytest.approx(shown.sum(1).mean())
    assert 1 < metrics["turns/mean"] <= 2 and 0 <= metrics["environment/right"] <= 1


def test_log_probs_of_all_turns_are_those_of_a_forward_pass(conversed):
    assert conversed[1]["kl/sampler_mismatch"] < 1e-6


def test_what_is_sampled_depends_on_neither_the_widths_nor_the_other_rows(folder, conversed):
    """The same prompts in three widths, and half as many prompts: a token's noise is keyed by its row and place."""
    one = {"environment.arguments": {"price": 0.25}}
    rows = conversed[2]
    wide = iterated(conversing.config(folder, "ppo", **one, **{"environment.context_widths": 3}))[2]
    np.testing.assert_array_equal(wide.tokens, rows.tokens)
    np.testing.assert_array_equal(wide.response_mask, rows.response_mask)


@pytest.mark.parametrize(
    ("changes", "turns"),
    [
        ({"environment.max_turns": 1}, 1),  # a turn limit: nothing is shown behind the last response
        ({"generate.max_new_tokens": 3}, 1),  # the observation, 2 tokens, leaves no room for a response
        ({"generate.max_new_tokens": 4}, 2),
    ],
)
def test_a_row_that_a_limit_cuts_is_unfinished(folder, changes, turns):
    more = {"environment.turn_tokens": 3, "algorithm.missing_eos_penalty": 0.5}
    _, metrics, rows, _ = iterated(conversing.config(folder, "grpo", **more | changes))
    spoken = [sum(own for own, _ in split(rows, row)) for row in range(len(rows.tokens))]
    assert max(spoken) == turns and rows.response_mask.any(1).all()
    assert metrics["turns/mean"] == pytest.approx(np.mean(spoken))
    assert (
        metrics["response/ended"] == pytest.approx(rows.ended.mean()) and metrics["turns/cut"] == 1 - rows.ended.mean()
    )
    if turns == 1:
        assert not rows.ended.any() and metrics["turns/observation_tokens"] == 0
    else:
        assert rows.ended.any() and (rows.valid[:, START:].sum(1) <= 4).all()
