"""Requests for responses, joined onto the slots of one decode loop by a thread of its own.

Every round reads at most one chunk of one prompt and decodes one token of every slot that is past its prompt: a long
prompt does not stop the others for long. A slot is given to the request that has waited longest.
"""

import collections
import dataclasses
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.generate.stop_texts import TextAutomaton, text_automaton
from jaxrlhf.serve.slots import Settings, Slots, settings_of

Reason = Literal["eos", "stop", "length", "cancelled", "error"]


class Ask(NamedTuple):
    """How a response is sampled, and what is told of it."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: bool = False  # of the response's tokens
    of_prompt: bool = False  # of the prompt's


class Said(NamedTuple):
    """A token, and what the model says of it where that is asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens, the likeliest first


@dataclasses.dataclass(eq=False)
class Job:
    """One response. ``tokens`` grows until ``reason`` says why it ended; ``changed`` is called after either, by the
    thread of the engine."""

    ids: np.ndarray  # i32[P]
    ask: Ask
    sample_id: int
    changed: Callable[[], None] = lambda: None
    tokens: list[Said] = dataclasses.field(default_factory=list)
    prompt: list[Said] = dataclasses.field(default_factory=list)  # where Ask.of_prompt
    reason: Reason | None = None
    began: float = 0.0  # seconds of the clock: when it got its slot
    read: int = 0  # columns of the prompt that the cache holds
    stops: list[tuple[TextAutomaton, int]] = dataclasses.field(default_factory=list)  # and their states


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


