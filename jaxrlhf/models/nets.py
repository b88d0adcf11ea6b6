"""What algorithms ask of networks, bound to the run's models: see types.Nets."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.models.config import MLP, ModelConfig
from jaxrlhf.models.context import SplitRows, forward_split, split_rows
from jaxrlhf.models.heads import gathered_head, lm_logits, scalar, scale_gradient
from jaxrlhf.models.lora import Based, params_of
from jaxrlhf.models.mlp import observed_states
from jaxrlhf.models.parameters import padded_vocab
from jaxrlhf.models.response_packing import Places, apart, places, side_by_side
from jaxrlhf.models.transformer import NO_ROUTING, Routing, Runtime, forward, forward_responses
from jaxrlhf.ops.divergence import divergence_stats
from jaxrlhf.ops.logprobs import action_values, in_chunks, stored_logits, token_logprobs
from jaxrlhf.ops.masked import at_last, keep
from jaxrlhf.ops.rows import group_rows, repeat_rows
from jaxrlhf.ops.sampling import Sampling, shape_logits
from jaxrlhf.sharding import constrain
from jaxrlhf.types import (
    Array,
    Ask,
    Divergence,
    DivergenceStats,
    Grader,
    Nets,
    Noted,
    Params,
    QStats,
    Role,
    Sample,
    Sequences,
    TokenStats,
    Trees,
    given,
)


def segments(sequences: Sequences) -> Array:
    """i32[B, S]: which document of its row a token belongs to; 0 is padding, which is never attended."""
    if sequences.segment_ids is not None:
        return sequences.segment_ids
    return sequences.valid.astype(jnp.int32)


class TrunkPass(NamedTuple):
    """Hidden states of a trunk over responses: R rows of C columns. These are the B rows of T response columns, or they
    are packed: several responses to one prompt in a row.

    Where columns are ``split`` over devices, R = B and the states [B, C, D] are those of all C columns, as they lie;
    each is the one before the token of the next column."""

    states: Array  # [R, 1 + C, D]: of the prompts' last column, and of the response tokens
    tokens: Array  # i32[R, C]: the response tokens; split: those of the next columns
    where: Places | None = None  # where each packed token belongs; None: not packed
    split: SplitRows | None = None
    start: int = 1  # split: the first response column

    def before(self) -> Array:
        """[R, C, D]: the state before each response token."""
        if self.split is not None:
            return self.states
        before = self.states[:, :-1]
        return before if self.where is None else jnp.where(self.where.index[..., None] == 0, self.states[:, :1], before)

    def read_by(self, trunk: "Trunk | None") -> Array:
        """``before`` for a head on a trunk, or None for a model's own head."""
        return self.before() if trunk is None else scale_gradient(self.before(), trunk.gradient)

    def index(self, columns: Array) -> Array:
        """i32, broadcastable to [R, columns]: how many response tokens precede those in ``columns``."""
        if self.split is not None:
            return self.split.columns()[columns] + 1 - self.start
        return columns if self.where is None else self.where.index.at[:, columns].get(mode="clip")

    def tokens_at(self, columns: Array) -> Array:
        """i32[R, columns]: ``tokens`` in some columns."""
        if self.split is None:
            return self.tokens.at[:, columns].get(mode="clip")
        return constrain(constrain(self.tokens, "batch", None)[:, columns], "batch", "seq")

    def rows(self, x: Array) -> Array:
        """[R, C] -> [B, T], of what is ``before`` the response tokens."""
        if self.split is not None:
            return self.split.in_order(x)[:, self.start - 1 : -1]
        return x if self.where is None else apart(x, self.where)

    def behind(self, x: Array) -> Array:
        """[B, T] of the response tokens themselves, from what is of every state."""
        return self.rows(x[:, 1:]) if self.split is None else self.split.in_order(x)[:, self.start :]

    def at_last(self, x: Array, valid: Array) -> Array:
        """[B]: at each row's last token, of those that ``valid`` bool[B, 1 + T] marks, from what is of every state; 0
        if there is none."""
        if self.split is not None:
            every = self.split.in_order(x)[:, self.start - 1 :]
        else:
            every = x if self.where is None else jnp.concatenate([self.prompts(x), self.behind(x)], axis=1)
        return jnp.where(at_last(valid), every, 0.0).sum(-1)

    def prompts(self, x: Array) -> Array:
        """[R, 1 + C] -> [B, 1]: what belongs to the prompts' last column."""
        assert self.where is not None
        return repeat_rows(x[:, :1], self.where.column.shape[1])


