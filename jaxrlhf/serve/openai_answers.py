"""What a model wrote, in the JSON of OpenAI's API."""

from collections.abc import Sequence
from typing import Any

from jaxrlhf.serve.jobs import Job, Said

REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


class Writing:
    """The text of a job as it grows: only what no later token can change, and without the stop text that ends it."""

    def __init__(self, job: Job, tokenizer: Any):
        self.job, self.tokenizer = job, tokenizer
        self.text, self.sent, self.told = "", 0, 0  # characters, and tokens, that were taken

    def update(self) -> None:
        job = self.job
        ended, tokens = job.reason, [said.token for said in job.tokens]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True) if tokens else ""
        if ended == "stop":
            places = [text.find(stop) for stop in job.ask.stop if stop in text]
            self.text = text[: min(places)] if places else text
        elif ended is not None:
            self.text = text
        else:
            self.text = text[: settled(text, job.ask.stop)]

    def take(self) -> str:
        """The text since the last call."""
        self.update()
        new, self.sent = self.text[self.sent :], max(self.sent, len(self.text))
        return new

    def tokens(self) -> list[Said]:
        """What its text consists of: without the token that ended it, and the stop text."""
        kept, size = [], 0
        for said in self.job.tokens[: -1 if self.job.reason == "eos" else None]:
            if self.job.reason == "stop" and size >= len(self.text):
                break
            kept.append(said)
            size += len(piece(self.tokenizer, said.token))
        return kept

    def take_tokens(self) -> list[Said]:
        every = self.tokens()
        new, self.told = every[self.told :], max(self.told, len(every))
        return new


def settled(text: str, stops: Sequence[str]) -> int:
    """How many characters of an unfinished text stay as they are: not the beginning of a letter, nor of a stop."""
    size = len(text.rstrip("\ufffd"))
    for stop in stops:
        for count in range(min(len(stop) - 1, size), 0, -1):
            if text.endswith(stop[:count], 0, size):
                size -= count
                break
    return size


def piece(tokenizer: Any, token: int) -> str:
    """A token as text."""
    return tokenizer.decode([token])


def most_likely(tokenizer: Any, said: Said, count: int) -> dict[str, float]:
    """The likeliest tokens by their text, and the token itself; of two with one text the likelier."""
    found: dict[str, float] = {}
    for token, logprob in [*said.top[:count], (said.token, said.logprob)]:
        if logprob is not None:
            found.setdefault(piece(tokenizer, token), logprob)
    return found


def completion_logprobs(tokenizer: Any, some: Sequence[Said], count: int, offset: int) -> dict[str, Any]:
    """``logprobs`` of /v1/completions; ``offset``: characters of the text before these tokens."""
    tokens = [piece(tokenizer, said.token) for said in some]
    return {
        "tokens": tokens,
        "token_logprobs": [said.logprob for said in some],
        "top_logprobs": [None if said.logprob is None else most_likely(tokenizer, said, count) for said in some],
        "text_offset": [offset + sum(map(len, tokens[:at])) for at in range(len(tokens))],
    }


def chat_logprobs(tokenizer: Any, some: Sequence[Said], count: int) -> dict[str, Any]:
    """``logprobs`` of /v1/chat/completions."""

    def one(token: int, logprob: float | None) -> dict[str, Any]:
        text = piece(tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": [*text.encode()]}

    content = [
        one(said.token, said.logprob) | {"top_logprobs": [one(*top) for top in said.top[:count]]} for said in some
    ]
    return {"content": content, "refusal": None}


def usage(jobs: Sequence[Job], n: int) -> dict[str, int]:
    """Tokens of a request's responses, n to each prompt."""
    prompt, completion = sum(len(job.ids) for job in jobs[::n]), sum(len(job.tokens) for job in jobs)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
