"""From a record to token ids and the mask of what is learnt.

One promise: the tokens before a response are exactly those that ``encode_prompt`` gives for its prompt, so what a
policy is trained on is what it sees while sampling. Hence a text is encoded whole where its pieces meet at the edge of
a token, and piece by piece where a token would straddle prompt and response.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.data.chat import Message, Messages, render
from jaxrlhf.data.record_kinds import BadRecord
from jaxrlhf.data.tokenizer import added_tokens, encode_text, eos_ids, find_added, leading_ids, start_id, turn_end

Record = Mapping[str, Any]
Piece = tuple[str, bool]  # text, and whether it is a response
OPENED = re.compile(r"<(\w+)>(\s*)$|\[(\w+)\](\s*)$")  # a tag at the end of a prompt, as <think>, and the space behind
CLOSED = re.compile(r"(</\w+>|\[/\w+\])\s*$")


class Encoded(NamedTuple):
    tokens: np.ndarray  # i32[S]
    response_mask: np.ndarray  # bool[S]: the tokens to learn, EOS among them, never the first
    rewards: np.ndarray | None = None  # f32[S] of a trajectory: what each token earned
    observations: np.ndarray | None = None  # f32[S, D] of an episode: what was observed after each token


def as_turns(record: Record) -> Record:
    """The record with its plain texts as turns of a conversation: of the user what is called prompt, of the assistant
    what answers it. A text without a prompt stays as it is."""
    prompt = record.get("prompt")
    if not isinstance(prompt, str):
        return record
    asked, said = [{"role": "user", "content": prompt}], {}
    for name in ("response", "chosen", "rejected"):
        if isinstance(record.get(name), str):
            said[name] = [{"role": "assistant", "content": record[name]}]
    rest = {name: value for name, value in record.items() if name not in ("prompt", "response")}
    if record.get("chosen") is not None:
        return {**rest, "prompt": asked, **said}
    return {**rest, "messages": asked + said.get("response", [])}


def prompt_turns(record: Record) -> Messages | None:
    """What of a conversation comes before the last response (of a pair: before its sides part); None of plain text."""
    if "chosen" in record:
        sides = pair_turns(record)
        return None if sides is None else sides[0][: shared_turns(*sides)]
    messages = _messages(record)
    if messages is None:
        return None
    turns = _turns(messages)
    return messages[: turns[-1]] if turns and turns[-1] == len(messages) - 1 else messages


def _messages(record: Record) -> Messages | None:
    """The conversation of a demonstration or a prompt; None of plain text."""
    prompt, response = record.get("prompt"), record.get("response")
    if isinstance(prompt, list):
        return [*prompt, *(response if isinstance(response, list) else [])]
    return None if isinstance(prompt, str) else record.get("messages")


def _turns(messages: Messages, start: int = 0) -> list[int]:
    """Where the assistant speaks, from message ``start`` on."""
    return [turn for turn in range(start, len(messages)) if messages[turn]["role"] == "assistant"]


def encode_prompt(record: Record, tokenizer: Any) -> np.ndarray:
    """i32[P] of ``prompt``, or of ``messages`` up to where the assistant speaks.

    Never empty: a start token is put where nothing would be, since the first sampled token needs one before it.
    """
    if isinstance(record.get("prompt"), str):
        before, _ = _begin(encode_text(tokenizer, record["prompt"]).ids, [], tokenizer)
        return np.asarray(before, np.int32)
    messages = _without_ends(_messages(record) or (), tokenizer)
    ids = encode_text(tokenizer, render(messages, tokenizer, True, record.get("tools"))).ids
    return np.asarray(ids or [start_id(tokenizer)], np.int32)


def encode_demonstration(
    record: Mapping[str, Any],
    tokenizer: Any,
    loss_on: str,
    eos: Sequence[int] | None = None,
    append_eos: bool = True,
) -> Encoded:
    """Tokens and mask of one demonstration; its first token is never learnt, as nothing comes before it.

    - prompt + response: the response and the EOS behind it are learnt (without ``append_eos`` only one that it has);
      where they are messages, through the chat template, all assistant turns of the response.
    - messages: through the chat template; learnt are all assistant turns (``loss_on`` "assistant") or the last one.
    - text: all of it is learnt, its first word too, so a start token (BOS, or else EOS) is put in front.

    Args:
        eos: ids that end a turn; the tokenizer's own by default.

    Raises:
        ValueError: the chat template renders a turn differently once more turns follow, so it can't be found.
    """
    eos = eos_ids(tokenizer) if eos is None else eos
    prompt, response = record.get("prompt"), record.get("response")
    if prompt is not None and isinstance(response, str):
        return _encode_texts(prompt, response, tokenizer, eos, append_eos)
    if (messages := _messages(record)) is not None:
        turns = _turns(messages, len(prompt) if isinstance(response, list) and prompt else 0)
        learnt = turns if loss_on == "assistant" or isinstance(response, list) else turns[-1:]
        return _encode_chat(Talk(messages, record.get("tools")), learnt, tokenizer, eos, append_eos)
    start, text = [start_id(tokenizer)], encode_text(tokenizer, record["text"]).ids
    text = text[1:] if text[:1] == start else text  # a text that a template has written already
    return _finish([(start, False), (_to_its_end(text, tokenizer, eos), True)], eos, append_eos)


def encode_pair(
    record: Mapping[str, Any], tokenizer: Any, eos: Sequence[int] | None = None, append_eos: bool = True
) -> tuple[Encoded, Encoded]:
    """(chosen, rejected), each with its prompt in front.

    Text sides follow ``prompt`` (empty where there is none). Of two lists of messages the prompt is what they share at
    the start, and the assistant's turns after it are the response; a list that starts with the assistant follows
    ``prompt``, any other is a whole conversation already.
    """
    eos = eos_ids(tokenizer) if eos is None else eos
    sides = pair_turns(record)
    if sides is None:
        prompt = record.get("prompt") or ""
        chosen, rejected = (
            _encode_texts(prompt, record[side], tokenizer, eos, append_eos) for side in ("chosen", "rejected")
        )
        return chosen, rejected
    shared = shared_turns(*sides)
    encode = lambda side: _encode_chat(
        Talk(side, record.get("tools")), _turns(side, shared), tokenizer, eos, append_eos
    )
    return encode(sides[0]), encode(sides[1])


def pair_turns(record: Record) -> tuple[list[Message], list[Message]] | None:
    """(chosen, rejected) as whole conversations; None where they are plain text."""
    prompt = record.get("prompt")
    if isinstance(record["chosen"], str) and not isinstance(prompt, list):
        return None
    return _conversation(prompt, record["chosen"]), _conversation(prompt, record["rejected"])


def shared_turns(chosen: Messages, rejected: Messages) -> int:
    """Messages that both begin with; one is left to differ."""
    return max(0, min(count_shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1))


def _conversation(prompt: Any, side: Any) -> list[Message]:
    side = [{"role": "assistant", "content": side}] if isinstance(side, str) else list(side)
    if side[0]["role"] != "assistant" or not prompt:
        return side
    return [*([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt), *side]


def _encode_texts(prompt: str, response: str, tokenizer: Any, eos: Sequence[int], append_eos: bool) -> Encoded:
    first, second = _encode_pieces([(prompt, False), (response, True)], tokenizer)
    before, after = _begin(first, second, tokenizer)
    return _finish([(before, False), (_to_its_end(after, tokenizer, eos), True)], eos, append_eos)


def encode_parts(
    record: Record, pieces: Sequence[Piece], tokenizer: Any, eos: Sequence[int], append_eos: bool
) -> tuple[Encoded, list[int]]:
    """(tokens and mask of the record's prompt, where it has one, and of pieces behind it; how many tokens there are up
    to the end of each piece)."""
    prompt, messages = record.get("prompt") or "", _messages(record)
    if messages is not None:
        prompt = render(_without_ends(messages, tokenizer), tokenizer, True, record.get("tools"))
    first, *rest = _encode_pieces([(prompt, False), *pieces], tokenizer)
    first, rest[0] = _begin(first, rest[0], tokenizer)
    if pieces[-1][1]:
        rest[-1] = _to_its_end(rest[-1], tokenizer, eos)
    if not all(ids for ids, (_, learnt) in zip(rest, pieces, strict=True) if learnt):
        raise BadRecord("a step has no token of its own")
    if append_eos and pieces[-1][1] and rest[-1][-1] not in eos:
        rest[-1] = [*rest[-1], eos[0]]
    parts = [(first, False), *((ids, learnt) for ids, (_, learnt) in zip(rest, pieces, strict=True))]
    return _finish(parts, eos, append_eos=False), np.cumsum([len(ids) for ids, _ in parts])[1:].tolist()


def _to_its_end(ids: list[int], tokenizer: Any, eos: Sequence[int]) -> list[int]:
    """A text up to the EOS that ends it, without what templates write behind that: a line break, or a second EOS."""
    at = len(ids)
    while at and (ids[at - 1] in eos or not tokenizer.decode(ids[at - 1]).strip()):
        at -= 1
    end = next((place for place in range(at, len(ids)) if ids[place] in eos), None)
    return ids if end is None else ids[: end + 1]


def _begin(before: list[int], after: list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Prompt and response with what the tokenizer puts before a text, where they don't begin with it: a text that a
    chat template has written already does. Where nothing would be before the response, a start token is."""
    lead = leading_ids(tokenizer)
    if not before:
        start = lead or [start_id(tokenizer)]
        return start, after[len(start) :] if after[: len(start)] == start else after
    return before if before[: len(lead)] == lead else lead + before, after


