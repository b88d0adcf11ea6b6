"""Every format of rows, as its own library writes it, against the record and the announcement that are right."""

import csv
import gzip
import io
import json

import pytest

from jaxrlhf.data.formats import check_columns, recognise, take_fields
from jaxrlhf.data.record_kinds import BadRecord
from jaxrlhf.data.sources import SourceConfig, open_source
from jaxrlhf.data.tokenizer import text_of


def said(role: str, content, **more) -> dict:
    return {"role": role, "content": content, **more}


SYSTEM, USER, ANSWER, OTHER = (
    said("system", "be brief"),
    said("user", "hi"),
    said("assistant", "hello"),
    said("assistant", "what"),
)
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
CALL = said("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": {"x": 1}}}])
TYPED_CALL = said("assistant", "", tool_calls=[{"type": "function", **CALL["tool_calls"][0]}])
PARTS = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
TRANSCRIPT = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how so?\n\nAssistant:"
PAIR = {"chosen": [ANSWER], "rejected": [OTHER]}
WHOLE = {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}

# kind, row, words of the record, what is announced
FORMATS = {
    "text pair": (
        "preferences",
        {"prompt": "hi", "chosen": " a", "rejected": " b"},
        {"prompt": "hi", "chosen": " a", "rejected": " b"},
        "prompt + chosen + rejected: text",
    ),
    "trl explicit": (
        "preferences",
        {"prompt": [USER], **PAIR},
        {"prompt": [USER], **PAIR},
        "prompt + chosen + rejected: messages",
    ),
    "trl implicit": ("preferences", WHOLE, WHOLE, "chosen + rejected: messages, implicit prompt"),
    "ultrafeedback": (
        "preferences",
        {"prompt": "hi ", **WHOLE},
        WHOLE,
        "prompt + chosen + rejected: messages, implicit prompt",
    ),
    "prompt of messages inside": (
        "preferences",
        {"prompt": [USER], "chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]},
        {"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]},
        "prompt + chosen + rejected: messages, implicit prompt",
    ),
    "text prompt, messages after": (
        "preferences",
        {"prompt": "hi", **PAIR},
        {"prompt": [USER], **PAIR},
        "prompt + chosen + rejected: messages",
    ),
    "system, then conversations": (
        "preferences",
        {"prompt": [SYSTEM], **WHOLE},
        {side: [SYSTEM, *turns] for side, turns in WHOLE.items()},
        "prompt + chosen + rejected: messages, implicit prompt",
    ),
    "one message a side": (
        "preferences",
        {"prompt": USER, "chosen": ANSWER, "rejected": OTHER},
        {"prompt": [USER], **PAIR},
        "prompt + chosen + rejected: messages",
    ),
    "json text": (
        "preferences",
        {name: json.dumps(value) for name, value in {"prompt": [USER], **PAIR}.items()},
        {"prompt": [USER], **PAIR},
        "prompt + chosen + rejected: messages, JSON text",
    ),
    "one side as python writes it": (
        "preferences",
        {"chosen": str([USER, ANSWER]), "rejected": json.dumps([USER, OTHER])},
        WHOLE,
        "chosen + rejected: messages, JSON text, implicit prompt",
    ),
    "json that is no conversation": (
        "preferences",
        {"chosen": '[{"name": "x"}]', "rejected": "{}"},
        {"chosen": '[{"name": "x"}]', "rejected": "{}"},
        "chosen + rejected: text",
    ),
    "json written twice": (
        "prompts",
        {"prompt": json.dumps(json.dumps([USER]))},
        {"prompt": [USER]},
        "prompt: messages, JSON text",
    ),
    "text that goes on behind json": (
        "demonstrations",
        {"prompt": json.dumps([USER]) + " who is it?", "response": '{"role": "x"} is all'},
        {"prompt": json.dumps([USER]) + " who is it?", "response": '{"role": "x"} is all'},
        "prompt + response: text",
    ),
    "lmsys": (
        "demonstrations",
        {"conversation": [USER, ANSWER]},
        {"messages": [USER, ANSWER]},
        "conversation: messages",
    ),
    "orca": (
        "preferences",
        {"system": "be brief", "question": "hi", "chosen": "hello", "rejected": "what"},
        {"prompt": [SYSTEM, USER], "chosen": "hello", "rejected": "what"},
        "system + question + chosen + rejected: messages",
    ),
    "orca without a system prompt": (
        "preferences",
        {"system": "", "question": "hi", "chosen": "hello", "rejected": "what"},
        {"prompt": [USER], "chosen": "hello", "rejected": "what"},
        "system + question + chosen + rejected: messages",
    ),
    "argilla": (
        "preferences",
        {"system": None, "input": "hi", "chosen": "hello", "rejected": "what"},
        {"prompt": [USER], "chosen": "hello", "rejected": "what"},
        "system + input + chosen + rejected: messages",
    ),
    "system beside conversations": (
        "preferences",
        {"system": "be brief", **WHOLE},
        {side: [SYSTEM, *turns] for side, turns in WHOLE.items()},
        "system + chosen + rejected: messages, implicit prompt",
    ),
    "alpaca pair": (
        "preferences",
        {"instruction": "add", "input": "1 2", "chosen": "3", "rejected": "4"},
        {"prompt": "add\n\n1 2", "chosen": "3", "rejected": "4"},
        "instruction + chosen + rejected + input: text",
    ),
    "sharegpt pair": (
        "preferences",
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "what"}},
        {"prompt": [USER], **PAIR},
        "conversations + chosen + rejected: messages, from/value",
    ),
    "openai pair": (
        "preferences",
        {
            "input": {"messages": [USER], "tools": [{"type": "function"}]},
            "preferred_output": [ANSWER],
            "non_preferred_output": [OTHER],
        },
        {"prompt": [USER], **PAIR, "tools": [{"type": "function"}]},
        "input + preferred_output + non_preferred_output: messages",
    ),
    "hh": (
        "preferences",
        {"chosen": TRANSCRIPT + " so", "rejected": TRANSCRIPT + " no"},
        {"prompt": TRANSCRIPT, "chosen": " so", "rejected": " no"},
        "chosen + rejected: text, implicit prompt, transcript",
    ),
    "messages": ("demonstrations", {"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER]}, "messages"),
    "messages as text": (
        "demonstrations",
        {"messages": json.dumps([USER, ANSWER])},
        {"messages": [USER, ANSWER]},
        "messages: JSON text",
    ),
    "sharegpt": (
        "demonstrations",
        {"conversations": SHAREGPT, "system": "be brief"},
        {"messages": [SYSTEM, USER, ANSWER]},
        "system + conversations: messages, from/value",
    ),
    "content parts": (
        "demonstrations",
        {"messages": [said("user", PARTS), said("assistant", [{"type": "text", "text": "hello", "image": None}])]},
        {"messages": [USER, ANSWER]},
        "messages: content parts",
    ),
    "openai with tools": (
        "demonstrations",
        {"messages": [USER, CALL, said("tool", "1", tool_call_id="a"), ANSWER], "tools": [{}]},
        {"messages": [USER, CALL, said("tool", "1", tool_call_id="a"), ANSWER], "tools": [{}]},
        "messages",
    ),
    "alpaca": (
        "demonstrations",
        {"instruction": "add", "input": "1 2", "output": "3"},
        {"prompt": "add\n\n1 2", "response": "3"},
        "instruction + output + input: text",
    ),
    "alpaca without input": (
        "demonstrations",
        {"instruction": "hi", "input": "", "output": "hello"},
        {"prompt": "hi", "response": "hello"},
        "instruction + output + input: text",
    ),
    "openorca": (
        "demonstrations",
        {"system_prompt": "be brief", "question": "hi", "response": "hello"},
        {"prompt": [SYSTEM, USER], "response": [ANSWER]},
        "system_prompt + question + response: messages",
    ),
    "prompt and completion": (
        "demonstrations",
        {"prompt": "hi", "completion": "hello"},
        {"prompt": "hi", "response": "hello"},
        "prompt + completion: text",
    ),
    "trl prompt and completion": (
        "demonstrations",
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER], "response": [ANSWER]},
        "prompt + completion: messages",
    ),
    "messages, then text": (
        "demonstrations",
        {"prompt": [SYSTEM, USER], "response": "hello"},
        {"prompt": [SYSTEM, USER], "response": [ANSWER]},
        "prompt + response: messages",
    ),
    "completion with the prompt in it": (
        "demonstrations",
        {"prompt": "hi", "completion": [USER, ANSWER]},
        {"prompt": [USER], "response": [ANSWER]},
        "prompt + completion: messages",
    ),
    "null beside text": (
        "demonstrations",
        {"messages": None, "text": "abc", "prompt": None, "response": "x"},
        {"text": "abc"},
        "text",
    ),
    "prompt of messages": ("prompts", {"prompt": [USER]}, {"prompt": [USER]}, "prompt: messages"),
    "prompt of one message": ("prompts", {"prompt": USER}, {"prompt": [USER]}, "prompt: messages"),
    "prompt as json": (
        "prompts",
        {"prompt": json.dumps([SYSTEM, USER])},
        {"prompt": [SYSTEM, USER]},
        "prompt: messages, JSON text",
    ),
    "prompt with a system prompt": (
        "prompts",
        {"system": "be brief", "prompt": "hi"},
        {"prompt": [SYSTEM, USER]},
        "system + prompt: messages",
    ),
    "instruction": ("prompts", {"instruction": "hi", "input": "x"}, {"prompt": "hi\n\nx"}, "instruction + input: text"),
    "question": ("prompts", {"question": "hi", "answer": "3"}, {"prompt": "hi", "answer": "3"}, "question: text"),
    "kto": (
        "unpaired",
        {"prompt": "hi", "completion": "hello", "label": True},
        {"prompt": "hi", "response": "hello", "label": True},
        "prompt + completion + label: text",
    ),
    "kto without a prompt": (
        "unpaired",
        {"prompt": None, "completion": "hello", "label": "1"},
        {"response": "hello", "label": True},
        "completion + label: text",
    ),
    "kto of a conversation as the completion": (
        "unpaired",
        {"completion": [USER, ANSWER], "label": "1"},
        {"messages": [USER, ANSWER], "label": True},
        "completion + label: messages",
    ),
    "kto of messages": (
        "unpaired",
        {"prompt": [USER], "completion": [ANSWER], "label": "False"},
        {"prompt": [USER], "response": [ANSWER], "label": False},
        "prompt + completion + label: messages",
    ),
    "kto of conversations": (
        "unpaired",
        {"conversations": SHAREGPT, "label": 1},
        {"messages": [USER, ANSWER], "label": True},
        "conversations + label: messages, from/value",
    ),
    "gsm8k": (
        "demonstrations",
        {"question": "a", "answer": "b"},
        {"prompt": "a", "response": "b"},
        "question + answer: text",
    ),
    "metamath": (
        "demonstrations",
        {"query": "a", "response": "b"},
        {"prompt": "a", "response": "b"},
        "query + response: text",
    ),
    "numina": (
        "demonstrations",
        {"problem": "a", "solution": "b"},
        {"prompt": "a", "response": "b"},
        "problem + solution: text",
    ),
    "problems": ("prompts", {"problem": "a", "solution": "b"}, {"prompt": "a"}, "problem: text"),
    "roles in any case": (
        "demonstrations",
        {"messages": [said("System", "be brief"), said("User", "hi"), said("Assistant", "hello")]},
        {"messages": [SYSTEM, USER, ANSWER]},
        "messages",
    ),
    "roles of chains": (
        "demonstrations",
        {"messages": [said("human", "hi"), said("ai", "hello")]},
        {"messages": [USER, ANSWER]},
        "messages",
    ),
    "sharegpt calls": (
        "demonstrations",
        {
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "function_response", "value": "3"},
                {"from": "gpt", "value": "hello"},
            ]
        },
        {"messages": [USER, TYPED_CALL, said("tool", "3"), ANSWER]},
        "conversations: messages, from/value",
    ),
    **{
        f"calls as {name}": (
            "demonstrations",
            {"messages": [USER, said("assistant", "", **calls)]},
            {"messages": [USER, call]},
            "messages",
        )
        for name, calls, call in [
            ("json text", {"tool_calls": json.dumps(CALL["tool_calls"])}, CALL),
            ("texts of json", {"tool_calls": [json.dumps(CALL["tool_calls"][0])]}, CALL),
            ("one object", {"tool_calls": CALL["tool_calls"][0]}, CALL),
            ("bare functions", {"tool_calls": [TYPED_CALL["tool_calls"][0]["function"]]}, TYPED_CALL),
            ("function_call", {"function_call": {"name": "f", "arguments": {"x": 1}}}, TYPED_CALL),
            ("null functions", {"tool_calls": [{"function": None, "name": "f", "arguments": {"x": 1}}]}, TYPED_CALL),
        ]
    },
    "no calls, as text": (
        "demonstrations",
        {"messages": [USER, ANSWER | {"tool_calls": "null"}]},
        {"messages": [USER, ANSWER | {"tool_calls": []}]},
        "messages",
    ),
    "a transcript that the sides repeat": (
        "preferences",
        {"prompt": TRANSCRIPT, "chosen": TRANSCRIPT + " a", "rejected": TRANSCRIPT + " b"},
        {"prompt": TRANSCRIPT, "chosen": " a", "rejected": " b"},
        "prompt + chosen + rejected: text, implicit prompt, transcript",
    ),
    "a prompt that the sides repeat": (
        "preferences",
        {"prompt": "Say a", "chosen": "Say a b", "rejected": "Say a c"},
        {"prompt": "Say a", "chosen": "Say a b", "rejected": "Say a c"},
        "prompt + chosen + rejected: text, chosen and rejected repeat the prompt",
    ),
    "a prompt that the response repeats": (
        "demonstrations",
        {"prompt": "Say a", "completion": "Say a b"},
        {"prompt": "Say a", "response": "Say a b"},
        "prompt + completion: text, response repeats the prompt",
    ),
    "labels of spreadsheets": (
        "unpaired",
        {"prompt": "a", "completion": "b", "label": "1.0"},
        {"prompt": "a", "response": "b", "label": True},
        "prompt + completion + label: text",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_becomes_the_record_that_it_means(name):
    kind, row, expected, announced = FORMATS[name]
    found = recognise(row | {"id": 7}, kind, {}, "data.x")
    words = {"prompt", "response", "chosen", "rejected", "messages", "text", "label"}
    record = {word: value for word, value in found.record.items() if word in words | expected.keys()}
    assert record == expected and found.format == announced
    assert found.record["id"] == 7
    assert "id" in found.unused or kind == "prompts"  # all columns go to rewards
    assert not (set(found.unused) - {"id"}) & row.keys() - {"messages", "prompt", "response"}
    again = recognise(found.record, kind, {"system": ""}, "data.x").record  # a record is what it says
    assert {word: again[word] for word in expected} == expected


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (
            "preferences",
            {"chosen": str([USER]).replace("}]", "} {}]"), "rejected": "b"},
            "chosen looks like messages and is not JSON",
        ),
        ("prompts", {"prompt": '[{"role": "user", "content": "cut'}, "prompt looks like messages and is not JSON"),
        (
            "demonstrations",
            {"text": json.dumps([USER, ANSWER])},
            "text holds messages as JSON; fields: {messages: text}",
        ),
        (
            "prompts",
            {"messages": [said("user", [{"type": "image_url", "image_url": {}}])]},
            "messages[0].content[0] is of type 'image_url'",
        ),
        ("prompts", {"messages": [said("user", [{"type": "text"}])]}, "messages[0].content[0] has no text"),
        (
            "demonstrations",
            {"conversations": [{"from": "narrator", "value": ""}]},
            "conversations[0].from is 'narrator', expected human",
        ),
        ("preferences", {"prompt": [said("user", "other")], **WHOLE}, "and the prompt is not in it"),
        ("preferences", {"prompt": "other", **WHOLE}, 'data.x.fields: {prompt: ""} leaves the prompt out'),
        (
            "preferences",
            {"prompt": "hi", "chosen": [ANSWER], "rejected": [USER, OTHER]},
            "one of chosen and rejected is an answer",
        ),
        ("preferences", {"chosen": "a", "rejected": [OTHER]}, "chosen is text and rejected is a list"),
        (
            "preferences",
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
            "transcripts that differ",
        ),
        (
            "preferences",
            {"question": "a", "instruction": "b", **PAIR},
            "prompt may be 'question' or 'instruction'; data.x.fields.prompt says which",
        ),
        (
            "demonstrations",
            {"prompt": "a", "completion": "b", "instruction": "a", "output": "b"},
            "prompt may be 'prompt' or 'instruction'",
        ),
        ("prompts", {"prompt": "a", "system": "b", "system_prompt": "c"}, "system may be 'system' or 'system_prompt'"),
        (
            "prompts",
            {"prompt": '[{"name": "x", "role": "user", "content": "h'},
            "prompt looks like messages and is not JSON",
        ),
        (
            "prompts",
            {"prompt": [said("developer", "b"), USER], "system": "c"},
            "a system prompt in a column and another",
        ),
        ("prompts", {"prompt": "a", "system": 3}, "system is a number, expected text"),
        (
            "prompts",
            {"messages": [SYSTEM, USER], "system": "another"},
            "a system prompt in a column and another in its messages",
        ),
        ("unpaired", {"prompt": "a", "completion": "b", "label": "maybe"}, "label is 'maybe', expected true or false"),
        ("unpaired", {"prompt": "a", "completion": "b", "label": 0.5}, "label is 0.5, expected true or false"),
        ("unpaired", {"prompt": "a", "completion": "b", "label": None}, "label is null"),
        ("unpaired", {"prompt": "a", "completion": "b"}, "no column 'label'"),
        ("prompts", {"prompt": []}, "prompt is empty"),
        ("demonstrations", {"conversations": "hi"}, "conversations is text, expected a list of messages"),
        ("demonstrations", {"prompt": "a", "completion": ""}, "completion is empty"),
        (
            "demonstrations",
            {"conversations": [SHAREGPT[0], {"from": "gpt", "value": None}]},
            "conversations[1].content is null",
        ),
        (
            "demonstrations",
            {"conversations": [SHAREGPT[0], {"from": "function_call", "value": "f(1)"}]},
            "conversations[1].value is 'f(1)', which is not JSON",
        ),
        *(
            ("demonstrations", {"messages": [USER, said("assistant", "a", tool_calls=calls)]}, message)
            for calls, message in [
                ("f(1)", "messages[1].tool_calls is 'f(1)', which is not JSON"),
                (3, "messages[1].tool_calls is a number, expected a list of calls"),
                ([{}], "messages[1].tool_calls[0] has no name of a function"),
                ([{"function": {"name": None}}], "messages[1].tool_calls[0] has no name of a function"),
                ([3], "messages[1].tool_calls[0] has no name of a function"),
            ]
        ),
        ("prompts", {"prompt": [USER, ANSWER]}, "prompt ends with role 'assistant'"),
        ("demonstrations", {"prompt": "a", "completion": [USER]}, "and the prompt is not in it"),
    ],
)
def test_what_can_be_read_in_no_way_or_in_two_is_refused_in_one_line(kind, row, message):
    with pytest.raises(BadRecord) as error:
        recognise(row, kind, {}, "data.x")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unused_columns_are_named():
    row = {"prompt": "a", "response": "b", "input": "c", "system_text": "d", "messages": [USER]}
    assert recognise(row, "demonstrations", {}, "x").unused == ("input", "system_text", "messages")
    assert recognise({"text": "a", "system": "b"}, "demonstrations", {}, "x").unused == ("system",)
    assert recognise({"prompt": "a", "messages": [USER], "answer": 1}, "prompts", {}, "x").unused == ("messages",)
    assert recognise({"chosen": "a", "rejected": "b", "margin": 1}, "preferences", {}, "x").unused == ()
    assert recognise({"chosen": "a", "rejected": "b", "system": "c"}, "preferences", {}, "x").unused == ("system",)
    weighted = {"messages": [USER, ANSWER | {"weight": 0}]}
    assert recognise(weighted, "demonstrations", {}, "x").unused == ("messages[].weight",)
    solved = {"question": "a", "response": "because b", "answer": "b"}
    assert recognise(solved, "demonstrations", {}, "x")[1:] == ("question + response: text", ("answer",))
    masked = {"messages": [USER, ANSWER | {"train": False}, USER, ANSWER | {"training": True}]}
    assert recognise(masked, "demonstrations", {}, "x").unused == ("messages[].train", "messages[].training")
    assert recognise({"prompt": "a", "response": "b", "tools": []}, "demonstrations", {}, "x").unused == ("tools",)


