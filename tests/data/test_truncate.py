"""Rows that are too long, read back as text: what is left of them, and what of that is learnt."""

import copy

import numpy as np
import pytest

from jaxrlhf.data.encode import Encoded
from jaxrlhf.data.truncate import Edges, cut

from .conftest import speaking
from .test_chat import OPENS, SAID, TURNS, USER, WORDS
from .test_encode import learnt, text_of
from .test_examples import make

BOS = "{{ bos_token }}"


def side(prompt: int, response: int) -> Encoded:
    """Tokens 0, 1, ...; the last ``response`` of them are learnt."""
    return Encoded(np.arange(prompt + response, dtype=np.int32), np.arange(prompt + response) >= prompt)


@pytest.mark.parametrize(
    "prompt, response, limit, lead, tail, tokens, learned",
    [
        (3, 2, 4, 0, 0, [1, 2, 3, 4], [3, 4]),  # the prompt loses its start
        (3, 2, 4, 1, 0, [0, 2, 3, 4], [3, 4]),  # behind what stays there
        (5, 2, 5, 1, 1, [0, 3, 4, 5, 6], [5, 6]),
        (5, 2, 4, 1, 1, None, None),  # a token of the prompt stays, between its edges
        (3, 4, 4, 0, 0, None, None),  # the response is kept to its end
        (5, 0, 2, 0, 0, [3, 4], []),  # a prompt keeps its end
        (5, 0, 4, 1, 2, [0, 2, 3, 4], []),
        (5, 0, 3, 1, 2, None, None),
    ],
)
def test_cut(prompt, response, limit, lead, tail, tokens, learned):
    found = cut((side(prompt, response),), limit, Edges(lead, tail))
    if tokens is None:
        assert found is None
        return
    assert found and found[0].tokens.tolist() == tokens
    assert found[0].tokens[found[0].response_mask].tolist() == learned


def test_a_pair_loses_the_same_tokens_and_keeps_what_differs():
    found = cut((side(4, 1), side(4, 3)), 5, Edges(0, 0))
    assert found is not None
    chosen, rejected = found
    assert chosen.tokens.tolist() == [2, 3, 4] and rejected.tokens.tolist() == [2, 3, 4, 5, 6]
    # without a prompt both are learnt from the start, and part at token 6
    first, second = np.arange(8), np.r_[0:6, 9, 9]
    mask = np.arange(8) > 0
    sides = cut((Encoded(first, mask), Encoded(second, mask)), 5, Edges(1, 0)) or ()
    assert [found.tokens.tolist() for found in sides] == [[0, 4, 5, 6, 7], [0, 4, 5, 9, 9]]
    assert cut((Encoded(first, mask), Encoded(second, mask)), 3, Edges(1, 0)) is None


def test_what_is_left_of_an_earlier_response_is_not_learnt():
    mask = np.array([False, True, True, True, False, False, True, True])
    sides = cut((Encoded(np.arange(8), mask),), 6, Edges(0, 0))
    assert sides is not None
    (found,) = sides
    assert found.tokens.tolist() == [2, 3, 4, 5, 6, 7]
    assert found.response_mask.tolist() == [False, False, False, False, True, True]


def rows(kind, record, tokenizer, config, limit: int, **more) -> list[str]:
    """The record's rows as text, learnt parts in brackets; [] where it is left out."""
    options = {"max_length": limit, "prompt_buckets": (limit,), "too_long": "truncate", **more}
    examples = make(
        kind, [record, {"prompt": "a", "response": "b", "chosen": "c", "rejected": "d"}], tokenizer, config(**options)
    )
    if 0 not in examples.kept:
        assert examples.counts["uncuttable"] == 1
        return []
    assert examples.counts["truncated"] == 1
    found = examples.sides(record)
    assert max(len(side.tokens) for side in found) == examples.lengths[0] <= limit
    shown = []
    for side in found:
        text = text_of(side, tokenizer)
        for run in learnt(side, tokenizer):
            text = text.replace(run, f"[{run}]")
        shown.append(text)
    return shown


@pytest.fixture
def chat(letters):
    """Letters, and a template that writes BOS, which the tokenizer itself does not."""
    other = speaking(letters, BOS + TURNS + OPENS, WORDS)
    other.bos_token = "<bos>"
    return other


