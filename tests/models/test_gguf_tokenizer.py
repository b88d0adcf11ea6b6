"""Tokenizers of GGUF files by llama.cpp's rules: what the name of a pre-tokenizer implies, what ends a generation."""

import re
from typing import Any

import pytest

from jaxrlhf.data.tokenizer import encode_text, eos_ids, leading_ids, load_tokenizer
from jaxrlhf.models.files.gguf_tokenizer import ending_ids, write_tokenizer

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
LETTERS = [chr(letter) for letter in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "ab", "\u2581ab"]


def byte_level(pre: str | None = "llama-bpe", tokens=(), **more: Any) -> dict[str, Any]:
    """The metadata of a byte-level vocabulary: special tokens, all bytes, a pair, and ``tokens``."""
    words = [*SPECIAL, *LETTERS, "ab", *tokens]
    own = {"model": "gpt2", "tokens": words, "merges": ["a b"], "bos_token_id": 0, "eos_token_id": 1}
    own |= {"token_type": [3] * 3 + [1] * (len(words) - 3)} | ({} if pre is None else {"pre": pre})
    return {f"tokenizer.ggml.{key}": value for key, value in (own | more).items() if value is not None}


def sentence_piece(first: str = "<unk>", **more: Any) -> dict[str, Any]:
    words = [first, *PIECES[1:]]
    kinds = [2, 3, 3] + [6] * 256 + [1] * 5
    own = {"model": "llama", "tokens": words, "scores": [-float(n) for n in range(len(words))], "token_type": kinds}
    return {f"tokenizer.ggml.{key}": value for key, value in (own | more).items()}


@pytest.fixture
def read(tmp_path):
    def read(metadata: dict[str, Any]):
        write_tokenizer(metadata, tmp_path, "file")
        return load_tokenizer(str(tmp_path))

    return read


# worked by hand; llama.cpp's expressions are at llama-vocab.cpp, llm_tokenizer_bpe
TEXT = "I'LL go  to 12345 Über-Café!\n\n x"
BY_HAND = {
    "llama-bpe": ["I", "'LL", " go", " ", " to", " ", "123", "45", " Über", "-Café", "!\n\n", " x"],
    "qwen2": ["I", "'LL", " go", " ", " to", " ", *"12345", " Über", "-Café", "!\n\n", " x"],
    "gpt-2": ["I", "'", "LL", " go", " ", " to", " 12345", " Über", "-", "Café", "!", "\n\n", " x"],
    "smollm": ["I", "'", "LL", " go", " ", " to", " ", *"12345", " Über", "-", "Café", "!", "\n\n", " x"],
    "default": ["I", "'", "LL", " go", " ", " to", " ", "123", "45", " Über", "-", "Café", "!", "\n\n", " x"],
    "tekken": ["I", "'LL", " go", " ", " to", " ", *"12345", " Über", "-Café", "!\n\n", " x"],
    "llama4": ["I'LL", " go", " ", " to", " ", "123", "45", " Über", "-Café", "!\n\n", " x"],
    "bloom": ["I'LL", " go", " ", " to", " 12345", " Über-Café", "!\n\n", " x"],
}


