"""The jitted sampler: Prompts -> Sequences."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.decoding import Cache, abreast, decode_layout, decode_step, prefill, prompts_abreast
from jaxrlhf.models.heads import lm_logits
from jaxrlhf.models.int8 import Part
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.ops.rows import group_rows, lay_rows, repeat_rows, ungroup_rows
from jaxrlhf.ops.sampling import Sampling, choose, shape_logits, uniform_noise
from jaxrlhf.sharding import constrain, decoding, spec, split_over
from jaxrlhf.types import Array, Params, Prompts, Sequences


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How responses are sampled. The trainer applies the same temperature, top-k and top-p to its log-probs."""

    max_new_tokens: int = 64
    min_new_tokens: int = 0  # EOS is out of reach before it
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    stop: tuple[str, ...] = ()  # texts that end a response, besides the EOS tokens
    int8: tuple[Part, ...] = ()  # what decoding reads as 8 bits: weights, cache; the trainer's log-probs are not its
    halvings: int = 0  # times, each compiled, that half of a prompt's samples go on alone once the others have ended


class Sampler(NamedTuple):
    """All that the sampler's program depends on, besides its arrays."""

    sampling: Sampling
    max_new_tokens: int
    eos_ids: tuple[int, ...]
    pad_id: int
    stops: tuple[np.ndarray, ...] = ()  # one automaton a stop text: i32[states, V]; the last state has seen it all
    samples_per_prompt: int = 1
    share_prompts: bool = True  # what learns from the samples reads a prompt once for all of them
    limits: np.ndarray | None = None  # i32[rows of the batch]: the longest response of each; None: max_new_tokens
    halvings: int = 0  # see GenerateConfig

    @property
    def copies(self) -> int:
        """Sequences.copies of what is sampled."""
        return self.samples_per_prompt if self.share_prompts else 1


def make_sampler(
    ask: GenerateConfig, eos_ids: tuple[int, ...], pad_id: int, pieces: list[bytes], vocab: int, samples_per_prompt: int
) -> Sampler:
    """The sampler that ``ask`` describes. ``pieces``: what each token writes, read where there are stop texts;
    ``vocab``: rows of the model's (padded) vocabulary."""
    sampling = Sampling(ask.temperature, ask.top_k, ask.top_p, ask.min_new_tokens, eos_ids)
    stops = tuple(stop_automaton(text, pieces, vocab) for text in ask.stop)
    return Sampler(sampling, ask.max_new_tokens, eos_ids, pad_id, stops, samples_per_prompt, halvings=ask.halvings)


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

    With halvings left, it goes on with half of each prompt's rows once no prompt needs more of them: they stand beside
    their prompt as before, so that nothing moves between devices."""
    copies = state.hidden.shape[1]
    few = copies // 2 if sampler.halvings and sampler.samples_per_prompt > 1 else 0

    def unfinished(state: Decoding) -> Array:
        busy = ~state.rows.done.all() if not few else group_rows(~state.rows.done, copies).sum(1).max() > few
        return (state.index < sampler.max_new_tokens) & busy

    one_token = functools.partial(decode_token, params, cfg, prompt, sampler, runtime)
    state = jax.lax.while_loop(unfinished, one_token, state)
    if not few:
        return state.rows
    live = jnp.argsort(group_rows(state.rows.done, copies), axis=1, stable=True)[:, :few]  # of each prompt, these first
    rest = decode(params, cfg, keep_rows(state, live), prompt, sampler._replace(halvings=sampler.halvings - 1), runtime)
    return put_back(state.rows, rest, live, copies)


def keep_rows(state: Decoding, which: Array) -> Decoding:
    """``state`` of some rows of each prompt, ``which`` i32[G, m] of its n."""
    take = jax.vmap(lambda x, at: x.at[at].get())
    copies = state.hidden.shape[1]
    rows = jax.tree.map(lambda x: ungroup_rows(take(group_rows(x, copies), which)), state.rows)
    own = jax.vmap(lambda x, at: x.at[:, at].get())
    owned = lambda x: jax.tree.map(lambda x: own(x, which), x)
    caches = [cache._replace(key=owned(cache.key), value=owned(cache.value)) for cache in state.caches]
    return Decoding(state.index, take(state.hidden, which), caches, rows)


def put_back(rows: Rows, some: Rows, which: Array, copies: int) -> Rows:
    """``rows`` with ``some`` of them as they have become: rows ``which`` i32[G, m] of each prompt's ``copies``."""
    few = which.shape[1]
    put = jax.vmap(lambda x, at, new: x.at[at].set(new, unique_indices=True))
    one = lambda x, new: ungroup_rows(put(group_rows(x, copies), which, group_rows(new, few)))
    return jax.tree.map(one, rows, some)


