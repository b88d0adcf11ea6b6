from types import SimpleNamespace

import pytest

from jaxrlhf.data import examples as ex
from jaxrlhf.data.batch_kinds import DEMONSTRATIONS, kind_of_section
from jaxrlhf.data.record_kinds import BadRecord
from jaxrlhf.data.sources import Source

from .conftest import in_memory


def make(kind, records, tokenizer, cfg, **options):
    return ex.make_examples(kind_of_section(kind), in_memory(records, **options), tokenizer, cfg, f"data.{kind}")


def test_dropped_and_cut_are_counted(tokenizer, config):
    records = [{"prompt": "x" * n, "id": n} for n in (3, 9, 5, 8, 1)]  # one token a character
    dropped = make("prompts", records, tokenizer, config(prompt_buckets=(4, 8)), skipped=2)
    assert dropped.kept.tolist() == [0, 2, 3, 4]
    found = {name: count for name, count in dropped.counts.items() if count}
    assert found == {"kept": 4, "dropped": 1, "skipped": 2}
    cut = make("prompts", records, tokenizer, config(prompt_buckets=(4, 8), too_long="truncate"))
    assert cut.lengths.tolist() == [3, 8, 5, 8, 1] and cut.truncated.tolist() == [False, True, False, False, False]
    assert cut.counts["truncated"] == 1 and len(cut.sides(records[1])[0].tokens) == 8


def test_nothing_left_is_an_error(tokenizer, config):
    said = r"^data\.prompts: none of its 2 rows is left \(2 too long; tokens: median 8, .*longest 9; limit 4\); "
    with pytest.raises(ValueError, match=rf"{said}a last bucket of 64 in data\.prompt_buckets"):
        make("prompts", [{"prompt": "x" * 9}, {"prompt": "x" * 8}], tokenizer, config(prompt_buckets=(4,)))


def test_identical_sides_are_left_out(tokenizer, config):
    pairs = [("abc", "abd"), ("abc", "abc"), ("qqqqqqqq1", "qqqqqqqq2")]
    records = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    whole = make("preferences", records, tokenizer, config())
    assert whole.kept.tolist() == [0, 2] and whole.counts["identical"] == 1
    cut = make("preferences", records, tokenizer, config(max_length=7, too_long="truncate"))
    assert cut.kept.tolist() == [0, 2] and cut.counts["identical"] == 1  # what differs is not cut off


def test_bad_record_stops_or_is_counted(tokenizer, config):
    def read(index):
        if index == 1:
            raise BadRecord("far/data[train]:1: text is empty")
        return {"text": "a"}

    source = Source(read, 3, "far/data[train]", "f")
    with pytest.raises(ValueError, match=r"^far/data\[train\]:1: text is empty$"):
        ex.make_examples(DEMONSTRATIONS, source, tokenizer, config(), "data.x")
    found = ex.make_examples(DEMONSTRATIONS, source, tokenizer, config(skip_bad=True), "data.x")
    assert found.kept.tolist() == [0, 2] and found.counts["skipped"] == 1


@pytest.mark.parametrize(
    ("max_length", "observed", "rows"), [(4, None, 2**15), (512, None, 2**14), (512, 15, 2**10), (2**24, None, 0)]
)
def test_long_rows_and_large_observations_are_kept_in_smaller_numbers(max_length, observed, rows):
    assert ex._rows_kept(SimpleNamespace(observation_size=observed), max_length) == rows


def test_measures_are_kept_for_the_next_start(tokenizer, config, chat):
    records = [{"text": "a"}, {"text": "bcd"}]
    first = make("demonstrations", records, tokenizer, config())

    def fail(index):
        raise AssertionError("measured again")

    source = in_memory(records)
    blind = Source(fail, 2, source.name, source.fingerprint)
    again = ex.make_examples(DEMONSTRATIONS, blind, tokenizer, config(), "data.x")
    assert again.lengths.tolist() == first.lengths.tolist() == [3, 5]
    for cfg, other in ((config(max_length=4), tokenizer), (config(), chat)):  # other rules are measured anew
        with pytest.raises(AssertionError, match="measured again"):
            ex.make_examples(DEMONSTRATIONS, blind, other, cfg, "data.x")


@pytest.mark.parametrize(
    "kind, fields, message",
    [
        ("prompts", {"prompt_buckets": ()}, r"data.prompt_buckets: \[\], expected rising"),
        ("prompts", {"prompt_buckets": (8, 4)}, r"data.prompt_buckets: \[8, 4\], expected rising"),
        ("preferences", {"max_length": 1}, "data.max_length: 1, expected at least 2"),
    ],
)
def test_limits_that_make_no_sense(kind, fields, message, tokenizer, config):
    with pytest.raises(ValueError, match=message):
        make(kind, [{"prompt": "a"}], tokenizer, config(**fields))
