"""An iteration whose scores only the host can compute: two programs, with the user's reward function between them."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxrlhf.data.tokenizer import decode_rows
from jaxrlhf.precomputed_answers import Answered
from jaxrlhf.rewards.functions import Details
from jaxrlhf.run.ahead import Ahead
from jaxrlhf.run.build import Run
from jaxrlhf.run.episodes import Player
from jaxrlhf.run.feed import glue_of
from jaxrlhf.run.programs import Program, turn_name
from jaxrlhf.run.raised_by_all import together
from jaxrlhf.run.transfer import fetch, holders, put, share_of
from jaxrlhf.run.turns import Talker, encode
from jaxrlhf.types import Batch, Sequences, TrainState, given

Records = list[dict[str, Any]]
More = Callable[[], tuple[Batch, Records]]  # the next batch, of the host, and its records


def nothing() -> None:
    """Done while a program runs."""


class Scored(NamedTuple):
    """Responses that the host has scored."""

    sequences: Sequences  # with scores, and grades of several functions, f32[B], laid out as rows
    seconds: dict[str, float]  # spent in all functions, time/rewards, and in each of several, time/rewards/NAME


def score(ready: Run, sequences: Sequences, records: Records) -> Scored:
    """The run's reward functions on this process's responses, special tokens left out.

    ``records``: those of this process's prompts, without the ones that fill up; the samples of a prompt are contiguous.
    Raises ValueError, in one line, where a function does not answer with numbers; as ``together``."""
    graders = ready.graders
    assert graders is not None, "the reward model scores"
    ended = given(sequences.ended, "batch.sequences.ended")
    tokens, masks, ended = fetch((sequences.tokens, sequences.response_mask, ended))
    each = ready.sampler.samples_per_prompt
    copies = [record for record in records for _ in range(each)]
    assert len(tokens) // len(share_of(ready.mesh).blocks) % each == 0, "a block of rows cuts a group"
    mine = [row for row, is_mine in zip(range(len(copies)), scored_here(ready.mesh, len(tokens))) if is_mine]
    responses = decode_rows(ready.tokenizer, tokens[mine], masks[mine])
    details = Details(
        [tokens[row][masks[row]].tolist() for row in mine],
        ended[mine].tolist(),
        [row // each for row in mine],
        ready.sampler.max_new_tokens,
    )
    grades = np.zeros((len(tokens), len(graders.functions)), np.float32)  # 0 in rows that fill up a batch
    seconds, started = {}, time.perf_counter()
    if responses:  # a process may have none in the last batch of an evaluation
        found = together(lambda: graders.grade(responses, [copies[row] for row in mine], details))
        grades[mine] = found.grades
        seconds = {f"time/rewards/{name}": spent for name, spent in zip(graders.names, found.seconds)}
    else:
        together(nothing)
    seconds["time/rewards"] = time.perf_counter() - started
    grades = exchange(ready.mesh, grades)
    each_grade = {name: grades[:, column] for column, name in enumerate(graders.names)}
    scores, named = put(ready.mesh, (graders.combine(grades), each_grade))
    return Scored(sequences.replace(scores=scores, grades=named or None), seconds)


def try_graders(ready: Run, where: str, records: Records) -> None:
    """Calls the run's reward functions once, before anything is compiled. ``records``: some of the data section
    ``where``. Raises ValueError, in one line, where one fails; as ``together``."""
    graders = ready.graders
    if graders is not None and records:
        together(lambda: graders.try_on(records, where, ready.sampler.max_new_tokens))


def try_environment(ready: Run, where: str, records: Records) -> None:
    """Calls the run's environment of text once, before anything is compiled, and encodes what it answers. ``records``:
    some of the data section ``where``. Raises ValueError, in one line, where something fails; as ``together``."""
    environment = ready.environment
    if environment is None or not records:
        return
    glue = glue_of(ready)

    def tried() -> None:
        for turn in environment.try_on(records, where):
            if not turn.done:
                encode(environment, glue, records[0], turn.observation, closed=True)

    together(tried)


def scored_here(mesh: Mesh, rows: int) -> np.ndarray:
    """bool[rows of this process]: those that no earlier process holds too. A function may answer otherwise when it is
    asked again, and copies of a row that differ would be two models."""
    share, held = share_of(mesh), holders(mesh)
    return np.repeat([held[block][0] == jax.process_index() for block in share.blocks], rows // len(share.blocks))


def exchange(mesh: Mesh, scores: np.ndarray) -> np.ndarray:
    """f32[rows of this process, ...] with the scores of rows that another process scored, where there are such."""
    if all(len(processes) == 1 for processes in holders(mesh)):
        return scores
    share = share_of(mesh)
    rows = len(scores) // len(share.blocks) * share.total
    here, everything = share.positions(rows), np.zeros((rows, *scores.shape[1:]), np.float32)
    everything[here] = scores
    return np.asarray(multihost_utils.process_allgather(everything)).sum(0)[here]  # 0 but for one process a row


def scored(
    ready: Run,
    programs: dict[str, Program],
    state: TrainState,
    batch: Batch,
    records: Records,
    meanwhile: Callable[[], None] = nothing,
) -> tuple[Sequences, Batch | Answered, dict[str, float]]:
    """(responses with their scores, what the program "learn" is given, Scored.seconds); the program
    "read", where there is one, is under way while the host works. ``meanwhile`` is called in between."""
    answers = programs["read"].run(state, batch) if "read" in programs else None
    meanwhile()
    sequences, seconds = score(ready, given(batch.sequences, "batch.sequences"), records)
    batch = batch.replace(sequences=sequences)
    return sequences, batch if answers is None else Answered(batch, answers), seconds


def joined(ready: Run, programs: dict[str, Program], more: More | None = None, ahead: Ahead | None = None) -> Callable:
    """programs.compile_programs as one function: (state, batch, records, meanwhile) -> (state, metrics, responses or
    None). ``meanwhile`` is called once the first program is under way.

    Where there are several, the host scores the responses between them, or steps an environment; ``records`` are for
    that alone. ``more`` takes the next batch of the data, where an iteration may need several; ``ahead`` samples the
    next iteration's responses while the host scores these."""
    if "fill" in programs:
        return resampled(ready, programs, given(more, "more"))

    def whole(state: TrainState, batch: Batch, records: Records, meanwhile: Callable[[], None] = nothing):
        found = programs["iteration"].run(state, batch)
        meanwhile()
        return found

    def parts(state: TrainState, batch: Batch, records: Records, meanwhile: Callable[[], None] = nothing):
        sequences, told = ahead.take(state, batch) if ahead else (programs["rollout"].run(state, batch), {})

        def while_the_host_scores() -> None:
            if ahead:
                ahead.sample(state)
            meanwhile()

        batch = batch.replace(sequences=sequences)
        sequences, rows, seconds = scored(ready, programs, state, batch, records, while_the_host_scores)
        state, metrics = programs["learn"].run(state, rows)
        return state, metrics | seconds | told, sequences

    player = Player(ready)
    talker = Talker(ready, lambda width: programs[turn_name(width)].run) if ready.cfg.converses else None

    def acted(state: TrainState, batch: Batch, records: Records, meanwhile: Callable[[], None] = nothing):
        meanwhile()
        started = time.perf_counter()
        sequences = player.play(programs["act"], state, given(batch.prompts, "batch.prompts"), records)
        seconds = time.perf_counter() - started
        state, metrics = programs["learn"].run(state, batch.replace(sequences=sequences))
        return state, metrics | {"time/environment": seconds}, sequences

    def conversed(state: TrainState, batch: Batch, records: Records, meanwhile: Callable[[], None] = nothing):
        said = programs["rollout"].run(state, batch)
        meanwhile()
        played = given(talker, "environment.function").play(state, given(batch.prompts, "batch.prompts"), said, records)
        state, metrics = programs["learn"].run(state, batch.replace(sequences=played.sequences))
        return state, metrics | played.metrics, played.sequences

    if "act" in programs:
        return acted
    if talker is not None and "learn" in programs:
        return conversed
    return whole if "iteration" in programs else parts


