"""Requests for responses, joined onto the slots of one decode loop by a thread of its own.

A job waits in the queue, then its prompt is computed in a seat, then it has a slot. Every round computes a chunk of the
prompts in the seats, and one token of every slot: a long prompt does not stop the others for long. A step is dispatched
before the tokens of the one before it are read, so that the device does not wait for what is done with them.
"""

import collections
import dataclasses
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.generate.stop_texts import text_automaton
from jaxrlhf.serve.jobs import Job, Reason, Said, said
from jaxrlhf.serve.slots import Slots, SlotStep, Told, settings_of

PATIENCE = 8  # rounds with few slots in use, until there are fewer


class Full(Exception):
    """Too many requests wait, or the engine takes no more."""


@dataclasses.dataclass
class Counts:
    """What an engine has done so far."""

    responses: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0  # of computing


class Flight(NamedTuple):
    """A step that was dispatched, and whose tokens were not read."""

    jobs: list[tuple[int, Job]]  # that want the token of their slot
    step: SlotStep


class Engine:
    """Decodes jobs in ``slots``; ``waiting`` of them at most stand in the queue.

    A context manager: its thread runs inside it. Once a job's end is told, its slot is free, and it is counted."""

    def __init__(self, slots: Slots, tokenizer: Any, eos_ids: Sequence[int], waiting: int):
        self.slots, self.tokenizer, self.eos_ids, self.most = slots, tokenizer, frozenset(eos_ids), waiting
        self.pieces: list[bytes] = tokenizers.token_bytes(tokenizer)
        self.queue: collections.deque[Job] = collections.deque()
        self.seats: list[Job | None] = [None] * slots.seats  # whose prompt is computed in each
        self.jobs: list[Job | None] = [None] * slots.count  # what has each slot
        self.flight: Flight | None = None
        self.few = 0  # rounds since more than the next smaller number of slots were in use
        self.told: dict[Callable[[], None], None] = {}  # what is to be called behind the round, each once
        self.counts = Counts()
        self.news = threading.Condition()
        self.drains = False
        self.thread = threading.Thread(target=self.work, name="engine", daemon=True)

    def __enter__(self) -> "Engine":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.news:
            for job in [*self.queue, *self.running_jobs()]:
                job.reason = job.reason or "cancelled"
        self.drain()

    # ---- from other threads -----------------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none. Raises Full."""
        with self.news:
            if self.drains:
                raise Full("the server is shutting down")
            if len(self.queue) + self.running + len(jobs) > self.most + self.slots.count:
                raise Full(f"{len(self.queue)} responses wait already; {self.most} may")
            for job in jobs:
                job.stops = [
                    (text_automaton(form), 0)
                    for text in job.ask.stop
                    for form in tokenizers.stop_forms(self.tokenizer, text)
                ]
            self.queue.extend(jobs)
            self.news.notify_all()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End jobs that nobody reads any more; their slots are free after the step that runs."""
        with self.news:
            for job in jobs:
                job.reason = job.reason or "cancelled"
            self.news.notify_all()

    def drain(self) -> None:
        """Take no more jobs, and return once those that are had have ended."""
        with self.news:
            self.drains = True
            self.news.notify_all()
        self.thread.join()

    def running_jobs(self) -> list[Job]:
        return [job for job in [*self.seats, *self.jobs] if job is not None]

    @property
    def running(self) -> int:
        """Jobs that are computed."""
        return len(self.running_jobs())

    # ---- the thread -------------------------------------------------------------------------------------------------

    def work(self) -> None:
        while True:
            with self.news:
                self.news.wait_for(lambda: self.queue or self.running or self.drains)
                self.free()
                self.seat()
                if not self.running:
                    if self.drains and not self.queue:
                        return
                    continue
            began = time.perf_counter()
            try:
                self.round()
            except Exception:  # one mistake must not end all later requests
                traceback.print_exc()
                self.fail()
            self.counts.seconds += time.perf_counter() - began
            with self.news:
                self.free()
            told, self.told = self.told, {}
            for changed in told:
                changed()

    def free(self) -> None:
        """Count the jobs that have ended, and free their places."""
        for places in (self.seats, self.jobs):
            for place, job in enumerate(places):
                if job is not None and job.reason is not None:
                    self.count(job)
                    places[place] = None
        for job in [job for job in self.queue if job.reason is not None]:
            self.count(job)
            self.queue.remove(job)
        if not self.running:
            self.flight, self.few = None, 0
            self.slots.reset()

    def seat(self) -> None:
        """Seat those that have waited longest, while there will be a slot for each."""
        for seat in [seat for seat, job in enumerate(self.seats) if job is None]:
            if self.queue and self.running < self.slots.count:
                self.seats[seat] = self.queue.popleft()

    def count(self, job: Job) -> None:
        self.counts.responses += job.reason in ("eos", "stop", "length")
        self.counts.cancelled += job.reason == "cancelled"

    def round(self) -> None:
        """A chunk of the prompts in the seats, and a token of every slot."""
        seated = {seat: job for seat, job in enumerate(self.seats) if job is not None}
        if seated:
            self.slots.make_room(max(self.columns_of(job) for job in seated.values()))
        if len(seated) > self.slots.seats // 2:
            self.read(seated)
        else:
            for seat, job in seated.items():
                self.read({seat: job})
        self.fit()
        self.decode()

    def columns_of(self, job: Job) -> int:
        """The columns of the caches that a job needs; chunks are whole."""
        chunks = -(-len(job.ids) // self.slots.small) * self.slots.small
        return min(max(job.columns, chunks), self.slots.limit)

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def read(self, some: dict[int, Job]) -> None:
        """The next chunk of the prompts in these seats; behind a last one, the first token, and a slot."""
        rests = {seat: job.ids[job.read :] for seat, job in some.items()}
        counts, hidden = self.slots.read(rests, {seat: job.read for seat, job in some.items()})
        together = len(some) > 1
        last, ended = np.zeros(len(hidden), np.int32), {}
        for seat, job in some.items():
            row = seat if together else 0  # of ``hidden``
            if job.ask.of_prompt:
                self.tell_prompt(job, self.slots.row(hidden, np.int32(row)), counts[seat])
            job.read += counts[seat]
            self.counts.prompt_tokens += counts[seat]
            last[row] = counts[seat] - 1
            if job.read == len(job.ids):
                ended[row] = job
        self.begin(ended, last, hidden)
        for seat, job in some.items():
            if job in ended.values() and job.reason is None:
                self.give_slot(seat, job)

    def tell_prompt(self, job: Job, hidden: Any, count: int) -> None:
        """What the model says of the tokens of a prompt behind the first of a chunk, whose states are [C, D]."""
        known = job.ids[job.read + 1 : job.read + count + 1]
        behind = np.zeros(len(hidden), np.int32)
        behind[: len(known)] = known
        told = self.slots.say(hidden, behind)
        job.prompt += [said(told, column, int(token)) for column, token in enumerate(known)]

    def begin(self, ended: dict[int, Job], last: np.ndarray, hidden: Any) -> None:
        """The first tokens of jobs whose prompts are whole, by their row of ``hidden`` [P, C, D]; ``last`` i32[P] are
        the columns of their prompts' last tokens."""
        for job in ended.values():
            if job.ask.max_tokens == 0:
                self.end(job, "length")
        writing = {row: job for row, job in ended.items() if job.ask.max_tokens}
        if writing:
            each = [writing.get(row) for row in range(len(hidden))]
            positions = np.array([0 if job is None else len(job.ids) for job in each], np.int32)
            step = self.slots.first(hidden, last, positions, settings_of(each))
            self.collect(Flight([*writing.items()], step))

    def give_slot(self, seat: int, job: Job) -> None:
        """Move a job from its seat to a slot."""
        if None not in self.jobs[: self.slots.rows]:
            self.resize(more=True)
        slot = self.jobs.index(None)
        self.slots.take(seat, slot)
        self.jobs[slot], self.seats[seat] = job, None

    # ---- slots ------------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Compute fewer slots, where few have been in use for some rounds."""
        sizes, used = self.slots.sizes, self.running
        at = sizes.index(self.slots.rows)
        self.few = self.few + 1 if at and used <= sizes[at - 1] else 0
        if self.few >= PATIENCE:
            self.resize(more=False)
            self.few = 0

    def resize(self, more: bool) -> None:
        """Compute the next larger or smaller number of slots."""
        self.land()  # its tokens are those of the slots as they are
        kept = [slot for slot, job in enumerate(self.jobs) if job is not None]
        self.slots.resize(more, kept)
        jobs = [self.jobs[slot] for slot in kept]
        self.jobs = [*jobs, *[None] * (self.slots.count - len(jobs))]

    def decode(self) -> None:
        """Dispatch one more token of every slot, then read those that were dispatched before."""
        coming = dict(self.flight.jobs) if self.flight else {}
        size = self.slots.rows
        given, positions = np.zeros(size, np.int32), np.zeros(size, np.int32)
        some: list[tuple[int, Job]] = []
        for slot, job in enumerate(self.jobs[:size]):
            if job is None or job.reason is not None:
                continue
            ahead = coming.get(slot) is job
            count = len(job.tokens) + ahead
            if count < job.ask.max_tokens:
                given[slot] = -1 if ahead else job.tokens[-1].token
                positions[slot] = len(job.ids) + count - 1
                some.append((slot, job))
        before, self.flight = self.flight, None
        if some:
            step = self.slots.decode(given, before and before.step, positions, settings_of(self.jobs[:size]))
            self.counts.steps += 1
            self.flight = Flight(some, step)
        if before:
            self.collect(before)

    def land(self) -> None:
        """Read the tokens of the step that was dispatched."""
        if self.flight:
            before, self.flight = self.flight, None
            self.collect(before)

    def collect(self, flight: Flight) -> None:
        """Read the tokens of a step; of jobs that have ended since, nobody wants them."""
        some = [(row, job) for row, job in flight.jobs if job.reason is None]
        told: Told | None = None
        if any(job.ask.logprobs for _, job in some):
            told = self.slots.say(flight.step.hidden, flight.step.tokens)
        tokens = np.asarray(flight.step.tokens)
        for row, job in some:
            self.add(job, said(told if job.ask.logprobs else None, row, int(tokens[row])))

    def add(self, job: Job, new: Said) -> None:
        """A token of a response, which may end it."""
        self.counts.tokens += 1
        piece = self.pieces[new.token] if new.token < len(self.pieces) else b""
        job.stops = [(stop, stop.follow(state, new.token, piece)) for stop, state in job.stops]
        job.tokens.append(new)
        if new.token in self.eos_ids and not job.ask.ignore_eos:
            self.end(job, "eos")
        elif any(state == stop.found for stop, state in job.stops):
            self.end(job, "stop")
        elif len(job.tokens) == job.ask.max_tokens:
            self.end(job, "length")
        elif job.streams:
            self.told[job.changed] = None

    def end(self, job: Job, reason: Reason) -> None:
        job.reason = job.reason or reason
        self.told[job.changed] = None

    def fail(self) -> None:
        """End all that was being computed; the caches are made anew, since a program may have taken them."""
        self.flight = None
        for job in self.running_jobs():
            self.counts.failed += 1
            self.end(job, "error")
        self.slots.caches = []
        self.slots.reset()
