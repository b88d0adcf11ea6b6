import copy
import json
from typing import Any

import numpy as np
import pytest

from jaxrlhf.data import batch_kinds, examples
from jaxrlhf.data.batch_kinds import kind_of_section
from jaxrlhf.data.batches import READ_AHEAD, Share, held_out_batches
from jaxrlhf.data.sources import Source
from tests.support.streams import (
    comparison_stream,
    demonstration_stream,
    preference_stream,
    prompt_stream,
    unpaired_stream,
)

from .conftest import in_memory

PROMPTS = [{"prompt": "x" * (1 + n % 7), "id": n} for n in range(10)]
PAIRS = [{"prompt": f"{n}", "chosen": "+", "rejected": "-", "margin": n / 4} for n in range(10)]
TEXTS = [{"text": chr(ord("a") + n) * (1 + n % 9)} for n in range(23)]  # one token a letter


def one(stream) -> Any:
    return next(stream)


def take(stream, number) -> list[Any]:
    return [next(stream) for _ in range(number)]


def held_out(kind: str, *arguments, **options) -> list[Any]:
    return list(held_out_batches(kind_of_section(kind), *arguments, **options))


def same(one, two) -> bool:
    import jax

    leaves = [jax.tree.leaves(batch) for batch in (one.batch, two.batch)]
    equal = len(leaves[0]) == len(leaves[1]) and all(map(np.array_equal, *leaves))
    return equal and one.columns == two.columns and one.counts == two.counts


def streams(tokenizer, config):
    """One of each sort, with batches that don't divide the data, as functions of (rows, process)."""
    packed, plain = config(max_length=16), config(max_length=16, pack=False)
    return {
        "packed": lambda **o: demonstration_stream(in_memory(TEXTS), tokenizer, packed, **o),
        "plain": lambda **o: demonstration_stream(in_memory(TEXTS), tokenizer, plain, **o),
        "pairs": lambda **o: preference_stream(in_memory(PAIRS), tokenizer, plain, **o),
        "prompts": lambda **o: prompt_stream(in_memory(PROMPTS), tokenizer, config(prompt_buckets=(4, 8)), **o),
    }


def test_a_record_is_encoded_once_where_memory_holds_it(letters, config, monkeypatch):
    """Later epochs read no record; with room for fewer rows they do, and give the same."""

    def epochs(rows_kept: int) -> tuple[list[Any], int]:
        monkeypatch.setattr(examples, "KEPT_ROWS", rows_kept)
        reads: list[int] = []
        source = Source(lambda index: reads.append(index) or TEXTS[index], len(TEXTS), "memory", "f")
        stream = demonstration_stream(source, letters, config(max_length=16, pack=False), rows=len(TEXTS), seed=3)
        return take(stream, 8), len(reads)

    (kept, few), (again, many) = epochs(100), epochs(4)
    assert few <= (1 + READ_AHEAD) * len(TEXTS)  # measured, then encoded, by each thread at most
    assert many >= len(TEXTS) + 8 * (len(TEXTS) - 4)
    assert all(map(same, kept, again))


@pytest.mark.parametrize("sort", ["packed", "plain", "pairs", "prompts"])
def test_resumes_where_it_was_across_the_end_of_an_epoch(sort, letters, config):
    make = streams(letters, config)[sort]
    stream = make(rows=4, seed=3)
    take(stream, 2)
    for _ in range(3):  # the epochs of 10 rows or so end at different places
        state = json.loads(json.dumps(stream.get_state()))
        expected = take(stream, 3)
        resumed = make(rows=4, seed=3)
        resumed.set_state(state)
        assert all(map(same, take(resumed, 3), expected))
        assert resumed.get_state() == stream.get_state()