class Engine:
    """Decodes jobs in ``slots``; ``waiting`` of them at most stand in the queue.

    A context manager: its thread runs inside it."""

    def __init__(self, slots: Slots, tokenizer: Any, eos_ids: Sequence[int], waiting: int):
        self.slots, self.tokenizer, self.eos_ids, self.most = slots, tokenizer, frozenset(eos_ids), waiting
        self.pieces: list[bytes] = tokenizers.token_bytes(tokenizer)
        self.queue: collections.deque[Job] = collections.deque()
        self.jobs: list[Job | None] = [None] * slots.count  # what has each slot
        self.settings = settings_of(slots.count)
        self.counts = Counts()
        self.news = threading.Condition()
        self.drains = False
        self.thread = threading.Thread(target=self.work, name="engine", daemon=True)

    def __enter__(self) -> "Engine":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.news:
            for job in [*self.queue, *filter(None, self.jobs)]:
                job.reason = job.reason or "cancelled"
        self.drain()

    # ---- from other threads -----------------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none. Raises Full."""
        with self.news:
            if self.drains:
                raise Full("the server is shutting down")
            busy = len(self.queue) + sum(job is not None for job in self.jobs)
            if busy + len(jobs) > self.most + self.slots.count:
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

    @property
    def running(self) -> int:
        return sum(job is not None for job in self.jobs)

    # ---- the thread -------------------------------------------------------------------------------------------------

    def work(self) -> None:
        while True:
            with self.news:
                self.news.wait_for(lambda: self.queue or self.running or self.drains)
                self.place()
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

    def place(self) -> None:
        """Free the slots of jobs that have ended, and give them to those that wait."""
        for slot, job in enumerate(self.jobs):
            if job is not None and job.reason is not None:
                self.jobs[slot] = None
                self.count(job)
        for job in [job for job in self.queue if job.reason is not None]:
            self.queue.remove(job)
            self.count(job)
        if not self.running:
            self.slots.reset()
        for slot in [slot for slot, job in enumerate(self.jobs) if job is None][: len(self.queue)]:
            job = self.queue.popleft()
            self.jobs[slot], job.began = job, time.perf_counter()
            ask, sampling = job.ask, self.settings.sampling
            sampling.temperature[slot], sampling.top_k[slot] = ask.temperature, ask.top_k  # type: ignore[index]
            sampling.top_p[slot] = ask.top_p  # type: ignore[index]
            self.settings.seed[slot], self.settings.sample_id[slot] = ask.seed, job.sample_id  # type: ignore[index]

    def count(self, job: Job) -> None:
        self.counts.responses += job.reason in ("eos", "stop", "length")
        self.counts.cancelled += job.reason == "cancelled"

    def round(self) -> None:
        """A chunk of the prompt that came first, and a token of every slot that is past its own."""
        if reading := [(slot, job) for slot, job in self.placed() if not job.tokens]:
            self.read(*min(reading, key=lambda one: one[1].began))
        if decoding := [(slot, job) for slot, job in self.placed() if job.tokens and job.reason is None]:
            self.decode(decoding)

    def placed(self) -> list[tuple[int, Job]]:
        return [(slot, job) for slot, job in enumerate(self.jobs) if job is not None]

    def read(self, slot: int, job: Job) -> None:
        """The next chunk of a prompt; behind the last one, the first token."""
        chunk = -(-len(job.ids) // self.slots.small) * self.slots.small
        self.slots.make_room(min(max(len(job.ids) + job.ask.max_tokens, chunk), self.slots.limit))
        rest = job.ids[job.read :]
        count, hidden = self.slots.read(rest, slot, job.read)
        if job.ask.of_prompt:
            behind = np.zeros(len(hidden), np.int32)
            known = rest[1 : count + 1]
            behind[: len(known)] = known
            told = self.slots.say(hidden, behind)
            job.prompt += [said(told, column, int(token)) for column, token in enumerate(known)]
        job.read += count
        self.counts.prompt_tokens += count
        if job.read < len(job.ids):
            return
        if job.ask.max_tokens == 0:
            self.end(job, "length")
            return
        one: Settings = settings_of(1)
        for mine, all_slots in zip([*one.sampling, *one[1:]], [*self.settings.sampling, *self.settings[1:]]):
            mine[0] = all_slots[slot]  # type: ignore[index]
        token, state = self.slots.first(hidden, count - 1, job.read, one)
        self.add(
            job, said(self.slots.say(state, np.array([token], np.int32)), 0, token) if job.ask.logprobs else Said(token)
        )

    def decode(self, some: list[tuple[int, Job]]) -> None:
        """One more token of each of these."""
        tokens, positions = np.zeros(self.slots.count, np.int32), np.zeros(self.slots.count, np.int32)
        for slot, job in self.placed():  # what a prompt has in its cache must not be overwritten
            positions[slot] = min(job.read, self.slots.width - 1)
        for slot, job in some:
            tokens[slot], positions[slot] = job.tokens[-1].token, len(job.ids) + len(job.tokens) - 1
        found, hidden = self.slots.decode(tokens, positions, self.settings)
        self.counts.steps += 1
        told = self.slots.say(hidden, found) if any(job.ask.logprobs for _, job in some) else None
        for slot, job in some:
            token = int(found[slot])
            self.add(job, said(told, slot, token) if told is not None and job.ask.logprobs else Said(token))

    def add(self, job: Job, new: Said) -> None:
        """A token of a response, which may end it."""
        self.counts.tokens += 1
        piece = self.pieces[new.token] if new.token < len(self.pieces) else b""
        job.stops = [(stop, stop.follow(state, new.token, piece)) for stop, state in job.stops]
        job.tokens.append(new)
        if new.token in self.eos_ids:
            self.end(job, "eos")
        elif any(state == stop.found for stop, state in job.stops):
            self.end(job, "stop")
        elif len(job.tokens) == job.ask.max_tokens:
            self.end(job, "length")
        else:
            job.changed()

    def end(self, job: Job, reason: Reason) -> None:
        job.reason = job.reason or reason
        job.changed()

    def fail(self) -> None:
        """End all that was being computed; the caches are made anew, since a program may have taken them."""
        for job in filter(None, self.jobs):
            self.counts.failed += 1
            self.end(job, "error")
        self.slots.caches = []
        self.slots.reset()


def said(told: Any, row: int, token: int) -> Said:
    top = zip(told.top_token[row].tolist(), told.top_logprob[row].tolist())
    return Said(token, float(told.logprob[row]), tuple(top))
