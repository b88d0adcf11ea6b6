"""The jitted sampler: Prompts -> Sequences."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.decoding import Cache, abreast, decode_layout, decode_step, prefill, prompts_abreast
from jaxrlhf.models.heads import lm_logits
from jaxrlhf.models.int8 import Part
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.ops.rows import by_device, group_rows, lay_rows, of_devices, repeat_rows, ungroup_rows
from jaxrlhf.ops.sampling import Sampling, choose, shape_logits, uniform_noise
from jaxrlhf.sharding import constrain, decoding, spec, split_over
from jaxrlhf.types import Array, Params, Prompts, Sequences


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How responses are sampled. The trainer applies the same temperature, top-k and top-p to its log-probs."""

    max_new_tokens: int = 64  # tokens of a response at most
    min_new_tokens: int = 0  # EOS is out of reach before it
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # sample from the likeliest tokens that make up this probability; 1: off
    stop: tuple[str, ...] = ()  # texts that end a response, besides the EOS tokens
    int8: tuple[Part, ...] = ()  # what decoding reads as 8 bits: weights, cache; the trainer's log-probs are not its
    halvings: int = 0  # times, each compiled, that half of the responses (to a prompt; on a device) go on alone


class Sampler(NamedTuple):
    """All that the sampler's program depends on, besides its arrays."""

    sampling: Sampling
    max_new_tokens: int
    eos_ids: tuple[int, ...]
    pad_id: int
    stops: tuple[np.ndarray, ...] = ()  # one automaton a stop text: i32[states, V]; the last state has seen it all
    samples_per_prompt: int = 1
    share_prompts: bool = True  # what learns from the samples computes a prompt once for all of them
    limits: np.ndarray | None = None  # i32[rows of the batch]: the longest response of each; None: max_new_tokens
    halvings: int = 0  # see GenerateConfig

    @property
    def copies(self) -> int:
        """Sequences.copies of what is sampled."""
        return self.samples_per_prompt if self.share_prompts else 1


def make_sampler(
    ask: GenerateConfig,
    eos_ids: tuple[int, ...],
    pad_id: int,
    pieces: list[bytes],
    vocab: int,
    samples_per_prompt: int,
    stops: Sequence[str | Sequence[str | int]] | None = None,
) -> Sampler:
    """The sampler that ``ask`` describes.

    Args:
        pieces: what each token writes, read where there are stop texts.
        vocab: rows of the model's (padded) vocabulary.
        stops: the stop texts as stop_automaton takes them; those of ``ask`` by default.
    """
    sampling = Sampling(ask.temperature, ask.top_k, ask.top_p, ask.min_new_tokens, eos_ids)
    automata = tuple(stop_automaton(stop, pieces, vocab) for stop in (ask.stop if stops is None else stops))
    sampler = Sampler(sampling, ask.max_new_tokens, eos_ids, pad_id, automata, samples_per_prompt)
    return sampler._replace(halvings=ask.halvings)


class Rows(NamedTuple):
    """What belongs to the rows of the decode loop: B = G prompts x n samples."""

    tokens: Array  # i32[B, T]
    logprobs: Array  # f32[B, T]
    mask: Array  # bool[B, T]: sampled before the row ended, the ending token included
    done: Array  # bool[B]
    stop_states: tuple[Array, ...]  # i32[B] a stop text
    noise: Array  # f32[B, T]: what tokens are chosen by
    limits: Array  # i32[B]: tokens of the longest response


class Decoding(NamedTuple):
    """What the decode loop carries."""

    index: Array  # i32[]: response tokens sampled so far
    hidden: Array  # [G, n, D]: state before the next token of each response
    caches: list[Cache]
    rows: Rows


def sample(
    params: Params, cfg: ModelConfig, prompts: Prompts, seed: Array, step: Array, sampler: Sampler, runtime: Runtime
) -> Sequences:
    """Sample ``samples_per_prompt`` responses to each prompt, [B * n, P + T], stopping when all rows have ended.

    Logprobs are of the distribution sampled from (after temperature, top-k, top-p), and the noise of a token depends on
    (seed, step, sample id, position) only. One prefill a prompt is shared by its samples.
    """
    with decoding():
        sequences = respond(params, cfg, lay_rows(prompts), seed, step, sampler, runtime)
    return lay_rows(sequences)


