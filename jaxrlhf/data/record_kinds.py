"""What a record must hold for each use of data, and the formats that its rows come in, in one table: KINDS.

How rows of files and data sets become such records: jaxrlhf.data.formats. What algorithms learn from is a row of
jaxrlhf.data.batch_kinds too.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Check = Callable[[Any], str | None]  # a value -> what is wrong with it, or None


class BadRecord(ValueError):
    """One record that can't be used; ``skip_bad`` counts it instead of raising."""


def nearest(word: str, choices: Iterable[str], listed: bool = True) -> str:
    """The end of an error message: " (did you mean 'x'?)", or the choices when none is near; nothing then where they
    are not to be ``listed``."""
    choices = sorted(choices)
    near = difflib.get_close_matches(str(word), choices, n=3, cutoff=0.6)
    if near:
        return f" (did you mean {' or '.join(map(repr, near))}?)"
    if not listed:
        return ""
    shown = ", ".join(map(repr, choices[:20])) + (", ..." if len(choices) > 20 else "")
    return f" (there is {shown})" if choices else " (there is none)"


def text(value: Any) -> str | None:
    """Any text, the empty one too."""
    if not isinstance(value, str):
        return f"is {type_name(value)}, expected text"
    if "\0" in value:
        return "holds a NUL byte"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid UTF-8 text"
    return None


def filled_text(value: Any) -> str | None:
    """Text with something to learn from."""
    return text(value) or (None if value.strip() else "is empty")


def messages(value: Any) -> str | None:
    """A list of {"role": text, "content": text}; a turn that calls tools may say nothing."""
    if not isinstance(value, list) or not value:
        return "is empty" if value == [] else f"is {type_name(value)}, expected a list of messages"
    for turn, message in enumerate(value):
        if not isinstance(message, dict):
            return f"[{turn}] is {type_name(message)}, expected an object with role and content"
        for key in ("role",) if calls_tools(message) and message.get("content") is None else ("role", "content"):
            if key not in message:
                return f"[{turn}] has no {key!r}" + nearest(key, message)
            wrong = text(message[key])
            if wrong:
                return f"[{turn}].{key} {wrong}"
    return None


def calls_tools(message: Mapping[str, Any]) -> bool:
    """Whether the turn is, or has, a call of tools: a list of objects with a name."""
    calls = message.get("tool_calls")
    return isinstance(calls, list) and bool(calls) and all(isinstance(call, dict) for call in calls)


def answered(value: Any) -> str | None:
    """Messages that end with something that the assistant said."""
    wrong = messages(value)
    if wrong:
        return wrong
    if value[-1]["role"] != "assistant":
        return f"ends with role {value[-1]['role']!r}, expected 'assistant'"
    said = value[-1].get("content") or ""
    return None if said.strip() or calls_tools(value[-1]) else "ends with an empty turn of the assistant"


def unanswered(value: Any) -> str | None:
    """Messages that wait for the assistant."""
    wrong = messages(value)
    if not wrong and value[-1]["role"] == "assistant":
        return "ends with role 'assistant', expected a turn that is to be answered"
    return wrong


def number(value: Any) -> str | None:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"is {type_name(value)}, expected a number"
    return None if math.isfinite(value) else f"is {value}, expected a finite number"


def numbers(value: Any) -> str | None:
    """A list of finite numbers."""
    if not isinstance(value, list) or not value:
        return "is empty" if value == [] else f"is {type_name(value)}, expected a list of numbers"
    return next((f"[{at}] {wrong}" for at, item in enumerate(value) if (wrong := number(item))), None)


def numbers_each(value: Any) -> str | None:
    """A list of lists of finite numbers."""
    if not isinstance(value, list) or not value:
        return "is empty" if value == [] else f"is {type_name(value)}, expected a list of lists of numbers"
    return next((f"[{at}] {wrong}" for at, item in enumerate(value) if (wrong := numbers(item))), None)


def steps(value: Any) -> str | None:
    """A list of {"text": text, "reward": number}, what was said and earned, and {"observation": text}, what came back;
    a step without a reward earned nothing."""
    if not isinstance(value, list) or not value:
        return "is empty" if value == [] else f"is {type_name(value)}, expected a list of steps"
    for at, step in enumerate(value):
        if not isinstance(step, dict):
            return f"[{at}] is {type_name(step)}, expected an object with text and reward, or observation"
        said = step.get("text") is not None
        if said == (step.get("observation") is not None):
            return f"[{at}] has {'both text and' if said else 'neither text nor'} observation, expected one of them"
        key = "text" if said else "observation"
        if wrong := (filled_text if said else text)(step[key]):
            return f"[{at}].{key} {wrong}"
        if step.get("reward") is not None and (wrong := number(step["reward"])):
            return f"[{at}].reward {wrong}"
        if not said and step.get("reward") is not None:
            return f"[{at}].reward: an observation earns nothing; expected it at the text before"
    return None if any(step.get("text") is not None for step in value) else "has no text to learn from"


