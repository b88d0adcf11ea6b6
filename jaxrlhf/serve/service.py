"""What the server serves: a model by its name, and requests turned into jobs of its engine, or into scores."""

import asyncio
import dataclasses
import math
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.hosts import compiler_flags
from jaxrlhf.models.config import row_limit
from jaxrlhf.serve.engine import Engine, Full
from jaxrlhf.serve.jobs import Job, ResponseSettings
from jaxrlhf.serve.openai_requests import ApiError, Chat, Completion, Sampled, Scores
from jaxrlhf.serve.scorer import Scorer
from jaxrlhf.serve.slots import Slots
from jaxrlhf.serve.writer import Model, encode_record, read_model
from jaxrlhf.sharding import MeshConfig, make_mesh

DEFAULT_TOKENS = 16  # of a completion, as OpenAI has it


@dataclasses.dataclass
class Service:
    """A model, served as ``name``."""

    name: str

    def check_name(self, name: str) -> None:
        """Raises ApiError for another model."""
        if name != self.name:
            message = f"The model {name!r} does not exist; this server has {self.name!r}"
            raise ApiError(404, message, "model", "model_not_found")


@dataclasses.dataclass
class TextService(Service):
    """A policy that writes."""

    model: Model
    engine: Engine

    def completion(self, request: Completion, changed: Callable[[], None]) -> list[Job]:
        """The jobs of a request, queued: n to each prompt. Raises ApiError."""
        told, most = request.logprobs is not None, request.max_tokens
        ids = [self.prompt(prompt) for prompt in request.prompts]
        if not ids:
            raise ApiError(400, "prompt: expected one at least", "prompt")
        if most == 0 and not request.echo:
            raise ApiError(400, "max_tokens: 0: nothing would come back; expected 1 or more, or echo", "max_tokens")
        room = DEFAULT_TOKENS if most is None else most
        ask = self.ask(request, room)._replace(logprobs=told, of_prompt=told and bool(request.echo))
        return self.submit(ids, ask, request, changed)

    def chat(self, request: Chat, changed: Callable[[], None]) -> list[Job]:
        """The same for a conversation, whose response may take what the context leaves."""
        if not self.model.tokenizer.chat_template:
            raise ApiError(400, "this model has no chat template; expected a prompt, at /v1/completions", "messages")
        record = {"messages": [message.plain() for message in request.messages]}
        ids = self.encoded(record, "messages")
        left = self.engine.slots.limit - len(ids)
        most = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
        room = max(left, 1) if most is None else most
        if room == 0:
            raise ApiError(400, "max_tokens: 0: expected 1 or more", "max_tokens")
        ask = self.ask(request, room)._replace(logprobs=bool(request.logprobs))
        return self.submit([ids], ask, request, changed)

    def ask(self, request: Sampled, room: int) -> ResponseSettings:
        either = lambda value, default: default if value is None else value
        seed = either(request.seed, secrets.randbelow(2**31)) % 2**31
        temperature, top_p = either(request.temperature, 1.0), either(request.top_p, 1.0)
        sampling = temperature, top_p, request.top_k or 0
        return ResponseSettings(room, *sampling, seed, request.stops, ignore_eos=bool(request.ignore_eos))

    def prompt(self, prompt: str | Sequence[int]) -> np.ndarray:
        """i32[P] of a text or of ids. Raises ApiError."""
        if isinstance(prompt, str):
            return self.encoded({"prompt": prompt}, "prompt")
        ids = np.asarray(prompt, np.int64)
        if not len(ids):
            raise ApiError(400, "prompt: no tokens; expected one at least", "prompt")
        size = self.model.config.vocab_size
        if wrong := [id for id in prompt if not 0 <= id < size]:
            raise ApiError(400, f"prompt: token {wrong[0]}: expected ids in [0, {size})", "prompt")
        if why := tokenizers.why_unreadable(self.model.tokenizer, prompt):
            raise ApiError(400, f"prompt: {why}", "prompt")
        return ids.astype(np.int32)

    def encoded(self, record: dict[str, Any], param: str) -> np.ndarray:
        try:
            return encode_record(self.model, record)
        except ValueError as error:
            raise ApiError(400, str(error), param) from None

    def submit(
        self, prompts: Sequence[np.ndarray], ask: ResponseSettings, request: Sampled, changed: Callable[[], None]
    ) -> list[Job]:
        limit, n = self.engine.slots.limit, request.n or 1
        for ids in prompts:
            if len(ids) + ask.max_tokens > limit:
                message = (
                    f"This model's maximum context length is {limit} tokens. However, you requested "
                    f"{len(ids) + ask.max_tokens} tokens ({len(ids)} in the prompt, {ask.max_tokens} for the response)."
                )
                raise ApiError(400, message, "max_tokens", "context_length_exceeded")
        if (count := len(prompts) * n) > (most := self.engine.most + self.engine.slots.count):
            raise ApiError(400, f"n: {count} responses to {len(prompts)} prompts; the server has room for {most}", "n")
        streams = bool(request.stream)
        jobs = [Job(ids, ask, at * n + copy, changed, streams) for at, ids in enumerate(prompts) for copy in range(n)]
        try:
            self.engine.submit(jobs)
        except Full as error:
            raise ApiError(429, f"The server is busy: {error}", None, "rate_limit_exceeded") from None
        return jobs