class Trunk(NamedTuple):
    """What a bare head stands on."""

    role: Role  # whose trunk it is
    gradient: float = 1.0  # share of the head's gradient that reaches it


def widen(x: Array, sequences: Sequences) -> Array:
    """f32[B, S] of the responses' columns alone; the prompts' are 0."""
    return jnp.pad(x, ((0, 0), (sequences.response_start, 0)))


def no_sampling(*_: Any) -> Sequences:
    """Nets.sample of networks that only read."""
    raise AssertionError("nothing is sampled here")


def make_nets(
    configs: dict[Role, ModelConfig],
    runtime: Runtime,
    sampling: Sampling,
    sample: Sample,
    trunks: Mapping[Role, Trunk] = MappingProxyType({}),
    graders: Mapping[Role, Grader] = MappingProxyType({}),
    bases: Mapping[Role, Based] = MappingProxyType({}),
    replays: frozenset[Role] = frozenset(),
) -> Nets:
    """Nets for models of these (resolved) shapes. ``sampling``: how responses are sampled, so what log-probs are of;
    ``sample``: Nets.sample; ``trunks`` of bare heads; ``graders``: ensembles; ``bases`` of roles that share weights;
    ``replays``: roles that follow the choice of experts that responses were sampled with, where it is kept."""
    stored = stored_logits(runtime.hardware.platform)
    whole = functools.partial(params_of, bases=bases)
    trunk_of = lambda role: trunks[role].role if role in trunks else role

    def read(trees: Trees, sequences: Sequences, /, *asks: Ask, noted: Noted | None = None) -> tuple[Any, ...]:
        asked = dict.fromkeys(trunk_of(role) for ask in asks for role in ask.roles)
        routing = {trunk: routing_of(trunk, sequences, replays, noted) for trunk in asked}
        run = lambda trunk: run_trunk(whole(trunk, trees), configs[trunk], sequences, runtime, routing[trunk])
        passes = {trunk: run(trunk) for trunk in asked}

        def answer(ask: Ask) -> Any:
            found = [passes[trunk_of(role)] for role in ask.roles]
            if ask.what == "divergence":
                models = [(whole(role, trees), configs[role]) for role in ask.roles]
                return jax.tree.map(lambda x: widen(x, sequences), compared(found, models, ask.how, runtime))
            return answers[ask.what](found[0], ask.role, trees, sequences)

        return tuple(map(answer, asks))

    def token_stats(found: TrunkPass, role: Role, trees: Trees, sequences: Sequences) -> TokenStats:
        cfg, head = configs[role], gathered_head(whole(role, trees), runtime.compute)
        logits_of = shaped_logits(head, cfg, sampling, found)
        stats = in_chunks(token_logprobs, found.before(), found.tokens, logits_of, padded_vocab(cfg), stored)
        return jax.tree.map(lambda x: widen(found.rows(x), sequences), stats)

    def q(found: TrunkPass, role: Role, trees: Trees, sequences: Sequences) -> QStats:
        cfg, head = configs[role], gathered_head(whole(role, trees), runtime.compute)
        q_of = lambda hidden, columns: lm_logits(head, cfg, hidden)
        stats = in_chunks(action_values, found.read_by(trunks.get(role)), found.tokens, q_of, padded_vocab(cfg), stored)
        return jax.tree.map(lambda x: widen(found.rows(x), sequences), stats)

    def values(found: TrunkPass, role: Role, trees: Trees, sequences: Sequences) -> Array:
        return widen(found.rows(scalar(whole(role, trees), found.read_by(trunks.get(role)))), sequences)

    def rewards(found: TrunkPass, role: Role, trees: Trees, sequences: Sequences) -> Array:
        every = scalar(whole(role, trees), found.states)
        return keep(widen(found.behind(every), sequences), sequences.response_mask)

    def scores(found: TrunkPass, role: Role, trees: Trees, sequences: Sequences) -> Array:
        if sequences.observations is not None:
            return rewards(found, role, trees, sequences).sum(-1)
        every = scalar(whole(role, trees), found.states)
        return found.at_last(every, sequences.valid[:, sequences.response_start - 1 :])

    answers = {"token_stats": token_stats, "values": values, "scores": scores, "rewards": rewards, "q": q}
    noting = lambda noted: functools.partial(read, noted=noted)
    return Nets(read, sample, graders, noting=noting if any(cfg.num_experts for cfg in configs.values()) else None)


