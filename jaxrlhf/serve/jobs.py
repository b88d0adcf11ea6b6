"""One response: how it is sampled, what has been sampled of it, and why it ended."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxrlhf.generate.stop_texts import TextAutomaton

Reason = Literal["eos", "stop", "length", "cancelled", "error"]


class ResponseSettings(NamedTuple):
    """How a response is sampled, and what is told of it."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: bool = False  # of the response's tokens
    of_prompt: bool = False  # of the prompt's
    ignore_eos: bool = False  # the response goes on behind an end token


class Said(NamedTuple):
    """A token, and what the model says of it where that is asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens, the likeliest first


@dataclasses.dataclass(eq=False)
class Job:
    """One response. ``tokens`` grows until ``reason`` says why it ended. The engine's thread calls ``changed`` at the
    end, and after each token where it ``streams``."""

    ids: np.ndarray  # i32[P]
    ask: ResponseSettings
    sample_id: int
    changed: Callable[[], None] = lambda: None
    streams: bool = False
    tokens: list[Said] = dataclasses.field(default_factory=list)
    prompt: list[Said] = dataclasses.field(default_factory=list)  # where ResponseSettings.of_prompt
    reason: Reason | None = None
    read: int = 0  # columns of the prompt that the cache holds
    stops: list[tuple[TextAutomaton, int]] = dataclasses.field(default_factory=list)  # and their states

    @property
    def columns(self) -> int:
        """That its prompt and its response may have."""
        return len(self.ids) + self.ask.max_tokens


def said(told: Any, row: int, token: int) -> Said:
    """``token``, of which ``told`` (slots.Told) speaks in ``row``; None: nothing."""
    if told is None:
        return Said(token)
    top = zip(told.top_token[row].tolist(), told.top_logprob[row].tolist())
    return Said(token, float(told.logprob[row]), tuple(top))
