"""The arithmetic of an iteration against numbers worked out by hand for a tiny model."""

import numpy as np
import pytest

from jaxrlhf.benchmarks import work
from jaxrlhf.benchmarks.case import Case, Shape, make_cases
from jaxrlhf.benchmarks.rows import packed_rows, random_batch, response_lengths
from jaxrlhf.benchmarks.work import Document, count_work, documents, forward_flops, pairs
from jaxrlhf.models.config import ModelConfig, resolve
from jaxrlhf.types import Batch, Sequences

# a layer: query, key, value and out 64x64, up, gate and down 64x128; one head; the embeddings are the head
LAYER, LOGITS, HEAD_DIM = 4 * 64 * 64 + 3 * 64 * 128, 8192 * 64, 64


def case(overrides: tuple[str, ...] = (), new_tokens: int = 2, **sizes) -> Case:
    """One layer of 64 features; prompts of 3 tokens."""
    shape = Shape(layers=1, hidden=64, prompt_tokens=3, new_tokens=new_tokens, **sizes)
    (made,) = make_cases(shape, None, overrides, "dense", False)
    return made


def sampled(made: Case, lengths: list[int]) -> Batch:
    """Prompts with responses of these lengths, as an iteration leaves them (NumPy)."""
    prompts = random_batch(made.shapes, 8192, made.prompt, "dense", 0, 0).prompts
    tokens = np.repeat(prompts.tokens, len(lengths) // len(prompts.tokens), 0)
    mask = np.arange(made.room) < np.array(lengths)[:, None]
    responses = np.where(mask, 7, 0)
    sequences = Sequences(
        np.concatenate([tokens, responses], 1).astype(np.int32),  # type: ignore[arg-type]
        np.concatenate([tokens > 0, mask], 1),  # type: ignore[arg-type]
        np.concatenate([tokens < 0, mask], 1),  # type: ignore[arg-type]
        logprobs=np.zeros((len(tokens), made.prompt + made.room), np.float32),  # type: ignore[arg-type]
        scores=np.zeros(len(tokens), np.float32),  # type: ignore[arg-type]
        ended=np.ones(len(tokens), bool),  # type: ignore[arg-type]
        response_start=made.prompt,
    )
    return Batch(prompts=prompts, sequences=sequences)


def test_grpo_reads_a_group_s_prompt_once():
    """2 prompts x 2 responses of 2, 1, 2 and 1 tokens. Distinct tokens: 2 x 3 and 6; products of attention: a prompt's
    1 + 2 + 3, a response's 4 (and 5). Sampling, reference, and three times the policy: five forward passes."""
    made = case(prompts=2, samples=2)
    found = count_work(made.drawn, sampled(made, [2, 1, 2, 1]))
    attended = 2 * 6 + 2 * (4 + 5) + 2 * 4
    once = 2 * (12 * LAYER + 6 * LOGITS) + 4 * attended * HEAD_DIM
    assert found.rollout == found.prepare == once and found.update == 3 * once and found.flops == 5 * once
    assert (found.response_tokens, found.sampled_share) == (6, 6 / 8)
    assert (found.update_tokens, found.update_share, found.distinct_share) == (18, 18 / 20, 12 / 20)


def test_ppo_pays_four_epochs_of_two_roles():
    """3 prompts, 1 response each, of 2 tokens; minibatches split rows, not work. Reference and old values and scores
    once; in every epoch policy and value three times."""
    made = case(algorithm="ppo", prompts=3, overrides=("algorithm.num_minibatches=3",))
    found = count_work(made.drawn, sampled(made, [2, 2, 2]))
    body = 2 * 15 * LAYER + 4 * 3 * (1 + 2 + 3 + 4 + 5) * HEAD_DIM
    logits, values, scores = 2 * 6 * LOGITS, 2 * 6 * 64, 2 * 3 * 64
    assert found.rollout == body + logits
    assert found.prepare == 3 * body + logits + values + scores
    assert found.update == 4 * 3 * (2 * body + logits + values)
    assert (found.update_tokens, found.sampled_share, found.update_share) == (4 * 15, 1, 1)


def test_a_shared_trunk_is_counted_once():
    """The case before, with the value model a head on the policy: old values take a pass of the trunk, an update none
    but the policy's."""
    made = case(algorithm="ppo", prompts=3, overrides=("models.value.share_trunk=true",))
    found = count_work(made.drawn, sampled(made, [2, 2, 2]))
    body = 2 * 15 * LAYER + 4 * 3 * (1 + 2 + 3 + 4 + 5) * HEAD_DIM
    logits, values, scores = 2 * 6 * LOGITS, 2 * 6 * 64, 2 * 3 * 64
    assert found.prepare == 3 * body + logits + values + scores
    assert found.update == 4 * 3 * (body + logits + values)


def test_a_pair_shares_its_prompt():
    """DPO: 2 pairs of a prompt of 3 and two responses of 2 tokens: 2 x (3 + 4) tokens. The reference does not learn."""
    made = case(algorithm="dpo", prompts=2)
    found = count_work(made.drawn, random_batch(made.shapes, 8192, 3, "dense", 0, 0))
    once = 2 * (14 * LAYER + 8 * LOGITS) + 4 * 2 * (1 + 2 + 3 + 2 * (4 + 5)) * HEAD_DIM
    assert (found.rollout, found.prepare, found.update) == (0, once, 3 * once)
    assert found.distinct_share == 14 / 20


def test_a_window_bounds_what_a_token_attends_to():
    assert pairs(0, 4) == 1 + 2 + 3 + 4 and pairs(3, 2) == 4 + 5
    assert pairs(0, 4, window=2) == 1 + 2 + 2 + 2 and pairs(3, 2, window=2) == 4
    types = ("local", "global")
    model = ModelConfig(vocab_size=64, hidden_size=8, num_heads=2, mlp_size=16, sliding_window=2, layer_types=types)
    model = resolve(model)
    found = [Document(b"x", 3, 2, 2)]
    layer = 4 * 8 * 8 + 3 * 8 * 16
    attended = (1 + 2 + 2 + 2 + 2) + (1 + 2 + 3 + 4 + 5)
    assert forward_flops(model, "lm", "token_stats", found) == 2 * (5 * 2 * layer + 2 * 64 * 8) + 4 * attended * 8


def test_documents_of_packed_rows_are_counted_one_by_one():
    sizes = response_lengths(16, 13, "ragged", seed=0)
    rows = packed_rows(4, 16, 8192, 3, sizes, np.random.default_rng(0))
    found = documents(rows)
    assert len(found) == int(rows.segment_ids.max(1).sum()) > 4
    assert all(one.prompt_tokens == 3 and one.response_tokens == one.read >= 1 for one in found)
    assert sum(one.prompt_tokens + one.response_tokens for one in found) == int(rows.valid.sum())


def test_a_decode_step_reads_the_weights_and_what_is_valid():
    """Responses of 2 and 1 tokens behind 3: two steps, which see 4 and 5, and 4 tokens; 4 bytes a number."""
    made = case(prompts=1, samples=2)
    sequences = sampled(made, [2, 1]).sequences
    assert sequences is not None
    assert work.decode_bytes(made.drawn, sequences) == 4 * (LAYER + LOGITS + (4 + 5 + 4) * 2 * 64 / 2)
    narrow = case(("generate.int8=[weights,cache]",), prompts=1, samples=2)
    assert work.decode_bytes(narrow.drawn, sequences) == LAYER + LOGITS + (4 + 5 + 4) * 2 * (64 + 4) / 2


def test_lengths_are_those_of_every_step_and_tokens_are_new():
    made = case(algorithm="dpo", prompts=6, new_tokens=9)
    first, second = (random_batch(made.shapes, 8192, 3, "ragged", 7, step).preferences for step in (0, 1))
    np.testing.assert_array_equal(first.chosen.valid, second.chosen.valid)
    assert (first.chosen.tokens != second.chosen.tokens).any()
    assert (first.chosen.tokens[:, :3] == first.rejected.tokens[:, :3]).all()
    assert (first.chosen.valid.sum(1) != first.rejected.valid.sum(1)).any()
    np.testing.assert_array_equal(first.chosen.response_mask, first.chosen.valid & (np.arange(12) >= 3))


def test_ragged_lengths_are_lognormal():
    room = 400
    found = response_lengths(20000, room, "ragged", seed=1)
    assert found.min() >= 1 and found.max() == room
    inside = np.log(found[found < room])
    assert np.median(found) == pytest.approx(0.4 * room * np.exp(-(0.8**2) / 2), rel=0.03)
    assert found.mean() == pytest.approx(0.375 * room, rel=0.03), "a little less than 0.4: clipped"
    quarters = np.quantile(np.log(found), [0.25, 0.75])
    assert np.diff(quarters) == pytest.approx(2 * 0.6745 * 0.8, rel=0.05) and len(inside) > 0.9 * len(found)
    assert (found == response_lengths(20000, room, "ragged", seed=1)).all()
    assert (response_lengths(5, room, "dense", seed=1) == room).all()