def respond(
    params: Params, cfg: ModelConfig, prompts: Prompts, seed: Array, step: Array, sampler: Sampler, runtime: Runtime
) -> Sequences:
    """``sample`` in the layout of decoding."""
    copies, room = sampler.samples_per_prompt, sampler.max_new_tokens
    prompt_size = prompts.tokens.shape[1]
    params = decode_layout(params, cfg, "lm", runtime, prompts.tokens.shape[0] * copies)
    hidden, caches = prefill(params, cfg, prompts.tokens, prompts.valid, copies, room, runtime)
    each = repeat_rows(prompts, copies)
    tokens, valid = each.tokens, each.valid
    sample_id = each.sample_id * copies + jnp.arange(tokens.shape[0]) % copies
    positions = valid.sum(1, dtype=jnp.int32)[:, None] + jnp.arange(room)
    rows = blank_rows(valid, uniform_noise(seed, step, sample_id, positions), sampler)
    hidden, read = jnp.broadcast_to(hidden, (hidden.shape[0], copies, hidden.shape[2])), prompts.valid[:, None]
    if (width := prompts_abreast(hidden.shape[0], copies, runtime)) > 1:
        hidden, read, caches = group_rows(hidden[:, 0], width), group_rows(read[:, 0], width), abreast(caches, width)
    state = Decoding(jnp.int32(0), hidden, caches, rows)
    rows = decode(params, cfg, state, read, sampler, runtime)
    everything = jnp.concatenate([tokens, rows.tokens], 1)
    pad = lambda x: jnp.pad(x, ((0, 0), (prompt_size, 0)))
    return Sequences(
        tokens=everything,
        valid=jnp.concatenate([valid, rows.mask], 1),
        response_mask=pad(rows.mask),
        logprobs=pad(rows.logprobs),
        ended=rows.done,
        response_start=prompt_size,
        copies=sampler.copies,
    )


def blank_rows(prompt: Array, noise: Array, sampler: Sampler) -> Rows:
    """The rows before their first tokens: prompt bool[B, P], the columns that hold tokens; noise f32[B, T]."""
    size, room = noise.shape
    empty = lambda dtype: constrain(jnp.zeros((size, room), dtype), "batch", None)
    row = lambda value: constrain(jnp.full((size,), value, jnp.int32), "batch")
    return Rows(
        tokens=empty(jnp.int32) + sampler.pad_id,
        logprobs=empty(jnp.float32),
        mask=empty(bool),
        done=~prompt.any(axis=1),  # a row without a prompt fills up a batch: no response
        stop_states=tuple(row(0) for _ in sampler.stops),
        noise=noise,
        limits=row(room + 1) if sampler.limits is None else constrain(jnp.asarray(sampler.limits), "batch"),
    )


def decode(
    params: Params, cfg: ModelConfig, state: Decoding, prompt: Array, sampler: Sampler, runtime: Runtime
) -> Rows:
    """Sample, read, repeat, until every row has ended or the room is used up. ``prompt``: see decode_step.

    With halvings left, it goes on with half of the rows once no more are needed: half of each prompt's samples, and
    where it has one, half of each device's prompts. So nothing moves between devices."""
    half = half_of(state, sampler)

    def unfinished(state: Decoding) -> Array:
        busy = ~state.rows.done.all() if half is None else (~half.done(state.rows)).sum(1).max() > half.few
        return (state.index < sampler.max_new_tokens) & busy

    one_token = functools.partial(decode_token, params, cfg, prompt, sampler, runtime)
    state = jax.lax.while_loop(unfinished, one_token, state)
    if half is None:
        return state.rows
    live = jnp.argsort(half.done(state.rows), axis=1, stable=True)[:, : half.few]  # what has not ended comes first
    some, its_prompt = half.keep(state, prompt, live)
    rest = decode(params, cfg, some, its_prompt, sampler._replace(halvings=sampler.halvings - 1), runtime)
    put = jax.vmap(lambda x, at, new: x.at[at].set(new, unique_indices=True))
    return jax.tree.map(lambda x, new: half.rows(put(half.lines(x), live, half.lines(new))), state.rows, rest)