def test_fields_leave_words_out_and_settle_what_is_ambiguous():
    row = {"system": "be brief", "question": "a", "instruction": "b", **PAIR, "margin": 1}
    found = recognise(row, "preferences", {"prompt": "question", "system": "", "margin": ""}, "x")
    assert found.record["prompt"] == [said("user", "a")] and "system" not in found.record
    assert "margin" not in found.record and found.unused == ("instruction",)
    bare = recognise({"prompt": "other", **WHOLE}, "preferences", {"prompt": ""}, "x")
    assert bare.record == WHOLE and bare.format == "chosen + rejected: messages, implicit prompt"


# ---- in files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path):
    def do(name: str, content: bytes | str, kind: str, **fields):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        cfg = SourceConfig(path=str(tmp_path / name), fields=fields)
        return open_source(cfg, kind, cache_dir=str(tmp_path / "cache"), path_in_config="data.x")

    return do


def test_conversations_in_csv(opened):
    file = io.StringIO()
    writer = csv.DictWriter(file, ["prompt", "chosen", "rejected", "margin", "id"])
    writer.writeheader()
    writer.writerow({"prompt": json.dumps([USER]), "chosen": json.dumps([ANSWER]), "rejected": str([OTHER]), "id": 1})
    writer.writerow({"prompt": "hi", "chosen": "hello", "rejected": "what", "id": 2})
    source = opened("a.csv", file.getvalue(), "preferences")
    assert list(source) == [
        {"prompt": [USER], **PAIR, "margin": None, "id": "1"},
        {"prompt": "hi", "chosen": "hello", "rejected": "what", "margin": None, "id": "2"},
    ]
    form = "prompt + chosen + rejected"
    assert (
        source.describe()
        == f"{form}: messages, JSON text (1 rows), {form}: text (1 rows); columns that are not used: id"
    )
    assert opened("b.csv", "prompt,completion,label\na,b,TRUE\na,c,0\n", "unpaired")[1]["label"] is False


