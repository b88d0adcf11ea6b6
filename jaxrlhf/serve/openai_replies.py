"""Whole and streamed replies to a request for text."""

import abc
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from jaxrlhf.serve.jobs import Job, Said
from jaxrlhf.serve.openai_answers import REASONS, Writing, chat_logprobs, completion_logprobs, usage
from jaxrlhf.serve.openai_requests import Chat, Completion


class Reply(abc.ABC):
    """The reply to one request, which ``jobs`` compute: n responses to each prompt, in their order."""

    name: str  # "object" of a whole reply
    chunk_name: str
    prefix: str

    def __init__(self, request: Any, tokenizer: Any, jobs: Sequence[Job]):
        self.request, self.tokenizer, self.jobs, self.n = request, tokenizer, jobs, request.n or 1
        self.writings = [Writing(job, tokenizer) for job in jobs]
        self.began: set[int] = set()  # responses of which something was sent
        self.finished: set[int] = set()  # of which everything was
        self.head = {"id": self.prefix + secrets.token_hex(12), "created": int(time.time()), "model": request.model}

    def whole(self) -> dict[str, Any]:
        """The body of a reply whose jobs have ended."""
        choices = [self.choice(index) for index in range(len(self.jobs))]
        return self.head | {"object": self.name, "choices": choices, "usage": usage(self.jobs, self.n)}

    def news(self) -> Iterator[str]:
        """Events of what is new, since the last call, of a reply that is streamed."""
        for index, job in enumerate(self.jobs):
            if index in self.finished or not (job.tokens or job.reason):
                continue
            reason = job.reason  # read before the text, so that the last text is not missed
            yield from (self.event([choice]) for choice in self.changes(index, reason))
            self.began.add(index)
            if reason:
                self.finished.add(index)

    def last(self) -> Iterator[str]:
        """Events behind all text."""
        options = self.request.stream_options
        if options is not None and options.include_usage:
            yield self.event([], usage=usage(self.jobs, self.n))
        yield "data: [DONE]\n\n"

    def event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        body = self.head | {"object": self.chunk_name, "choices": choices} | more
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    @abc.abstractmethod
    def choice(self, index: int) -> dict[str, Any]:
        """A whole response."""

    @abc.abstractmethod
    def changes(self, index: int, reason: str | None) -> Iterator[dict[str, Any]]:
        """What is new of a response, and in the last of them why it ended."""


class CompletionReply(Reply):
    """Of /v1/completions."""

    name = chunk_name = "text_completion"
    prefix = "cmpl-"
    request: Completion

    def prompt(self, index: int) -> str:
        """The text in front of a response: where it is asked for, that of its prompt."""
        if not self.request.echo:
            return ""
        asked = self.request.prompts[index // self.n]
        return asked if isinstance(asked, str) else self.tokenizer.decode(asked)

    def of_prompt(self, index: int) -> list[Said]:
        job = self.jobs[index]
        return [Said(int(job.ids[0])), *job.prompt] if self.request.echo else []

    def logprobs(self, some: Sequence[Said], offset: int) -> dict[str, Any] | None:
        count = self.request.logprobs
        return None if count is None else completion_logprobs(self.tokenizer, some, count, offset)

    def choice(self, index: int) -> dict[str, Any]:
        writing, reason = self.writings[index], self.jobs[index].reason
        text = self.prompt(index) + writing.take()
        told = self.logprobs([*self.of_prompt(index), *writing.tokens()], 0)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": REASONS.get(str(reason))}

    def changes(self, index: int, reason: str | None) -> Iterator[dict[str, Any]]:
        writing, first = self.writings[index], index not in self.began
        before = writing.sent + (0 if first else len(self.prompt(index)))
        text = writing.take()
        if first:
            text = self.prompt(index) + text
        if not text and not reason:
            return
        some = [*(self.of_prompt(index) if first else []), *writing.take_tokens()]
        finish = REASONS.get(reason) if reason else None
        yield {"index": index, "text": text, "logprobs": self.logprobs(some, before), "finish_reason": finish}


class ChatReply(Reply):
    """Of /v1/chat/completions."""

    name, chunk_name, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"
    request: Chat

    def logprobs(self, some: Sequence[Said]) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        return chat_logprobs(self.tokenizer, some, self.request.top_logprobs or 0)

    def choice(self, index: int) -> dict[str, Any]:
        writing, reason = self.writings[index], self.jobs[index].reason
        message = {"role": "assistant", "content": writing.take(), "refusal": None}
        told = self.logprobs(writing.tokens())
        return {"index": index, "message": message, "logprobs": told, "finish_reason": REASONS.get(str(reason))}

    def changes(self, index: int, reason: str | None) -> Iterator[dict[str, Any]]:
        chunk = {"index": index, "logprobs": None, "finish_reason": None}
        writing = self.writings[index]
        if index not in self.began:
            yield chunk | {"delta": {"role": "assistant", "content": ""}}
        if text := writing.take():
            yield chunk | {"delta": {"content": text}, "logprobs": self.logprobs(writing.take_tokens())}
        if reason:
            yield chunk | {"delta": {}, "finish_reason": REASONS.get(reason)}
