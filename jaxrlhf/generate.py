"""The jitted sampler: Prompts -> Sequences."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.heads import lm_logits
from jaxrlhf.models.transformer import Cache, Runtime, decode_layout, decode_step, prefill
from jaxrlhf.ops.rows import group_rows, lay_rows, repeat_rows, ungroup_rows
from jaxrlhf.ops.sampling import Sampling, choose, shape_logits, uniform_noise
from jaxrlhf.sharding import constrain, decoding, spec
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
    return Sampler(sampling, ask.max_new_tokens, eos_ids, pad_id, stops, samples_per_prompt)


class Decoding(NamedTuple):
    """What the decode loop carries."""

    index: Array  # i32[]: response tokens sampled so far
    hidden: Array  # [G, n, D]: state before the next token of each response
    caches: list[Cache]
    tokens: Array  # i32[B, T]
    logprobs: Array  # f32[B, T]
    mask: Array  # bool[B, T]: sampled before the row ended, the ending token included
    done: Array  # bool[B]
    stop_states: tuple[Array, ...]  # i32[B] a stop text


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
    params = decode_layout(params, cfg, "lm", runtime)
    hidden, caches = prefill(params, cfg, prompts.tokens, prompts.valid, copies, room, runtime)
    state = start_decoding(hidden, caches, prompts, sampler)
    each = repeat_rows(prompts, copies)
    tokens, valid = each.tokens, each.valid
    sample_id = each.sample_id * copies + jnp.arange(tokens.shape[0]) % copies
    positions = valid.sum(1, dtype=jnp.int32)[:, None] + jnp.arange(room)
    noise = uniform_noise(seed, step, sample_id, positions)
    state = decode_loop(params, cfg, state, prompts.valid, noise, sampler, runtime)
    everything = jnp.concatenate([tokens, state.tokens], 1)
    pad = lambda x: jnp.pad(x, ((0, 0), (prompt_size, 0)))
    return Sequences(
        tokens=everything,
        valid=jnp.concatenate([valid, state.mask], 1),
        response_mask=pad(state.mask),
        logprobs=pad(state.logprobs),
        ended=state.done,
        response_start=prompt_size,
        copies=sampler.copies,
    )


def start_decoding(hidden: Array, caches: list[Cache], prompts: Prompts, sampler: Sampler) -> Decoding:
    """The state before the first tokens; hidden [G, 1, D] of the prompts."""
    groups, copies, room = hidden.shape[0], sampler.samples_per_prompt, sampler.max_new_tokens
    rows = groups * copies
    empty = lambda dtype: constrain(jnp.zeros((rows, room), dtype), "batch", None)
    row = lambda dtype: constrain(jnp.zeros((rows,), dtype), "batch")
    return Decoding(
        index=jnp.int32(0),
        hidden=jnp.broadcast_to(hidden, (groups, copies, hidden.shape[2])),
        caches=caches,
        tokens=empty(jnp.int32) + sampler.pad_id,
        logprobs=empty(jnp.float32),
        mask=empty(bool),
        done=repeat_rows(~prompts.valid.any(axis=1), copies),  # a row without a prompt fills up a batch: no response
        stop_states=tuple(row(jnp.int32) for _ in sampler.stops),
    )


def decode_loop(
    params: Params, cfg: ModelConfig, state: Decoding, prompt: Array, noise: Array, sampler: Sampler, runtime: Runtime
) -> Decoding:
    """Sample, read, repeat, until every row has ended or the room is used up.

    prompt bool[G, P]: the columns that hold tokens; noise f32[G * n, T]."""
    copies = sampler.samples_per_prompt
    limits = sampler.max_new_tokens + 1 if sampler.limits is None else constrain(jnp.asarray(sampler.limits), "batch")

    def unfinished(state: Decoding):
        return (state.index < sampler.max_new_tokens) & ~state.done.all()

    def step(state: Decoding) -> Decoding:
        logits = constrain(ungroup_rows(lm_logits(params, cfg, state.hidden)), "batch", None)
        logits = shape_logits(logits, sampler.sampling, jnp.broadcast_to(state.index, state.done.shape))
        uniform = jax.lax.dynamic_slice_in_dim(noise, state.index, 1, axis=1)[:, 0]
        token, logprob = choose(logits, uniform, greedy=sampler.sampling.temperature == 0.0)
        live = ~state.done
        token = jnp.where(live, token, sampler.pad_id)
        stop_states, stopped = follow_stops(sampler.stops, state.stop_states, token)
        write = lambda old, new: jax.lax.dynamic_update_slice(old, new[:, None], (0, state.index))
        hidden, caches = decode_step(params, cfg, group_rows(token, copies), state.index, prompt, state.caches, runtime)
        return Decoding(
            index=state.index + 1,
            hidden=hidden,
            caches=caches,
            tokens=write(state.tokens, token),
            logprobs=write(state.logprobs, jnp.where(live, logprob, 0.0)),
            mask=write(state.mask, live),
            done=state.done | is_any(token, sampler.eos_ids) | stopped | (state.index + 1 >= limits),
            stop_states=stop_states,
        )

    return jax.lax.while_loop(unfinished, step, state)


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
