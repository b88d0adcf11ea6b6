"""The decision process of the benchmark bellman, by hand and by enumeration."""

import itertools

import pytest

from jaxrlhf.benchmarks.letters import EOS, letters_tokenizer
from jaxrlhf.benchmarks.published import bellman
from jaxrlhf.data.trajectories import encode_trajectory


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_value_iteration_is_the_best_of_all_walks(gamma):
    rewards = bellman.draw_rewards(1, 3)
    q = bellman.value_iteration(rewards, 3, gamma)
    walks = [step for step in rewards if bellman.ends(step, 3)]
    for start in bellman.LETTERS:
        best = max(bellman.returns_of(walk, rewards, gamma) for walk in walks if walk[0] == start)
        assert max(q[(start, action)] for action in bellman.ACTIONS) == pytest.approx(best)
    assert len(rewards) == 2 * 7 * 3 and len(walks) == 2 * (7 + 8)


def test_data_are_each_step_once_and_each_walk_once():
    rewards = bellman.draw_rewards(0, 2)
    walks, steps = bellman.whole(rewards, 2), bellman.pieces(rewards, 2)
    assert len({row["prompt"] + row["response"] for row in walks}) == len(walks) == 2 * (3 + 4)
    assert len(steps) == len(rewards) == 2 * 3 * 3
    assert sum(not row["truncated"] for row in steps) == len(walks)


def test_every_token_is_an_action():
    tokenizer = letters_tokenizer("ab")
    assert len(tokenizer) == 3 and [bellman.at_of(action) for action in bellman.ACTIONS] == [1, 2, 0]
    for text, ids in (("ab", [1, 2]), (f"b{EOS}", [2, 0])):
        side = encode_trajectory({"prompt": "a", "response": text, "reward": 1}, tokenizer, "response", [0], False)
        assert side.tokens.tolist() == [1, *ids]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix(EOS)


def test_a_short_response_ends_with_eos():
    for size in range(4):
        for letters in itertools.product("ab", repeat=size):
            walk = bellman.as_walk("a", "".join(letters), 3)
            assert walk == ("a", *letters, *([EOS] if size < 3 else [])) and bellman.ends(walk, 3)
