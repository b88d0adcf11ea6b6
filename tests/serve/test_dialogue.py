"""`jaxrlhf generate`: what it reads and prints, how a conversation goes. The model is a fake: it spells backwards."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from jaxrlhf.cli import app
from jaxrlhf.generate.config import GenerateConfig
from jaxrlhf.serve import dialogue, writer
from jaxrlhf.serve.writer import Response


class FakeWriter:
    """Answers with the last text backwards, and its number where there are several samples."""

    made: ClassVar[list["FakeWriter"]] = []

    def __init__(self, name, cfg, seed=0, samples=1, width=32):
        self.name, self.cfg, self.seed, self.samples, self.width = name, cfg, seed, samples, width
        self.seen = []
        FakeWriter.made.append(self)

    def __call__(self, records):
        for record in records:
            self.seen.append(record)
            text = dialogue.title(record)[::-1]
            if "pots" in text:  # stop
                yield [Response(f"{text}##", "stop", 3)]
            elif "gnol" in text:  # long
                raise ValueError("a prompt of 1000 tokens is too long")
            else:
                yield [Response(f"{text}{n or ''}", "length" if n else "eos", len(text)) for n in range(self.samples)]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs ``jaxrlhf generate model ARGS`` with ``stdin``: (stdout, stderr, the writer that was made)."""
    monkeypatch.setattr(writer, "Writer", FakeWriter)
    monkeypatch.setattr(FakeWriter, "made", [])

    def call(*args, stdin="", code=0):
        monkeypatch.setattr(sys, "argv", ["jaxrlhf", "generate", "model", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as stop:
            app.main()
        out, err = capsys.readouterr()
        assert (stop.value.code or 0) == code, err
        return out, err, FakeWriter.made[-1] if FakeWriter.made else None

    return call


# ---- text out -------------------------------------------------------------------------------------------------------


def test_one_prompt_gives_the_response_alone(run):
    out, err, writer = run("--prompt", "one", "--temperature", "0", "--top-k", 5, "--max-tokens", 7, "--seed", 2)
    assert (out, err) == ("eno\n", "")
    assert (writer.name, writer.seed, writer.samples, writer.seen) == ("model", 2, 1, [{"prompt": "one"}])
    assert writer.cfg == GenerateConfig(max_new_tokens=7, temperature=0.0, top_k=5)


def test_several_prompts_and_samples(run):
    out, _, writer = run("--prompt", "one", "--prompt", "two", "-n", 2, "--stop", "a", "--stop", "bc")
    assert out == "one\n  -> eno\n  -> eno1\ntwo\n  -> owt\n  -> owt1\n"
    assert writer.cfg.stop == ("a", "bc") and writer.samples == 2


def test_json_is_an_object_a_line(run):
    out, _, _ = run("--prompt", "ünö", "--prompt", "a\nb", "-n", 2, "--json")
    first, second = map(json.loads, out.splitlines())
    assert first == {
        "prompt": "ünö",
        "responses": [
            {"text": "önü", "finish_reason": "eos", "tokens": 3},
            {"text": "önü1", "finish_reason": "length", "tokens": 3},
        ],
    }
    assert second["prompt"] == "a\nb" and "ünö" in out


def test_chat_puts_prompts_into_messages(run):
    assert run("--prompt", "hi", "--chat")[2].seen == [{"messages": [{"role": "user", "content": "hi"}]}]
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert run("--prompt", "hi", "--system", "Be brief.")[2].seen == [{"messages": said}]


# ---- prompts in -----------------------------------------------------------------------------------------------------

USER = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "name, text, seen",
    [
        ("a.txt", "one\r\n\n  two \nthree", [{"prompt": "one"}, {"prompt": "  two "}, {"prompt": "three"}]),
        ("a.txt", "\ufeffone\n", [{"prompt": "one"}]),
        ("a.txt", '{"prompt": "x"}\n', [{"prompt": '{"prompt": "x"}'}]),  # its name says text
        ("a.jsonl", '{"prompt": "x", "id": 3}\n\n{"prompt": "y"}', [{"prompt": "x", "id": 3}, {"prompt": "y"}]),
        ("a.jsonl", json.dumps({"messages": USER, "id": 1}), [{"messages": USER, "id": 1}]),
        ("a.jsonl", json.dumps({"prompt": USER}), [{"messages": USER}]),  # as TRL writes it
        ("-", '{"prompt": "x"}\n{"prompt": "y"}\n', [{"prompt": "x"}, {"prompt": "y"}]),
        ("-", "x\ny\n", [{"prompt": "x"}, {"prompt": "y"}]),
        ("-", "3\n[4]\n", [{"prompt": "3"}, {"prompt": "[4]"}]),  # no objects
    ],
)
def test_prompts_of_a_file_and_of_standard_input(run, tmp_path, name, text, seen):
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "a.txt").write_bytes(text.encode())
    file = name if name == "-" else tmp_path / name
    assert run("--file", file, "--json", stdin=text)[2].seen == seen


