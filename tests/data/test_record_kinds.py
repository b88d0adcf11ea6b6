import pytest

from jaxrlhf.data.formats import recognise
from jaxrlhf.data.record_kinds import KINDS, BadRecord, check_record, nearest

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


@pytest.mark.parametrize(
    "kind, record",
    [
        ("demonstrations", {"prompt": "", "response": "b"}),
        ("demonstrations", {"messages": [USER, ASSISTANT], "text": None}),
        ("demonstrations", {"text": "a", "stars": 3}),
        ("preferences", {"chosen": "a", "rejected": "b", "prompt": None, "margin": 1}),
        ("preferences", {"chosen": [ASSISTANT], "rejected": [ASSISTANT], "prompt": [USER]}),
        ("prompts", {"prompt": "", "answer": 3}),
        ("prompts", {"messages": [USER]}),
    ],
)
def test_usable(kind, record):
    check_record(record, KINDS[kind])


@pytest.mark.parametrize(
    "kind, record, message",
    [
        ("demonstrations", {"prompt": "a", "respons": "b"}, "no column 'response' (did you mean 'respons'?)"),
        ("demonstrations", {"txet": "b"}, "no column 'text' (did you mean 'txet'?)"),
        ("demonstrations", {"prompt": "a", "response": ""}, "response is empty"),
        ("demonstrations", {"prompt": "a", "response": " \n"}, "response is empty"),
        ("demonstrations", {"prompt": "a", "response": None}, "response is null"),
        ("demonstrations", {"prompt": 3, "response": "b"}, "prompt is a number, expected text"),
        ("demonstrations", {"text": ["a"]}, "text is a list, expected text"),
        ("demonstrations", {"text": "a\0b"}, "text holds a NUL byte"),
        ("demonstrations", {"text": "a\ud83d"}, "text is not valid UTF-8"),
        ("demonstrations", {"text": "a", "note": "a\0"}, "note holds a NUL byte"),
        ("demonstrations", {"messages": []}, "messages is empty"),
        ("demonstrations", {"messages": "hi"}, "messages is text, expected a list of messages"),
        ("demonstrations", {"messages": [USER]}, "messages ends with role 'user', expected 'assistant'"),
        ("demonstrations", {"messages": [{"role": "user"}]}, "messages[0] has no 'content'"),
        ("demonstrations", {"messages": [{"rol": "user", "content": ""}]}, "[0] has no 'role' (did you mean 'rol'?)"),
        (
            "demonstrations",
            {"messages": [USER, {"role": "assistant", "content": 3}]},
            "messages[1].content is a number",
        ),
        ("demonstrations", {"messages": [USER, {"role": "assistant", "content": ""}]}, "empty turn of the assistant"),
        ("preferences", {"chosen": "a", "rejected": ""}, "rejected is empty"),
        ("preferences", {"chosen": "a", "rejected": [ASSISTANT]}, "chosen is text and rejected is a list"),
        ("preferences", {"chosen": "a", "rejected": "b", "margin": float("nan")}, "margin is nan"),
        ("preferences", {"chosen": "a", "rejected": "b", "margin": True}, "margin is true/false"),
        ("preferences", {"chosen": "a", "rejected": "b", "prompt": [ASSISTANT]}, "prompt ends with role 'assistant'"),
        ("prompts", {"messages": [USER, ASSISTANT]}, "expected a turn that is to be answered"),
    ],
)
def test_refused_in_one_line(kind, record, message):
    with pytest.raises(BadRecord) as error:
        recognise(record, kind, {}, "data.x")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_nearest_without_a_near_one_lists_the_choices():
    assert nearest("zzz", ["b", "a"]) == " (there is 'a', 'b')"
    assert nearest("zzz", []) == " (there is none)"
