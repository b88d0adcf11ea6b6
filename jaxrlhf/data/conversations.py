"""Conversations as people write them, in one form: a list of {"role": text, "content": text, ...}.

Read are lists of messages, one message alone, ShareGPT's {"from", "value"}, any of these as JSON text (in CSV, Parquet
or JSONL), contents in parts, and calls of tools in all their spellings. Other keys of a message stay as they are.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrlhf.data.chat import LEADING_ROLES, parse_json
from jaxrlhf.data.record_kinds import BadRecord, type_name

ROLES = {  # other words for the roles of a chat template, in any case
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    **{role: role for role in ("user", "assistant", "system", "developer", "tool")},
}
FROM = ROLES | {"observation": "tool", "function_response": "tool", "function_call": "assistant"}  # of ShareGPT
TEXT_PARTS = ("text", "input_text", "output_text")
SPELLINGS = (("role", "content"), ("from", "value"))
TURN, ANSWER = "\n\nHuman:", "\n\nAssistant:"  # of transcripts, as in Anthropic's HH
# a list of messages, or one, that starts as JSON or as Python writes it
OPENING = re.compile(r"\s*(array\()?\[?\s*\{")


def read_value(value: Any, name: str, notes: set[str]) -> Any:
    """A column's value as text or as a list of messages; anything else as it is, for the check of the record to refuse.

    Args:
        name: of the column, for messages.
        notes: gains how a conversation was written, where it was not a list of messages with role and content.

    Raises:
        BadRecord: text that looks like messages and is none, a part that is no text, an unknown ShareGPT role.
    """
    if isinstance(value, str):
        found = _from_text(value, name)
        if found is None:
            return value
        notes.add("JSON text")
        value = found
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        return value
    return [_message(message, f"{name}[{turn}]", notes) for turn, message in enumerate(value)]


def holds_messages(value: Any) -> bool:
    """A message, or a list of nothing but messages."""
    turns = [value] if isinstance(value, Mapping) else value
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(isinstance(turn, Mapping) and any(set(keys) <= turn.keys() for keys in SPELLINGS) for turn in turns)
    )


def text_holds_messages(value: str) -> bool:
    """Whether text is a conversation written as JSON, or looks like one."""
    return holds_messages(_parse(value)) or _looks_broken(value)


def _from_text(value: str, name: str) -> Any:
    """The messages that a text holds as JSON; None for ordinary text, which may well be some other JSON."""
    found = _parse(value)
    if holds_messages(found):
        return found
    if _looks_broken(value):
        shown = " ".join(value[:40].split())
        raise BadRecord(f"{name} looks like messages and is not JSON that holds them: {shown}...; expected JSON text")
    return None


def _names_keys(value: str) -> bool:
    """Whether text opens an object and names the keys of a message in quotes."""
    quoted = lambda key: re.search(rf"""(['"]){key}\1\s*:""", value) is not None
    return OPENING.match(value) is not None and any(all(map(quoted, keys)) for keys in SPELLINGS)


def _looks_broken(value: str) -> bool:
    """Whether text is messages that were cut, or that no JSON is: not text that goes on behind JSON."""
    if not _names_keys(value):
        return False
    try:
        json.JSONDecoder().raw_decode(value.lstrip())
    except (ValueError, RecursionError):
        return True
    return False


def _parse(value: str) -> Any:
    """JSON of a list or an object, also where it is written as JSON twice, or what Python writes for one (pandas does,
    in CSV); else None."""
    value = value.strip()
    if (value[:1], value[-1:]) not in (("[", "]"), ("{", "}"), ('"', '"')):
        return None
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):  # ValueError: an integer of thousands of digits, too
        pass
    else:
        return _parse(found) if isinstance(found, str) else found
    if not _names_keys(value):
        return None
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _message(message: Any, name: str, notes: set[str]) -> Any:
    if not isinstance(message, Mapping):
        return message
    # null is what Arrow fills absent keys with; a content of null stands beside a tool call
    message = {key: value for key, value in message.items() if value is not None or key in ("content", "value")}
    if {"from", "value"} <= message.keys() and not {"role", "content"} & message.keys():
        speaker = str(message.pop("from"))
        if speaker.lower() not in FROM:
            raise BadRecord(f"{name}.from is {speaker[:40]!r}, expected human, gpt, system, tool or function_call")
        notes.add("from/value")
        message = {"role": FROM[speaker.lower()], "content": message.pop("value"), **message}
        if speaker.lower() == "function_call":
            message |= {"content": "", "tool_calls": _json_of(message["content"], f"{name}.value")}
    if isinstance(message.get("role"), str):
        message["role"] = ROLES.get(message["role"].lower(), message["role"])
    _take_calls(message, name)
    if isinstance(message.get("content"), Sequence) and not isinstance(message["content"], str):
        notes.add("content parts")
        message["content"] = "".join(_part(part, f"{name}.content[{at}]") for at, part in enumerate(message["content"]))
    return message


def _take_calls(message: dict[str, Any], name: str) -> None:
    """Makes the calls of tools in a message what templates expect: tool_calls: [{"function": {"name", "arguments"}}].

    Read are also one call alone, JSON text of any of these, and OpenAI's older function_call."""
    key = next((key for key in ("tool_calls", "function_call") if message.get(key)), None)
    if key is None:
        return
    calls = _json_of(message.pop(key), f"{name}.{key}")
    message.pop("function_call", None)
    calls = [calls] if isinstance(calls, Mapping) else [] if calls is None else calls
    if not isinstance(calls, list):
        raise BadRecord(f"{name}.{key} is {type_name(calls)}, expected a list of calls")
    message["tool_calls"] = [_call(call, f"{name}.{key}[{at}]") for at, call in enumerate(calls)]


def _call(call: Any, name: str) -> dict[str, Any]:
    call = _json_of(call, name)
    if isinstance(call, Mapping) and call.get("function") is None:
        call = {key: value for key, value in call.items() if key != "function"}
    inner = _json_of(call.get("function", call), f"{name}.function") if isinstance(call, Mapping) else call
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise BadRecord(f"{name} has no name of a function, expected {{function: {{name: text, arguments: object}}}}")
    return {**call, "function": inner} if "function" in call else {"type": "function", "function": dict(call)}


def _json_of(value: Any, name: str) -> Any:
    return parse_json(value, name) if isinstance(value, str) else value


def _part(part: Any, name: str) -> str:
    """The text of one part of a content; parts are joined with nothing between them, as chat templates join them."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
        wrong = "has no text" if kind in TEXT_PARTS else f"is of type {kind!r}"
        raise BadRecord(f"{name} {wrong}, expected {{type: text, text: ...}}: models here read text only")
    return part["text"]


# ---- prompts, answers, pairs ----------------------------------------------------------------------------------------


def fit_response(taken: dict[str, Any], where: str, notes: set[str]) -> dict[str, Any]:
    """Prompt and response both as messages where one of them is; the response without the prompt."""
    prompt, response = taken.get("prompt"), taken.get("response")
    if isinstance(prompt, list) and isinstance(response, str):
        response = [{"role": "assistant", "content": response}]
        return taken | {"response": response}
    if not isinstance(response, list) or not response:
        return taken | _without_prompt(prompt, {"response": response}, notes)
    if prompt is None:
        return {word: value for word, value in taken.items() if word != "response"} | {"messages": response}
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    end = _prompt_end(prompt, response, "response", where)
    return taken | {"prompt": response[:end] if end else prompt, "response": response[end:]}


def fit_pair(taken: dict[str, Any], where: str, notes: set[str]) -> dict[str, Any]:
    """A pair of texts with the prompt before them; of conversations with the prompt either before or in both."""
    prompt, chosen, rejected = taken.get("prompt"), taken["chosen"], taken["rejected"]
    if prompt is None and all(isinstance(side, str) and side.startswith(TURN) for side in (chosen, rejected)):
        return _split_transcripts(chosen, rejected, notes)
    if not (isinstance(chosen, list) and isinstance(rejected, list) and chosen and rejected):
        return taken | _without_prompt(prompt, {"chosen": chosen, "rejected": rejected}, notes)
    if prompt is None or prompt == "":
        notes.update(["implicit prompt"] if _role(chosen[0]) != "assistant" != _role(rejected[0]) else [])
        return {word: value for word, value in taken.items() if word != "prompt"}
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if _only_system(prompt) and _role(chosen[0]) == _role(rejected[0]) == "user":
        notes.add("implicit prompt")
        whole = {"chosen": [*prompt, *chosen], "rejected": [*prompt, *rejected]}
        return {word: value for word, value in taken.items() if word != "prompt"} | whole
    ends = [_prompt_end(prompt, side, name, where) for name, side in (("chosen", chosen), ("rejected", rejected))]
    if all(end == 0 for end in ends):
        return taken | {"prompt": prompt}
    if 0 in ends:
        raise BadRecord("one of chosen and rejected is an answer and the other a whole conversation, expected the same")
    notes.add("implicit prompt")
    return {word: value for word, value in taken.items() if word != "prompt"}


def _without_prompt(prompt: Any, answers: dict[str, Any], notes: set[str]) -> dict[str, Any]:
    """Texts without the prompt that they repeat, where it is a transcript. Any other prompt an answer may well begin
    with ("Hello" - "Hello there"): then that is only told."""
    if not isinstance(prompt, str) or not prompt.strip():
        return {}
    if not all(isinstance(answer, str) and answer.startswith(prompt) for answer in answers.values()):
        return {}
    if not prompt.startswith(TURN):
        notes.add(f"{' and '.join(answers)} repeat{'s' * (len(answers) == 1)} the prompt")
        return {}
    notes.update(["transcript", "implicit prompt"])
    return {word: answer.removeprefix(prompt) for word, answer in answers.items()}


def _prompt_end(prompt: Any, side: list[Any], name: str, where: str) -> int:
    """Where in ``side`` the answer to ``prompt`` begins: 0 where the side is the answer alone."""
    if _role(side[0]) in ("assistant", None) or not isinstance(prompt, list):
        return 0  # whatever is no message is refused by the check of the record
    if _only_system(prompt) and _role(side[0]) == "user":
        return 0
    said = [_said(turn) for turn in prompt]
    for start in range(len(side) - len(prompt) + 1):
        if [_said(turn) for turn in side[start : start + len(prompt)]] == said:
            return start + len(prompt)
    raise BadRecord(
        f"{name} starts with role {_role(side[0])!r}, and the prompt is not in it: expected an assistant's answer, "
        f'or the whole conversation; {where}.fields: {{prompt: ""}} leaves the prompt out'
    )


def _only_system(prompt: list[Any]) -> bool:
    return bool(prompt) and all(_role(turn) == "system" for turn in prompt)


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, Mapping) else None


def _said(turn: Any) -> tuple[Any, Any]:
    content = turn.get("content") if isinstance(turn, Mapping) else turn
    return _role(turn), content.strip() if isinstance(content, str) else content


def _split_transcripts(chosen: str, rejected: str, notes: set[str]) -> dict[str, Any]:
    """Texts that go "Human: ... Assistant: ...", each cut behind the last "Assistant:"."""
    (before, sign, first), (same, _, second) = chosen.rpartition(ANSWER), rejected.rpartition(ANSWER)
    if not sign or before != same or TURN in first or TURN in second:
        raise BadRecord(f"chosen and rejected are transcripts that differ before the last {ANSWER.strip()!r}")
    notes.update(["transcript", "implicit prompt"])
    return {"prompt": before + sign, "chosen": first, "rejected": second}


def with_system(taken: dict[str, Any], system: Any) -> dict[str, Any]:
    """The conversation with a system prompt in front. A row whose own is empty becomes a conversation too, so that all
    rows of a data set are rendered alike."""
    if not isinstance(system, str | None):
        raise BadRecord(f"system is {type_name(system)}, expected text")
    opening = [{"role": "system", "content": system}] if (system or "").strip() else []

    def begin(value: Any) -> Any:
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
        if not isinstance(messages, list) or not messages or _role(messages[0]) not in LEADING_ROLES:
            return [*opening, *messages] if isinstance(messages, list) else messages
        if opening and _said(messages[0]) != _said(opening[0]):
            raise BadRecord('has a system prompt in a column and another in its messages; fields: {system: ""}')
        return messages

    words = [word for word in ("messages", "prompt") if word in taken] or ["chosen", "rejected"]
    taken = taken | {word: begin(taken[word]) for word in words}
    if isinstance(taken.get("response"), str):
        taken["response"] = [{"role": "assistant", "content": taken["response"]}]
    return taken
