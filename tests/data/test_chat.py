"""Conversations of templates as published models have them: what is rendered, what is learnt, what ends a turn."""

import copy
import json
import resource

import pytest

from jaxrlhf.data import chat as chat_templates
from jaxrlhf.data.chat import date_of, render
from jaxrlhf.data.encode import encode_demonstration, encode_pair, encode_prompt
from jaxrlhf.data.record_kinds import KINDS, BadRecord, check_record
from jaxrlhf.data.sources import SourceConfig, open_source
from jaxrlhf.data.tokenizer import eos_ids, load_tokenizer, save_tokenizer

from .conftest import speaking
from .test_encode import learnt, text_of

USER = lambda text: {"role": "user", "content": text}
SAID = lambda text: {"role": "assistant", "content": text}
ONE = [USER("late?"), SAID("Yes.")]
TWO = [*ONE, USER("now?"), SAID("No.")]
TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
OPENS = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
WORDS = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
PHI3 = TURNS + "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
# as DeepSeek-R1-Distill: it opens the thoughts, and leaves those of the content out
R1 = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments | tojson }})"
    "{% endfor %}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}" + OPENS
)


# ---- what ends a response -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [TURNS + OPENS, PHI3, R1, TOOLS])
def test_the_token_that_ends_a_turn_ends_responses(tokenizer, template):
    """A base tokenizer, whose EOS is another, with a chat template."""
    chat = speaking(tokenizer, template, WORDS)
    end = chat.convert_tokens_to_ids("<|end|>")
    assert eos_ids(chat) == (1, end)
    assert learnt(encode_demonstration({"messages": ONE}, chat, "response"), chat)[-1].endswith("Yes.<|end|>")


def test_a_template_that_ends_turns_with_text_adds_nothing(tokenizer):
    chat = speaking(tokenizer, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert eos_ids(chat) == (1,)
    refuses = speaking(tokenizer, "{{ raise_exception('no') }}" + TURNS, WORDS)
    assert eos_ids(refuses) == (1,)


def test_a_template_that_does_not_end_is_refused(tokenizer, monkeypatch):
    """Jinja's sandbox limits the loop, not the loops in it."""
    monkeypatch.setattr(chat_templates, "TRIAL", 0.2)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    endless = speaking(tokenizer, loops + TURNS, WORDS)
    line = r"^tokenizer: .*: its chat template wrote no short conversation in 0\.2 s; expected another in data\.chat"
    with pytest.raises(ValueError, match=line):
        eos_ids(endless)
    with pytest.raises(ValueError, match=line):
        chat_templates.apply_config(endless, chat_templates.ChatConfig(template=loops), adds_bos=False)


DOUBLED = "{% set n = namespace(t='a') %}{% for _ in range(40) %}{% set n.t = n.t ~ n.t %}{% endfor %}"


@pytest.mark.parametrize("hungry", ["{{ 'a' * 10**9 }}", "{{ 'a' | center(10**10) }}", DOUBLED])
def test_a_template_that_takes_all_memory_is_refused(tokenizer, hungry):
    line = r"^tokenizer: .*: its chat template took more than 0\.5 GB of memory for a short conversation; expected"
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ValueError, match=line):
        eos_ids(speaking(tokenizer, hungry + TURNS, WORDS))
    with pytest.raises(ValueError, match=line):
        config = chat_templates.ChatConfig(template=hungry + TURNS)
        chat_templates.apply_config(speaking(tokenizer, TURNS, WORDS), config, adds_bos=False)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_turn_ends_at_its_first_eos(tokenizer):
    """Phi-3 writes <|endoftext|> behind the last turn: a policy has stopped before it."""
    chat = speaking(tokenizer, PHI3, WORDS)
    encoded = encode_demonstration({"messages": TWO}, chat, "assistant")
    assert learnt(encoded, chat) == ["Yes.<|end|>", "No.<|end|>"]
    assert text_of(encoded, chat).endswith("<|assistant|>No.<|end|>")


def test_an_eos_within_a_content_does_not_cut_it(tokenizer):
    chat = speaking(tokenizer, TURNS + OPENS, WORDS)
    encoded = encode_demonstration({"messages": [USER("how?"), SAID("write <|end|> there")]}, chat, "response")
    assert text_of(encoded, chat).endswith("write <|end|> there<|end|>")


@pytest.mark.parametrize("behind", ["<|end|>", "<|end|>\n", "<|end|><|end|>"])
def test_an_eos_that_a_content_brings_along_is_not_doubled(tokenizer, behind):
    """In what is learnt, in earlier turns, and in the prompt that the sampler sees."""
    chat = speaking(tokenizer, TURNS + OPENS, WORDS)
    marked = [turn | {"content": turn["content"] + behind} if turn["role"] == "assistant" else turn for turn in TWO]
    plain, given = (encode_demonstration({"messages": talk}, chat, "assistant") for talk in (TWO, marked))
    assert text_of(given, chat) == text_of(plain, chat) and learnt(given, chat) == ["Yes.<|end|>", "No.<|end|>"]
    assert (
        encode_prompt({"messages": marked[:-1]}, chat).tolist() == encode_prompt({"messages": TWO[:-1]}, chat).tolist()
    )


