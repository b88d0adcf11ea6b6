"""Reward functions that are written for TRL's GRPO: (prompts, completions, one keyword a data column) -> rewards."""

import inspect
from collections.abc import Callable
from typing import Any

from jaxrlhf.rewards.event_loop import is_async

PREFIX = "trl:"  # of the name of such a function in a config


class Adapter:
    """Such a function, called with (responses, records).

    It gets ``prompts`` and ``completions`` as text, or as lists of messages where a prompt is a conversation; and every
    other column of the records as a list; and ``completion_ids``. What it doesn't take is left out; trainer_state,
    which TRL passes too, is not there."""

    def __init__(self, function: Callable):
        self.function, self.is_async = function, is_async(function)

    def __call__(self, responses: list[str], records: list[dict[str, Any]], token_ids: list[list[int]]) -> Any:
        prompts = [record.get("prompt", record.get("messages")) for record in records]
        completions = [completion(text, prompt) for text, prompt in zip(responses, prompts, strict=True)]
        columns = dict.fromkeys(name for record in records for name in record if name not in ("prompt", "messages"))
        given: dict[str, Any] = {name: [record.get(name) for record in records] for name in columns}
        given |= {"prompts": prompts, "completions": completions, "completion_ids": token_ids}
        return self.function(**taken(self.function, given))


def completion(text: str, prompt: Any) -> Any:
    """A response as TRL has it: the assistant's message after a conversation, text after text."""
    return text if prompt is None or isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def taken(function: Callable, given: dict[str, Any]) -> dict[str, Any]:
    """What of ``given`` the function takes."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return given
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return given
    return {name: value for name, value in given.items() if name in parameters}