def test_a_system_message_comes_first_but_not_before_another(run, tmp_path):
    own = [{"role": "system", "content": "mine"}, *USER]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in (USER, own)))
    seen = run("--file", tmp_path / "a.jsonl", "--system", "S")[2].seen
    assert seen == [{"messages": [{"role": "system", "content": "S"}, *USER]}, {"messages": own}]


@pytest.mark.parametrize(
    "text, line",
    [
        ("{}", "expected an object with prompt (a text) or messages (a list of objects with role and content)"),
        ('{"prompt": 3}', "expected an object with prompt (a text) or messages"),
        ('{"messages": []}', "expected an object with prompt (a text) or messages"),
        ('{"messages": [{"role": "user"}]}', "expected an object with prompt (a text) or messages"),
        ("[1]", "expected an object with prompt (a text) or messages"),
        ("{", "no JSON (Expecting property name"),
    ],
)
def test_a_line_that_is_no_prompt_is_named_before_the_model_is_loaded(run, tmp_path, text, line):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n\n' + text)
    out, err, writer = run("--file", tmp_path / "a.jsonl", code=2)
    assert err.startswith(f"{tmp_path}/a.jsonl:3: {line}") and err.count("\n") == 1 and not out and not writer


@pytest.mark.parametrize(
    "args, line",
    [
        ([], "generate: no prompts: expected --prompt TEXT, --file FILE (- is standard input), or --chat"),
        (["--chat", "--json"], "generate: no prompts: expected"),
        (["--file", "none.txt"], "--file: none.txt: no such file; expected a file of prompts, or - for standard input"),
        (["--file", "/"], "--file: /: no such file"),
        (["--prompt", "x", "-n", "0"], "--samples: 0: expected a number in [1, 4096]; nearest: 1"),
        (["--prompt", "x", "--seed", "-1"], "--seed: -1: expected a number in [0, 2147483647]; nearest: 0"),
        (["--prompt", "x", "--seed", str(2**40)], f"--seed: {2**40}: expected a number in [0, 2147483647]"),
        (
            ["--prompt", "x", "--stop", ""],
            "--stop: an empty text ends every response; expected one of a letter or more",
        ),
        (["--prompt", "x", "--top-p", "1.5"], "command line: top_p: 1.5: expected a number in (0, 1]; nearest: 1"),
        (["--file", "-"], "generate: no prompts in standard input"),
        (["--prompt", "long"], "a prompt of 1000 tokens is too long"),
    ],
)
def test_mistakes_are_one_line(run, args, line, monkeypatch):
    if "long" in args:  # raised by the fake, which is outside of the package
        monkeypatch.setattr(app, "raised_here", lambda error: True)
    out, err, _ = run(*args, code=2)
    assert err.startswith(line) and err.count("\n") == 1 and out == ""


# ---- a conversation -------------------------------------------------------------------------------------------------


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def test_a_conversation_is_kept(run):
    out, err, writer = run("--chat", "--system", "S", stdin="hello\n\nagain\n/exit\nnever\n")
    assert (out, err) == ("olleh\nniaga\n", "")
    system = [{"role": "system", "content": "S"}]
    assert writer.seen == [
        {"messages": [*system, *turns("hello")]},
        {"messages": [*system, *turns("hello", "olleh", "again")]},
    ]


def test_clear_begins_another(run):
    assert run("--chat", stdin="one\n/clear\ntwo\n")[2].seen == [{"messages": turns("one")}, {"messages": turns("two")}]


def test_what_ends_a_turn_is_no_part_of_it(run):
    out, _, writer = run("--chat", "--stop", "##", stdin="stop\nx\n")
    assert out == "pots\nx\n\n"
    assert writer.seen[1] == {"messages": turns("stop", "pots", "x")}


def test_a_turn_that_there_is_no_room_for_is_taken_back(run):
    out, _, writer = run("--chat", stdin="one\nlong\ntwo\n")
    assert out == ("eno\n(a prompt of 1000 tokens is too long; /clear begins another conversation)\nowt\n\n")
    assert writer.seen[-1] == {"messages": turns("one", "eno", "two")}


def test_letters_that_the_locale_lacks_do_not_stop_a_command():
    code = "import sys\nfrom jaxrlhf.cli import app\napp.app = lambda: print('ü → x')\napp.main()"
    environ = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(app.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("? ? x\n", "")
