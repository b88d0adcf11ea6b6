"""data.chat: the template, the system prompt and the variables that a run's conversations are written with."""

import copy
import json

import jax
import pytest

from jaxrlhf.config.check import check
from jaxrlhf.config.load import parse
from jaxrlhf.config.resolved import resolve_config
from jaxrlhf.data.chat import TEMPLATES, ChatConfig, apply_config, markers, render
from jaxrlhf.data.encode import encode_demonstration
from jaxrlhf.data.tokenizer import eos_ids, load_tokenizer, save_tokenizer, train_bpe
from jaxrlhf.errors import ConfigError
from jaxrlhf.run import build
from jaxrlhf.run.feed import Feed

from .conftest import speaking
from .test_chat import OPENS, SAID, TURNS, USER, WORDS
from .test_encode import learnt, text_of
from .test_examples import make

TALK = [USER("late?"), SAID("Yes.")]
THINKS = (
    TURNS
    + "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}"
    + ("<think></think>{% endif %}{% endif %}")
)


def configured(tokenizer, adds_bos=False, **fields):
    other = copy.deepcopy(tokenizer)
    apply_config(other, ChatConfig(**fields), adds_bos)
    return other


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_known_by_name(name):
    """Each is prefix-stable, writes every content, and ends turns with a token."""
    chat = configured(train_bpe(["late yes"], 300, markers(ChatConfig(template=name))), True, template=name)
    talk = [{"role": "system", "content": "be kind"}, *TALK, USER("now?"), SAID("No.")]
    encoded = encode_demonstration({"messages": talk}, chat, "assistant")
    text = text_of(encoded, chat)
    assert all(message["content"] in text for message in talk) and text.startswith("<bos>")
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(name, "<eos>")
    assert [run.strip() for run in learnt(encoded, chat)] == [f"Yes.{end}", f"No.{end}"]
    assert chat.convert_tokens_to_ids(end) in eos_ids(chat)


def test_a_template_from_a_file_or_as_text(tokenizer, tmp_path):
    (tmp_path / "chat.jinja").write_text(TURNS)
    for template in (TURNS, str(tmp_path / "chat.jinja")):
        assert (
            render(TALK, configured(tokenizer, template=template)) == "<|user|>late?<|end|>\n<|assistant|>Yes.<|end|>\n"
        )


@pytest.mark.parametrize("system", ["be kind", 'say "é"\n{% endif %} {{ x }} \U0001f642 \\n', ""])
def test_a_system_prompt_stands_before_conversations_without_one(tokenizer, system):
    chat = configured(tokenizer, template=TURNS, system=system)
    assert render(TALK, chat).startswith(f"<|system|>{system}<|end|>\n<|user|>late?")
    own = [{"role": "system", "content": "mine"}, *TALK]
    assert render(own, chat).startswith("<|system|>mine<|end|>\n<|user|>late?")
    assert render([{"role": "developer", "content": "mine"}, *TALK], chat).startswith(
        "<|developer|>mine<|end|>\n<|user|>"
    )


def test_variables_of_the_template(tokenizer):
    chat = configured(speaking(tokenizer, THINKS, WORDS), kwargs={"enable_thinking": False})
    assert render(TALK[:1], chat, to_answer=True).endswith("<|assistant|><think></think>")
    assert not render(TALK[:1], speaking(tokenizer, THINKS, WORDS), to_answer=True).endswith("</think>")
    text = chat.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert text.endswith("<|assistant|>")  # who uses the saved tokenizer may still say otherwise
    values = {"a": None, "b": [1, 2.5, "x"], "c": {"d": True}, "e": "it's"}
    shown = configured(tokenizer, template="{{ [a, b, c, e] | tojson }}", kwargs=values)
    assert json.loads(render(TALK, shown)) == [None, [1, 2.5, "x"], {"d": True}, "it's"]


def test_macros_of_a_template_see_its_variables(tokenizer):
    template = "{% macro say() %}{{ word }}{% endmacro %}{{ say() }}"
    assert render(TALK, configured(tokenizer, template=template, kwargs={"word": "hi"})) == "hi"