# ---- conversations --------------------------------------------------------------------------------------------------


class Talk(NamedTuple):
    """A conversation, and the tools that its assistant may call."""

    messages: Messages
    tools: Any


def _encode_chat(talk: Talk, turns: list[int], tokenizer: Any, eos: Sequence[int], append_eos: bool) -> Encoded:
    """``turns`` are learnt, each up to its EOS: what a template writes behind it (a line break) no policy ever says."""
    pieces = _chat_pieces(talk, turns, tokenizer, eos)
    parts = list(zip(_encode_pieces(pieces, tokenizer), (learnt for _, learnt in pieces)))
    return _finish(parts, eos, append_eos)


def _chat_pieces(talk: Talk, turns: Iterable[int], tokenizer: Any, eos: Sequence[int]) -> list[Piece]:
    """The rendered conversation, cut where the assistant starts and stops. The spans come from rendering prefixes."""
    messages, tools = _without_ends(talk.messages, tokenizer), talk.tools
    added = added_tokens(tokenizer)
    ends = [word for word in tokenizer.convert_ids_to_tokens(list(eos)) if word in added]
    whole, at, pieces = render(messages, tokenizer, tools=tools), 0, []
    for turn in turns:
        before = render(messages[:turn], tokenizer, True, tools) if turn else _opening(messages[0], tokenizer, tools)
        after = render(messages[: turn + 1], tokenizer, tools=tools)
        last = turn == len(messages) - 1
        if last and not after.startswith(before) and (said := _thought(before, after, messages[turn])):
            whole = before + said
            after = whole
        said = _said(whole, before, after, messages[turn], ends)
        if said is None or len(before) < at:
            raise ValueError(
                f"chat template of {tokenizer.name_or_path!r} is not prefix-stable: it writes what comes before "
                f"message {turn}, or the message, in another way once more follows, so what to learn can't be found"
                + ("" if last else " (data.loss_on: response needs it of the last message only)")
            )
        _check_calls(messages[turn], whole[len(before) :], tokenizer)
        pieces += [(whole[at : len(before)], False), (said, True)]
        at = len(before) + len(said)
    return pieces + ([(whole[at:], False)] if not last and at < len(whole) else [])