def text_or(check: Check, text_check: Check = filled_text) -> Check:
    """Text, or else messages that pass ``check``."""

    def either(value: Any) -> str | None:
        if isinstance(value, str):
            return text_check(value)
        return (
            check(value) if isinstance(value, list) else f"is {type_name(value)}, expected text or a list of messages"
        )

    return either


def boolean(value: Any) -> str | None:
    """True or false."""
    simple = isinstance(value, str | int | float)
    shown = repr(value)[:40] if simple else type_name(value)
    return None if isinstance(value, bool) else f"is {shown}, expected true or false"


def same_sort(first: str, second: str) -> Callable[[Mapping[str, Any]], str | None]:
    """Two fields, where the record has both, are both text or both messages."""

    def check(record: Mapping[str, Any]) -> str | None:
        if first not in record or second not in record:
            return None
        if isinstance(record[first], str) != isinstance(record[second], str):
            one, other = type_name(record[first]), type_name(record[second])
            return f"{first} is {one} and {second} is {other}, expected the same"
        return None

    return check


# ---- the table ------------------------------------------------------------------------------------------------------

Words = Mapping[str, str]  # our word -> the column that it is taken from
# names that are common, and elsewhere mean something beside the response: used where nothing else fits
USUAL: list[Words] = [
    {"prompt": "query", "response": "response"},
    {"prompt": "question", "response": "answer"},
    {"prompt": "problem", "response": "solution"},
    {"prompt": "input", "response": "output"},
]


def _answers(**more: str) -> list[Words]:
    """Prompt and response as other libraries call them: ours, TRL, Alpaca, OpenOrca, ShareGPT."""
    return [
        {"prompt": "prompt", "response": "response", **more},
        {"prompt": "prompt", "response": "completion", **more},
        {"messages": "messages", **more},
        {"messages": "conversations", **more},
        {"messages": "conversation", **more},
        {"prompt": "instruction", "response": "output", **more},
        {"prompt": "instruction", "response": "response", **more},
        {"prompt": "question", "response": "response", **more},
        *({**words, **more} for words in USUAL),
    ]


def _pairs() -> list[Words]:
    """Ours and TRL's, Orca, Alpaca, Argilla, ShareGPT; OpenAI's preference files; pairs with the prompt inside."""
    sides = {"chosen": "chosen", "rejected": "rejected"}
    prompts = ("prompt", "question", "instruction", "input", "conversations")
    openai = {"prompt": "input", "chosen": "preferred_output", "rejected": "non_preferred_output"}
    return [*({"prompt": column, **sides} for column in prompts), openai, sides]


@dataclasses.dataclass(frozen=True)
class Kind:
    """The fields of one use of data. A record fills the first of ``forms`` whose fields it all has."""

    forms: tuple[tuple[str, ...], ...]
    checks: Mapping[str, Check]  # of the fields of every form, and of the optional ones
    formats: Sequence[Words]  # in order: a row has the first of these whose columns it all has
    whole: Callable[[Mapping[str, Any]], str | None] = lambda record: None  # of the fields together
    passes_on: bool = False  # the columns beside the fields are used too: rewards get them
    beside: tuple[str, ...] = ()  # optional fields that have one name in every format

    @property
    def optional(self) -> set[str]:
        """The fields that no form needs."""
        return set(self.checks).difference(*self.forms)