@pytest.mark.parametrize("sort", ["packed", "plain", "pairs", "prompts"])
def test_processes_share_the_batch_and_the_state(sort, letters, config):
    """2 processes make the halves of what 1 makes, and either can go on from the state of the other."""
    import jax

    make = streams(letters, config)[sort]
    alone = make(rows=4, seed=3)
    pair = [make(rows=4, seed=3, share=Share((index,), 2)) for index in range(2)]
    for _ in range(6):
        whole, halves = one(alone), [one(stream) for stream in pair]
        joined = jax.tree.map(lambda *parts: np.concatenate(parts), *(half.batch for half in halves))
        assert all(map(np.array_equal, jax.tree.leaves(joined), jax.tree.leaves(whole.batch)))
        if whole.columns is not None:
            assert halves[0].columns + halves[1].columns == whole.columns
        assert pair[0].get_state() == pair[1].get_state() == alone.get_state()
    again = make(rows=4, seed=3)
    again.set_state(pair[1].get_state())
    assert same(one(again), one(alone))


def test_epochs_are_complete_fresh_and_seeded(letters, config):
    make = streams(letters, config)["prompts"]
    ids = [record["id"] for batch in take(make(rows=4, seed=3), 10) for record in batch.columns]
    epochs = [ids[at : at + 10] for at in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)  # nothing lost though 4 doesn't divide 10
    assert len(set(map(tuple, epochs))) == 4
    other = [record["id"] for batch in take(make(rows=4, seed=4), 3) for record in batch.columns][:10]
    assert other not in epochs
    with_small_data = prompt_stream(in_memory(PROMPTS[:1]), letters, config(), rows=4, seed=0)
    assert [record["id"] for record in one(with_small_data).columns] == [0, 0, 0, 0]


def test_prompts_are_left_padded_into_buckets(letters, config):
    stream = prompt_stream(in_memory(PROMPTS), letters, config(prompt_buckets=(2, 5, 8)), rows=3, seed=0)
    widths = set()
    for host in take(stream, 10):
        prompts, lengths = host.batch.prompts, [len(record["prompt"]) for record in host.columns]
        width = prompts.tokens.shape[1]
        widths.add(width)
        assert width == next(bucket for bucket in (2, 5, 8) if bucket >= max(lengths))
        assert prompts.valid.tolist() == [[False] * (width - n) + [True] * n for n in lengths]
        assert (prompts.tokens[prompts.valid] == letters.convert_tokens_to_ids("x")).all()
        assert (prompts.tokens[~prompts.valid] == 0).all()
        assert prompts.sample_id.tolist() == [0, 1, 2]
        assert (prompts.tokens.dtype, prompts.valid.dtype, prompts.sample_id.dtype) == (np.int32, bool, np.int32)
    assert len(widths) > 1


def test_bucket_is_of_the_global_batch(letters, config):
    """A process with short prompts pads them as far as the others do."""
    records = [{"prompt": "x"}, {"prompt": "x" * 8}]
    for seed in range(4):
        for index in range(2):
            options: dict[str, Any] = {"rows": 2, "seed": seed, "share": Share((index,), 2)}
            prompts = one(
                prompt_stream(in_memory(records), letters, config(prompt_buckets=(4, 8)), **options)
            ).batch.prompts
            assert prompts.tokens.shape == (1, 8) and prompts.sample_id.tolist() == [index]


def test_packed_rows_lose_and_mix_nothing(letters, config):
    """Every document is whole, in one segment of one row, as often as any other."""
    stream = demonstration_stream(in_memory(TEXTS), letters, config(max_length=16), rows=2, seed=1)
    seen, number = [], 0
    while number < 46:  # 2 epochs
        host = one(stream)
        sequences = host.batch.sequences
        assert sequences.tokens.shape == (2, 16) and sequences.response_start == 1
        assert np.array_equal(sequences.valid, sequences.segment_ids > 0)
        number += host.counts["examples"]
        assert host.counts["rows"] == 2
        for tokens, segments, mask in zip(sequences.tokens, sequences.segment_ids, sequences.response_mask):
            assert (np.diff(segments[segments > 0]) >= 0).all() and not mask[segments == 0].any()
            for segment in range(1, segments.max() + 1):
                inside = segments == segment
                assert mask[inside].tolist() == [False] + [True] * (inside.sum() - 1)  # its start token is not learnt
                seen.append(letters.decode(tokens[inside]))
    expected = [f"<eos>{record['text']}<eos>" for record in TEXTS]
    assert set(seen) == set(expected) and len(seen) == number
    plan = stream.summary.counts["kept"]
    assert plan == 23