def test_parquet_conversations_lose_what_arrow_fills_in(opened):
    import pyarrow
    import pyarrow.parquet

    call = said("assistant", None, tool_calls=[{"function": {"name": "f", "arguments": {"x": 1}}}])
    other = said("assistant", "b", tool_calls=[{"function": {"name": "g", "arguments": {"y": 2}}}])
    buffer = io.BytesIO()
    rows = [{"messages": [USER, call, ANSWER]}, {"messages": [USER, other, ANSWER]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    records = [record["messages"] for record in opened("a.parquet", buffer.getvalue(), "demonstrations")]
    assert records == [row["messages"] for row in rows]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"text": "a"}, {"text": "b"}], indent=1),
        json.dumps({"data": [{"text": "a"}, {"text": "b"}], "version": 1}),
        '{"text": "a"}\n{"text": "b"}\n',
        '\ufeff[{"text": "a"}, {"text": "b"}]',
    ],
)
def test_json(opened, content):
    assert [record["text"] for record in opened("a.json", content, "demonstrations")] == ["a", "b"]
    packed = opened("b.json.gz", gzip.compress(content.encode()), "demonstrations")
    assert [record["text"] for record in packed] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"rows": [\n]}', "a.json: is an object with 'rows', expected a list of objects"),
        ("a.json", "3", "a.json: is a number, expected a list of objects"),
        ("a.json", "[{]", "a.json: is not JSON"),
        ("a.json", b"\xff", "a.json: is not JSON"),
        ("a.json", '[{"text": "a"}, 3]', "a.json:2: is a number, expected a JSON object"),
        ("a.json", "[" * 100_000, "a.json: is not JSON"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz: is not gzip that can be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-9], "a.jsonl.gz: is not gzip that can be read"),
        ("a.parquet.gz", b"", "ends with '.gz', expected one of .jsonl"),
        ("a.csv", "prompt;completion\na;b\n", "a.csv:1: the columns are split by ';', expected ','"),
        ("a.csv", "prompt\tcompletion\na\tb\n", "a.csv:1: the columns are split by '\\t', expected ','"),
        ("a.tsv", "prompt,completion\na,b\n", "a.tsv:1: the columns are split by ',', expected '\\t'"),
        ("a.csv", "prompt,completion\na,b\n".encode("utf-16"), "a.csv:1: the name of a column"),
    ],
)
def test_files_that_cannot_be_read(opened, name, content, message):
    with pytest.raises(ValueError) as error:
        opened(name, content, "demonstrations")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_column_without_a_name_is_no_part_of_the_prompt(opened):
    """pandas writes the numbers of the rows so."""
    source = opened("a.csv", ",prompt,completion\n0,a,b\n1,c,d\n", "demonstrations")
    assert [(record["prompt"], record["response"]) for record in source] == [("a", "b"), ("c", "d")]
    assert source.describe().endswith("; columns that are not used: one without a name")