ANSWERED: dict[str, Check] = {
    "prompt": text_or(unanswered, text),
    "response": text_or(answered),
    "messages": answered,
}
# two segments of episodes: the actions, and what was observed before the first and after each
SEGMENTS = ("chosen_observations", "chosen_actions", "rejected_observations", "rejected_actions")
EARNED = ("reward", "rewards")  # of a whole response; of each of its tokens
KINDS: dict[str, Kind] = {
    "demonstrations": Kind(
        forms=(("prompt", "response"), ("messages",), ("text",)),
        checks={**ANSWERED, "text": filled_text},
        formats=[*_answers(), {"text": "text"}],
        whole=same_sort("prompt", "response"),
    ),
    "preferences": Kind(
        forms=(("chosen", "rejected"), SEGMENTS),
        checks={
            **{f"{side}_actions": numbers for side in ("chosen", "rejected")},
            **{f"{side}_observations": numbers_each for side in ("chosen", "rejected")},
            "chosen": text_or(answered),
            "rejected": text_or(answered),
            "prompt": text_or(unanswered, text),
            "margin": number,
            "tie": boolean,
        },
        formats=[*_pairs(), {name: name for name in SEGMENTS}],
        whole=same_sort("chosen", "rejected"),
        beside=("margin", "tie"),
    ),
    "prompts": Kind(
        forms=(("prompt",), ("messages",)),
        checks={"prompt": text_or(unanswered, text), "messages": unanswered},
        formats=[
            {"prompt": "prompt"},
            {"messages": "messages"},
            {"messages": "conversations"},
            {"messages": "conversation"},
            {"prompt": "instruction"},
            {"prompt": "question"},
            {"prompt": "problem"},
            {"prompt": "query"},
        ],
        passes_on=True,
    ),
    "unpaired": Kind(
        forms=(("prompt", "response", "label"), ("messages", "label"), ("response", "label")),
        checks={**ANSWERED, "label": boolean},
        formats=[
            *_answers(label="label"),
            {"response": "response", "label": "label"},
            {"response": "completion", "label": "label"},
        ],
        whole=same_sort("prompt", "response"),
    ),
    "trajectories": Kind(
        forms=(
            *((*form, reward) for form in (("prompt", "response"), ("messages",), ("response",)) for reward in EARNED),
            ("prompt", "steps"),
            ("steps",),
        ),
        checks={**ANSWERED, "reward": number, "rewards": numbers, "steps": steps, "truncated": boolean},
        formats=[
            *(words for reward in EARNED for words in _answers(**{reward: reward})),
            *({"response": column, reward: reward} for reward in EARNED for column in ("response", "completion")),
            {"prompt": "prompt", "steps": "steps"},
            {"steps": "steps"},
        ],
        whole=same_sort("prompt", "response"),
        beside=("truncated",),
    ),
    "labels": Kind(
        forms=(("text", "label"),),
        checks={"text": filled_text, "label": number},
        formats=[{"text": "text", "label": "label"}],
    ),
}


class DataKind(NamedTuple):
    """One kind of data that algorithms learn from, a row of jaxrlhf.data.batch_kinds. What its records hold is the row
    of KINDS of the same name."""

    name: str  # of its section of ``data``; eval_NAME has the held-out rows
    field: str  # of Batch
    rows_key: str  # of ``batch``: how many an iteration takes
    encode: Callable[..., tuple]  # (record, tokenizer, DataConfig, ids that end a turn) -> truncate.Sides
    make: Callable[..., tuple]  # a batches.Maker
    make_packed: Callable[..., tuple] | None = None  # the same of several records a row, where data.pack asks for it
    shapes: Callable[..., Any] | None = None  # (Shaped, rows, DataConfig, margins) -> its field; None: a prompt
    sides: int = 1  # rows of tokens that a record becomes
    least_rows: int = 1  # that an iteration has to take
    is_prompt: bool = False  # responses to it are sampled; padded on the left to data.prompt_buckets
    rank: Callable[[Mapping[str, Any]], float] | None = None  # of a record, by which data.keep_top keeps the highest


def find_kind(name: str) -> Kind:
    """The row of KINDS. Raises ValueError for a name that is not there."""
    if name not in KINDS:
        raise ValueError(f"kind of data: {name!r} is unknown{nearest(name, KINDS)}")
    return KINDS[name]


def form_of(kind: Kind, record: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The first form whose fields the record has (null is not having it)."""
    return next((form for form in kind.forms if all(record.get(field) is not None for field in form)), None)


def check_record(record: Mapping[str, Any], kind: Kind, columns: Mapping[str, str] | None = None) -> None:
    """Raises BadRecord, in one line, when the record, which has the words of ``kind``, can't be used as one.

    Args:
        columns: what the fields are called where they come from, for messages.
    """
    form = form_of(kind, record)
    if form is None:
        empty = next(field for form in kind.forms for field in form if record.get(field) is None)
        raise BadRecord(f"{empty} is {'null' if empty in record else 'missing'}")
    for field in (*form, *kind.optional):
        value = record.get(field)
        wrong = kind.checks[field](value) if value is not None else None
        if wrong:
            name = (columns or {}).get(field, field)
            raise BadRecord(f"{name}{'' if wrong.startswith('[') else ' '}{wrong}")
    wrong = kind.whole(record)
    if wrong:
        raise BadRecord(wrong)
    for column, value in record.items():
        wrong = text(value) if isinstance(value, str) else None
        if wrong:
            raise BadRecord(f"{column} {wrong}")


def closeness(form: tuple[str, ...], columns: list[str]) -> float:
    """How much of the form the columns look like: 1 a field that is there, less for one that is misspelt."""
    scores = [
        max((difflib.SequenceMatcher(None, field, column).ratio() for column in columns), default=0.0) for field in form
    ]
    return sum(score if score > 0.6 else 0.0 for score in scores) / len(form)


def type_name(value: Any) -> str:
    """What a value is, in JSON's words."""
    names = {str: "text", bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