def test_a_long_prompt_keeps_bos_system_and_headers(chat, config):
    """The template alone writes BOS."""
    talk = [{"role": "system", "content": "be"}, USER("abcdefgh")]
    whole = "<bos><|system|>be<|end|>\n<|user|>abcdefgh<|end|>\n<|assistant|>"
    size = len(chat(whole, add_special_tokens=False)["input_ids"])
    kept = rows("prompts", {"messages": talk}, chat, config, size - 5)
    assert kept == [whole.replace("abcdefgh", "fgh")]
    assert rows("prompts", {"messages": talk}, chat, config, size - 7) == [whole.replace("abcdefgh", "h")]
    assert rows("prompts", {"messages": talk}, chat, config, size - 8) == []
    again = {"messages": [talk[0], USER("first"), SAID("one"), USER("abc")]}
    assert rows("prompts", again, chat, config, size - 5) == [whole.replace("abcdefgh", "abc")]


@pytest.mark.parametrize("loss_on", ["response", "assistant"])
def test_a_long_conversation_loses_its_oldest_exchanges(chat, config, loss_on):
    """Questions with their answers; the end stays, and what is learnt keeps its question."""
    talk = [{"role": "system", "content": "be"}, USER("one"), SAID("1"), USER("two"), SAID("2"), USER("six"), SAID("6")]
    kept = lambda limit: rows("demonstrations", {"messages": talk}, chat, config, limit, loss_on=loss_on)
    first = "[2<|end|>]" if loss_on == "assistant" else "2<|end|>"
    head = "<bos><|system|>be<|end|>\n"
    assert kept(30) == [head + f"<|user|>two<|end|>\n<|assistant|>{first}\n<|user|>six<|end|>\n<|assistant|>[6<|end|>]"]
    assert kept(20) == [head + "<|user|>six<|end|>\n<|assistant|>[6<|end|>]"]
    assert kept(13) == [head + "<|user|>x<|end|>\n<|assistant|>[6<|end|>]"]
    assert kept(12) == []


def test_an_exchange_with_tools_goes_as_a_whole(chat, config):
    talk = [USER("one"), SAID("1"), {"role": "tool", "content": "t"}, SAID("2"), USER("six"), SAID("6")]
    assert rows("demonstrations", {"messages": talk}, chat, config, 16) == [
        "<bos><|user|>six<|end|>\n<|assistant|>[6<|end|>]"
    ]


def test_pairs_of_conversations(chat, config):
    talk = [USER("one"), SAID("1"), USER("abcdef")]
    pair = {"chosen": [*talk, SAID("yes")], "rejected": [*talk, SAID("no")]}
    split = {"prompt": talk, "chosen": [SAID("yes")], "rejected": [SAID("no")]}
    for record in (pair, split):
        found = rows("preferences", record, chat, config, 12)
        assert found == [f"<bos><|user|>def<|end|>\n<|assistant|>[{said}<|end|>]" for said in ("yes", "no")]


def test_pairs_of_texts(letters, config):
    """With a prompt, and without one: then what both begin with is cut, never what differs."""
    pair = {"prompt": "abcdefgh", "chosen": " yes", "rejected": " no"}
    assert rows("preferences", pair, letters, config, 8) == ["fgh[ yes<eos>]", "fgh[ no<eos>]"]
    whole = {"chosen": "abcdefgh yes", "rejected": "abcdefgh no"}
    found = rows("preferences", whole, letters, config, 8)
    assert found == ["<eos>[gh yes<eos>]", "<eos>[gh no<eos>]"]
    assert rows("preferences", whole, letters, config, 4) == []


def test_texts_and_responses(letters, config):
    """A text loses its end; a response does not, so that what is learnt has one."""
    assert rows("demonstrations", {"text": "abcdefgh"}, letters, config, 5) == ["<eos>[abcd]"]
    assert rows("demonstrations", {"prompt": "abcdefgh", "response": "xyz"}, letters, config, 6) == ["gh[xyz<eos>]"]
    assert rows("demonstrations", {"prompt": "abc", "response": "uvwxyz"}, letters, config, 6) == []


def test_bos_of_the_tokenizer_stays(trained, config):
    found = rows("demonstrations", {"prompt": "qzqzqzqz", "response": "xyz"}, copy.deepcopy(trained), config, 7)
    assert found == ["<bos>qz[xyz<eos>]"]