def test_a_template_of_several_kinds(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = {"default": TURNS, "tool_use": "{{ tools | tojson }}" + TURNS}
    chat = configured(other, system="be kind")
    assert render(TALK, chat).startswith("<|system|>be kind")
    assert render(TALK, chat, tools=[{"name": "clock"}]).startswith('[{"name": "clock"}]<|system|>be kind')


def test_it_is_kept_with_the_tokenizer_and_may_be_given_again(tokenizer, tmp_path):
    chat = configured(tokenizer, template=TURNS, system="be kind")
    save_tokenizer(chat, str(tmp_path))
    loaded = load_tokenizer(str(tmp_path))
    assert render(TALK, loaded) == render(TALK, chat)
    assert render(TALK, configured(loaded, system="be brief")).startswith("<|system|>be brief<|end|>\n<|user|>")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"template": "chatmll"}, r"data\.chat\.template: 'chatmll' is no file; .* \(did you mean 'chatml'\?\)"),
        ({"template": "nowhere/chat.jinja"}, r"data\.chat\.template: 'nowhere/chat\.jinja' is no file"),
        ({"kwargs": {"tools": 1}}, r"data\.chat\.kwargs: 'tools': expected the name of a variable other than messages"),
        ({"kwargs": {"no-name": 1}}, r"data\.chat\.kwargs: 'no-name': expected the name of a variable"),
    ],
)
def test_mistakes_are_found_before_anything_is_built(fields, message):
    tree = {"run_dir": "r", "iterations": 1, "algorithm": {"name": "sft"}, "models": {"policy": {"init_from": "x"}}}
    tree["data"] = {"demonstrations": {"path": "x.jsonl"}, "chat": fields}
    with pytest.raises(ConfigError, match=message) as error:
        check(parse(tree, "test"), 1)
    assert "\n" not in str(error.value)


def test_mistakes_in_a_template_are_one_line(tokenizer):
    with pytest.raises(ValueError, match=r"^data\.chat\.template: is not Jinja: .* \(line 2\)$"):
        configured(tokenizer, template="{{ bos_token }}\n{% for %}")
    with pytest.raises(
        ValueError, match=r"^data\.chat: tokenizer .* has no chat template; expected data\.chat\.template"
    ):
        configured(tokenizer)


def test_plain_texts_become_turns(tokenizer, config):
    """Of prompts, demonstrations and pairs; without data.chat they stay as they are, and texts without a prompt too."""
    chat = speaking(tokenizer, TURNS + OPENS, WORDS)
    asked = "<|user|>late?<|end|>\n<|assistant|>"
    records = {
        "prompts": ({"prompt": "late?"}, [asked]),
        "demonstrations": ({"prompt": "late?", "response": "Yes."}, [asked + "Yes.<|end|>"]),
        "preferences": (
            {"prompt": "late?", "chosen": "Yes.", "rejected": "No."},
            [asked + "Yes.<|end|>", asked + "No.<|end|>"],
        ),
    }
    for kind, (record, expected) in records.items():
        with_chat = make(kind, [record], chat, config(chat=ChatConfig()))
        assert [text_of(side, chat) for side in with_chat.sides(record)] == expected
        without = make(kind, [record], chat, config())
        assert [text_of(side, chat)[:5] for side in without.sides(record)] == ["late?"] * len(expected)
    text = {"text": "late?"}
    assert (
        text_of(make("demonstrations", [text], chat, config(chat=ChatConfig())).sides(text)[0], chat)
        == "<eos>late?<eos>"
    )


def test_a_run_from_nothing_with_a_template(tmp_path):
    """A trained tokenizer knows the template's tokens; rows, endings and the saved tokenizer are of one mind."""
    rows = [{"prompt": f"how late {n}", "response": "it is nine"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {"run_dir": str(tmp_path / "run"), "iterations": 1, "algorithm": {"name": "sft"}}
    shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "mlp_size": 16}
    tree |= {"models": {"policy": {"architecture": shape}}, "tokenizer": {"train_vocab_size": 300}}
    chat = {"template": "chatml", "system": "be kind"}
    sources = {"demonstrations": {"path": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    tree["data"] = sources | {"chat": chat, "max_length": 64, "pack": False}
    ready = build.build(resolve_config(parse(tree | {"batch": {"sequences_per_step": 4}}, "test")), jax.devices()[:1])
    end = ready.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len(ready.tokenizer) <= 300 and ready.sampler.eos_ids == (1, end)
    with jax.set_mesh(ready.mesh):
        batch, _ = Feed(ready).next()
    row = batch.sequences.tokens[0][batch.sequences.valid[0]]
    said = "<bos><|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhow late "
    text = ready.tokenizer.decode(row)
    assert text.startswith(said) and text.endswith("<|im_end|>\n<|im_start|>assistant\nit is nine<|im_end|>")
    saved = load_tokenizer(str(tmp_path / "run" / "tokenizer"))
    assert render(TALK, saved) == render(TALK, ready.tokenizer) and eos_ids(saved) == (1, end)