def test_tsv(opened):
    source = opened("a.tsv", 'prompt\tcompletion\nhi, "you"\t"b\n\tc"\n', "demonstrations")
    assert [(record["prompt"], record["response"]) for record in source] == [('hi, "you"', "b\n\tc")]


def test_a_tokenizer_is_trained_on_rows_with_null_columns():
    for row, expected in (
        ({"messages": None, "text": "abc"}, "abc"),
        ({"prompt": None, "response": None, "messages": [USER, ANSWER], "text": None}, "hi\nhello"),
        ({"prompt": "a", "response": "b", "messages": None}, "ab"),
        ({"prompt": [USER], "response": [ANSWER]}, "hi\nhello"),
    ):
        assert text_of(row) == expected


# ---- which columns --------------------------------------------------------------------------------------------------


def test_missing_column_names_the_setting_that_renames():
    with pytest.raises(BadRecord, match=r"expected chosen \+ rejected; data\.preferences\.fields renames columns"):
        check_columns(["good", "bad"], "preferences", {}, "data.preferences")


def test_take_fields_renames_and_keeps_the_rest():
    row = {"question": "q", "answer": "a", "id": 7}
    assert take_fields(row, {"prompt": "question"}, "x") == {"prompt": "q", "answer": "a", "id": 7}
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    assert take_fields({"chosen": 1, "rejected": 2}, swapped, "x") == {"chosen": 2, "rejected": 1}
    with pytest.raises(BadRecord, match=r"no column 'questoin', which x.fields.prompt names \(did you mean 'question'"):
        take_fields(row, {"prompt": "questoin"}, "x")