def routing_of(trunk: Role, sequences: Sequences, replays: frozenset[Role], noted: Noted | None) -> Routing:
    """What a pass of ``trunk`` over the rows follows, and where it says what was measured of its routers."""
    note = None if noted is None else lambda found: noted.append((trunk, found))
    return Routing(note, sequences.routing if trunk in replays else None)


def shaped_logits(head: Params, cfg: ModelConfig, sampling: Sampling, found: TrunkPass) -> Callable[..., Array]:
    """(hidden states, columns) -> the logits there, as they were sampled from."""

    def logits_of(hidden: Array, columns: Array) -> Array:
        logits = lm_logits(head, cfg, hidden)
        keep = found.tokens_at(columns) if sampling.top_k or sampling.top_p < 1 else None
        return shape_logits(logits, sampling, found.index(columns), keep)

    return logits_of


def compared(
    passes: Sequence[TrunkPass], models: Sequence[tuple[Params, ModelConfig]], how: Divergence, runtime: Runtime
) -> DivergenceStats:
    """How far the first of two models is from the second at each response token, [B, T], over the rows of vocabulary
    that both have: logits of both are computed a chunk of columns at a time."""
    vocab = min(cfg.vocab_size for _, cfg in models)
    shapes = [dataclasses.replace(cfg, vocab_size=vocab) for _, cfg in models]
    width, (ours, theirs) = padded_vocab(shapes[0]), passes
    heads = [gathered_head(params, runtime.compute, width) for params, _ in models]

    def logits_of(hidden, columns):
        return [lm_logits(head, cfg, states) for head, cfg, states in zip(heads, shapes, hidden, strict=True)]

    def reduce(logits, tokens):
        student, teacher = logits
        return divergence_stats(student, teacher, how)

    states = [ours.before(), jax.lax.stop_gradient(theirs.before())]
    stored = stored_logits(runtime.hardware.platform)
    return jax.tree.map(ours.rows, in_chunks(reduce, states, ours.tokens, logits_of, 2 * width, stored))


def run_trunk(
    params: Params, cfg: ModelConfig, sequences: Sequences, runtime: Runtime, routing: Routing = NO_ROUTING
) -> TrunkPass:
    """The forward pass of one trunk over the rows."""
    if cfg.family == MLP:
        observations = given(sequences.observations, "sequences.observations")
        states = observed_states(params, cfg, observations, runtime)[:, sequences.response_start - 1 :]
        return TrunkPass(states, sequences.tokens[:, sequences.response_start :])
    start, tokens, valid, copies = sequences.response_start, sequences.tokens, sequences.valid, sequences.copies
    if (split := split_rows(tokens.shape[1])) is not None:
        states = forward_split(params, cfg, tokens, segments(sequences), split, runtime, routing)
        ahead = constrain(split.spread(next_tokens(tokens)), "batch", "seq")
        return TrunkPass(states, ahead, split=split, start=start)
    if sequences.segment_ids is not None or start == 1:
        states = forward(params, cfg, tokens, segments(sequences), runtime, routing)[:, start - 1 :]
        return TrunkPass(states, tokens[:, start:])
    if sequences.width is None:
        states = forward_responses(params, cfg, tokens, valid, start, copies, runtime, routing=routing)
        return TrunkPass(states, tokens[:, start:])
    where = places(group_rows(valid[:, start:], copies), sequences.width)
    states = forward_responses(params, cfg, tokens, valid, start, copies, runtime, where, routing)
    return TrunkPass(states, side_by_side(tokens[:, start:], where), where)


def next_tokens(tokens: Array) -> Array:
    """i32[B, S]: the token of the next column; 0 in the last one."""
    return jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
