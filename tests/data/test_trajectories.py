"""Trajectories: what each token earned, where they end, and which of them are used."""

from typing import Any

import numpy as np
import pytest

from jaxrlhf.data.encode import Encoded
from jaxrlhf.data.formats import recognise
from jaxrlhf.data.record_kinds import BadRecord
from jaxrlhf.data.trajectories import earned, encode_trajectory
from jaxrlhf.data.truncate import truncate
from tests.data.conftest import in_memory
from tests.support.streams import trajectory_stream


def shown(side: Encoded, letters) -> list[tuple[str, float | None]]:
    """Each token with what it earned; None: it is not learned."""
    assert side.rewards is not None
    rows = zip(side.tokens, side.response_mask, side.rewards, strict=True)
    return [(letters.decode(token), float(reward) if learned else None) for token, learned, reward in rows]


WALK = {"prompt": "p", "steps": [{"text": "ab", "reward": 1}, {"observation": "c"}, {"text": "d", "reward": -2}]}
FORMS: dict[str, tuple[dict[str, Any], list[tuple[str, float | None]]]] = {
    "reward": ({"prompt": "p", "response": "ab", "reward": 2}, [("p", None), ("a", 0), ("b", 0), ("<eos>", 2)]),
    "no prompt": ({"response": "a", "reward": 2}, [("<eos>", None), ("a", 0), ("<eos>", 2)]),
    "rewards": (
        {"prompt": "p", "response": "ab", "rewards": [1, 2]},
        [("p", None), ("a", 1), ("b", 2), ("<eos>", 0)],
    ),
    "rewards with that of EOS": (
        {"prompt": "p", "response": "ab", "rewards": [1, 2, 3]},
        [("p", None), ("a", 1), ("b", 2), ("<eos>", 3)],
    ),
    "steps": (WALK, [("p", None), ("a", 0), ("b", 1), ("c", None), ("d", 0), ("<eos>", -2)]),
    "steps without a prompt": ({"steps": [{"text": "a"}]}, [("<eos>", None), ("a", 0), ("<eos>", 0)]),
    "an observation last": (
        {"prompt": "p", "steps": [{"text": "a", "reward": 1}, {"observation": "c"}]},
        [("p", None), ("a", 1), ("c", None)],
    ),
    "truncated": (
        {"prompt": "p", "response": "ab", "reward": 2, "truncated": True},
        [("p", None), ("a", 0), ("b", 2), ("<eos>", None)],
    ),
    "truncated steps": (
        WALK | {"truncated": True},
        [*[("p", None), ("a", 0), ("b", 1), ("c", None)], ("d", -2), ("<eos>", None)],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_each_token_earns(letters, form):
    record, expected = FORMS[form]
    record = recognise(record, "trajectories", {}, "data.trajectories").record
    assert shown(encode_trajectory(record, letters, "response", [letters.eos_token_id]), letters) == expected
    assert earned(record) == sum(reward or 0 for _, reward in expected)


def test_an_eos_of_its_own_is_not_doubled(letters):
    record = {"prompt": "p", "steps": [{"text": "a<eos>", "reward": 3}]}
    side = encode_trajectory(record, letters, "response", [letters.eos_token_id])
    assert shown(side, letters) == [("p", None), ("a", 0), ("<eos>", 3)]


def test_a_conversation_earns_at_its_last_turn(chat):
    turns = [{"role": "user", "content": "bad"}, {"role": "assistant", "content": "good"}]
    record = recognise({"messages": turns, "reward": 1}, "trajectories", {}, "data.trajectories").record
    side = encode_trajectory(record, chat, "response", [chat.eos_token_id])
    assert side.rewards is not None
    (last,) = np.flatnonzero(side.rewards)
    assert side.rewards[last] == 1 and last == np.flatnonzero(side.response_mask)[-1]
    assert side.tokens[last] == chat.eos_token_id


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"response": "a"}, "no column 'reward'"),
    ({"response": "a", "reward": "much"}, "reward is text, expected a number"),
    ({"response": "a", "reward": float("nan")}, "reward is nan, expected a finite number"),
    ({"response": "ab", "rewards": [1, "x"]}, "rewards[1] is text, expected a number"),
    ({"response": "ab", "rewards": []}, "rewards is empty"),
    ({"response": "a", "reward": 1, "truncated": "perhaps"}, "truncated is 'perhaps', expected true or false"),
    ({"steps": "ab"}, "steps is text, expected a list of steps"),
    ({"steps": [1]}, "steps[0] is a number, expected an object with text and reward, or observation"),
    ({"steps": [{"reward": 1}]}, "steps[0] has neither text nor observation"),
    ({"steps": [{"text": "a", "observation": "b"}]}, "steps[0] has both text and observation"),
    ({"steps": [{"text": "a", "reward": "x"}]}, "steps[0].reward is text, expected a number"),
    ({"steps": [{"text": " "}]}, "steps[0].text is empty"),
    ({"steps": [{"observation": "a", "reward": 1}]}, "steps[0].reward: an observation earns nothing"),
    ({"steps": [{"observation": "a"}]}, "steps has no text to learn from"),
]


