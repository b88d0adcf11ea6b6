"""Chat templates that are built as those of published models are, in words of our own, and what each has to write."""

from typing import NamedTuple

import pytest

from jaxrlhf.data.chat import DATE, TEMPLATES, ChatConfig, apply_config, markers, render
from jaxrlhf.data.encode import encode_demonstration, encode_prompt
from jaxrlhf.data.record_kinds import BadRecord
from jaxrlhf.data.tokenizer import eos_ids, train_bpe
from tests.data.conftest import speaking, without_bos
from tests.data.test_encode import learnt, text_of

WORDS = ["<|open|>", "<|close|>", "<|role|>", "<|body|>", "<|last|>", "<|mind|>", "<mind|>"]
SYSTEM = {"role": "system", "content": "be kind"}
USER, SAID = {"role": "user", "content": "late?"}, {"role": "assistant", "content": "Yes."}
EMPTY = "<think>\n\n</think>\n\n"  # thoughts that are closed at once


class Shape(NamedTuple):
    """How a template writes a conversation. Texts are of USER, SAID and SYSTEM."""

    template: str
    prompt: str  # of USER
    answer: str  # of SAID behind it, as far as it is learnt
    end: str  # the token that ends an answer
    system: str | None  # how the prompt of SYSTEM and USER begins; None: the template refuses it
    other: tuple[dict, str, str] | None = None  # variables (thinking off), how a prompt ends with them, what is learnt