@dataclasses.dataclass
class ScoreService(Service):
    """A reward model. Requests are computed one after the other; of ``waiting`` rows at most."""

    scorer: Scorer
    context: int
    waiting: int
    busy: int = 0  # rows that are computed or wait
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def warm_up(self) -> None:
        """Compile the program of every width."""
        for width in widths_up_to(self.context):
            self.scorer.score([np.zeros(width, np.int32)])

    async def score(self, request: Scores) -> dict[str, Any]:
        """The body of the reply. Raises ApiError."""
        try:
            rows = self.scorer.encode([answered.record() for answered in request.input])
        except ValueError as error:
            raise ApiError(400, str(error), "input") from None
        if (longest := max(map(len, rows))) > self.context:
            message = f"input: {longest} tokens; this model's maximum context length is {self.context}"
            raise ApiError(400, message, "input", "context_length_exceeded")
        if self.busy and self.busy + len(rows) > self.waiting:
            raise ApiError(429, f"The server is busy: {self.busy} rows wait already", None, "rate_limit_exceeded")
        self.busy += len(rows)
        try:
            scores = await asyncio.to_thread(self.compute, rows)
        finally:
            self.busy -= len(rows)
        data = [{"object": "score", "index": index, "score": score} for index, score in enumerate(scores)]
        count = sum(map(len, rows))
        used = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "model": self.name, "data": data, "usage": used}

    def compute(self, rows: list[np.ndarray]) -> list[float]:
        with self.lock:
            return self.scorer.score(rows)


def widths_up_to(context: int) -> list[int]:
    """The columns that Scorer's batches have for rows of at most so many tokens, in powers of two from 32 on."""
    return [2**power for power in range(5, int(math.log2(max(context, 32))) + 1)]


def read_scores(name: str, count: int, context: int, waiting: int, served_as: str = "") -> ScoreService:
    """The reward model of a run, or a sequence classifier. Raises ValueError, in one line, where there is none."""
    scorer = Scorer(name, rows=count)
    context = min(context, row_limit(scorer.model.config) or context)
    context = widths_up_to(context)[-1]
    return ScoreService(served_as or public_name(name), scorer, context, waiting)


def read_service(name: str, count: int, context: int, waiting: int, served_as: str = "") -> TextService:
    """The policy of a run, or a model, with ``count`` slots of at most ``context`` columns on the first device; its
    engine is not started. Raises ValueError, in one line, where ``name`` holds no language model."""
    compiler_flags.use_compilation_cache()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = read_model(name, mesh)
    slots = Slots(model.params, model.config, count, context)
    model = model._replace(params={})  # the slots have them, in another layout
    return TextService(served_as or public_name(name), model, Engine(slots, model.tokenizer, model.ids.eos, waiting))


def public_name(name: str) -> str:
    """What clients call a model: the last part of its place, never a path."""
    return name.rstrip("/").replace(":", "/").rpartition("/")[2] or "model"