def test_the_header_of_a_first_turn_is_not_learnt(tokenizer):
    """A conversation that the assistant opens; the answers of a pair without a prompt."""
    chat = speaking(tokenizer, "{{ bos_token or '' }}" + TURNS + OPENS, WORDS)
    talk = [SAID("Hello."), *TWO]
    encoded = encode_demonstration({"messages": talk}, chat, "assistant")
    assert learnt(encoded, chat) == ["Hello.<|end|>", "Yes.<|end|>", "No.<|end|>"]
    assert text_of(encoded, chat).startswith("<|assistant|>Hello.<|end|>\n<|user|>")
    sides = encode_pair({"chosen": [SAID("A yes.")], "rejected": [SAID("Or no.")]}, chat)
    assert [learnt(side, chat) for side in sides] == [["A yes.<|end|>"], ["Or no.<|end|>"]]
    other = speaking(tokenizer, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert learnt(encode_demonstration({"messages": talk[:1]}, other, "response"), other) == ["Hello.\n<eos>"]


def test_an_eos_that_swallows_the_space_behind_it(tokenizer):
    """Phi-3's tokens take the line break along."""
    from tokenizers import AddedToken

    chat = speaking(tokenizer, TURNS + OPENS, [AddedToken(word, rstrip=True, special=True) for word in WORDS])
    encoded = encode_demonstration({"messages": TWO}, chat, "assistant")
    assert learnt(encoded, chat) == ["Yes.<|end|>", "No.<|end|>"]
    prompt = encode_prompt({"messages": TWO[:-1]}, chat)
    assert encoded.tokens[: len(prompt)].tolist() == prompt.tolist()


def test_pairs_end_as_demonstrations_do(tokenizer):
    chat = speaking(tokenizer, PHI3, WORDS)
    sides = encode_pair({"prompt": ONE[:1], "chosen": [SAID("Yes.")], "rejected": [SAID("No.")]}, chat)
    assert [learnt(side, chat) for side in sides] == [["Yes.<|end|>"], ["No.<|end|>"]]


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, (1,)),
        ({"generation_config.json": {"eos_token_id": [5, 1]}}, (1, 5)),
        ({"config.json": {"eos_token_id": [1, 6]}}, (1, 6)),  # as transformers does where the other is absent
        ({"config.json": {"text_config": {"eos_token_id": 7}}}, (1, 7)),
        ({"generation_config.json": {"eos_token_id": 5}, "config.json": {"eos_token_id": 6}}, (1, 5)),
        ({"generation_config.json": {"temperature": 0.5}, "config.json": {"eos_token_id": 6}}, (1, 6)),
    ],
)
def test_a_tokenizer_knows_what_its_folder_says_of_endings(trained, tmp_path, files, expected):
    trained.save_pretrained(tmp_path)
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    loaded = load_tokenizer(str(tmp_path))
    assert eos_ids(loaded) == expected
    save_tokenizer(loaded, str(tmp_path / "run" / "tokenizer"))
    assert eos_ids(load_tokenizer(str(tmp_path / "run" / "tokenizer"))) == expected  # it is kept with a run


def test_broken_configs_beside_a_tokenizer_are_one_line(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json: is not JSON") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


# ---- thoughts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, said",
    [
        ("<think>\nIt is nine.\n</think>\n\nYes.", "It is nine.\n</think>\n\nYes.<|end|>"),
        ("It is nine.\n</think>\n\nYes.", "It is nine.\n</think>\n\nYes.<|end|>"),  # the opening is the prompt's
        ("Yes.", "\n</think>\n\nYes.<|end|>"),  # no thoughts: closed at once
    ],
)
def test_thoughts_that_the_prompt_opens_are_learnt(tokenizer, content, said):
    """The template drops them, and the policy is sampled behind <think>: what is learnt follows that prompt."""
    chat = speaking(tokenizer, R1, WORDS)
    for before in ([], TWO):
        talk = [*before, USER("late?"), SAID(content)]
        encoded, prompt = (
            encode_demonstration({"messages": talk}, chat, "response"),
            encode_prompt({"messages": talk[:-1]}, chat),
        )
        assert encoded.tokens[: len(prompt)].tolist() == prompt.tolist()
        assert text_of(encoded, chat) == chat.decode(prompt) + said and learnt(encoded, chat) == [said]


