"""The jitted sampler: Prompts -> Sequences."""

import functools

import jax
import jax.numpy as jnp

from jaxrlhf.generate.compaction import Lines, all_ended, compact, lines_of, live_places, put_back
from jaxrlhf.generate.sampler import Sampler
from jaxrlhf.generate.state import Decoding, LoopRows, blank_rows
from jaxrlhf.generate.stop_texts import follow_stops, is_any
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.cpu import prompts_abreast
from jaxrlhf.models.decoding import abreast, decode_layout, decode_step, prefill
from jaxrlhf.models.experts import OWN, Routed, routing_dtype
from jaxrlhf.models.heads import IMPOSSIBLE, lm_logits
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.ops.rows import group_rows, lay_rows, repeat_rows, ungroup_rows
from jaxrlhf.ops.sampling import Sampling, choose, shape_logits, uniform_noise
from jaxrlhf.sharding import constrain, decoding, spec, split_over
from jaxrlhf.types import Array, Params, Prompts, Sequences

Guides = tuple[Params, ...]  # heads of action values on the trunk of what is sampled from


def sample(
    params: Params,
    cfg: ModelConfig,
    prompts: Prompts,
    seed: Array,
    step: Array,
    sampler: Sampler,
    runtime: Runtime,
    guides: Guides = (),
) -> Sequences:
    """Sample ``samples_per_prompt`` responses to each prompt, [B * n, P + T], stopping when all rows have ended.

    Logprobs are of the distribution sampled from (after temperature, top-k, top-p), and the noise of a token depends on
    (seed, step, sample id, position) only. One prefill a prompt is shared by its samples. ``guides``: see next_logits.
    """
    with decoding():
        sequences = respond(params, cfg, lay_rows(prompts), seed, step, sampler, runtime, guides)
    return lay_rows(sequences)


def respond(
    params: Params,
    cfg: ModelConfig,
    prompts: Prompts,
    seed: Array,
    step: Array,
    sampler: Sampler,
    runtime: Runtime,
    guides: Guides = (),
) -> Sequences:
    """``sample`` in the layout of decoding."""
    copies, room = sampler.samples_per_prompt, sampler.max_new_tokens
    prompt_size = prompts.tokens.shape[1]
    size = prompts.tokens.shape[0] * copies
    params = decode_layout(params, cfg, "lm", runtime, size)
    guides = tuple(decode_layout(head, cfg, "action", runtime, size) for head in guides)
    routed: list[Routed] = []
    hidden, caches = prefill(params, cfg, prompts.tokens, prompts.valid, copies, room, runtime, routed.append)
    read_by = kept_routing(routed, prompts.valid, cfg) if sampler.keeps_routing else None
    each, read_by = repeat_rows((prompts, read_by), copies)
    tokens, valid = each.tokens, each.valid
    sample_id = each.sample_id * copies + jnp.arange(tokens.shape[0]) % copies
    positions = valid.sum(1, dtype=jnp.int32)[:, None] + jnp.arange(room)
    rows = blank_rows(valid, uniform_noise(seed, step, sample_id, positions), sampler, read_by)
    hidden, read = jnp.broadcast_to(hidden, (hidden.shape[0], copies, hidden.shape[2])), prompts.valid[:, None]
    if (width := prompts_abreast(hidden.shape[0], copies, runtime.hardware)) > 1:
        hidden, read, caches = group_rows(hidden[:, 0], width), group_rows(read[:, 0], width), abreast(caches, width)
    state = Decoding(jnp.int32(0), hidden, caches, rows)
    rows = decode(params, guides, cfg, state, read, sampler, runtime)
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
        routing=None if read_by is None else jnp.concatenate([read_by, known(rows.routing, rows.mask)], 1),
    )


def kept_routing(routed: list[Routed], valid: Array, cfg: ModelConfig) -> Array:
    """[R, C, layers * k] of tokens bool[R, C], by what each layer's router said of them, or of their last columns."""
    columns, dtype = valid.shape[1], routing_dtype(cfg)

    def one(choice: Array) -> Array:
        left = ((0, 0), (columns - choice.shape[1], 0), (0, 0))
        return jnp.pad(choice.astype(dtype), left, constant_values=OWN)

    return known(jnp.concatenate([one(layer.choice) for layer in routed], axis=-1), valid)


