"""The rollout of a policy that converses with an environment: what the host does between two compiled programs.

A row is the prompt, response 1, observation 1, response 2, ... side by side, with generate.max_new_tokens columns
behind the prompt. Tokens stay as they were sampled. Each turn the policy reads the whole row anew, left-padded to one
of a few compiled widths. A token's noise is that of its place in the row, so that it depends on no other row."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.data.glue import Glue
from jaxrlhf.data.tokenizer import decode_rows
from jaxrlhf.errors import ConfigError, show
from jaxrlhf.hosts import processes
from jaxrlhf.rewards.turns import TextEnvironment, Turn
from jaxrlhf.run.batch_shapes import context_widths
from jaxrlhf.run.build import Run
from jaxrlhf.run.feed import glue_of
from jaxrlhf.run.raised_by_all import together
from jaxrlhf.run.transfer import fetch, holders, put
from jaxrlhf.types import Prompts, Sequences, TrainState, given

Record = dict[str, Any]
METRICS = ("turns/mean", "turns/cut", "turns/observation_tokens", "turns/changed_tokens")
Say = Callable[[TrainState, Prompts], Sequences]  # compiled: rows so far -> them with a response more


class Played(NamedTuple):
    """The conversations of one iteration."""

    sequences: Sequences  # on the mesh
    metrics: dict[str, float]


class Conversations:
    """The rows of this process as NumPy arrays, while they grow."""

    def __init__(self, first: Sequences, rows: int, columns: int, pad_id: int):
        start, size = first.response_start, len(first.tokens)
        wide = lambda x, fill: np.concatenate([x, np.full((size, columns - x.shape[1]), fill, x.dtype)], axis=1)
        self.start, self.columns, self.pad_id = start, columns, pad_id
        self.tokens = wide(first.tokens[:, :start], pad_id)
        self.valid = wide(first.valid[:, :start], False)
        self.mask = np.zeros(self.valid.shape, bool)
        self.logprobs, self.rewards = np.zeros(self.valid.shape, np.float32), np.zeros(self.valid.shape, np.float32)
        self.end = np.full(size, start)  # the column behind the last token
        self.live = np.arange(size) < rows  # rows whose episode goes on; the others wait, or fill up a batch
        self.finished = np.zeros(size, bool)  # the last response ended with EOS or a stop text, not by its length
        self.ended = np.zeros(size, bool)  # the environment ended the episode; no limit cut it
        self.lost = np.zeros(size, bool)  # rows that can't be scored
        self.turns = np.zeros(size, np.int32)
        self.begun = np.full(size, start)  # where the last response begins

    def respond(self, said: Sequences, start: int) -> None:
        """Appends to each live row its response, from column ``start`` of ``said``, as far as it fits."""
        for row in np.flatnonzero(self.live):
            here = np.flatnonzero(said.response_mask[row, start:]) + start
            room = self.columns - self.end[row]
            self.finished[row] = given(said.ended, "ended")[row] and len(here) <= room
            here = here[:room]
            self.begun[row], place = self.end[row], slice(self.end[row], self.end[row] + len(here))
            self.tokens[row, place] = said.tokens[row, here]
            self.logprobs[row, place] = given(said.logprobs, "logprobs")[row, here]
            self.valid[row, place] = self.mask[row, place] = True
            self.end[row] += len(here)
            self.turns[row] += 1

    def observe(self, row: int, ids: Sequence[int]) -> bool:
        """Whether the observation fits, and one token behind it; then it is appended."""
        end = self.end[row] + len(ids)
        if end >= self.columns:
            return False
        self.tokens[row, self.end[row] : end], self.valid[row, self.end[row] : end] = ids, True
        self.end[row] = end
        return True

    def responses(self, rows: Iterable[int], tokenizer: Any) -> list[str]:
        """The text of the last response of each of the rows, special tokens left out."""
        spans = [slice(self.begun[row], self.end[row]) for row in rows]
        tokens = [self.tokens[row, span] for row, span in zip(rows, spans)]
        return decode_rows(tokenizer, tokens, [np.ones(len(ids), bool) for ids in tokens])

    def longest(self) -> int:
        """Tokens of the longest live row; 0 where none is live."""
        return int(self.valid[self.live].sum(1).max(initial=0))

    def contexts(self, width: int, sample_id: np.ndarray) -> Prompts:
        """The live rows, left-padded to ``width`` columns; those that wait have no token."""
        tokens, valid = np.full((len(self.live), width), self.pad_id, np.int32), np.zeros((len(self.live), width), bool)
        for row in np.flatnonzero(self.live):
            ids = self.tokens[row, self.valid[row]]
            tokens[row, width - len(ids) :], valid[row, width - len(ids) :] = ids, True
        return Prompts(tokens, valid, sample_id)  # type: ignore[arg-type]


class Growth:
    """Whether rows only grow: what is read and written in a turn has to begin with all tokens of the turn before.

    Args:
        first: the prompts and their first responses.
        columns: of whole rows; a response that does not fit into its row is cut there.
    """

    def __init__(self, first: Sequences, columns: int):
        size, prompts = len(first.tokens), first.valid[:, : first.response_start].sum(1)
        self.room = np.asarray(prompts + columns - first.response_start)  # tokens that a row may have
        self.ids, self.count = np.zeros((size, columns), np.int32), np.zeros(size, np.int32)
        self.changed = np.zeros(size, np.int32)  # tokens of a turn that the next one had otherwise, or had not
        self.saw(first, np.ones(size, bool))

    def saw(self, seen: Any, rows: np.ndarray) -> None:
        """The ``tokens`` that are ``valid`` in those of the rows for which bool[B] ``rows`` is true."""
        order = np.argsort(~seen.valid, axis=1, kind="stable")[:, : self.ids.shape[1]]  # the valid ones go first
        ids, count = np.zeros_like(self.ids), np.minimum(seen.valid.sum(1), self.room)
        ids[:, : order.shape[1]] = np.take_along_axis(seen.tokens, order, 1)
        place = np.arange(self.ids.shape[1])
        other = (ids != self.ids) | (place >= count[:, None])
        self.changed += np.where(rows, (other & (place < self.count[:, None])).sum(1), 0).astype(np.int32)
        self.ids[rows], self.count[rows] = ids[rows], count[rows]


def marked_turns(tokenizer: Any, tokens: np.ndarray, said: np.ndarray, mask: np.ndarray) -> list[dict[str, str]]:
    """The turns of one row, {"by": "policy" or "environment", "text": ...}: the columns ``said`` bool[S], of which the
    policy's are in ``mask``. Special tokens are left out."""
    columns = np.flatnonzero(said)
    edges = np.flatnonzero(np.diff(mask[columns].astype(np.int8))) + 1
    parts = [part for part in np.split(columns, edges) if len(part)]
    texts = [tokenizer.decode(tokens[part], skip_special_tokens=True) for part in parts]
    return [{"by": "policy" if mask[part[0]] else "environment", "text": text} for part, text in zip(parts, texts)]


