"""Random rows of the shapes that an iteration is given, and how long their responses are."""

import math
from typing import Literal

import numpy as np

from jaxrlhf.data.document_packing import pack
from jaxrlhf.generate.stop_texts import Automaton
from jaxrlhf.types import Batch, Comparisons, Preferences, Prompts, Sequences, Trajectories, Unpaired, given

Lengths = Literal["dense", "ragged"]
SIGMA, MEAN = (
    0.8,
    0.4,
)  # of the logarithm of a ragged length; of the lengths before they are clipped, a share of the room
FIRST = 3  # token ids below it may mean something: padding, EOS
DESCRIBED = {
    "dense": "all responses as long as there is room",
    "ragged": f"lognormal, sigma {SIGMA}, mean {MEAN} of the room before it is clipped to [1, room]",
}


def response_lengths(count: int, room: int, lengths: Lengths, seed: int) -> np.ndarray:
    """i32[count]: tokens of each response, at most ``room``; see DESCRIBED."""
    if lengths == "dense":
        return np.full(count, room, np.int32)
    drawn = np.random.default_rng(seed).lognormal(math.log(MEAN * room) - SIGMA**2 / 2, SIGMA, count)
    return np.clip(np.rint(drawn), 1, room).astype(np.int32)


def countdown(lengths: np.ndarray) -> Automaton:
    """Ends the response of row i after lengths[i] tokens, whatever they are: lengths i32[rows of the batch]."""
    most = int(lengths.max())
    following = np.minimum(np.arange(1, most + 2, dtype=np.int32), most)
    return Automaton(following[:, None], most - lengths)


def random_batch(shapes: Batch, vocab: int, prompt: int, lengths: Lengths, seed: int, step: int) -> Batch:
    """NumPy rows of the shapes in ``shapes``: prompts that fill their columns; sequences and pairs with prompts of
    ``prompt`` tokens (the same for both of a pair), and responses that have the room behind them. Tokens are new in
    every step; lengths depend on the seed alone, so that all iterations are the same work."""
    batch, rng = Batch(), np.random.default_rng((seed, step))
    if shapes.prompts is not None:
        rows, columns = shapes.prompts.tokens.shape
        tokens = rng.integers(FIRST, vocab, (rows, columns)).astype(np.int32)
        ids = np.arange(rows, dtype=np.int32)
        batch = batch.replace(prompts=Prompts(tokens, np.ones((rows, columns), bool), ids))  # type: ignore[arg-type]
    if shapes.preferences is not None:
        pair = shapes.preferences
        rows, columns = pair.chosen.tokens.shape
        prompts = rng.integers(FIRST, vocab, (rows, prompt))
        sizes = np.split(response_lengths(2 * rows, columns - prompt, lengths, seed), 2)
        chosen, rejected = (whole_rows(prompts, columns, vocab, mine, rng) for mine in sizes)
        batch = batch.replace(preferences=Preferences(chosen, rejected))
    if shapes.comparisons is not None:
        asked = Batch(preferences=shapes.comparisons.pairs)
        pairs = given(random_batch(asked, vocab, prompt, lengths, seed, step).preferences, "preferences")
        tie = np.arange(len(pairs.chosen.tokens)) % 4 == 0
        batch = batch.replace(comparisons=Comparisons(pairs, tie))  # type: ignore[arg-type]
    if shapes.unpaired is not None:
        rows, columns = shapes.unpaired.responses.tokens.shape
        prompts = rng.integers(FIRST, vocab, (rows, prompt))
        sizes = np.split(response_lengths(2 * rows, columns - prompt, lengths, seed), 2)
        own, others = (whole_rows(prompts, columns, vocab, mine, rng) for mine in sizes)
        batch = batch.replace(unpaired=Unpaired(own, np.arange(rows) % 2 == 0, others))  # type: ignore[arg-type]
    if shapes.trajectories is not None:
        rows, columns = shapes.trajectories.rewards.shape
        sizes = response_lengths(rows, columns - prompt, lengths, seed)
        own = whole_rows(rng.integers(FIRST, vocab, (rows, prompt)), columns, vocab, sizes, rng)
        rewards = (rng.normal(size=(rows, columns)) * own.response_mask).astype(np.float32)
        batch = batch.replace(trajectories=Trajectories(own, rewards, np.zeros(rows, bool)))  # type: ignore[arg-type]
    if shapes.demonstrations is not None:
        asked = Batch(sequences=shapes.demonstrations)
        batch = batch.replace(demonstrations=random_batch(asked, vocab, prompt, lengths, seed, step).sequences)
    if shapes.sequences is not None:
        rows, columns = shapes.sequences.tokens.shape
        packed = shapes.sequences.segment_ids is not None
        sizes = response_lengths(4 * rows if packed else rows, columns - prompt, lengths, seed)
        if packed:
            return batch.replace(sequences=packed_rows(rows, columns, vocab, prompt, sizes, rng))
        prompts = rng.integers(FIRST, vocab, (rows, prompt))
        batch = batch.replace(sequences=whole_rows(prompts, columns, vocab, sizes, rng))
    return batch


def whole_rows(prompts: np.ndarray, columns: int, vocab: int, sizes: np.ndarray, rng: np.random.Generator) -> Sequences:
    """One document a row: the prompt [B, P], a response of sizes[B] tokens, padding."""
    rows, start = prompts.shape
    at = np.arange(columns)
    tokens = rng.integers(FIRST, vocab, (rows, columns))
    tokens[:, :start] = prompts
    valid = at < start + sizes[:, None]
    tokens = np.where(valid, tokens, 0).astype(np.int32)
    return Sequences(tokens, valid, valid & (at >= start))  # type: ignore[arg-type]


def packed_rows(
    rows: int, columns: int, vocab: int, prompt: int, sizes: np.ndarray, rng: np.random.Generator
) -> Sequences:
    """Rows that documents share, as data.pack fills them: the fullest of all rows that prompts with responses of
    ``sizes`` tokens (at least one a row) make."""
    sizes = prompt + sizes
    plan = sorted(pack(sizes, columns), key=lambda row: -int(sizes[row].sum()))[:rows]
    tokens, segments = (np.zeros((rows, columns), np.int32) for _ in range(2))
    mask = np.zeros((rows, columns), bool)
    for row, documents in enumerate(plan):
        start = 0
        for number, size in enumerate(sizes[documents].tolist(), 1):
            tokens[row, start : start + size] = rng.integers(FIRST, vocab, size)
            segments[row, start : start + size] = number
            mask[row, start + prompt : start + size] = True
            start += size
    return Sequences(tokens, segments > 0, mask, segments)  # type: ignore[arg-type]