def test_packing_saves_rows(letters, config):
    """23 documents of 151 tokens fit into 10 rows of 16; two epochs of them are seen in 10 batches of 2."""
    packed = streams(letters, config)["packed"](rows=2, seed=1)
    assert sum(host.batch.sequences.valid.sum() for host in take(packed, 10)) == 2 * 151


def test_plain_rows_are_right_padded(letters, config):
    host = one(streams(letters, config)["plain"](rows=3, seed=1))
    sequences = host.batch.sequences
    assert sequences.segment_ids is None and sequences.tokens.shape == (3, 16)
    for tokens, valid, mask in zip(sequences.tokens, sequences.valid, sequences.response_mask):
        length = valid.sum()
        assert valid[:length].all() and not valid[length:].any()
        assert mask.tolist() == [False] + [True] * (length - 1) + [False] * (16 - length)
        assert (tokens[length:] == 0).all() and tokens[length - 1] == 1


def test_pairs(letters, config):
    stream = streams(letters, config)["pairs"](rows=5, seed=1)
    pairs = one(stream).batch.preferences
    for chosen, rejected, margin in zip(pairs.chosen.tokens, pairs.rejected.tokens, pairs.margin):
        number = letters.decode(chosen[:1])
        assert letters.decode(chosen[:4]) == f"{number}+<eos><pad>"
        assert letters.decode(rejected[:4]) == f"{number}-<eos><pad>"
        assert margin == int(number) / 4
    assert pairs.chosen.tokens.shape == pairs.rejected.tokens.shape == (5, 16) and pairs.margin.dtype == np.float32
    without = [{"chosen": "a", "rejected": "b"}]
    assert (
        one(preference_stream(in_memory(without), letters, config(), rows=1, seed=0)).batch.preferences.margin is None
    )


@pytest.mark.parametrize("missing", [[0], [9], [0, 4, 9]])
def test_margins_are_used_of_all_pairs_or_of_none(missing, letters, config):
    """Whichever pairs lack one. Pairs that are not used do not count."""
    mixed = [PAIRS[n] | {"margin": None} if n in missing else PAIRS[n] for n in range(10)]
    options = {"rows": 5, "seed": 0, "where": "data.x"}
    with pytest.raises(ValueError) as error:
        preference_stream(in_memory(mixed), letters, config(), **options)
    assert f"data.x: margin is missing in {len(missing)} of 10 pairs (the first is record {missing[0]} of" in str(
        error.value
    )
    assert 'data.x.fields: {margin: ""} leaves it out' in str(error.value) and "\n" not in str(error.value)
    same = [PAIRS[0] | {"margin": None, "rejected": "+"}, *PAIRS]
    margins = one(preference_stream(in_memory(same), letters, config(), **options)).batch.preferences.margin
    assert margins.max() > 0


def test_ties_are_for_comparisons_alone(letters, config):
    """And a tie that is learned from as a pair would teach a preference that nobody has."""
    some = [record | {"margin": None, "tie": number % 3 == 0} for number, record in enumerate(PAIRS)]
    found = one(comparison_stream(in_memory(some), letters, config(), rows=5, seed=0)).batch.comparisons
    for chosen, rejected, tie in zip(found.pairs.chosen.tokens, found.pairs.rejected.tokens, found.tie, strict=True):
        assert tie == (int(letters.decode(chosen[:1])) % 3 == 0)
        assert letters.decode(chosen[1:2]) == "+" and letters.decode(rejected[1:2]) == "-"
    assert found.pairs.margin is None and found.tie.dtype == bool
    with pytest.raises(ValueError, match="tie is true, and only rm_ties learns from ties"):
        preference_stream(in_memory(some), letters, config(), rows=5, seed=0)