def test_thoughts_in_a_field_of_their_own(tokenizer):
    chat = speaking(tokenizer, R1, WORDS)
    talk = [USER("late?"), SAID("Yes.") | {"reasoning_content": "It is nine."}]
    assert learnt(encode_demonstration({"messages": talk}, chat, "response"), chat) == [
        "It is nine.\n</think>\n\nYes.<|end|>"
    ]


def test_thoughts_behind_a_prompt_that_closes_them_are_refused(tokenizer):
    """As with enable_thinking: false."""
    chat = speaking(tokenizer, R1.replace("<think>\n{%", "<think>\n\n</think>\n\n{%"), WORDS)
    with pytest.raises(BadRecord, match=r"closes the thoughts \(</think>\).*data.chat.kwargs"):
        encode_demonstration({"messages": [USER("late?"), SAID("<think>nine</think>Yes.")]}, chat, "response")


def test_an_answer_that_is_in_the_ending_of_its_turn_too(tokenizer):
    """Behind a prompt that closes thoughts, which the template leaves out of the turn."""
    chat = speaking(tokenizer, R1.replace("<think>\n{%", "<think>\n\n</think>\n\n{%"), WORDS)
    encoded = encode_demonstration({"messages": [USER("late?"), SAID("end")]}, chat, "response")
    assert learnt(encoded, chat) == ["end<|end|>"]


# ---- tools ----------------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "clock", "description": "time", "parameters": {}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock", "arguments": {"zone": "é"}}}]}
TALK = [USER("late?"), CALL, {"role": "tool", "content": "9"}, SAID("Yes.")]


def call(content: str | None = "", arguments: object = None) -> dict:
    function = {"name": "clock", "arguments": {"zone": "é"} if arguments is None else arguments}
    return {"role": "assistant", "content": content, "tool_calls": [{"function": function}]}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], json.dumps(TOOL)])
def test_tools_reach_the_template(tokenizer, tools):
    """Of demonstrations, prompts and pairs, as transformers writes them."""
    chat = speaking(tokenizer, TOOLS, WORDS)
    whole = chat.apply_chat_template(TALK, tools=[TOOL], tokenize=False)
    assert '"clock"' in whole
    assert text_of(encode_demonstration({"messages": TALK, "tools": tools}, chat, "response"), chat) == whole
    prompt = chat.apply_chat_template(TALK[:3], tools=[TOOL], tokenize=False, add_generation_prompt=True)
    assert chat.decode(encode_prompt({"messages": TALK[:3], "tools": tools}, chat)) == prompt
    pair = {"prompt": TALK[:1], "chosen": [call()], "rejected": [SAID("No.")], "tools": tools}
    assert [text_of(side, chat).count('"clock"') for side in encode_pair(pair, chat)] == [1, 1]


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools(tokenizer, tools):
    chat = speaking(tokenizer, TOOLS, WORDS)
    assert text_of(encode_demonstration({"messages": ONE, "tools": tools}, chat, "response"), chat).startswith(
        "<|user|>"
    )


@pytest.mark.parametrize(
    "last", [call(), call(None), call(arguments='{"zone": "é"}'), {k: v for k, v in call().items() if k != "content"}]
)
def test_a_bare_call_is_learnt(tokenizer, tmp_path, last):
    chat = speaking(tokenizer, TOOLS, WORDS)
    record = {"messages": [TALK[0], last], "tools": [TOOL]}
    path = tmp_path / "calls.jsonl"
    path.write_text(json.dumps(record) + "\n")
    source = open_source(SourceConfig(path=str(path)), "demonstrations", cache_dir=str(tmp_path))
    assert learnt(encode_demonstration(source[0], chat, "response"), chat) == ['clock({"zone": "é"})<|end|>']


def test_arguments_as_the_template_wants_them(tokenizer):
    """Templates that write them as they come want JSON text, not what Python prints for an object."""
    plain = speaking(tokenizer, TOOLS.replace(" | tojson }})", " }})"), WORDS)
    joins = speaking(
        tokenizer, TOOLS.replace("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}"), WORDS
    )
    for chat in (plain, joins):
        for arguments in ({"zone": "é"}, '{"zone": "é"}'):
            found = encode_demonstration({"messages": [TALK[0], call(arguments=arguments)]}, chat, "response")
            assert learnt(found, chat) == ['clock({"zone": "é"})<|end|>']


def test_null_contents_are_not_written_as_words(tokenizer):
    template = TOOLS.replace("{% if m.tool_calls %}", "{{ m.content }}{% if m.tool_calls %}")
    chat = speaking(tokenizer, template, WORDS)
    found = encode_demonstration({"messages": [TALK[0], call(None)]}, chat, "response")
    assert learnt(found, chat) == ['clock({"zone": "é"})<|end|>']


