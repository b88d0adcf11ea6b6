"""The task of the benchmark frontier, by hand and by counting."""

import itertools
import random

import numpy as np
import pytest

from jaxrlhf.benchmarks.letters import EOS, letters_tokenizer
from jaxrlhf.benchmarks.published import frontier
from jaxrlhf.data.encode import encode_pair


def test_the_reward_of_a_text_is_that_of_its_tokens():
    worth = frontier.worth(7)
    for text, tokens in (("", (EOS,)), ("ab", ("a", "b", EOS)), ("abc", ("a", "b", "c"))):
        assert frontier.as_response(text) == tokens
        pairs = itertools.pairwise(("c", *tokens))
        (found,) = frontier.reward([text], [{"prompt": "c", "seed": 7}])
        assert found == pytest.approx(sum(worth[pair] for pair in pairs))
    responses, rewards = frontier.every_reward(7)
    assert rewards.shape == (3, 40) and len({*responses}) == 40
    assert rewards[2, responses.index(("a", "b", EOS))] == pytest.approx(
        worth["c", "a"] + worth["a", "b"] + worth["b", EOS]
    )


def test_pairs_are_labelled_by_bradley_and_terry():
    """Every pair of responses is there; each response wins as often as the model expects, to one win."""
    responses, rewards = frontier.every_reward(7)
    rows = frontier.pairs_of(random.Random(0), 7, "b", responses)
    assert len(rows) == frontier.COPIES * 40 * 39 // 2
    pairs = [
        [responses.index(frontier.as_response(row[side].removesuffix(EOS))) for side in ("chosen", "rejected")]
        for row in rows
    ]
    assert len({frozenset(pair) for pair in pairs}) == 40 * 39 // 2
    won = np.bincount([chosen for chosen, _ in pairs], minlength=40)
    reward = rewards[frontier.LETTERS.index("b")]
    likely = 1 / (1 + np.exp(reward[None] - reward[:, None]))
    np.testing.assert_allclose(won, frontier.COPIES * (likely.sum(1) - 0.5), atol=1.5)
    assert 0.5 < np.mean([reward[chosen] > reward[rejected] for chosen, rejected in pairs]) < 0.95


def test_pairs_tell_the_reward():
    """The maximum of the likelihood of wins is the reward, up to a constant: what DPO can learn of them."""
    responses, rewards = frontier.every_reward(7)
    rows = frontier.pairs_of(random.Random(0), 7, "b", responses)
    won, lost = (
        np.array([responses.index(frontier.as_response(row[side].removesuffix(EOS))) for row in rows])
        for side in ("chosen", "rejected")
    )
    found = np.zeros(40)
    for _ in range(4000):  # gradient ascent
        wrong = 1 / (1 + np.exp(found[won] - found[lost]))
        found += 0.05 * (np.bincount(won, wrong, 40) - np.bincount(lost, wrong, 40)) / frontier.COPIES
    reward = rewards[frontier.LETTERS.index("b")]
    np.testing.assert_allclose(found - found.mean(), reward - reward.mean(), atol=0.3)
    assert np.sqrt(np.mean((found - found.mean() - reward + reward.mean()) ** 2)) < 0.1


def test_a_response_of_three_letters_has_no_eos_in_data_either():
    tokenizer = letters_tokenizer(frontier.LETTERS)
    chosen, rejected = encode_pair({"prompt": "a", "chosen": "bca", "rejected": f"b{EOS}"}, tokenizer, append_eos=False)
    assert chosen.tokens.tolist() == [1, 2, 3, 1] and rejected.tokens.tolist() == [1, 2, 0]
    rows = frontier.sequences([("b", "c", "a"), ("b", EOS)])
    assert rows.tokens[0].tolist() == chosen.tokens.tolist()
    assert rows.tokens[1].tolist() == [*rejected.tokens.tolist(), 0] and rows.valid[1].sum() == 3
    assert rows.response_mask[:, 0].sum() == 0


def test_a_reward_is_given_for_any_text():
    assert frontier.reward(["Text"], [{"prompt": "a", "seed": 7}]) == [0.0]
