"""What stands between two responses: beside the rendering of the whole conversation, for templates of many kinds."""

import copy

import pytest

from jaxrlhf.data.chat import TEMPLATES, ChatConfig, apply_config, markers, render
from jaxrlhf.data.encode import as_turns, encode_prompt, encode_text
from jaxrlhf.data.glue import Glue
from jaxrlhf.data.record_kinds import BadRecord
from jaxrlhf.data.tokenizer import eos_ids, turn_end

from .conftest import speaking
from .test_chat import OPENS, PHI3, R1, SAID, TURNS, USER, WORDS

# as Mistral's: BOS once, brackets, a space behind the closing one, and EOS behind the answer; roles must alternate
INST = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# as Llama 2's: a space before the token that ends a turn
SPACED = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
# as Gemma's: the assistant is called model, and contents are trimmed
GEMMA = (
    "{% for m in messages %}<|{{ 'model' if m.role == 'assistant' else m.role }}|>\n"
    "{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|model|>\n{% endif %}"
)
# as Qwen 3's: thoughts of turns before the last user's are left out
FORGETS = (
    "{% set last = (messages | selectattr('role', 'equalto', 'user') | list | length) %}"
    "{% set seen = namespace(users=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set seen.users = seen.users + 1 %}{% endif %}"
    "<|{{ m.role }}|>{% if m.role == 'assistant' and seen.users < last %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}" + OPENS
)
OWN = {"turns": TURNS + OPENS, "phi3": PHI3, "inst": INST, "gemma": GEMMA, "forgets": FORGETS}
QUESTION = {"prompt": [USER("late?")]}


def chat_of(name: str, tokenizer):
    """A tokenizer with one of our templates, or one of those that have a name."""
    if name in OWN:
        return speaking(tokenizer, OWN[name], [*WORDS, "<|model|>"])
    named = copy.deepcopy(tokenizer)
    named.add_special_tokens({"additional_special_tokens": markers(ChatConfig(template=name))})
    apply_config(named, ChatConfig(template=name), adds_bos=False)
    return named


@pytest.mark.parametrize("name", [*OWN, *TEMPLATES])
def test_a_row_is_the_whole_conversation(trained, name):
    """Three responses, put together token by token, are what the template writes of the conversation; and where turns
    end with added tokens, they have the ids that it has as one text."""
    chat = chat_of(name, trained)
    glue, ends = Glue(chat, chat=False), eos_ids(chat)
    answers, asked = ["No.", "Perhaps so.", "Yes"], ["now?", "the film is good ."]
    end = turn_end(chat) or chat.eos_token_id
    row = encode_prompt(QUESTION, chat).tolist()
    space = " " if name in ("inst", "plain") else ""  # that the template writes before an answer
    for said, observation in zip(answers, asked):
        row += [*encode_text(chat, space + said).ids, end]
        assert end in ends
        row += glue.ids(QUESTION, observation, closed=True)
    row += encode_text(chat, space + answers[-1]).ids
    talk = [*QUESTION["prompt"]]
    for said, observation in zip(answers, asked):
        talk += [SAID(said), USER(observation)]
    whole = render([*talk, SAID(answers[-1])], chat)
    text = chat.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert whole.startswith(text), (whole, text)
    rest = [token for token in encode_text(chat, whole[len(text) :]).ids if chat.decode([token]).strip()]
    assert rest and set(rest) <= {*ends}, "behind the last answer is only the end of its turn"
    if name not in ("inst", "plain"):  # whose turns meet inside a word
        assert encode_text(chat, whole).ids[: len(row)] == row


@pytest.mark.parametrize("name", ["turns", "gemma", "chatml"])
def test_a_response_that_did_not_end_its_turn_is_ended(tokenizer, name):
    chat = chat_of(name, tokenizer)
    glue = Glue(chat, chat=False)
    open_, closed = (glue.ids(QUESTION, "now?", closed) for closed in (False, True))
    assert open_ == [turn_end(chat), *closed]


def test_a_space_before_the_end_of_a_turn_goes_with_it(tokenizer):
    chat = speaking(tokenizer, SPACED)
    ids = Glue(chat, chat=False).ids(QUESTION, "now?", closed=True)
    assert chat.decode(ids) == "[INST] now? [/INST]"


def test_observations_are_messages_of_any_role(tokenizer):
    chat = chat_of("turns", tokenizer)
    shown = [{"role": "tool", "content": "42"}, USER("so?")]
    text = chat.decode(Glue(chat, chat=False).ids(QUESTION, shown, closed=True))
    assert text == "\n<|tool|>42<|end|>\n<|user|>so?<|end|>\n<|assistant|>"


def test_text_goes_on_as_text(tokenizer):
    """A prompt that is no conversation, whatever template the tokenizer has; with data.chat it is the user's turn."""
    chat = chat_of("turns", tokenizer)
    record = {"prompt": "late?"}
    plain = Glue(chat, chat=False)
    assert chat.decode(plain.ids(record, " now?", closed=True)) == " now?"
    with pytest.raises(BadRecord, match="the observation is messages, and the prompt is plain text; expected a text"):
        plain.ids(record, [USER("now?")], closed=True)
    assert Glue(chat, chat=True).ids(record, "now?", True) == plain.ids(as_turns(record), "now?", True)


def test_what_a_prompt_and_an_observation_say_is_not_taken_for_the_response(tokenizer):
    chat = chat_of("turns", tokenizer)
    same = [USER("The assistant said this.")]
    ids = Glue(chat, chat=False).ids({"prompt": same}, "The assistant said this.", closed=True)
    assert chat.decode(ids) == "\n<|user|>The assistant said this.<|end|>\n<|assistant|>"


@pytest.mark.parametrize(
    ("template", "what"),
    [(R1, "writes earlier turns otherwise"), (FORGETS, "writes the thinking of earlier turns otherwise")],
)
def test_a_template_that_rewrites_earlier_turns_is_named(tokenizer, template, what):
    chat = speaking(tokenizer, template, WORDS)
    line = Glue(chat, chat=False).rewrites(QUESTION)
    assert line and what in line and "\n" not in line
    assert Glue(chat, chat=False).rewrites({"prompt": "text"}) is None


@pytest.mark.parametrize("name", ["turns", "phi3", "gemma", *TEMPLATES])
def test_others_are_not(trained, name):
    assert Glue(chat_of(name, trained), chat=False).rewrites(QUESTION) is None


def test_a_template_that_refuses_an_observation_is_one_line(tokenizer):
    chat = speaking(tokenizer, INST)
    with pytest.raises(BadRecord, match="refuses the messages: roles must alternate"):
        Glue(chat, chat=False).ids(QUESTION, [USER("now?"), USER("so?")], closed=True)
    mute = speaking(tokenizer, "{{ messages[-1].content }}" + OPENS)
    with pytest.raises(BadRecord, match="does not write what was said before"):
        Glue(mute, chat=False).ids(QUESTION, "now?", closed=True)