def test_keys_that_columnar_files_fill_with_null_are_absent(tokenizer):
    template = TOOLS.replace("{% if m.tool_calls %}", "{% if 'tool_calls' in m %}")
    chat = speaking(tokenizer, template, WORDS)
    talk = [message | {"tool_calls": None, "name": None} for message in ONE]
    tool = {**TOOL, "function": TOOL["function"] | {"parameters": {"zone": {"type": "string"}, "day": None}}}
    text = text_of(encode_demonstration({"messages": talk, "tools": [tool]}, chat, "response"), chat)
    assert "null" not in text and text.endswith("Yes.<|end|>")


@pytest.mark.parametrize(
    "record, error, message",
    [
        ({"messages": ONE, "tools": [TOOL]}, ValueError, "writes none of them; .*data.chat.template"),
        ({"messages": [ONE[0], call()]}, ValueError, "writes no call of 'clock'"),
        ({"messages": ONE, "tools": "{clock"}, BadRecord, "tools is '{clock', which is not JSON"),
        ({"messages": ONE, "tools": 3}, BadRecord, "tools is int, expected a list of JSON schemas"),
        ({"messages": [ONE[0], call(arguments="{zone")]}, BadRecord, "arguments is '{zone', which is not JSON"),
    ],
)
def test_tools_that_cannot_be_written_are_one_line(tokenizer, record, error, message):
    chat = speaking(tokenizer, TURNS + OPENS, WORDS)
    with pytest.raises(error, match=message) as caught:
        encode_demonstration(record, chat, "response")
    assert "\n" not in str(caught.value)


def test_an_empty_turn_without_a_call_is_still_refused():
    with pytest.raises(BadRecord, match="ends with an empty turn"):
        check_record({"messages": [USER("late?"), SAID(" ") | {"tool_calls": []}]}, KINDS["demonstrations"])


# ---- dates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asks",
    [
        "{{ strftime_now('%d %b %Y') }}",
        "{% set form = '%d %b %Y' %}{{ strftime_now(form) }}",
        "{% macro today(form) %}{{ strftime_now(form) }}{% endmacro %}{{ today('%d ' ~ '%b %Y') }}",
        "{% if strftime_now is defined %}{{ '%02d' % strftime_now(format='%-d') | int }}{% endif %} "
        "{{ strftime_now('%b %Y') }}",
    ],
)
def test_a_dated_template_writes_one_date(tokenizer, tmp_path, monkeypatch, asks):
    """That of its first use, on every later day and in what starts from the run."""
    import datetime as real

    from jaxrlhf.data import chat as module

    class Clock(real.datetime):
        today_is = 2

        @classmethod
        def now(cls, tz=None):
            return real.datetime(2026, 5, cls.today_is)

    monkeypatch.setattr(module.datetime, "datetime", Clock)
    chat = speaking(tokenizer, asks + TURNS, WORDS)
    first = render(ONE, chat)
    Clock.today_is = 21
    assert first.startswith("02 May 2026") and render(ONE, chat) == first
    assert render(ONE, speaking(tokenizer, chat.chat_template, WORDS)).startswith("21 May 2026")
    save_tokenizer(chat, str(tmp_path))
    loaded = load_tokenizer(str(tmp_path))
    assert render(ONE, loaded) == first and date_of(loaded) == "2026-05-02T00:00"
    assert "strftime_now" in loaded.chat_template  # what is exported still asks for the date


# ---- texts that a template has written already ----------------------------------------------------------------------


def test_bos_is_not_doubled(add_bos):
    bos = "<bos>"
    assert add_bos.decode(encode_prompt({"prompt": bos + "the"}, add_bos)) == "<bos>the"
    for record in ({"prompt": bos + "the", "response": " film"}, {"prompt": "", "response": bos + "the film"}):
        encoded = encode_demonstration(record, add_bos, "response")
        assert text_of(encoded, add_bos) == "<bos>the film<eos>" and not encoded.response_mask[0]
    encoded = encode_demonstration({"text": bos + "the film"}, add_bos, "response")
    assert text_of(encoded, add_bos) == "<bos>the film<eos>" and learnt(encoded, add_bos) == ["the film<eos>"]
    pair = encode_pair({"chosen": bos + "the film", "rejected": bos + "the plot"}, add_bos)
    assert [text_of(side, add_bos) for side in pair] == ["<bos>the film<eos>", "<bos>the plot<eos>"]
    pair = encode_pair({"prompt": bos + "the", "chosen": " film", "rejected": " plot"}, add_bos)
    assert [text_of(side, add_bos) for side in pair] == ["<bos>the film<eos>", "<bos>the plot<eos>"]


def test_a_bos_inside_a_text_stays(add_bos):
    other = copy.deepcopy(add_bos)
    assert other.decode(encode_prompt({"prompt": "the <bos>film"}, other)) == "<bos>the <bos>film"