def known(routing: Array | None, valid: Array) -> Array:
    """``routing`` of the tokens that are ``valid``; OWN elsewhere."""
    assert routing is not None
    return jnp.where(valid[..., None], routing, jnp.asarray(OWN, routing.dtype))


def decode(
    params: Params,
    guides: Guides,
    cfg: ModelConfig,
    state: Decoding,
    prompt: Array,
    sampler: Sampler,
    runtime: Runtime,
) -> LoopRows:
    """The rows after the decode loop: until every row has ended or ``max_new_tokens`` are sampled. ``prompt``: see
    decode_step.

    With ``halvings`` there are several loops, each compiled. A loop ends once at most half of its places (see
    compaction.Lines) are live, and the next one computes these alone. At the end the rows of each loop are put back
    among those of the loop before it."""

    def loop(state: Decoding, prompt: Array, lines: Lines | None) -> Decoding:
        def unfinished(state: Decoding) -> Array:
            live = (
                ~state.rows.done.all() if lines is None else (~all_ended(state.rows, lines)).sum(1).max() > lines.kept
            )
            return (state.index < sampler.max_new_tokens) & live

        one_token = functools.partial(decode_token, params, guides, cfg, prompt, sampler, runtime)
        return jax.lax.while_loop(unfinished, one_token, state)

    compacted: list[tuple[LoopRows, Array, Lines]] = []
    while len(compacted) < sampler.halvings and (lines := lines_of(state, sampler)):
        state = loop(state, prompt, lines)
        compacted.append((state.rows, places := live_places(state.rows, lines), lines))
        state, prompt = compact(state, prompt, places, lines)
    rows = loop(state, prompt, None).rows
    for before, places, lines in reversed(compacted):
        rows = put_back(before, rows, places, lines)
    return rows


def decode_token(
    params: Params,
    guides: Guides,
    cfg: ModelConfig,
    prompt: Array,
    sampler: Sampler,
    runtime: Runtime,
    state: Decoding,
) -> Decoding:
    """Choose the next token of every row, and read it."""
    every, copies = state.rows, state.hidden.shape[1]
    read = lambda x: jax.lax.dynamic_slice_in_dim(x, state.index, 1, axis=1) if x.ndim == 2 else x
    write = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, state.index)) if old.ndim == 2 else new
    logits = next_logits(params, guides, cfg, state.hidden, sampler.beta)
    rows = next_tokens(logits, state.index, jax.tree.map(read, every), sampler)
    token = group_rows(rows.tokens[:, 0], copies)
    routed: list[Routed] = []
    hidden, caches = decode_step(params, cfg, token, state.index, prompt, state.caches, runtime, routed.append)
    rows = jax.tree.map(write, every, rows)._replace(noise=every.noise)
    if every.routing is not None:
        new = kept_routing(routed, jnp.ones_like(token, bool), cfg)
        new = ungroup_rows(new)[:, None]
        rows = rows._replace(routing=jax.lax.dynamic_update_slice(every.routing, new, (0, state.index, 0)))
    return Decoding(state.index + 1, hidden, caches, rows)


def next_logits(params: Params, guides: Guides, cfg: ModelConfig, hidden: Array, beta: float) -> Array:
    """f32[G, n, V] of the responses' next tokens, from hidden [G, n, D]. With ``guides``, heads of action values on the
    same states, those of

        policy(a | s) * exp(beta * (Q(s, a) - V(s)))        Q: the lowest of theirs

    V is one number a state, so that it cancels.

    Source: Snell et al. 2022 (arXiv:2206.11871), section 4."""
    logits = lm_logits(params, cfg, hidden)
    if not guides:
        return logits
    lowest = functools.reduce(jnp.minimum, (lm_logits(head, cfg, hidden) for head in guides))
    return jnp.where(logits > IMPOSSIBLE, logits + beta * lowest, logits)  # not of rows that pad the vocabulary


def next_tokens(logits: Array, index: Array, rows: LoopRows, sampler: Sampler) -> LoopRows:
    """``rows``, of which only the column of their next tokens is given, [B, 1], with what is chosen for it. logits
    [G, n, V]; ``index`` i32[]: tokens of each response so far."""
    token, logprob = choose_tokens(logits, rows.noise[:, 0], index, sampler.sampling)
    live = ~rows.done
    token = jnp.where(live, token, sampler.pad_id)
    stop_states, stopped = follow_stops(sampler.stops, rows.stop_states, token)
    ended = is_any(token, sampler.eos_ids) | stopped
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
