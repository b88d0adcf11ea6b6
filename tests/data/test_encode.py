"""Masks are checked by decoding what they keep: that is what the policy learns to write."""

import copy

import pytest

from jaxrlhf.data.encode import encode_demonstration, encode_pair, encode_prompt
from jaxrlhf.data.record_kinds import BadRecord
from jaxrlhf.data.tokenizer import encode_text

from .conftest import TEXTS

TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello there"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "see you"},
]


def learnt(encoded, tokenizer) -> list[str]:
    """The texts of the runs of learnt tokens."""
    runs, run = [], []
    for token, kept in zip([*encoded.tokens.tolist(), 0], [*encoded.response_mask.tolist(), False]):
        if kept:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


def text_of(encoded, tokenizer) -> str:
    return tokenizer.decode(encoded.tokens)


def test_prompt_and_response(tokenizer):
    encoded = encode_demonstration({"prompt": "the film", "response": " is good ."}, tokenizer, "response")
    assert text_of(encoded, tokenizer) == "the film is good .<eos>"
    assert learnt(encoded, tokenizer) == [" is good .<eos>"]
    assert encoded.tokens.dtype == "int32" and encoded.response_mask.dtype == bool


def test_eos_is_not_doubled(tokenizer):
    encoded = encode_demonstration({"prompt": "a", "response": "b<eos>"}, tokenizer, "response")
    assert text_of(encoded, tokenizer) == "ab<eos>"
    assert learnt(encoded, tokenizer) == ["b<eos>"]


@pytest.mark.parametrize("behind", ["<eos>\n", "<eos> \n\n", "<eos><eos>", "<eos>\n<eos>\n"])
def test_what_follows_the_eos_that_ends_a_text_is_not_learnt(tokenizer, behind):
    """A text that a chat template has written ends with a line break; no policy writes on behind its EOS."""
    encode = lambda record: encode_demonstration(record, tokenizer, "response")
    assert text_of(encode({"prompt": "a", "response": "b" + behind}), tokenizer) == "ab<eos>"
    assert text_of(encode({"text": "b<eos>a" + behind}), tokenizer) == "<eos>b<eos>a<eos>"
    pair = encode_pair({"prompt": "a", "chosen": "b" + behind, "rejected": "c\n"}, tokenizer)
    assert [text_of(side, tokenizer) for side in pair] == ["ab<eos>", "ac\n<eos>"]
    bare = encode_demonstration({"prompt": "a", "response": "b" + behind}, tokenizer, "response", append_eos=False)
    assert text_of(bare, tokenizer) == "ab<eos>"


def test_without_append_eos_responses_stay_as_they_are(tokenizer):
    """Only an EOS that the text itself has; on both sides of a pair too."""
    encode = lambda record: encode_demonstration(record, tokenizer, "response", append_eos=False)
    assert learnt(encode({"prompt": "the film", "response": " is good ."}), tokenizer) == [" is good ."]
    assert learnt(encode({"prompt": "a", "response": "b<eos>"}), tokenizer) == ["b<eos>"]
    assert text_of(encode({"text": "the film"}), tokenizer) == "<eos>the film"
    pair = encode_pair({"prompt": "it", "chosen": " is", "rejected": " was"}, tokenizer, append_eos=False)
    assert [text_of(side, tokenizer) for side in pair] == ["it is", "it was"]


def test_first_word_of_a_text_is_learnt(tokenizer, add_bos):
    encoded = encode_demonstration({"text": "the film"}, tokenizer, "response")
    assert text_of(encoded, tokenizer) == "<eos>the film<eos>"  # no BOS: a document begins where the last one ended
    assert learnt(encoded, tokenizer) == ["the film<eos>"] and not encoded.response_mask[0]
    assert text_of(encode_demonstration({"text": "the film"}, add_bos, "response"), add_bos) == "<bos>the film<eos>"


def test_bos_is_added_once_and_the_tokenizers_eos_is_not_in_the_middle(add_bos):
    encoded = encode_demonstration({"prompt": "the", "response": " film"}, add_bos, "response")
    assert text_of(encoded, add_bos) == "<bos>the film<eos>"
    assert learnt(encoded, add_bos) == [" film<eos>"]
    assert add_bos.decode(encode_prompt({"prompt": "the"}, add_bos)) == "<bos>the"
    add_bos.chat_template = "{{ bos_token }}" + "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    messages = {"messages": TALK[1:3]}
    assert text_of(encode_demonstration(messages, add_bos, "response"), add_bos) == "<bos>hi<eos>hello there<eos>"


