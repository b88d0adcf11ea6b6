"""From a record to token ids and the mask of what is learnt.

One promise: the tokens before a response are exactly those that ``encode_prompt`` gives for its prompt, so what a
policy is trained on is what it sees while sampling. Hence a text is encoded whole where its pieces meet at the edge of
a token, and piece by piece where a token would straddle prompt and response.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.data.kinds import BadRecord
from jaxrlhf.data.tokenizer import encode_text, eos_ids, leading_ids, start_id

Messages = Sequence[Mapping[str, Any]]
Piece = tuple[str, bool]  # text, and whether it is a response


class Encoded(NamedTuple):
    tokens: np.ndarray  # i32[S]
    response_mask: np.ndarray  # bool[S]: the tokens to learn, EOS among them, never the first


def encode_prompt(record: Mapping[str, Any], tokenizer: Any) -> np.ndarray:
    """i32[P] of ``prompt`` (text or messages), or of ``messages`` up to where the assistant speaks.

    Never empty: a start token is put where nothing would be, since the first sampled token needs one before it.
    """
    prompt = record["messages"] if record.get("prompt") is None else record["prompt"]
    if isinstance(prompt, str):
        ids = leading_ids(tokenizer) + encode_text(tokenizer, prompt).ids
    else:
        ids = encode_text(tokenizer, _render(prompt, tokenizer, to_answer=True)).ids
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
    if prompt is not None and isinstance(response, list):
        messages = [*prompt, *response]
        turns = [turn for turn in range(len(prompt), len(messages)) if messages[turn]["role"] == "assistant"]
        return _encode_chat(messages, turns, tokenizer, eos, append_eos)
    if prompt is not None and response is not None:
        return _encode_texts(prompt, response, tokenizer, eos, append_eos)
    if record.get("messages") is not None:
        messages = record["messages"]
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        return _encode_chat(messages, turns if loss_on == "assistant" else turns[-1:], tokenizer, eos, append_eos)
    text = encode_text(tokenizer, record["text"]).ids
    return _finish([([start_id(tokenizer)], False), (text, True)], eos, append_eos)


def encode_pair(
    record: Mapping[str, Any], tokenizer: Any, eos: Sequence[int] | None = None, append_eos: bool = True
) -> tuple[Encoded, Encoded]:
    """(chosen, rejected), each with its prompt in front.

    Text sides follow ``prompt`` (empty where there is none). Of two lists of messages the prompt is what they share at
    the start, and the assistant's turns after it are the response; a list that starts with the assistant follows
    ``prompt``, any other is a whole conversation already.
    """
    eos = eos_ids(tokenizer) if eos is None else eos
    prompt = record.get("prompt")
    if isinstance(record["chosen"], str) and not isinstance(prompt, list):
        chosen, rejected = (
            _encode_texts(prompt or "", record[side], tokenizer, eos, append_eos) for side in ("chosen", "rejected")
        )
        return chosen, rejected
    chosen, rejected = (_conversation(prompt, record[side]) for side in ("chosen", "rejected"))
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    turns = lambda side: [turn for turn in range(shared, len(side)) if side[turn]["role"] == "assistant"]
    first, second = (_encode_chat(side, turns(side), tokenizer, eos, append_eos) for side in (chosen, rejected))
    return first, second


def _conversation(prompt: Any, side: Any) -> list[Mapping[str, Any]]:
    side = [{"role": "assistant", "content": side}] if isinstance(side, str) else list(side)
    if side[0]["role"] != "assistant" or not prompt:
        return side
    return [*([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt), *side]


def _encode_texts(prompt: str, response: str, tokenizer: Any, eos: Sequence[int], append_eos: bool) -> Encoded:
    before, after = _encode_pieces([(prompt, False), (response, True)], tokenizer)
    before = leading_ids(tokenizer) + before
    return _finish([(before or [start_id(tokenizer)], False), (after, True)], eos, append_eos)


def _encode_chat(messages: Messages, turns: list[int], tokenizer: Any, eos: Sequence[int], append_eos: bool) -> Encoded:
    """``turns`` are learnt, each up to its EOS: what a template writes behind it (a line break) no policy ever says."""
    pieces = _chat_pieces(messages, turns, tokenizer)
    parts: list[tuple[list[int], bool]] = []
    for ids, (_, learnt) in zip(_encode_pieces(pieces, tokenizer), pieces):
        end = max((at + 1 for at, token in enumerate(ids) if learnt and token in eos), default=len(ids))
        parts.append((ids[:end], learnt))
        parts.append((ids[end:], False))
    return _finish(parts[:-1] if turns[-1] == len(messages) - 1 else parts, eos, append_eos)


def _chat_pieces(messages: Messages, turns: Iterable[int], tokenizer: Any) -> list[Piece]:
    """The rendered conversation, cut where the assistant starts and stops. The spans come from rendering prefixes."""
    whole, at, pieces = _render(messages, tokenizer), 0, []
    for turn in turns:
        before, after = _render(messages[:turn], tokenizer, to_answer=True), _render(messages[: turn + 1], tokenizer)
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= at):
            raise ValueError(
                f"chat template of {tokenizer.name_or_path!r} is not prefix-stable: it writes what comes before "
                f"message {turn}, or the message, in another way once more follows, so what to learn can't be found"
                + (" (data.loss_on: response needs it of the last message only)" if turn < len(messages) - 1 else "")
            )
        pieces += [(whole[at : len(before)], False), (whole[len(before) : len(after)], True)]
        at = len(after)
    return pieces + ([(whole[at:], False)] if at < len(whole) else [])


def _render(messages: Messages, tokenizer: Any, to_answer: bool = False) -> str:
    if not tokenizer.chat_template:
        raise ValueError(f"tokenizer: {tokenizer.name_or_path!r} has no chat template, and the data holds messages")
    if not messages:
        return ""
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=to_answer)
    except Exception as error:  # templates raise what they like: "roles must alternate"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadRecord(f"chat template of {tokenizer.name_or_path!r} refuses the messages: {reason}") from error


def _encode_pieces(pieces: Sequence[Piece], tokenizer: Any) -> list[list[int]]:
    """Ids of each piece, whose concatenation is the text (see the promise at the top)."""
    texts = [text for text, _ in pieces]
    whole = encode_text(tokenizer, "".join(texts))
    ids, first = whole.ids, encode_text(tokenizer, texts[0]).ids
    edges = np.cumsum([len(text) for text in texts])
    begins, ends = _extents(whole.offsets)
    straddles = ((begins[:, None] < edges) & (edges < ends[:, None])).any()
    if not straddles and ids[: len(first)] == first:
        owner = np.searchsorted(edges[:-1], begins, side="right")
        return [[ids[at] for at in np.flatnonzero(owner == piece)] for piece in range(len(pieces))]
    return [first] + [_continuation(text, tokenizer) for text in texts[1:]]


def _extents(offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Characters [begin, end) of each token. Some tokenizers trim spaces off their offsets: a token is taken to begin
    where the last one ended, or before, when it is a further byte of the same character."""
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    return np.minimum(starts, np.concatenate([[0], ends])[:-1]), ends


def _continuation(text: str, tokenizer: Any) -> list[int]:
    """Ids of a text that follows another: some tokenizers write a space before the first word that they see."""
    after_break = encode_text(tokenizer, "\n" + text)
    begins, ends = _extents(after_break.offsets)
    if ((begins < 1) & (ends > 1)).any():
        return encode_text(tokenizer, text).ids
    return [token for token, begin in zip(after_break.ids, begins) if begin >= 1]


def _finish(parts: Sequence[tuple[list[int], bool]], eos: Sequence[int], append_eos: bool) -> Encoded:
    """Joins the parts and ends a learnt last part with EOS, where it has none and ``append_eos`` asks for it."""
    ids = [token for part, _ in parts for token in part]
    mask = [learnt for part, learnt in parts for _ in part]
    if append_eos and parts[-1][1] and ids[-1] not in eos:
        ids.append(eos[0])
        mask.append(True)
    mask[0] = False
    return Encoded(np.asarray(ids, np.int32), np.asarray(mask, bool))