@pytest.mark.parametrize("pre", [*BY_HAND, None])
def test_cuts(read, pre):
    """A file without a name is cut as llama.cpp's default."""
    backend = read(byte_level(pre)).backend_tokenizer
    found = [TEXT[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert found == BY_HAND[pre or "default"] and backend.decode(encode_text(read(byte_level(pre)), TEXT).ids) == TEXT


@pytest.mark.parametrize(
    "pre, whole, bos",
    [
        ("llama-bpe", True, True),
        ("llama3", True, True),
        ("falcon3", True, True),
        ("tekken", True, True),
        ("smaug-bpe", False, False),
        ("qwen2", False, False),
        ("gpt-2", False, False),
        ("default", False, False),
    ],
)
def test_what_a_name_implies(read, pre, whole, bos):
    """ " bad" is in the vocabulary, and no merge leads to it."""
    tokenizer = read(byte_level(pre, tokens=["\u0120bad"]))
    assert ("\u0120bad" in encode_text(tokenizer, "ab bad").tokens) is whole
    assert leading_ids(tokenizer) == ([0] if bos else [])
    assert leading_ids(read(byte_level(pre, add_bos_token=not bos))) == ([] if bos else [0])  # the file's word counts


def test_a_text_may_end_with_eos(read):
    tokenizer = read(byte_level("gpt-2", add_eos_token=True))
    assert tokenizer("ab")["input_ids"][-1] == 1 and leading_ids(tokenizer) == []
    assert encode_text(tokenizer, "ab").tokens == ["ab"]  # ours adds nothing


@pytest.mark.parametrize(
    "more, expected",
    [
        ({}, [1, 2]),  # by what it is called
        ({"eot_token_id": 5}, [1, 5, 2]),
        ({"eot_token_id": 2, "eom_token_id": 7}, [1, 2, 7]),
        ({"eos_token_id": 2}, [2, 1]),
        ({"eos_token_id": None, "eot_token_id": 2}, [2, 1]),
    ],
)
def test_what_ends_a_generation(more, expected):
    assert ending_ids(byte_level(**more), "file") == expected


@pytest.mark.parametrize(
    "name", ["<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "<\uff5cend\u2581of\u2581sentence\uff5c>"]
)
def test_a_token_called_like_an_ending_is_special(read, name):
    """Also where the file marks it as an ordinary word."""
    metadata = byte_level("llama-bpe", tokens=[name])
    ident = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert ending_ids(metadata, "file")[-1] == ident and encode_text(read(metadata), f"ab{name}").ids[-1] == ident


def test_end_of_a_message_is_none_where_others_follow():
    metadata = byte_level("gpt-4o", tokens=["<|return|>", "<|call|>", "<|end|>"])
    size = len(metadata["tokenizer.ggml.tokens"])
    assert ending_ids(metadata, "file") == [1, 2, size - 3, size - 2]


def test_sentence_piece(read):
    """Its special tokens have default ids, and the unknown token any name."""
    for first in ("<unk>", "[UNK]"):
        tokenizer = read(sentence_piece(first))
        assert encode_text(tokenizer, "ab é").tokens == ["\u2581ab", "\u2581", "<0xC3>", "<0xA9>"]
        assert (tokenizer.unk_token, eos_ids(tokenizer), leading_ids(tokenizer)) == (first, (2,), [1])
    assert encode_text(read(sentence_piece(add_space_prefix=False)), "ab").tokens == ["ab"]
    assert leading_ids(read(sentence_piece(add_bos_token=False))) == []


def test_templates_by_name(read):
    named = {"tokenizer.chat_template": "one", "tokenizer.chat_template.tool_use": "two"}
    assert read(byte_level() | named).chat_template == {"default": "one", "tool_use": "two"}
    assert read(byte_level() | {"tokenizer.chat_template": "one"}).chat_template == "one"


@pytest.mark.parametrize(
    "metadata, message",
    [
        (byte_level("llama_bpe"), "tokenizer.ggml.pre: 'llama_bpe' is not supported; expected one of a.x-4.0"),
        (byte_level("llama_bpe"), "; nearest: llama-bpe"),
        (byte_level(merges=None), "tokenizer.ggml.merges: is missing"),
        (byte_level(eos_token_id=9999), "tokenizer.ggml.eos_token_id: 9999: the vocabulary has"),
        (byte_level(eos_token_id=None), "tokenizer.ggml.eos_token_id: is missing"),
        (
            byte_level("llama-bpe", bos_token_id=None),
            "tokenizer.ggml.bos_token_id: is missing, and a text is to have it",
        ),
        (byte_level(model="rwkv"), "tokenizer.ggml.model: 'rwkv' is not supported; expected gpt2 or llama"),
    ],
)
def test_refusals(tmp_path, metadata, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        write_tokenizer(metadata, tmp_path, "file")
    assert "\n" not in str(caught.value)