@pytest.mark.parametrize(("row", "expected"), WRONG, ids=lambda value: str(value)[:40])
def test_a_row_that_can_t_be_used_is_one_line(row, expected):
    with pytest.raises(BadRecord) as error:
        recognise(row, "trajectories", {}, "data.trajectories")
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_rewards_are_one_a_token(letters):
    record = {"prompt": "p", "response": "ab", "rewards": [1, 2, 3, 4]}
    with pytest.raises(BadRecord, match=r"rewards has 4 numbers; expected one a token of the response: 2, or 3 with"):
        encode_trajectory(record, letters, "response", [letters.eos_token_id])
    with pytest.raises(BadRecord, match=r"rewards has 4 numbers; expected one a token of the response: 2$"):
        encode_trajectory(record | {"truncated": True}, letters, "response", [letters.eos_token_id])


def test_a_cell_of_csv_says_what_was_cut():
    read = lambda row: recognise(row, "trajectories", {}, "data.trajectories", from_text=True).record
    assert read({"completion": "a", "reward": "0.5", "truncated": "TRUE"})["truncated"] is True
    assert read({"completion": "a", "reward": "0.5", "truncated": ""})["reward"] == 0.5


def test_a_prompt_that_is_cut_leaves_rewards_in_their_places(letters):
    encode = lambda record: (encode_trajectory(record, letters, "response", [letters.eos_token_id]),)
    sides = truncate({"prompt": "pqrs", "response": "ab", "rewards": [1, 2]}, encode, letters, 5)
    assert sides is not None and shown(sides[0], letters) == [
        ("r", None),
        ("s", None),
        ("a", 1),
        ("b", 2),
        ("<eos>", 0),
    ]


ROWS = [{"prompt": f"{n}", "response": "r" * (n % 3 + 1), "reward": n % 4, "truncated": n % 2 == 0} for n in range(8)]


def test_rows_of_a_batch(letters, config):
    """Rewards and cuts belong to their rows; a cut row has one more valid token than it learns and reads."""
    stream = trajectory_stream(in_memory(ROWS), letters, config(max_length=8), rows=4, seed=1)
    found = [next(stream).batch.trajectories for _ in range(2)]
    seen = set()
    for rows in found:
        for at in range(4):
            tokens, mask = rows.responses.tokens[at], rows.responses.response_mask[at]
            n = int(letters.decode(tokens[:1]))
            seen.add(n)
            assert bool(rows.truncated[at]) == (n % 2 == 0) and rows.rewards[at].sum() == n % 4
            last = np.flatnonzero(mask)[-1]
            assert rows.rewards[at][last] == n % 4 and (rows.rewards[at][~mask] == 0).all()
            assert rows.responses.valid[at].sum() == last + 1 + rows.truncated[at]
    assert seen == set(range(8))


def test_the_best_share_is_used_and_the_rest_is_counted(letters, config):
    """Returns 3, 3, then 2: of two that earned 2 the first in the source. Held-out rows are not chosen from."""
    from jaxrlhf.data.batch_kinds import TRAJECTORIES
    from jaxrlhf.data.batches import count_rows, held_out_batches

    cfg = config(max_length=8, keep_top=0.375)
    stream = trajectory_stream(in_memory(ROWS), letters, cfg, rows=3, seed=1)
    tokens = next(stream).batch.trajectories.responses.tokens
    assert {int(letters.decode(row[:1])) for row in tokens} == {3, 7, 2}
    assert stream.summary.counts["kept"] == 3 and stream.summary.counts["outranked"] == 5
    assert (
        stream.summary.read == 8
        and stream.summary.warnings() == []
        and "5 below data.keep_top" in stream.summary.lines()[0]
    )
    assert count_rows(TRAJECTORIES, in_memory(ROWS), letters, cfg, seed=0, where="data.trajectories") == 3
    (held,) = held_out_batches(TRAJECTORIES, in_memory(ROWS), letters, cfg, size=8, rows=8)
    assert held.real == 8