def test_fields_choose_the_form():
    row = {"prompt": "p", "response": "r", "story": "s", "id": 1}
    assert recognise(row, "demonstrations", {"text": "story"}, "x").record == {"text": "s", "id": 1}
    named = recognise(row, "demonstrations", {"response": "story"}, "x").record
    assert named == {"prompt": "p", "response": "s", "id": 1}


def test_what_was_recognised_is_announced_once(tmp_path, opened):
    """A line a section; held-out data are named where they are something else than the training data."""
    from types import SimpleNamespace

    from jaxrlhf.run import feed

    pairs = json.dumps({**WHOLE, "id": 1, "score": 2}) + "\n"
    opened("a.jsonl", pairs, "preferences")
    opened("b.jsonl", json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}), "preferences")
    data = SimpleNamespace(cache_dir=str(tmp_path / "cache"), skip_bad=False)
    ready = SimpleNamespace(cfg=SimpleNamespace(data=data), recognised={}, environment=None)
    for where, name in (("data.preferences", "a"), ("data.eval_preferences", "a"), ("data.eval_prompts", "b")):
        feed.read_source(ready, "preferences", SourceConfig(path=f"{tmp_path}/{name}.jsonl"), where)  # type: ignore[arg-type]
    assert feed.describe_data(ready) == [  # type: ignore[arg-type]
        "data.preferences: chosen + rejected: messages, implicit prompt; columns that are not used: id, score",
        "data.eval_prompts: prompt + chosen + rejected: text",
    ]