class Half(NamedTuple):
    """How half of the rows go on: they stand in lines, of each of which ``few`` do."""

    few: int
    lines: Callable[[Array], Array]  # [B, ...] -> [lines, places, ...]; of the half too
    rows: Callable[[Array], Array]  # the inverse
    done: Callable[[Rows], Array]  # bool[lines, places]
    keep: Callable[[Decoding, Array, Array], tuple[Decoding, Array]]  # (state, prompt, i32[lines, few]), of these


def half_of(state: Decoding, sampler: Sampler) -> Half | None:
    """The half that decoding goes on with; None where it is to go on as it is."""
    prompts, copies, _ = state.hidden.shape
    if not sampler.halvings:
        return None
    if copies > 1 and sampler.samples_per_prompt > 1:
        return half_of_samples(prompts, copies // 2)
    few = prompts // split_over("batch") // 2
    return half_of_prompts(copies, few) if few else None


def half_of_samples(prompts: int, few: int) -> Half:
    """A prompt is a line, and its samples are what stands in it."""
    take, lines = jax.vmap(lambda x, at: x.at[at].get()), lambda x: group_rows(x, len(x) // prompts)

    def keep(state: Decoding, prompt: Array, which: Array) -> tuple[Decoding, Array]:
        own = jax.vmap(lambda x, at: x.at[:, at].get())
        owned = lambda x: jax.tree.map(lambda x: own(x, which), x)
        caches = [cache._replace(key=owned(cache.key), value=owned(cache.value)) for cache in state.caches]
        rows = jax.tree.map(lambda x: ungroup_rows(take(lines(x), which)), state.rows)
        return Decoding(state.index, take(state.hidden, which), caches, rows), prompt

    return Half(few, lines, ungroup_rows, lambda rows: lines(rows.done), keep)


def half_of_prompts(copies: int, few: int) -> Half:
    """A device is a line, and the prompts that it has are what stands in it, each with its ``copies`` rows."""
    take = jax.vmap(lambda x, at: x.at[at].get())
    lines, rows = lambda x: by_device(group_rows(x, copies)), lambda x: ungroup_rows(of_devices(x))

    def keep(state: Decoding, prompt: Array, which: Array) -> tuple[Decoding, Array]:
        some = lambda x: of_devices(take(by_device(x), which))
        hidden, caches, prompt = jax.tree.map(some, (state.hidden, state.caches, prompt))
        left = jax.tree.map(lambda x: rows(take(lines(x), which)), state.rows)
        return Decoding(state.index, hidden, caches, left), prompt

    return Half(few, lines, rows, lambda rows: lines(rows.done).all(2), keep)


def decode_token(
    params: Params, cfg: ModelConfig, prompt: Array, sampler: Sampler, runtime: Runtime, state: Decoding
) -> Decoding:
    """Choose the next token of every row, and read it."""
    every, copies = state.rows, state.hidden.shape[1]
    read = lambda x: jax.lax.dynamic_slice_in_dim(x, state.index, 1, axis=1) if x.ndim == 2 else x
    write = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, state.index)) if old.ndim == 2 else new
    rows = next_tokens(lm_logits(params, cfg, state.hidden), state.index, jax.tree.map(read, every), sampler)
    token = group_rows(rows.tokens[:, 0], copies)
    hidden, caches = decode_step(params, cfg, token, state.index, prompt, state.caches, runtime)
    rows = jax.tree.map(write, every, rows)._replace(noise=every.noise)
    return Decoding(state.index + 1, hidden, caches, rows)