def test_trained_tokenizer_starts_prompts_and_demonstrations_alike(trained):
    """Sampling goes on where training on whole texts began: <bos> the film ..."""
    text = encode_demonstration({"text": "the film is good"}, trained, "response").tokens
    prompt = encode_prompt({"prompt": "the film"}, trained)
    assert text[: len(prompt)].tolist() == prompt.tolist() and trained.decode(prompt) == "<bos>the film"


def test_prompt_is_never_empty(tokenizer, add_bos):
    assert encode_prompt({"prompt": ""}, tokenizer).tolist() == [tokenizer.eos_token_id]
    assert encode_prompt({"prompt": ""}, add_bos).tolist() == [add_bos.bos_token_id]
    encoded = encode_demonstration({"prompt": "", "response": "a"}, tokenizer, "response")
    assert learnt(encoded, tokenizer) == ["a<eos>"] and text_of(encoded, tokenizer) == "<eos>a<eos>"


@pytest.mark.parametrize(
    "prompt, response", [("the fil", "m is good"), ("the film ", "is good"), ("a", "b"), ("caf", "\u00e9")]
)
def test_response_follows_the_tokens_that_the_sampler_sees(tokenizer, prompt, response):
    """Also where the whole text has a token across the border ("film", " is")."""
    encoded = encode_demonstration({"prompt": prompt, "response": response}, tokenizer, "response")
    start = int(encoded.response_mask.argmax())
    assert encoded.tokens[:start].tolist() == encode_prompt({"prompt": prompt}, tokenizer).tolist()
    assert learnt(encoded, tokenizer) == [response + "<eos>"]


def test_whole_text_is_encoded_at_once_where_no_token_straddles(tokenizer):
    encoded = encode_demonstration({"prompt": "the film", "response": " is good"}, tokenizer, "response")
    assert encoded.tokens[:-1].tolist() == encode_text(tokenizer, "the film is good").ids


def test_no_space_comes_in_where_a_tokenizer_puts_one_before_the_first_word():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>", "<eos>"], show_progress=False)
    backend.train_from_iterator([*TEXTS, *["\nis"] * 9], trainer)
    spaced = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    assert "\nis" in spaced.get_vocab()
    cuts = (("the film", " is good"), ("the film ", "is good"), ("the fil", "m is good"), ("the film\n", "is good"))
    for prompt, response in cuts:
        encoded = encode_demonstration({"prompt": prompt, "response": response}, spaced, "response")
        assert text_of(encoded, spaced) == prompt + response + "<eos>"
        assert learnt(encoded, spaced)[0].endswith(response.strip() + "<eos>")


def test_chat_masks(chat):
    last = encode_demonstration({"messages": TALK}, chat, "response")
    assert learnt(last, chat) == ["see you<eos>"]
    every = encode_demonstration({"messages": TALK}, chat, "assistant")
    assert learnt(every, chat) == ["hello there<eos>", "see you<eos>"]  # up to EOS, not the line break behind it
    whole = chat.apply_chat_template(TALK, tokenize=False)
    assert text_of(last, chat) == text_of(every, chat) == whole.removesuffix("\n")  # ends with EOS, as a sample does


def test_chat_demonstration_begins_with_the_prompt_of_the_sampler(chat):
    prompt = encode_prompt({"messages": TALK[:-1]}, chat)
    encoded = encode_demonstration({"messages": TALK}, chat, "response")
    assert encoded.tokens[: len(prompt)].tolist() == prompt.tolist()
    assert int(encoded.response_mask.argmax()) == len(prompt)


def test_template_without_eos_gets_one(chat):
    chat.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    encoded = encode_demonstration({"messages": TALK[1:3]}, chat, "response")
    assert learnt(encoded, chat) == ["hello there\n<eos>"]


def test_another_eos_ends_a_turn(chat):
    chat.add_special_tokens({"additional_special_tokens": ["<end>"]})
    chat.chat_template = "{% for m in messages %}{{ m.content }}<end>\n{% endfor %}"
    end = chat.convert_tokens_to_ids("<end>")
    encoded = encode_demonstration({"messages": TALK[1:3]}, chat, "response", eos=(1, end))
    assert text_of(encoded, chat) == "hi<end>\nhello there<end>"


