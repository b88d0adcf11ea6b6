"""`jaxrlhf generate`: prompts from the command line, files and standard input, or a conversation; text or JSON out."""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from jaxrlhf.data.readers import load_json
from jaxrlhf.serve.writer import Response, Writer, as_record, title

STDIN = "-"
PROMPT, LEAVE = "> ", ("/exit", "/quit")


# ---- prompts in -----------------------------------------------------------------------------------------------------


def read_prompts(prompts: Sequence[str], files: Sequence[str], chat: bool, system: str | None) -> list[dict[str, Any]]:
    """The records of prompts and of files. Raises ValueError where there is none."""
    records = [as_record(text, chat, system) for text in prompts]
    records += [record for file in files for record in read_records(file, chat, system)]
    if not records:
        where = ", ".join("standard input" if file == STDIN else file for file in files)
        raise ValueError(f"generate: no prompts in {where}; expected one a line")
    return records


def read_records(file: str, chat: bool, system: str | None) -> Iterator[dict[str, Any]]:
    """The records of a file, or of standard input: ``prompt`` or ``messages`` of JSON objects, or a prompt a line.

    Lines are JSON where the file is called .jsonl, or the first of standard input is an object. Blank ones are left
    out. Raises ValueError, with the number of the line, for one that can't be used."""
    where = "standard input" if file == STDIN else file
    with contextlib.ExitStack() as stack:
        if file != STDIN and not Path(file).is_file():
            raise ValueError(f"--file: {file}: no such file; expected a file of prompts, or - for standard input")
        lines: IO = sys.stdin if file == STDIN else stack.enter_context(open(file, encoding="utf-8-sig"))
        objects = Path(file).suffix == ".jsonl" if file != STDIN else None
        for number, line in numbered(lines, where):
            text = line.rstrip("\r\n")
            if not text.strip():
                continue
            if objects is None:
                objects = is_object(text)
            yield parse(text, f"{where}:{number}", chat, system) if objects else as_record(text, chat, system)


def numbered(lines: IO, where: str) -> Iterator[tuple[int, str]]:
    """The lines, counted from 1. Raises ValueError for one that is not UTF-8."""
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            yield number, line
    except UnicodeDecodeError as error:  # it is read ahead: the line is one of those behind the last
        raise ValueError(f"{where}: is not UTF-8, behind line {number}: {error.reason}") from None


def is_object(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return isinstance(load_json(text), dict)
    return False


def parse(text: str, where: str, chat: bool, system: str | None) -> dict[str, Any]:
    """The record of a line of JSON; its other fields stay. Raises ValueError."""
    try:
        row = load_json(text)
    except ValueError as error:
        raise ValueError(f"{where}: no JSON ({error}); expected an object with prompt or messages") from None
    prompt, messages = (row.get("prompt"), row.get("messages")) if isinstance(row, dict) else (None, None)
    if isinstance(prompt, list) and messages is None:
        prompt, messages = None, prompt
    if isinstance(prompt, str):
        return row | as_record(prompt, chat, system)
    if not isinstance(messages, list) or not all(is_message(message) for message in messages) or not messages:
        raise ValueError(
            f"{where}: expected an object with prompt (a text) or messages (a list of objects with role and content)"
        )
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return {name: value for name, value in row.items() if name != "prompt"} | {"messages": messages}


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


# ---- text out -------------------------------------------------------------------------------------------------------


def print_responses(writer: Writer, records: Sequence[dict[str, Any]], as_json: bool) -> None:
    """The responses to each record as they come: a JSON object a line, or for a reader; a single one without its
    prompt."""
    for record, responses in zip(records, writer(records), strict=True):
        if as_json:
            print(
                json.dumps(record | {"responses": [response._asdict() for response in responses]}, ensure_ascii=False)
            )
        elif len(records) == len(responses) == 1:
            print(responses[0].text)
        else:
            print(title(record))
            for response in responses:
                print(f"  -> {response.text}")
        sys.stdout.flush()


# ---- a conversation -------------------------------------------------------------------------------------------------


def converse(writer: Writer, system: str | None) -> None:
    """A turn a line, until /exit or the end of the input; the model sees all turns so far."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (input() has its editing keys)
        print("a conversation: /clear begins another, /exit or Ctrl-D ends it", flush=True)
    messages = start = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            said = input(PROMPT if interactive else "").strip()
        except EOFError:
            print()
            return
        if said in LEAVE:
            return
        if said == "/clear":
            messages = start
        elif said:
            messages = answer(writer, [*messages, {"role": "user", "content": said}])


def answer(writer: Writer, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The conversation with the model's answer, which is printed; without the last message where there is none."""
    try:
        ((response,),) = writer([{"messages": messages}])
    except ValueError as error:
        if len(messages) < 3:  # not the conversation's length: the model has no template, say
            raise
        print(f"({error}; /clear begins another conversation)")
        return messages[:-1]
    text = without_stop(response, writer.cfg.stop)
    print(text.strip(), flush=True)
    if response.finish_reason == "length":
        print(f"(cut after --max-tokens {writer.cfg.max_new_tokens})")
    return [*messages, {"role": "assistant", "content": text}]


def without_stop(response: Response, stops: tuple[str, ...]) -> str:
    """The text without the stop text that ended it, which is no part of what the assistant said."""
    if response.finish_reason == "stop":
        for stop in stops:
            if stop in response.text:
                return response.text[: response.text.rindex(stop)]
    return response.text