def _without_ends(messages: Messages, tokenizer: Any) -> Messages:
    """Turns of the assistant without the EOS that the template writes behind them: it would stand there twice."""
    end = turn_end(tokenizer)
    word = "" if end is None else tokenizer.convert_ids_to_tokens(end)

    def bare(message: Message) -> Message:
        content = message.get("content")
        if message["role"] != "assistant" or not isinstance(content, str) or not content.rstrip().endswith(word):
            return message
        while content.rstrip().endswith(word):
            content = content.rstrip().removesuffix(word)
        return {**message, "content": content}

    return [bare(message) for message in messages] if word else messages


def _opening(first: Message, tokenizer: Any, tools: Any) -> str:
    """What a template writes before a conversation's first turn, where that is the assistant's."""
    texts = [render([{**first, "content": word}], tokenizer, tools=tools) for word in ("A probe.", "Or two?")]
    both = texts[0][: count_shared(*texts)]
    return both[: count_shared(both, render([first], tokenizer, tools=tools))]


def _said(whole: str, before: str, after: str, message: Message, ends: Sequence[str]) -> str | None:
    """What of ``whole`` is the turn ``message`` that follows ``before``, up to its end; None where it can't be found.

    ``after``: the conversation up to and with the message. A template may write something behind the last message
    only (<|endoftext|>): then the turn has to end before the texts part.
    """
    if not whole.startswith(before) or not after.startswith(before):
        return None
    shared = after if whole.startswith(after) else after[: count_shared(whole, after)]
    text, answer = shared[len(before) :], _answer(message)
    found = text.find(answer)
    end = max(found, 0) + (len(answer) if found >= 0 else 0)
    word = find_added(text[end:], ends)
    if word is not None:
        return text[: text.index(word, end) + len(word)]
    return text if shared == after else None


def _answer(message: Message) -> str:
    """The content of a turn without its thoughts: what templates write as it is."""
    content = message.get("content")
    return content.rpartition("</think>")[2].strip() if isinstance(content, str) else ""