def test_masks_do_not_come_from_ids(letters, config):
    """With pad == eos the EOS that ends a response is still valid, learnt, and the padding is neither."""
    tokenizer = copy.deepcopy(letters)
    tokenizer.pad_token = tokenizer.eos_token
    host = one(
        demonstration_stream(in_memory([{"text": "ab"}]), tokenizer, config(max_length=6, pack=False), rows=1, seed=0)
    )
    sequences = host.batch.sequences
    assert sequences.tokens[0, 3:].tolist() == [1, 1, 1] == sequences.tokens[0, :1].tolist() * 3
    assert sequences.valid[0].tolist() == [True] * 4 + [False] * 2
    assert sequences.response_mask[0].tolist() == [False, True, True, True, False, False]


def test_counts(letters, config):
    records = [{"prompt": "x" * n} for n in (1, 2, 9, 3, 12)]
    dropped = prompt_stream(in_memory(records, skipped=1), letters, config(prompt_buckets=(4, 8)), rows=3, seed=0)
    assert {name: n for name, n in dropped.summary.counts.items() if n} == {"kept": 3, "dropped": 2, "skipped": 1}
    assert sorted(len(record["prompt"]) for record in one(dropped).columns) == [1, 2, 3]
    cfg = config(prompt_buckets=(4, 8), too_long="truncate")
    cut = prompt_stream(in_memory(records), letters, cfg, rows=5, seed=0)
    host = one(cut)
    assert cut.summary.counts["truncated"] == 2 and host.counts == {"rows": 5, "examples": 5, "truncated": 2}
    assert sorted(host.batch.prompts.valid.sum(axis=1)) == [1, 2, 3, 8, 8]


def test_state_of_other_data_is_refused(letters, config):
    make = streams(letters, config)["prompts"]
    state = make(rows=4, seed=3).get_state()
    for other in (make(rows=2, seed=3), make(rows=4, seed=4), streams(letters, config)["pairs"](rows=4, seed=3)):
        with pytest.raises(ValueError, match=r"data\.\w+: the saved position is in another order of the data"):
            other.set_state(state)


def test_rows_have_to_divide(letters, config):
    with pytest.raises(
        ValueError, match=r"data\.prompts: 3 rows a batch, expected a positive multiple of the 2 batch shards"
    ):
        streams(letters, config)["prompts"](rows=3, seed=0, share=Share((0,), 2))


def test_held_out_prompts(letters, config):
    options = {"size": 7, "rows": 4}
    cfg = config(prompt_buckets=(8,))
    found = held_out("prompts", in_memory(PROMPTS), letters, cfg, **options)
    assert [record["id"] for host in found for record in host.columns] == list(range(7))
    assert [host.counts["rows"] for host in found] == [4, 3]
    assert found[1].batch.prompts.valid[3].any() == np.False_ and found[1].batch.prompts.tokens.shape == (4, 8)
    assert len(held_out("prompts", in_memory(PROMPTS), letters, cfg, size=100, rows=5)) == 2
    second = held_out("prompts", in_memory(PROMPTS), letters, cfg, share=Share((1,), 2), **options)
    assert [[record["id"] for record in host.columns] for host in second] == [[2, 3], [6]]
    assert second[1].batch.prompts.valid.any(axis=1).tolist() == [True, False]


def test_held_out_rows_have_sample_ids_of_their_own(letters, config):
    """7 rows of one prompt in batches of 4 on two processes, with the row that fills up the last batch."""
    records, found = in_memory([{"prompt": "xx"}] * 7), []
    for index in range(2):
        options: dict[str, Any] = {"size": 7, "rows": 4, "share": Share((index,), 2)}
        held = held_out("prompts", records, letters, config(prompt_buckets=(4,)), **options)
        found.append([host.batch.prompts.sample_id.tolist() for host in held])
    assert found == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_held_out_process_with_nothing_but_filling(letters, config):
    options = {"size": 5, "rows": 4, "share": Share((1,), 2)}
    for kind, records in (("prompts", PROMPTS), ("preferences", PAIRS), ("demonstrations", TEXTS)):
        last = held_out(kind, in_memory(records), letters, config(max_length=16, pack=False), **options)[-1]
        import jax

        assert last.counts == {"rows": 0, "examples": 0, "truncated": 0}
        assert not any(leaf.any() for leaf in jax.tree.leaves(last.batch) if leaf.dtype == bool)