def test_pad_equal_to_eos_keeps_eos_in_the_mask(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.pad_token = other.eos_token
    encoded = encode_demonstration({"prompt": "a", "response": "b"}, other, "response")
    assert encoded.tokens[-1] == other.pad_token_id and encoded.response_mask[-1]


def test_template_that_is_not_prefix_stable_is_refused_by_name(chat):
    """As templates that leave the thinking of earlier turns out: the first answer reads differently in the end."""
    chat.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' and loop.last %}(think){% endif %}"
        "{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    chat.name_or_path = "my/model"
    with pytest.raises(
        ValueError, match=r"chat template of 'my/model' is not prefix-stable.*message 2.*loss_on: response"
    ):
        encode_demonstration({"messages": TALK}, chat, "assistant")
    assert learnt(encode_demonstration({"messages": TALK}, chat, "response"), chat) == ["(think)see you<eos>"]
    chat.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="is not prefix-stable"):
        encode_demonstration({"messages": TALK}, chat, "response")


def test_template_that_refuses(chat, tokenizer):
    chat.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRecord, match="refuses the messages: roles must alternate"):
        encode_prompt({"messages": TALK[:2]}, chat)
    with pytest.raises(ValueError, match="has no chat template"):
        encode_prompt({"messages": TALK[:2]}, tokenizer)


def test_text_pair(tokenizer):
    for prompt in ("the film", None):
        record = {"prompt": prompt, "chosen": " is good", "rejected": " is bad ."}
        sides = encode_pair(record, tokenizer)
        assert [learnt(side, tokenizer) for side in sides] == [[" is good<eos>"], [" is bad .<eos>"]]
        start = [int(side.response_mask.argmax()) for side in sides]
        before = [side.tokens[:at].tolist() for side, at in zip(sides, start)]
        assert before[0] == before[1] == encode_prompt({"prompt": prompt or ""}, tokenizer).tolist()


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": [*TALK[:2], answer("good")], "rejected": [*TALK[:2], answer("bad")]},
        {"prompt": "hi", "chosen": [*TALK[:2], answer("good")], "rejected": [*TALK[:2], answer("bad")]},
        {"prompt": TALK[:2], "chosen": [answer("good")], "rejected": [answer("bad")]},
        {"prompt": TALK[:2], "chosen": "good", "rejected": "bad"},
    ],
)
def test_chat_pair(chat, record):
    chosen, rejected = encode_pair(record, chat)
    before = "<|system|>be kind<eos>\n<|user|>hi<eos>\n<|assistant|>"
    assert text_of(chosen, chat) == before + "good<eos>" and text_of(rejected, chat) == before + "bad<eos>"
    assert learnt(chosen, chat) == ["good<eos>"] and learnt(rejected, chat) == ["bad<eos>"]


def test_chat_pair_with_a_text_prompt(chat):
    record = {"prompt": "hi", "chosen": [answer("good")], "rejected": [answer("bad")]}
    assert text_of(encode_pair(record, chat)[0], chat) == "<|user|>hi<eos>\n<|assistant|>good<eos>"


def test_chat_pair_learns_what_differs(chat):
    other = [*TALK[:2], answer("go away"), TALK[3], answer("no")]
    chosen, rejected = encode_pair({"chosen": TALK, "rejected": other}, chat)
    assert learnt(chosen, chat) == ["hello there<eos>", "see you<eos>"]
    assert learnt(rejected, chat) == ["go away<eos>", "no<eos>"]
    chosen, _ = encode_pair({"chosen": TALK, "rejected": [*TALK[:-1], answer("no")]}, chat)
    assert learnt(chosen, chat) == ["see you<eos>"]  # the first answer is shared


def test_first_token_is_never_learnt(chat):
    """Where the assistant opens and the template writes nothing before it, nothing predicts its first token."""
    chat.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    encoded = encode_demonstration({"messages": [{"role": "assistant", "content": "abc"}]}, chat, "response")
    assert encoded.response_mask.tolist() == [False] + [True] * (len(encoded.tokens) - 1)


def test_offsets_without_their_spaces(letters):
    """A space at the end of a prompt stays there, though such a tokenizer says that it is empty and further on."""
    from tokenizers import processors

    trimming = copy.deepcopy(letters)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert encode_text(trimming, "a ").offsets[1] == (2, 2)
    encoded = encode_demonstration({"prompt": "a ", "response": "b"}, trimming, "response")
    assert learnt(encoded, trimming) == ["b<eos>"]


def test_offsets_with_bytes_of_one_character(letters):
    """An emoji is several tokens with the same offsets; none of them may be taken for a token across the border."""
    encoded = encode_demonstration({"prompt": "\U0001f642", "response": "\U0001f642"}, letters, "response")
    assert learnt(encoded, letters) == ["\U0001f642<eos>"] and len(encoded.tokens) == 9
