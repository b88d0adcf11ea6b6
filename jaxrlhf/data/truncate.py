"""How a row that is too long is cut: one law for prompts, demonstrations and pairs.

What goes is the oldest exchanges of a conversation, then the start of what is left of the prompt. What stays is BOS,
the system turn and all that a template writes before the first message; at least one token of the prompt; what it
writes between prompt and response; and the last response to its end, of a pair all from where its sides differ. A text
without a prompt loses its end. A row for which that is not enough can't be cut.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.data.chat import LEADING_ROLES, Messages, render
from jaxrlhf.data.encode import Encoded, Record, count_shared, pair_turns, prompt_turns
from jaxrlhf.data.tokenizer import encode_text, leading_ids, start_id

Sides = tuple[Encoded, ...]  # one row of tokens; of a pair two: chosen, rejected
Encoder = Callable[[Mapping[str, Any]], Sides]


class Edges(NamedTuple):
    """Tokens of a prompt that stay: at its start, and at its end."""

    lead: int
    tail: int


def truncate(record: Record, encode: Encoder, tokenizer: Any, max_length: int) -> Sides | None:
    """The record's rows with at most ``max_length`` tokens; None where they can't be cut to that."""
    sides = encode(record)
    while longest(sides) > max_length and (shorter := without_oldest(record)) is not None:
        record, sides = shorter, encode(shorter)
    if longest(sides) <= max_length:
        return sides
    if sides[0].observations is not None:  # a part of an episode would have another return
        return None
    if "text" in record and not {"prompt", "messages", "chosen"} & {key for key in record if record[key] is not None}:
        return tuple(Encoded(side.tokens[:max_length], side.response_mask[:max_length]) for side in sides)
    return cut(sides, max_length, edges_of(record, sides, tokenizer))


def longest(sides: Sides) -> int:
    return max(len(side.tokens) for side in sides)


def without_oldest(record: Record) -> Record | None:
    """The record without the first user's turn and what follows up to the next one's; None where there is no other
    exchange before the last response."""
    prompt = prompt_turns(record)
    if prompt is None:
        return None
    first = _first(prompt)
    users = [turn for turn in range(first, len(prompt)) if prompt[turn]["role"] == "user"]
    second = next((turn for turn in users if turn > first), None)
    if second is None:
        return None
    shorter = lambda messages: [*messages[:first], *messages[second:]]
    if "chosen" in record:
        chosen, rejected = pair_turns(record) or ([], [])
        return {**record, "prompt": None, "chosen": shorter(chosen), "rejected": shorter(rejected)}
    if isinstance(record.get("prompt"), list):
        return {**record, "prompt": shorter(record["prompt"])}
    return {**record, "messages": shorter(record["messages"])}


def _first(messages: Messages) -> int:
    """The first message that is not the system's."""
    return next((turn for turn, message in enumerate(messages) if message["role"] not in LEADING_ROLES), 0)


def edges_of(record: Record, sides: Sides, tokenizer: Any) -> Edges:
    """What stays at the edges of the prompt: what is rendered alike whatever its first and its last message say."""
    prompt = prompt_turns(record)
    if prompt is None:
        lead = leading_ids(tokenizer) or ([] if record.get("prompt") else [start_id(tokenizer)])
        return Edges(len(lead) if sides[0].tokens[: len(lead)].tolist() == lead else 0, 0)
    if not prompt:
        return Edges(0, 0)
    probe = lambda turn, word: render(
        [message if at != turn else {**message, "content": word} for at, message in enumerate(prompt)],
        tokenizer,
        to_answer=True,
        tools=record.get("tools"),
    )
    first, last = _first(prompt), len(prompt) - 1
    one, other = probe(first, "A probe."), probe(first, "Or two?")
    lead = encode_text(tokenizer, one[: count_shared(one, other)]).ids
    one, other = probe(last, "A probe."), probe(last, "Or two?")
    alike = count_shared(one[::-1], other[::-1])
    tail = encode_text(tokenizer, one[len(one) - alike :]).ids
    tokens = sides[0].tokens[: _start(sides[0])].tolist()
    return Edges(count_shared(lead, tokens), count_shared(tail[::-1], tokens[::-1]))


def _start(side: Encoded) -> int:
    """Where the last response begins; the end of a row without one."""
    learnt = np.flatnonzero(np.diff(side.response_mask.astype(int), prepend=0) == 1)
    return int(learnt[-1]) if len(learnt) else len(side.tokens)


def cut(sides: Sides, max_length: int, edges: Edges) -> Sides | None:
    """Rows without tokens of their prompt, all sides without the same ones; None where that is not enough.

    Responses before the last that begin in what goes are no longer learnt: nothing says what they answer."""
    over, lead = longest(sides) - max_length, edges.lead
    if len(sides) == 2:
        firm = min(int(side.response_mask.argmax()) for side in sides) - edges.tail
        if firm <= max(lead, 1):  # there is no prompt but what both sides begin with
            firm = count_shared(sides[0].tokens.tolist(), sides[1].tokens.tolist())
    else:
        firm = _start(sides[0]) - edges.tail
    if lead + over > firm - 1:
        return None
    return tuple(_without(side, lead, over, earlier=len(sides) == 1) for side in sides)


def _without(side: Encoded, lead: int, count: int, earlier: bool) -> Encoded:
    """The row without ``count`` tokens from ``lead`` on; with ``earlier`` what is left of a response is not learnt."""
    mask, at = side.response_mask.copy(), lead + count
    if earlier and mask[at - 1]:
        mask[at : at + int((~mask[at:]).argmax())] = False
    keep = np.r_[0:lead, at : len(mask)]
    mask = mask[keep]
    mask[0] = False
    return Encoded(side.tokens[keep], mask, None if side.rewards is None else np.where(mask, side.rewards[keep], 0))