def test_held_out_demonstrations_are_packed_in_their_order(letters, config):
    found = held_out("demonstrations", in_memory(TEXTS), letters, config(max_length=16), size=9, rows=4)
    assert sum(host.counts["examples"] for host in found) == 9
    texts = []
    for host in found:
        sequences = host.batch.sequences
        assert sequences.tokens.shape == (4, 16) and not sequences.response_mask[host.counts["rows"] :].any()
        assert not sequences.segment_ids[host.counts["rows"] :].any()
        for tokens, segments in zip(sequences.tokens, sequences.segment_ids):
            texts += [letters.decode(tokens[segments == segment]) for segment in range(1, segments.max() + 1)]
    assert sorted(texts) == sorted(f"<eos>{record['text']}<eos>" for record in TEXTS[:9])
    with pytest.raises(ValueError, match=r"eval\.size: 0, expected at least 1"):
        held_out("demonstrations", in_memory(TEXTS), letters, config(), size=0, rows=4)


def test_error_in_a_thread_that_reads_ahead_is_raised(letters, config, monkeypatch):
    def fail(*arguments):
        raise ValueError("one line")

    stream = streams(letters, config)["prompts"](rows=2, seed=0)
    monkeypatch.setattr(batch_kinds, "_arrays", fail)
    with pytest.raises(ValueError, match="one line"):
        take(stream, 4)


LABELLED = [{"prompt": f"p{n}", "response": f"r{n}", "label": n % 3 == 0} for n in range(10)]


def test_unpaired_rows(letters, config):
    """Labels, and each prompt with the response of the next row of the global batch, on any number of processes."""
    options: dict[str, Any] = {"rows": 4, "seed": 1}
    rows = one(unpaired_stream(in_memory(LABELLED), letters, config(max_length=16), **options)).batch.unpaired
    text = lambda sequences: [letters.decode(row[here]) for row, here in zip(sequences.tokens, sequences.valid)]
    numbers = [int(row[1]) for row in text(rows.responses)]
    assert text(rows.responses) == [f"p{n}r{n}<eos>" for n in numbers]
    assert text(rows.mismatched) == [f"p{n}r{other}<eos>" for n, other in zip(numbers, numbers[1:] + numbers[:1])]
    assert rows.desirable.tolist() == [n % 3 == 0 for n in numbers]
    for sequences in (rows.responses, rows.mismatched):
        learnt = [letters.decode(row[here]) for row, here in zip(sequences.tokens, sequences.response_mask)]
        assert learnt == [row[2:] for row in text(sequences)]
    for block in range(2):
        share = {"share": Share((block,), 2), **options}
        mine = one(unpaired_stream(in_memory(LABELLED), letters, config(max_length=16), **share)).batch.unpaired
        assert text(mine.mismatched) == text(rows.mismatched)[2 * block : 2 * block + 2]


def test_mismatched_rows_fit(letters, config):
    """A long prompt with a long response of another row: the response loses its end."""
    records = [
        {"prompt": "aaaaaaaa", "response": "b", "label": True},
        {"prompt": "c", "response": "dddddddd", "label": False},
    ]
    rows = one(unpaired_stream(in_memory(records), letters, config(max_length=10), rows=2, seed=0)).batch.unpaired
    whole = sorted(letters.decode(row[here]) for row, here in zip(rows.mismatched.tokens, rows.mismatched.valid))
    assert whole == ["aaaaaaaadd", "cb<eos>"]


def test_a_held_out_row_alone_takes_the_response_of_another_batch(letters, config):
    found = held_out("unpaired", in_memory(LABELLED), letters, config(max_length=16), size=3, rows=2)
    last = found[-1].batch.unpaired
    assert letters.decode(last.mismatched.tokens[0][last.mismatched.valid[0]]) == "p2r0<eos>"
    assert not last.responses.valid[1].any() and not last.mismatched.valid[1].any() and not last.desirable[1]