def resampled(ready: Run, programs: dict[str, Program], more: More) -> Callable:
    """``joined`` with batch.max_rollouts: rollouts of further prompts until groups that differ fill the iteration.

    Several processes see the same number of groups, and so go on, or not, together."""
    most, count = ready.cfg.batch.max_rollouts, ready.cfg.batch.prompts_per_step

    def gathered(state: TrainState, batch: Batch, records: Records, meanwhile: Callable[[], None] = nothing):
        pool, metrics, seconds = None, {}, Counter()
        for number in range(most):
            if number:
                host, records = more()
                batch = put(ready.mesh, with_ids_from(host, number * count))
            batch = batch.replace(sequences=programs["rollout"].run(state, batch))
            if number == 0:
                meanwhile()
            if ready.graders is not None:
                sequences, spent = score(ready, given(batch.sequences, "batch.sequences"), records)
                batch = batch.replace(sequences=sequences)
                seconds.update(spent)
            pool, metrics = programs["fill" if number else "begin"].run(state, (pool, batch))
            if int(pool.filled) == count:
                break
        found = given(pool, "pool")
        learned = batch.replace(prompts=found.prompts, sequences=found.sequences)
        state, numbers = programs["learn"].run(state, learned)
        return state, numbers | metrics | dict(seconds), found.sequences.replace(scores=found.scores)

    return gathered


def with_ids_from(host: Batch, first: int) -> Batch:
    """A later batch of one iteration: no two rows of it share noise."""
    prompts = given(host.prompts, "batch.prompts")
    return host.replace(prompts=prompts.replace(sample_id=prompts.sample_id + np.int32(first)))
