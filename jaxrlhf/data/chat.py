"""Chat templates: which one a run uses, and a conversation as the text that it writes."""

import contextlib
import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxrlhf.data.record_kinds import BadRecord, nearest
from jaxrlhf.hosts.address_space import at_most
from jaxrlhf.hosts.call_timeout import Interrupted, interruptible
from jaxrlhf.paths import need_reachable

Message = Mapping[str, Any]
Messages = Sequence[Message]
TRIAL, MEMORY = 10.0, 2**29  # seconds and bytes that a template has for its first conversation
LEADING_ROLES = ("system", "developer")  # turns that stand before a conversation

_USUAL = (
    "{%% for message in messages %%}%s{%% endfor %%}{%% if add_generation_prompt %%}%s{%% endif %%}"  # turn, next turn
)
TEMPLATES = {
    "chatml": _USUAL
    % (
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    "llama3": _USUAL
    % (
        "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "zephyr": _USUAL
    % (
        "<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n",
        "<|assistant|>\n",
    ),
    "plain": _USUAL
    % (
        "{{ message['role'] | capitalize }}: {{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n",
        "Assistant:",
    ),
}
GIVEN = ("messages", "tools", "documents", "add_generation_prompt")  # variables that every template is given
DATE = "chat_date"  # key of tokenizer_config.json: what a template that asks for the date is told
STRFTIME = "aAbBcdefHIjmMpSUwWxXyY%"  # the letters of its formats


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """How conversations become text. With this section, even an empty one, a plain-text ``prompt`` is a user's turn,
    and ``response``, ``chosen`` and ``rejected`` are the assistant's; without it they are text as it stands. Texts
    without a prompt (``text``, pairs without ``prompt``) stay text."""

    template: str | None = None  # a Jinja file or text, chatml, llama3, zephyr or plain; null: the tokenizer's own
    system: str | None = None  # put before conversations that have no system turn
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the template: {enable_thinking: false}


# ---- which template -------------------------------------------------------------------------------------------------


def apply_config(tokenizer: Any, cfg: ChatConfig, adds_bos: bool) -> None:
    """Gives the tokenizer the template that ``cfg`` describes. The system prompt and the variables become part of it,
    so that whatever reads the saved tokenizer (generate, an export, transformers) writes the same text.

    Args:
        adds_bos: whether the tokenizer puts BOS before a text: a template known by name then writes it too.

    Raises:
        ValueError: there is no such template, or it is not Jinja.
    """
    own = tokenizer.chat_template if cfg.template is None else find_template(cfg.template, adds_bos)
    if not own:
        raise ValueError(
            f"data.chat: tokenizer {tokenizer.name_or_path!r} has no chat template; expected data.chat.template: "
            f"a Jinja file, or one of {', '.join(TEMPLATES)}"
        )
    header = _header(cfg)
    if isinstance(own, Mapping):
        tokenizer.chat_template = {name: header + text for name, text in own.items()}
    else:
        tokenizer.chat_template = header + own
    check_syntax(tokenizer)


def markers(cfg: ChatConfig | None) -> list[str]:
    """The special tokens of the template that ``cfg`` names: a tokenizer that is trained for it has to know them."""
    text = TEMPLATES.get(cfg.template or "", "") if cfg else ""
    return list(dict.fromkeys(re.findall(r"<\|\w+\|>", text)))


def check_config(cfg: ChatConfig) -> None:
    """Raises ValueError where there is no such template, or a variable can't have its name."""
    if cfg.template is not None:
        find_template(cfg.template, adds_bos=False)
    _header(cfg)


def find_template(named: str, adds_bos: bool) -> str:
    """The Jinja text of a file, of a name, or the text itself."""
    from etils import epath

    if named in TEMPLATES:
        return ("{{ bos_token }}" if adds_bos else "") + TEMPLATES[named]
    if "{{" in named or "{%" in named:
        return named
    need_reachable(named, "data.chat.template")
    path = epath.Path(named).expanduser()
    if not path.is_file():
        raise ValueError(
            f"data.chat.template: {named!r} is no file; expected a Jinja file or text, or a name"
            + nearest(named, TEMPLATES)
        )
    return path.read_text()


class TooCostly(ValueError):
    """A template that does not come to an end, or takes all memory."""


@contextlib.contextmanager
def limited(tokenizer: Any) -> Iterator[None]:
    """Around the first use of a template, which may come from anywhere: raises TooCostly, in one line, where it has not
    written a short conversation in TRIAL seconds and MEMORY bytes. Jinja's sandbox limits a range, but neither loops
    inside loops nor texts that double: its documentation leaves both to limits of the process."""
    try:
        with interruptible(TRIAL), at_most(MEMORY):
            yield
        return
    except Interrupted:
        why = f"wrote no short conversation in {TRIAL:g} s"
    except MemoryError:
        why = f"took more than {MEMORY / 1e9:.1g} GB of memory for a short conversation"
    raise TooCostly(
        f"tokenizer: {tokenizer.name_or_path!r}: its chat template {why}; expected another in data.chat.template: a "
        f"Jinja file, or one of {', '.join(TEMPLATES)}"
    )


def check_syntax(tokenizer: Any) -> None:
    """Raises ValueError, in one line, for a template that is not Jinja, or costs too much."""
    import jinja2

    try:
        with limited(tokenizer):
            tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except TooCostly:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"data.chat.template: is not Jinja: {error.message} (line {error.lineno})") from None
    except Exception:  # it may refuse this conversation: what it does with the data is said there
        return


def _header(cfg: ChatConfig) -> str:
    """What stands before the template: its variables, which a caller may still set, and the system turn."""
    for name in cfg.kwargs:
        if not name.isidentifier() or name in GIVEN:
            raise ValueError(
                f"data.chat.kwargs: {name!r}: expected the name of a variable other than {', '.join(GIVEN)}"
            )
    parts = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in cfg.kwargs.items()
    ]
    if cfg.system is not None:
        turn = _literal([{"role": "system", "content": cfg.system}])
        begins = f"messages[0]['role'] not in {_literal(list(LEADING_ROLES))}"
        parts.append(f"{{%- if not messages or {begins} %}}{{%- set messages = {turn} + messages %}}{{%- endif %}}")
    return "".join(parts)


