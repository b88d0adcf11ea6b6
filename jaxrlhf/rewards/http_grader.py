"""Graders on a server: any that takes {"prompts", "responses", "records"}, and a reward model of ``jaxrlhf serve``."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrlhf.errors import counted, show
from jaxrlhf.rewards.llm_judge import prompt_text
from jaxrlhf.rewards.remote import Client, Failed, RemoteConfig, settings_of


class HttpGrader:
    """A grader (rewards.function: http) that posts {"prompts": [text], "responses":
    [text], "records": [object]} to ``url`` and takes {"scores": [number or null]} back. Responses that got no reply
    have no score (None).

    Args:
        batch: responses of one request.
        given: the fields of RemoteConfig.
    """

    def __init__(self, batch: int = 16, **given: Any):
        self.batch, self.client = checked(batch), Client(settings_of(RemoteConfig, given))

    async def __call__(self, responses: list[str], records: list[dict[str, Any]]) -> list[float | None]:
        parts = [slice(at, at + self.batch) for at in range(0, len(responses), self.batch)]
        bodies = [
            {
                "prompts": [prompt_text(record) for record in records[part]],
                "responses": responses[part],
                "records": records[part],
            }
            for part in parts
        ]
        read = lambda reply, body: scores_in(reply, "scores", len(body["responses"]))
        replies = await self.client.post_all(self.client.cfg.url, bodies, read)
        return joined(replies, [len(body["responses"]) for body in bodies])


class RewardModelServer:
    """A grader (rewards.function: reward_model_server) that asks ``jaxrlhf serve`` of a
    reward model, at ``url``/scores, as in http://127.0.0.1:8000/v1.

    Args:
        model: the name that it is served by.
        batch: responses of one request.
        given: the fields of RemoteConfig.
    """

    def __init__(self, model: str, batch: int = 16, **given: Any):
        self.model, self.batch, self.client = model, checked(batch), Client(settings_of(RemoteConfig, given))

    async def __call__(self, responses: list[str], records: list[dict[str, Any]]) -> list[float | None]:
        rows = [answered(record, text) for record, text in zip(records, responses, strict=True)]
        parts = [rows[at : at + self.batch] for at in range(0, len(rows), self.batch)]
        bodies = [{"model": self.model, "input": part} for part in parts]
        replies = await self.client.post_all("/scores", bodies, read_scores)
        return joined(replies, [len(part) for part in parts])


def read_scores(reply: dict[str, Any], body: Mapping[str, Any]) -> list[Any]:
    """The scores in a reply of /v1/scores, in the order of the rows."""
    data = reply.get("data")
    if not isinstance(data, list) or not all(isinstance(one, dict) and "score" in one for one in data):
        raise ValueError(f"the server gave {show(reply)}: expected data, a list of scores")
    return scores_in({"data": [one["score"] for one in data]}, "data", len(body["input"]))


def checked(batch: int) -> int:
    """Raises ValueError, in one line, for what is no number of responses."""
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch: {show(batch)}: expected at least 1 response a request")
    return batch


def answered(record: Mapping[str, Any], response: str) -> dict[str, Any]:
    """The record with its response, as /v1/scores takes it: text, or a conversation."""
    prompt = record.get("prompt", record.get("messages"))
    if isinstance(prompt, str):
        return {"prompt": prompt, "response": response}
    if not isinstance(prompt, Sequence):
        raise ValueError(f"the record {show(record)} has no prompt and no messages to score a response to")
    return {"messages": [*prompt, {"role": "assistant", "content": response}]}


def scores_in(reply: dict[str, Any], name: str, count: int) -> list[Any]:
    """The scores of a reply. Raises ValueError, in one line, where there are not ``count``."""
    scores = reply.get(name)
    if not isinstance(scores, list) or len(scores) != count:
        given = counted(len(scores), "score") if isinstance(scores, list) else show(reply)
        raise ValueError(f"the server gave {given}: expected {name}, a list of {count}, one a response")
    return scores


def joined(replies: Sequence[list[Any] | Failed], counts: Sequence[int]) -> list[float | None]:
    """The scores of all requests; None for those of a request that failed."""
    parts = [[None] * n if isinstance(reply, Failed) else reply for reply, n in zip(replies, counts, strict=True)]
    return [score for part in parts for score in part]