def count_shared(first: Sequence, second: Sequence) -> int:
    """Items that both begin with: letters of texts, tokens, messages."""
    return next((at for at, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def _thought(before: str, after: str, message: Message) -> str:
    """A last turn as the policy writes it where the prompt ends with more than the template writes before a turn.

    Where the prompt opens thoughts (<think>), and the template writes none: those of the content, or else empty ones.
    Where it closes them, or writes other words that the template leaves out of a turn: the content. "" elsewhere.

    Raises BadRecord for thoughts behind a prompt that closes them."""
    content = message.get("content") or ""
    closed = CLOSED.search(before)
    if closed and closed[1] in content:
        raise BadRecord(
            f"the chat template closes the thoughts ({closed[1]}) before the assistant speaks, and its turn has "
            "thoughts; expected none, or data.chat.kwargs under which the template leaves them to the assistant"
        )
    opened = OPENED.search(before)
    if not opened:
        text = content.strip()  # which may be in the turn's ending too
        at = after.rfind(text, 0, count_shared(before, after) + len(text)) if text else -1
        return after[at:] if at >= 0 and before.startswith(after[:at]) else ""
    if not after.startswith(before[: opened.start()]):
        return ""
    word, space = opened[1] or opened[3], opened[2] if opened[1] else opened[4]
    opening, closing = (f"<{word}>", f"</{word}>") if opened[1] else (f"[{word}]", f"[/{word}]")
    answer = content.rpartition(closing)[2].strip() or content.strip()
    tail = after[after.rindex(answer) + len(answer) :] if answer and answer in after else ""
    thoughts = message.get("reasoning_content") or message.get("thinking") or message.get("reasoning")
    if closing in content:
        body = content.lstrip()
        return (body.removeprefix(opening).lstrip() if body.startswith(opening) else body) + tail
    between = "" if space else "\n"
    return f"{between}{thoughts or ''}\n{closing}\n\n{answer}{tail}"


def _check_calls(message: Message, text: str, tokenizer: Any) -> None:
    """Raises ValueError where the template leaves a call of the assistant out: there would be nothing to learn."""
    for call in message.get("tool_calls") or ():
        name = call.get("function", call).get("name")
        if name and name not in text:
            raise ValueError(
                f"tool_calls: the chat template of {tokenizer.name_or_path!r} writes no call of {name!r}; expected a "
                "template that does (data.chat.template)"
            )


# ---- tokens ---------------------------------------------------------------------------------------------------------


def _encode_pieces(pieces: Sequence[Piece], tokenizer: Any) -> list[list[int]]:
    """Ids of each piece, whose concatenation is the text (see the promise at the top)."""
    texts = [text for text, _ in pieces]
    whole = encode_text(tokenizer, "".join(texts))
    ids, first = whole.ids, encode_text(tokenizer, texts[0]).ids
    edges = np.cumsum([len(text) for text in texts])
    begins, ends = _extents(whole.offsets)
    straddles = (begins[:, None] < edges) & (edges < ends[:, None])
    for token, edge in zip(*np.nonzero(straddles)):  # an EOS that takes the space behind it along ends its turn
        if pieces[edge][1] and whole.ids[token] in added_tokens(tokenizer).values():
            straddles[token, edge] = not "".join(texts)[edges[edge] : ends[token]].isspace()
    if not straddles.any() and ids[: len(first)] == first:
        owner = np.searchsorted(edges[:-1], begins, side="right")
        return [[ids[at] for at in np.flatnonzero(owner == piece)] for piece in range(len(pieces))]
    return [first] + [encode_continuation(text, tokenizer) for text in texts[1:]]


def _extents(offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Characters [begin, end) of each token. Some tokenizers trim spaces off their offsets: a token is taken to begin
    where the last one ended, or before, when it is a further byte of the same character."""
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    return np.minimum(starts, np.concatenate([[0], ends])[:-1]), ends


def encode_continuation(text: str, tokenizer: Any) -> list[int]:
    """Ids of a text that follows another: some tokenizers write a space before the first word that they see."""
    for before in ("\n", "\x01"):  # what the vocabulary may have in one token with the text, and what it has not
        whole = encode_text(tokenizer, before + text)
        begins, ends = _extents(whole.offsets)
        written = encode_text(tokenizer, before).ids  # a vocabulary without it leaves it out, and counts from behind it
        if written and not ((begins < 1) & (ends > 1)).any():
            return [token for token, begin in zip(whole.ids, begins) if begin >= 1]
    return encode_text(tokenizer, text).ids


def _finish(parts: Sequence[tuple[list[int], bool]], eos: Sequence[int], append_eos: bool) -> Encoded:
    """Joins the parts and ends a learnt last part with EOS, where it has none and ``append_eos`` asks for it."""
    ids = [token for part, _ in parts for token in part]
    mask = [learnt for part, learnt in parts for _ in part]
    if append_eos and parts[-1][1] and ids[-1] not in eos:
        ids.append(eos[0])
        mask.append(True)
    mask[0] = False
    return Encoded(np.asarray(ids, np.int32), np.asarray(mask, bool))