def _literal(value: Any) -> str:
    """A value as Jinja writes it."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


# ---- the date -------------------------------------------------------------------------------------------------------


def is_dated(tokenizer: Any) -> bool:
    """Whether the template writes the date."""
    return "strftime_now" in json.dumps(tokenizer.chat_template or "")


def date_of(tokenizer: Any) -> str:
    """The date, in ISO form, that the tokenizer's template writes: that of its first use, and kept with the tokenizer
    when it is saved. Rows would have other lengths on another day."""
    now = datetime.datetime.now().isoformat(timespec="minutes")
    return tokenizer.init_kwargs.setdefault(DATE, now)


@functools.lru_cache(maxsize=8)
def _at(template: str, date: str) -> str:
    """The template with a ``strftime_now`` of its own, which writes ``date`` in any format."""
    then = datetime.datetime.fromisoformat(date)
    codes = [f"%{flag}{letter}" for flag in ("", "-") for letter in STRFTIME]
    written = "".join(f" | replace({_literal(code)}, {_literal(then.strftime(code))})" for code in codes)
    macro = "{% macro strftime_now(format) %}{{ format" + written + " }}{% endmacro %}"
    return macro + "{{ '' }}" + template  # a line break behind the macro itself would not be written


# ---- a conversation as text -----------------------------------------------------------------------------------------


def render(messages: Messages, tokenizer: Any, to_answer: bool = False, tools: Any = None) -> str:
    """The text of a conversation; ``to_answer``: and what the template writes before the assistant's next turn.

    Raises:
        ValueError: there is no template, or it writes no tools.
        BadRecord: the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer: {tokenizer.name_or_path!r} has no chat template, and the data holds messages; expected one in "
            f"data.chat.template: a Jinja file, or one of {', '.join(TEMPLATES)}"
        )
    if not messages:
        return ""
    tools = read_tools(tools)
    template = tokenizer.get_chat_template(tools=tools)
    if is_dated(tokenizer):
        template = _at(template, date_of(tokenizer))
    if tools and not _writes_tools(tokenizer, template):
        raise ValueError(
            f"tools: the chat template of {tokenizer.name_or_path!r} writes none of them; expected a template that "
            "does (data.chat.template), or data without that column"
        )
    apply = lambda messages: tokenizer.apply_chat_template(
        messages, tools, chat_template=template, tokenize=False, add_generation_prompt=to_answer
    )
    return _first_good(apply, [_without_nulls(message) for message in messages], tokenizer)


