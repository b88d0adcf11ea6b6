"""What is told of a source at the start of a run: counts, lengths, why rows are left out, and the way out."""

import json

import numpy as np
import pytest

from jaxrlhf.data.batch_kinds import PROMPTS
from jaxrlhf.data.batches import held_out_batches
from jaxrlhf.data.sources import SourceConfig, open_source
from jaxrlhf.data.summary import Summary, quantiles
from tests.support.streams import demonstration_stream, preference_stream, prompt_stream

from .conftest import in_memory

LONG = [{"prompt": "x" * n} for n in [300, *[500] * 35, 3, 4, 5, 6]]  # one token a letter


def test_most_rows_too_long(letters, config):
    """36 of 40 prompts are beyond the last bucket."""
    summary = prompt_stream(in_memory(LONG), letters, config(prompt_buckets=(64, 256)), rows=2, seed=0).summary
    assert summary.lines() == [
        "data.prompts: 40 read, 4 kept, 36 dropped (36 too long)",
        "  tokens: median 500, 95th percentile 500, longest 500; limit 256",
        "warning: data.prompts: 90% of its rows are dropped; a last bucket of 512 in data.prompt_buckets keeps 95 %, "
        "data.too_long=truncate cuts them",
    ]


def test_the_limit_that_is_suggested_keeps_what_it_says(letters, config):
    rng = np.random.default_rng(0)
    records = [{"text": "x" * int(n)} for n in rng.integers(1, 900, 200)]
    one = lambda limit: (
        demonstration_stream(in_memory(records), letters, config(max_length=limit), rows=2, seed=0).summary
    )
    (warning,) = one(100).warnings()
    suggested = int(warning.partition("data.max_length=")[2].split()[0])
    assert "keeps 95 %" in warning and suggested % 64 == 0
    after = one(suggested)
    assert after.warnings() == [] and after.counts["dropped"] <= 0.05 * 200 < one(suggested - 128).counts["dropped"]


def test_truncated_rows_are_counted_without_a_warning(letters, config):
    cfg = config(prompt_buckets=(256,), too_long="truncate")
    first, second = prompt_stream(in_memory(LONG), letters, cfg, rows=2, seed=0).summary.lines()
    assert first == "data.prompts: 40 read, 40 kept, 36 truncated"
    assert second.startswith("  tokens: median 500")  # before they were cut


def test_held_out_rows_are_counted_and_how_many_are_used(letters, config):
    held = held_out_batches(PROMPTS, in_memory(LONG), letters, config(prompt_buckets=(256,)), size=3, rows=2)
    first, _, warning = held.summary.lines()  # type: ignore[union-attr]
    assert first == "data.eval_prompts: 40 read, 4 kept, 36 dropped (36 too long), the first 3 used"
    assert warning.startswith("warning: data.eval_prompts: 90% of its rows are dropped")


def test_pairs_say_why(letters, config):
    """Too long by either side, equal sides; the length is that of the longer side."""
    pairs = [("a", "b"), ("a", "a"), ("a" * 20, "b"), ("a", "b" * 30), *[("c", "d")] * 36]
    records = [{"prompt": "q", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    summary = preference_stream(in_memory(records), letters, config(max_length=16), rows=2, seed=0).summary
    assert summary.lines() == [
        "data.preferences: 40 read, 37 kept, 3 dropped (2 too long, 1 with equal sides)",
        "  tokens: median 3, 95th percentile 3, longest 32; limit 16",
        "warning: data.preferences: 8% of its rows are dropped; data.max_length=64 keeps 95 %, data.too_long=truncate "
        "cuts them",
    ]


def test_packed_rows_are_told(letters, config):
    records = [{"text": "x" * 6}] * 10  # 8 tokens each, two a row
    summary = demonstration_stream(in_memory(records), letters, config(max_length=16), rows=2, seed=0).summary
    assert summary.lines()[0] == "data.demonstrations: 10 read, 10 kept, packed into 5 rows"


def test_rows_without_a_token_to_learn_are_dropped_and_told(letters, config):
    records = [{"prompt": "q", "response": text} for text in ("", "a", "b")]
    cfg = config(max_length=16, append_eos=False)
    summary = demonstration_stream(in_memory(records), letters, cfg, rows=2, seed=0).summary
    assert summary.lines()[0] == (
        "data.demonstrations: 3 read, 2 kept, 1 dropped (1 with nothing to learn), packed into 1 row"
    )
    assert summary.warnings() == [
        "warning: data.demonstrations: 33% of its rows are dropped; 1 with nothing to learn: their responses are empty"
    ]


def test_bad_rows_of_files_are_told_with_the_first(letters, config, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": 3}\n{\n{"prompt": "b"}\n')
    for _ in range(2):  # parsed, and prepared already
        source = open_source(SourceConfig(str(path)), "prompts", cache_dir=str(tmp_path / "cache"), skip_bad=True)
        summary = prompt_stream(source, letters, config(prompt_buckets=(8,), skip_bad=True), rows=1, seed=0).summary
        assert summary.lines()[0] == "data.prompts: 4 read, 2 kept, 2 dropped (2 bad)"
        (warning,) = summary.warnings()
        assert f"50% of its rows are dropped; the first bad row: {path}:2: " in warning


def test_nothing_left_is_one_line_with_the_way_out(letters, config):
    with pytest.raises(ValueError) as error:
        prompt_stream(in_memory(LONG[:36]), letters, config(prompt_buckets=(256,)), rows=2, seed=0)
    assert str(error.value) == (
        "data.prompts: none of its 36 rows is left (36 too long; tokens: median 500, 95th percentile 500, longest 500; "
        "limit 256); a last bucket of 512 in data.prompt_buckets keeps 95 %, "
        "data.too_long=truncate cuts them"
    )


def test_a_warning_begins_above_5_percent():
    counts = lambda dropped: (
        {"kept": 100 - dropped, "truncated": 0, "dropped": dropped}
        | dict.fromkeys(("empty", "identical", "skipped"), 0)
    )
    make = lambda dropped: Summary("data.x", counts(dropped), 1, 9, 9, 4, "data.max_length")
    assert make(5).warnings() == [] and len(make(6).warnings()) == 1
    assert Summary(**json.loads(json.dumps(make(6)._asdict()))) == make(6)  # as the report of an evaluation keeps it


def test_quantiles_are_lengths_that_occur():
    assert quantiles(np.array([4, 1, 3, 2])) == (2, 4, 4)
    assert quantiles(np.arange(1, 101)) == (50, 95, 100)
    assert quantiles(np.array([], np.int32)) == (0, 0, 0)