def next_tokens(logits: Array, index: Array, rows: Rows, sampler: Sampler) -> Rows:
    """``rows``, of which only the column of their next tokens is given, [B, 1], with what is chosen for it. logits
    [G, n, V]; ``index`` i32[]: tokens of each response so far."""
    token, logprob = choose_tokens(logits, rows.noise[:, 0], index, sampler.sampling)
    live = ~rows.done
    token = jnp.where(live, token, sampler.pad_id)
    stop_states, stopped = follow_stops(sampler.stops, rows.stop_states, token)
    ended = is_any(token, sampler.eos_ids) | stopped | (index + 1 >= rows.limits)
    return rows._replace(
        tokens=token[:, None],
        logprobs=jnp.where(live, logprob, 0.0)[:, None],
        mask=live[:, None],
        done=rows.done | ended,
        stop_states=stop_states,
    )


def choose_tokens(logits: Array, uniform: Array, index: Array, sampling: Sampling) -> tuple[Array, Array]:
    """Tokens i32[B] and their log-probs f32[B]: logits [G, n, V] of the responses' next tokens, ``uniform`` f32[B] what
    they are chosen by, ``index`` i32[].

    Each device has a part of the vocabulary. They trade it for whole rows, and those that share rows take a part of
    them each, where they divide: so a row is gathered, shaped and searched once, not by all of them."""
    axis = "rows" if len(uniform) % split_over("rows") == 0 else "batch"
    flat = (len(uniform), logits.shape[-1])
    logits = constrain(jax.lax.reshape(logits, flat, out_sharding=spec("batch", "vocab")), axis, None)
    logits = shape_logits(logits, sampling, constrain(jnp.broadcast_to(index, uniform.shape), axis))
    token, logprob = choose(logits, constrain(uniform, axis), greedy=sampling.temperature == 0.0)
    return constrain(token, "batch"), constrain(logprob, "batch")


# ---- what ends a response -------------------------------------------------------------------------------------------


def is_any(token: Array, ids: tuple[int, ...]) -> Array:
    """bool[B]: token is one of ids."""
    found = jnp.zeros_like(token, bool)
    for ident in ids:
        found = found | (token == ident)
    return found


def follow_stops(stops: tuple[np.ndarray, ...], states: tuple[Array, ...], token: Array):
    """Advance each stop text's automaton by one token: (new states, bool[B] where one has been completed)."""
    found, after = jnp.zeros_like(token, bool), []
    for table, state in zip(stops, states, strict=True):
        state = jnp.asarray(table).at[state, token].get(out_sharding=spec("batch"))
        found = found | (state == table.shape[0] - 1)
        after.append(state)
    return tuple(after), found


def stop_automaton(stop: str | Sequence[str | int], token_bytes: Sequence[bytes], vocab: int) -> np.ndarray:
    """i32[states, vocab]: the Knuth-Morris-Pratt automaton of a stop text run over what each token writes.

    A stop text is found however the tokenizer cuts it, also across tokens. Of one that is given in parts, ids are found
    as these tokens, and other tokens that write nothing are no part of it. Raises ValueError for an empty text."""
    parts = [stop] if isinstance(stop, str) else stop
    own = {part for part in parts if isinstance(part, int)}
    pattern = [symbol for part in parts for symbol in ([-1 - part] if isinstance(part, int) else part.encode())]
    if not pattern:
        raise ValueError("generate.stop: '' is empty; a stop sequence has at least one character")
    codes: dict[int | None, int] = {symbol: code for code, symbol in enumerate(dict.fromkeys(pattern))}
    size, other = len(pattern), len(codes)
    step = np.zeros((size + 1, other + 1), np.int32)
    fallback = 0  # the state after pattern[1:state]
    for state, symbol in enumerate(pattern):
        step[state] = step[fallback] if state else 0
        step[state, codes[symbol]] = state + 1
        if state:
            fallback = step[fallback, codes[symbol]]
    step[size] = size  # found stays found
    table = np.tile(np.arange(size + 1, dtype=np.int32)[:, None], (1, vocab))
    for token, piece in enumerate(token_bytes[:vocab]):
        symbols: list[int | None] = [-1 - token] if token in own else [*piece]
        if own and not symbols:
            symbols = [None]
        if symbols and not any(symbol in codes for symbol in symbols):
            symbols = symbols[:1]  # one that the pattern lacks is enough
        for symbol in symbols:
            table[:, token] = step[table[:, token], codes.get(symbol, other)]
    return table