def _first_good(apply: Any, messages: list[dict[str, Any]], tokenizer: Any) -> str:
    """Arguments of calls come as objects or as JSON text, and templates expect one of them; likewise contents that are
    null or empty. So the first form is taken that the template writes without an error and not as Python prints it."""
    written, errors = [], []
    for form in _forms(messages):
        try:
            written.append(apply(form))
        except MemoryError:
            raise
        except Exception as error:  # templates raise what they like: "roles must alternate"
            errors.append(error)
            continue
        if not _prints_python(written[-1], form):
            return written[-1]
    if written:
        return written[0]
    reason = (str(errors[0]).strip().splitlines() or [type(errors[0]).__name__])[0]
    raise BadRecord(f"chat template of {tokenizer.name_or_path!r} refuses the messages: {reason}") from errors[0]


def _forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    objects = [_with_arguments(message, as_text=False) for message in messages]
    yield objects
    calls = any(message.get("tool_calls") for message in messages)
    null = any("content" in message and message["content"] is None for message in messages)
    fill = lambda form: [message | {"content": message.get("content") or ""} for message in form]
    texts = [_with_arguments(message, as_text=True) for message in messages]
    if null:
        yield fill(objects)
    if calls:
        yield texts
    if calls and null:
        yield fill(texts)


def _with_arguments(message: dict[str, Any], as_text: bool) -> dict[str, Any]:
    """The message with the arguments of its calls as JSON text, or as objects."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        inner = call.get("function", call)
        given = inner.get("arguments", {})
        value = parse_json(given, "tool_calls: arguments") if isinstance(given, str) and given.strip() else given or {}
        changed = {**inner, "arguments": json.dumps(value, ensure_ascii=False) if as_text else value}
        calls.append({**call, "function": changed} if "function" in call else changed)
    return {**message, "tool_calls": calls}


def _prints_python(text: str, messages: list[dict[str, Any]]) -> bool:
    """Whether the text has Python's spelling of null contents or of arguments."""
    null = any("content" in message and message["content"] is None for message in messages)
    if null and "None" in text and "None" not in json.dumps(messages, ensure_ascii=False):
        return True
    for message in messages:
        for call in message.get("tool_calls") or ():
            arguments = call.get("function", call).get("arguments")
            if isinstance(arguments, dict) and arguments and str(arguments) in text:
                return True
    return False


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """The ``tools`` column: a list of JSON schemas, or JSON text of it; None where there are none."""
    if isinstance(tools, str):
        tools = parse_json(tools, "tools") if tools.strip() else None
    if isinstance(tools, Mapping):
        tools = [tools]
    if not tools:
        return None
    if not isinstance(tools, list):
        raise BadRecord(f"tools is {type(tools).__name__}, expected a list of JSON schemas, or JSON text of one")
    found = [parse_json(tool, "tools") if isinstance(tool, str) else tool for tool in tools]
    if not all(isinstance(tool, Mapping) for tool in found):
        raise BadRecord("tools: expected a list of objects, each the JSON schema of a function")
    return [_without_nulls(tool, keep=()) for tool in found]


def parse_json(text: str, what: str) -> Any:
    """The value that a text holds as JSON. Raises BadRecord, in one line, where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRecord(f"{what} is {text[:40]!r}, which is not JSON: {error.msg}") from None
    except (ValueError, RecursionError):
        raise BadRecord(f"{what} is {text[:40]!r}, which is not JSON that can be used") from None


def _without_nulls(value: Any, keep: Sequence[str] = ("content",)) -> Any:
    """Without keys whose value is null: columnar files write all keys of all records into each of them."""
    if isinstance(value, Mapping):
        items = {key: _without_nulls(item, ()) for key, item in value.items() if item is not None or key in keep}
        return items
    return [_without_nulls(item, ()) for item in value] if isinstance(value, list) else value


_PROBE = {"name": "probe_of_tools", "description": "probe", "parameters": {"type": "object", "properties": {}}}
_writing: dict[str, bool] = {}  # template -> whether it writes tools


def _writes_tools(tokenizer: Any, template: str) -> bool:
    if template not in _writing:
        talk, tool = [{"role": "user", "content": "x"}], {"type": "function", "function": _PROBE}
        try:
            text = tokenizer.apply_chat_template(talk, [tool], chat_template=template, tokenize=False)
        except Exception:  # it may want another conversation: then it is not known that it writes none
            text = _PROBE["name"]
        _writing[template] = _PROBE["name"] in text
    return _writing[template]
