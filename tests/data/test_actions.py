"""Segments of episodes as pairs: their tokens and observations, and what is refused."""

import json

import numpy as np
import pytest

from jaxrlhf.data import batches
from jaxrlhf.data.actions import actions_tokenizer, starts
from jaxrlhf.data.batch_kinds import PREFERENCES
from jaxrlhf.data.sources import DataConfig, SourceConfig, open_source
from jaxrlhf.data.tokenizer import decode_rows, eos_ids


def pair(size: int = 2, steps: int = 3) -> dict:
    rng = np.random.default_rng(size)
    side = lambda: {"observations": rng.normal(size=(steps + 1, size)).round(3).tolist(), "actions": [1, 0, 1][:steps]}
    return {f"{name}_{key}": value for name in ("chosen", "rejected") for key, value in side().items()}


def made(tmp_path, rows: list[dict], tokenizer=None):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = DataConfig(preferences=SourceConfig(path=str(path)), max_length=5, cache_dir=str(tmp_path / "cache"))
    source = open_source(cfg.preferences, "preferences", path_in_config="data.preferences")  # type: ignore[arg-type]
    tokenizer = tokenizer or actions_tokenizer(2, 2)
    return next(batches.stream(PREFERENCES, source, tokenizer, cfg, rows=1, seed=0)).batch.preferences


def test_a_token_is_an_action():
    tokenizer = actions_tokenizer(3, 2)
    assert tokenizer("0120")["input_ids"] == [0, 1, 2, 0] and eos_ids(tokenizer) == (3,) and len(tokenizer) == 4
    assert decode_rows(tokenizer, np.array([[3, 2, 0, 3]]), np.array([[False, True, True, False]])) == ["20"]


def test_segments_become_rows_with_observations(tmp_path):
    row = pair()  # the sides differ in what was observed alone
    found = made(tmp_path, [row])
    for side in ("chosen", "rejected"):
        rows = getattr(found, side)
        assert rows.tokens.tolist() == [[2, 1, 0, 1, 2]]
        assert rows.valid.tolist() == [[True] * 4 + [False]]
        assert rows.response_mask.tolist() == [[False, True, True, True, False]]
        expected = np.pad(np.array(row[f"{side}_observations"], np.float32), ((0, 1), (0, 0)))
        np.testing.assert_array_equal(rows.observations[0], expected)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"chosen_actions": [1, 0, 2]}, r"chosen_actions\[2\] is 2: expected an action of 0 to 1"),
        ({"chosen_actions": [1, 0]}, "chosen_observations are 4: expected 3"),
        ({"rejected_observations": [[0, 1, 2]] * 4}, r"rejected_observations\[0\] has 3 numbers: expected .* 2"),
        ({"rejected_observations": [[0, "a"]] * 4}, r"rejected_observations\[0\] \[1\] is text, expected a number"),
    ],
)
def test_what_is_no_segment_is_refused(tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        made(tmp_path, [pair() | change])


def test_text_and_segments_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match="is text, and the run acts in an environment"):
        made(tmp_path, [{"prompt": "0", "chosen": "1", "rejected": "0"}])


def test_a_segment_that_is_too_long_is_not_cut(tmp_path):
    with pytest.raises(ValueError, match="none of its 1 rows is left"):
        made(
            tmp_path,
            [
                pair(steps=3)
                | {
                    f"{side}_{key}": value
                    for side in ("chosen", "rejected")
                    for key, value in {
                        "actions": [0, 1] * 3,
                        "observations": [[0.0, float(side == "chosen")]] * 7,
                    }.items()
                }
            ],
        )


def test_an_episode_starts_from_each_seed():
    source = starts(3)
    assert [record["seed"] for record in source] == [0, 1, 2]