def decode_token(
    params: Params, cfg: ModelConfig, prompt: Array, sampler: Sampler, runtime: Runtime, state: Decoding
) -> Decoding:
    """Choose the next token of every row, and read it."""
    rows, copies = state.rows, state.hidden.shape[1]
    token, logprob = choose_tokens(lm_logits(params, cfg, state.hidden), rows.noise, state.index, sampler.sampling)
    live = ~rows.done
    token = jnp.where(live, token, sampler.pad_id)
    stop_states, stopped = follow_stops(sampler.stops, rows.stop_states, token)
    ended = is_any(token, sampler.eos_ids) | stopped | (state.index + 1 >= rows.limits)
    write = lambda old, new: jax.lax.dynamic_update_slice(old, new[:, None], (0, state.index))
    rows = rows._replace(
        tokens=write(rows.tokens, token),
        logprobs=write(rows.logprobs, jnp.where(live, logprob, 0.0)),
        mask=write(rows.mask, live),
        done=rows.done | ended,
        stop_states=stop_states,
    )
    hidden, caches = decode_step(params, cfg, group_rows(token, copies), state.index, prompt, state.caches, runtime)
    return Decoding(state.index + 1, hidden, caches, rows)


def choose_tokens(logits: Array, noise: Array, index: Array, sampling: Sampling) -> tuple[Array, Array]:
    """Tokens i32[B] and their log-probs f32[B]: logits [G, n, V] of the responses' next tokens, noise f32[B, T].

    Each device has a part of the vocabulary. They trade it for whole rows, and those that share rows take a part of
    them each, where they divide: so a row is gathered, shaped and searched once, not by all of them."""
    axis = "rows" if noise.shape[0] % split_over("rows") == 0 else "batch"
    flat = (noise.shape[0], logits.shape[-1])
    logits = constrain(jax.lax.reshape(logits, flat, out_sharding=spec("batch", "vocab")), axis, None)
    logits = shape_logits(logits, sampling, jnp.broadcast_to(index, noise.shape[:1]))
    uniform = constrain(jax.lax.dynamic_slice_in_dim(noise, index, 1, axis=1)[:, 0], axis)
    token, logprob = choose(logits, uniform, greedy=sampling.temperature == 0.0)
    return constrain(token, "batch"), constrain(logprob, "batch")


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


def stop_automaton(text: str, token_bytes: list[bytes], vocab: int) -> np.ndarray:
    """i32[len + 1, vocab]: the Knuth-Morris-Pratt automaton of ``text`` run over each token's bytes.

    A stop text is found however the tokenizer cuts it, also across tokens. Raises ValueError for an empty text."""
    pattern = text.encode()
    if not pattern:
        raise ValueError("generate.stop: '' is empty; a stop sequence has at least one character")
    size = len(pattern)
    byte_step = np.zeros((size + 1, 256), np.int32)
    fallback = 0  # the state after pattern[1:state]
    for state in range(size):
        byte_step[state] = byte_step[fallback] if state else 0
        byte_step[state, pattern[state]] = state + 1
        if state:
            fallback = byte_step[fallback, pattern[state]]
    byte_step[size] = size  # found stays found
    table = np.tile(np.arange(size + 1, dtype=np.int32)[:, None], (1, vocab))
    for token, piece in enumerate(token_bytes):
        for byte in piece:
            table[:, token] = byte_step[table[:, token], byte]
    return table