OPEN = "<|open|>{{ m.role }}\n"
# the thoughts of a content, and it without them; thoughts of turns before the last question are not written
SPLIT = (
    "{% set asked = namespace(at=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set asked.at = loop.index0 %}{% endif %}{% endfor %}"
)
THOUGHT = (
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% if loop.index0 > asked.at %}{{ '<think>\n' + parts[0].split('<think>')[-1].strip() if parts | length > 1 else "
    "'<think>\n' }}{{ '\n</think>\n\n' + parts[-1].strip() }}{% else %}{{ parts[-1].strip() }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}"
)
TURNS = SPLIT + "{% for m in messages %}" + OPEN + THOUGHT + "<|close|>\n{% endfor %}"
NO_THOUGHTS = "{% if enable_thinking is defined and enable_thinking is false %}" + EMPTY
ASKED = "<|open|>user\nlate?<|close|>\n<|open|>assistant\n"
THINKS_OFF = {"enable_thinking": False}
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[S]{{ m.content }}[/S]"
    "{% elif m.role == 'user' %}[U]{{ m.content }}[/U]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
MODEL = "{{ 'model' if m.role == 'assistant' else m.role }}"
ALTERNATE = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns alternate') }}{% endif %}"
# a date, then the system turn as a developer's; answers have channels, and the last one another end
CHANNELS = (
    "<|open|>system<|body|>today: {{ strftime_now('%Y-%m-%d') }}, effort: {{ reasoning_effort | default('medium') }}"
    "<|close|>{% for m in messages %}{% if m.role == 'system' %}<|open|>developer<|body|>{{ m.content }}<|close|>"
    "{% elif m.role == 'user' %}<|open|>user<|body|>{{ m.content }}<|close|>{% else %}<|open|>assistant<|role|>final"
    "<|body|>{{ m.content }}{% if loop.last and not add_generation_prompt %}<|last|>{% else %}<|close|>{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|open|>assistant{% endif %}"
)
SHAPES = {
    "turns with a header": Shape(
        TEMPLATES["llama3"],
        "<|start_header_id|>user<|end_header_id|>\n\nlate?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Yes.<|eot_id|>",
        "<|eot_id|>",
        "<|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|>",
    ),
    "turns": Shape(
        TEMPLATES["chatml"],
        "<|im_start|>user\nlate?<|im_end|>\n<|im_start|>assistant\n",
        "Yes.<|im_end|>",
        "<|im_end|>",
        "<|im_start|>system\nbe kind<|im_end|>\n",
    ),
    "brackets": Shape(INST, "<bos>[U]late?[/U]", "Yes.<eos>", "<eos>", "<bos>[S]be kind[/S][U]"),
    "thoughts": Shape(
        TURNS + "{% if add_generation_prompt %}<|open|>assistant\n" + NO_THOUGHTS + "{% endif %}{% endif %}",
        ASKED,
        EMPTY + "Yes.<|close|>",
        "<|close|>",
        "<|open|>system\nbe kind<|close|>\n",
        (THINKS_OFF, f"<|open|>assistant\n{EMPTY}", "Yes.<|close|>"),
    ),
    "thoughts that the prompt opens": Shape(
        TURNS
        + "{% if add_generation_prompt %}<|open|>assistant\n"
        + NO_THOUGHTS
        + "{% else %}<think>\n{% endif %}{% endif %}",
        ASKED + "<think>\n",
        "\n</think>\n\nYes.<|close|>",
        "<|close|>",
        "<|open|>system\nbe kind<|close|>\n",
        (THINKS_OFF, f"<|open|>assistant\n{EMPTY}", "Yes.<|close|>"),
    ),
    "marks of roles": Shape(
        "{% for m in messages %}<|role|>{{ m.role }}\n{{ m.content }}{{ eos_token if m.role == 'assistant' else '' }}\n"
        "{% endfor %}{% if add_generation_prompt %}<|role|>assistant\n{% endif %}",
        "<|role|>user\nlate?\n<|role|>assistant\n",
        "Yes.<eos>",
        "<eos>",
        "<|role|>system\nbe kind\n",
    ),
    "no system turn": Shape(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{% for m in messages %}" + ALTERNATE + f"<|open|>{MODEL}\n{{{{ m.content }}}}<|close|>\n{{% endfor %}}"
        "{% if add_generation_prompt %}<|open|>model\n{% endif %}",
        "<bos><|open|>user\nlate?<|close|>\n<|open|>model\n",
        "Yes.<|close|>",
        "<|close|>",
        None,
    ),
    "system in the first user's turn": Shape(
        "{{ bos_token }}{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
        "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}{% for m in rest %}"
        + ALTERNATE
        + f"<|open|>{MODEL}\n{{{{ first if loop.first else '' }}}}{{{{ m.content }}}}<|close|>\n{{% endfor %}}"
        "{% if add_generation_prompt %}<|open|>model\n{% endif %}",
        "<bos><|open|>user\nlate?<|close|>\n<|open|>model\n",
        "Yes.<|close|>",
        "<|close|>",
        "<bos><|open|>user\nbe kind\n\nlate?<|close|>\n",
    ),
    "thoughts by the system turn": Shape(  # a mark there asks for them; without it the prompt closes them
        "{{ bos_token }}{% set think = enable_thinking is defined and enable_thinking %}"
        "{% set own = messages[0].role == 'system' %}{% if own or think %}<|open|>system\n"
        "{{ '<|mind|>' if think else '' }}{{ messages[0].content if own else '' }}<|close|>\n{% endif %}"
        "{% for m in (messages[1:] if own else messages) %}"
        f"<|open|>{MODEL}\n{{{{ m.content.split('<mind|>')[-1] }}}}<|close|>\n{{% endfor %}}"
        "{% if add_generation_prompt %}<|open|>model\n{{ '' if think else '<|mind|>thought\n<mind|>' }}{% endif %}",
        "<bos><|open|>user\nlate?<|close|>\n<|open|>model\n<|mind|>thought\n<mind|>",
        "Yes.<|close|>",
        "<|close|>",
        "<bos><|open|>system\nbe kind<|close|>\n",
        (
            {"enable_thinking": True},
            "<|mind|><|close|>\n<|open|>user\nlate?<|close|>\n<|open|>model\n",
            "Yes.<|close|>",
        ),
    ),
    "channels": Shape(
        CHANNELS,
        "<|open|>system<|body|>today: 2026-01-02, effort: medium<|close|><|open|>user<|body|>late?<|close|>"
        "<|open|>assistant",
        "<|role|>final<|body|>Yes.<|last|>",
        "<|last|>",
        "<|open|>system<|body|>today: 2026-01-02, effort: medium<|close|><|open|>developer<|body|>be kind<|close|>",
        ({"reasoning_effort": "low"}, "late?<|close|><|open|>assistant", "<|role|>final<|body|>Yes.<|last|>"),
    ),
}
# family -> the shape of its models' templates; None: none has one
CHATS: dict[str, str | None] = {
    "llama": "turns with a header",
    "mistral": "brackets",
    "ministral3": "brackets",
    "qwen2": "turns",
    "qwen3": "thoughts",
    "qwen3_5_text": "thoughts that the prompt opens",
    "qwen3_5_moe_text": "thoughts that the prompt opens",
    "phi3": "marks of roles",
    "olmo2": "marks of roles",
    "olmo3": "turns",
    "smollm3": "thoughts",
    "gemma2": "no system turn",
    "gemma3_text": "system in the first user's turn",
    "gemma4_text": "thoughts by the system turn",
    "gpt2": None,
    "gpt_neox": None,
    "mixtral": "brackets",
    "qwen3_moe": "thoughts",
    "olmoe": "marks of roles",
    "gpt_oss": "channels",
}


def speaker(shape: Shape, **kwargs):
    """A small tokenizer with the template."""
    named = [word for name in ("chatml", "llama3") for word in markers(ChatConfig(template=name))]
    chat = speaking(without_bos(train_bpe(["late yes"], 300)), shape.template, [*WORDS, *named])
    chat.bos_token = "<bos>"
    chat.init_kwargs[DATE] = "2026-01-02T03:04"
    apply_config(chat, ChatConfig(kwargs=kwargs), adds_bos=False)
    return chat


def check(shape: Shape) -> None:
    """The prompt, what is learnt behind it and what ends it; the system turn; and a prompt by other variables."""
    chat = speaker(shape)
    prompt, demonstration = encode_prompt({"messages": [USER]}, chat), demonstrate(chat, [USER, SAID])
    assert chat.decode(prompt) == shape.prompt
    assert demonstration.tokens[: len(prompt)].tolist() == prompt.tolist()
    assert text_of(demonstration, chat) == shape.prompt + shape.answer
    assert learnt(demonstration, chat) == [shape.answer]
    assert chat.convert_tokens_to_ids(shape.end) in eos_ids(chat)
    later = [USER, SAID, USER, SAID | {"content": "No."}]
    assert learnt(demonstrate(chat, later), chat) == [shape.answer.replace("Yes.", "No.")]
    if shape.system is None:
        with pytest.raises(BadRecord, match="refuses the messages"):
            encode_prompt({"messages": [SYSTEM, USER]}, chat)
    else:
        text = render([SYSTEM, USER], chat, to_answer=True)
        assert text.startswith(shape.system) and text.endswith(shape.prompt.rpartition("late?")[2])
        assert learnt(demonstrate(chat, [SYSTEM, USER, SAID]), chat) == [shape.answer]
    if shape.other:
        kwargs, ending, answer = shape.other
        quiet = speaker(shape, **kwargs)
        assert render([USER], quiet, to_answer=True).endswith(ending)
        assert render([USER], quiet, to_answer=True) != shape.prompt
        prompt, demonstration = encode_prompt({"messages": [USER]}, quiet), demonstrate(quiet, [USER, SAID])
        assert demonstration.tokens[: len(prompt)].tolist() == prompt.tolist()
        assert learnt(demonstration, quiet) == [answer]


def demonstrate(chat, messages):
    return encode_demonstration({"messages": messages}, chat, "response")