def encode(environment: TextEnvironment, glue: Glue, record: Record, observation: Any, closed: bool) -> list[int]:
    """Glue.ids, whose error names the environment."""
    try:
        return glue.ids(record, observation, closed)
    except ValueError as error:
        raise ValueError(f"{environment}: step: observation {show(observation)}: {error}") from error


class Talker:
    """Lets the policy converse with the run's environment.

    Nothing of an episode depends on those before: a resumed run has the conversations that the first would have had,
    where the environment is deterministic.

    Args:
        say: width of what came before -> what samples one response more to each row.

    Raises:
        ConfigError: a row is on several processes, whose environments may answer differently.
    """

    def __init__(self, ready: Run, say: Callable[[int], Say]):
        if any(len(found) > 1 for found in holders(ready.mesh)):
            raise ConfigError(
                f"environment.function: {ready.cfg.environment.function}: the mesh puts a row on several processes, "
                "each of which would ask the environment; expected mesh.data x mesh.fsdp of all processes"
            )
        self.ready, self.say = ready, say
        self.glue = glue_of(ready)
        self.seconds = 0.0

    def play(self, state: TrainState, prompts: Prompts, said: Sequences, records: Sequence[Record]) -> Played:
        """Whole conversations, one a row.

        Args:
            prompts: of this iteration, on the mesh.
            said: their first responses, samples_per_prompt to each, on the mesh.
            records: those of this process's prompts, without the ones that fill up.

        Raises:
            GraderError, ValueError: as TextEnvironment, and where an observation can't be encoded; on all processes.
        """
        ready, environment = self.ready, given(self.ready.environment, "environment.function")
        copies, self.seconds = ready.sampler.samples_per_prompt, 0.0
        records = [record for record in records for _ in range(copies)]
        said, first_id = fetch((said, prompts.sample_id))
        start = said.response_start
        table = Conversations(said, len(records), start + ready.cfg.generate.max_new_tokens, ready.sampler.pad_id)
        sample_id = np.repeat(first_id, copies) * copies + np.arange(len(table.live), dtype=np.int32) % copies
        growth = Growth(said, table.columns)
        table.respond(said, start)
        states = self.timed(lambda: environment.reset(records) if records else [])
        for turn in range(1, ready.cfg.environment.max_turns + 1):
            self.answer(environment, table, states, records, last=turn == ready.cfg.environment.max_turns)
            longest = max(map(int, processes.everywhere(str(table.longest()))))  # several processes go on together
            if not longest:
                break
            width = next(width for width in context_widths(ready, start) if width >= longest)
            contexts: Any = put(ready.mesh, table.contexts(width, sample_id))
            said = fetch(self.say(width)(state, contexts))
            growth.saw(said, table.live)
            table.respond(said, width)
        growth.saw(table, np.ones(len(table.live), bool))
        metrics = self.timed(lambda: environment.metrics(states))
        numbers = summary(table, growth, len(records), metrics)
        return Played(self.rows(table), numbers | {"time/environment": self.seconds})

    def timed(self, work: Callable[[], Any]) -> Any:
        """What ``work``, the user's code, returns."""
        began = time.perf_counter()
        found = together(work)
        self.seconds += time.perf_counter() - began
        return found

    def answer(
        self,
        environment: TextEnvironment,
        table: Conversations,
        states: list[Any],
        records: Sequence[Record],
        last: bool,
    ) -> None:
        """The environment's answer to the last response of each live row: its reward, and its observation where the
        episode goes on. A response that a limit cut is answered too, and is the last of its row."""
        live = np.flatnonzero(table.live).tolist()
        texts = table.responses(live, self.ready.tokenizer)
        step = lambda: environment.step([states[row] for row in live], texts) if live else []
        turns: list[Turn] = self.timed(step)

        for row, turn in zip(live, turns, strict=True):
            table.lost[row] |= turn.reward is None
            table.rewards[row, table.end[row] - 1] = turn.reward or 0.0
            table.ended[row] = turn.done and table.finished[row]
            table.live[row] = not (turn.done or last) and table.finished[row]
        goes_on = [(row, turn.observation) for row, turn in zip(live, turns) if table.live[row]]
        together(lambda: self.observe(environment, table, goes_on, records))

    def observe(
        self, environment: TextEnvironment, table: Conversations, shown: Sequence[tuple[int, Any]], records
    ) -> None:
        """Appends to each of the rows what it is shown; one for which there is no room ends there."""
        for row, observation in shown:
            closed = bool(table.tokens[row, table.end[row] - 1] in self.glue.eos)
            table.live[row] = table.observe(row, encode(environment, self.glue, records[row], observation, closed))

    def rows(self, table: Conversations) -> Sequences:
        """The whole rows, on the mesh."""
        scores = np.where(table.lost, np.nan, table.rewards.sum(1)).astype(np.float32)
        rows: dict[str, Any] = {
            "tokens": table.tokens,
            "valid": table.valid,
            "response_mask": table.mask,
            "logprobs": table.logprobs,
            "scores": scores if self.ready.cfg.environment_scores else None,
            "ended": table.ended,
            "rewards": table.rewards,
        }
        rows |= {"response_start": table.start, "copies": self.ready.sampler.copies}
        return put(self.ready.mesh, Sequences(**rows))


def summary(table: Conversations, growth: Growth, rows: int, more: Mapping[str, float]) -> dict[str, float]:
    """Metrics of the conversations of all processes: of the first ``rows`` rows of each; ``more`` are the environment's
    own, of which each process has those of its rows."""
    shown = (table.valid & ~table.mask)[:rows, table.start :]
    counts = table.turns[:rows], ~table.ended[:rows], shown, growth.changed[:rows]
    sums = {name: float(count.sum()) for name, count in zip(METRICS, counts, strict=True)}
    sums |= {f"environment/{name}": value * rows for name, value in more.items()}
    every = [json.loads(text) for text in processes.everywhere(json.dumps([rows, sums]))]
    total = max(sum(count for count, _ in every), 1)
    names = dict.fromkeys(name for _, part in every for name in part)
    return {name: sum(part.get(name, 0.0) for _, part in every) / total for name in names}
