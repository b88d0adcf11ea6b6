"""The programs that serve requests: chunks of prompts, and one token of every slot. Nothing else computes.

Prompts are computed in a few seats with caches of their own; once it is whole, a prompt's cache moves to a slot. Shapes
are few: the chunks, the number of slots and the width of all caches are each from a short list. Everything that a
request may choose is an array. So nothing compiles after ``warm_up``.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.models.attention.kernels import hardware_of
from jaxrlhf.models.config import ModelConfig, row_limit
from jaxrlhf.models.cpu import prompts_abreast
from jaxrlhf.models.decoding import decode_layout
from jaxrlhf.models.heads import lm_logits
from jaxrlhf.models.slot_decoding import (
    LayerSlots,
    blank_caches,
    keys_of,
    moved,
    read_columns,
    slot_of,
    widened,
    with_slot,
)
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.ops.sampling import RowSampling, choose, shape_rows, uniform_noise
from jaxrlhf.serve.jobs import Job
from jaxrlhf.types import Array, Params

SMALL, LARGE = 32, 128  # columns of a chunk of a prompt
SEATS = 4  # prompts that are computed at once
FIRST_WIDTH, GROWTH = 256, 4  # columns of the smallest caches; what widths, and numbers of slots, are multiplied by
LEAST_SLOTS = 4  # beside 1: fewer are hardly faster
TOP = 5  # the likeliest tokens that are told


class Settings(NamedTuple):
    """What each row asks for, as arrays of B rows."""

    sampling: RowSampling
    seed: Array  # i32[B]
    sample_id: Array  # i32[B]


class Told(NamedTuple):
    """What the model itself says of tokens: at temperature 1, without top-k and top-p."""

    logprob: Array  # f32[B]
    top_token: Array  # i32[B, TOP], the likeliest first
    top_logprob: Array  # f32[B, TOP]


class SlotStep(NamedTuple):
    """What was computed of each slot, on the device, perhaps not yet."""

    tokens: Array  # i32[B]
    hidden: Array  # [B, D]: the states before them


def settings_of(jobs: Sequence[Job | None]) -> Settings:
    """As NumPy arrays; None: greedy."""
    asks = [(0.0, 0, 1.0, 0, 0) if job is None else (*sampling_of(job), job.ask.seed, job.sample_id) for job in jobs]
    kinds = np.float32, np.int32, np.float32, np.int32, np.int32
    columns = [np.array(column, kind) for column, kind in zip(zip(*asks), kinds)]
    return Settings(RowSampling(*columns[:3]), *columns[3:])  # type: ignore[arg-type]


def sampling_of(job: Job) -> tuple[float, int, float]:
    return job.ask.temperature, job.ask.top_k, job.ask.top_p


def sizes_up_to(most: int, least: int) -> list[int]:
    """``most``, and what divisions by GROWTH make of it down to ``least``; the smallest first."""
    sizes = [most]
    while sizes[0] >= least * GROWTH:
        sizes.insert(0, -(-sizes[0] // GROWTH))
    return sizes


def tell(cfg: ModelConfig, params: Params, hidden: Array, token: Array) -> Told:
    """What hidden states [B, D] say of the tokens behind them, i32[B]."""
    logprobs = jax.nn.log_softmax(lm_logits(params, cfg, hidden[None])[0])
    top_logprob, top_token = jax.lax.top_k(logprobs, TOP)
    return Told(jnp.take_along_axis(logprobs, token[:, None], 1)[:, 0], top_token, top_logprob)


def pick(cfg: ModelConfig, params: Params, hidden: Array, position: Array, settings: Settings) -> Array:
    """The tokens i32[B] that follow hidden states [B, D], for ``position`` i32[B], by the same noise as generate.loop:
    of (seed, step 0, sample id, position)."""
    noise = lambda seed, ident, at: uniform_noise(seed, jnp.int32(0), ident[None], at[None, None])[0, 0]
    uniform = jax.vmap(noise)(settings.seed, settings.sample_id, position)
    logits = shape_rows(lm_logits(params, cfg, hidden[None])[0], settings.sampling)
    token, _ = choose(logits, uniform, settings.sampling.temperature == 0)
    return token


class Slots:
    """Rows of a model on one device: seats, in which prompts are computed, and slots, which decode.

    Args:
        count: slots, at most; ``self.sizes`` are the numbers of them that programs compute.
        limit: columns that a prompt and its response may have together, at most; ``self.limit`` is what is had.
    """

    def __init__(self, params: Params, cfg: ModelConfig, count: int, limit: int):
        self.device = jax.devices()[0]
        self.runtime = Runtime(hardware=hardware_of(self.device))
        self.cfg, self.count, self.seats = cfg, count, min(SEATS, count)
        limit = min(limit, row_limit(cfg) or limit)
        self.small = min(SMALL, limit)
        self.limit = limit // self.small * self.small
        self.sizes = sorted({1, *sizes_up_to(count, LEAST_SLOTS)})
        self.widths = [min(FIRST_WIDTH, self.limit)]
        while self.widths[-1] < self.limit:
            self.widths.append(min(self.widths[-1] * GROWTH, self.limit))
        params = jax.device_put(params, jax.sharding.SingleDeviceSharding(self.device))  # no mesh from here on
        lay_out = lambda params: decode_layout(params, cfg, "lm", self.runtime, count)
        self.params = jax.jit(lay_out)(params)
        self.compile()
        self.caches: list[LayerSlots] = []
        self.seat_caches: list[LayerSlots] = []
        self.reset()

    def compile(self) -> None:
        """The programs. Each is compiled for the shapes that it meets."""
        given = self.cfg, self.runtime
        self.chunk = jax.jit(functools.partial(read_chunk, *given), donate_argnums=1)
        self.chunks = jax.jit(functools.partial(read_chunks, *given), donate_argnums=1)
        self.step = jax.jit(functools.partial(decode_slots, *given), donate_argnums=1)
        self.pick = jax.jit(functools.partial(pick_last, self.cfg))
        self.tell = jax.jit(functools.partial(tell, self.cfg))
        self.row = jax.jit(lambda x, at: jax.lax.dynamic_index_in_dim(x, at, keepdims=False))
        self.settle = jax.jit(take_slot, donate_argnums=0)
        self.move = jax.jit(lambda caches, source: moved(caches, self.blank(len(source), caches), source))
        self.grow = jax.jit(widened, static_argnums=1)

    def blank(self, rows: int, like: int | list[LayerSlots]) -> list[LayerSlots]:
        """Empty caches of so many rows; ``like``: their columns, or caches that have as many."""
        columns = like if isinstance(like, int) else keys_of(like).shape[3]
        abreast = prompts_abreast(rows, 1, self.runtime.hardware)
        return blank_caches(self.cfg, rows // abreast, abreast, columns, self.runtime.compute)

    # ---- sizes ------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Empty caches of the smallest size; for when neither slots nor seats are in use."""
        if not self.caches or (self.rows, self.width) != (self.sizes[0], self.widths[0]):
            self.caches, self.seat_caches = [], []  # the old ones are freed first
            self.caches = self.blank(self.sizes[0], self.widths[0])
            self.seat_caches = self.blank(self.seats, self.widths[0])

    @property
    def rows(self) -> int:
        """Slots that the caches hold now."""
        groups, _, abreast, _, _ = keys_of(self.caches).shape
        return groups * abreast

    @property
    def width(self) -> int:
        return keys_of(self.caches).shape[3]

    def make_room(self, columns: int) -> None:
        """Widen the caches until they hold so many columns."""
        while self.width < columns:
            width = self.widths[self.widths.index(self.width) + 1]
            self.caches, self.seat_caches = self.grow(self.caches, width), self.grow(self.seat_caches, width)

    def resize(self, more: bool, kept: Sequence[int]) -> None:
        """The next larger or smaller number of slots, of which the first are those that are ``kept``, in that order."""
        rows = self.sizes[self.sizes.index(self.rows) + (1 if more else -1)]
        source = np.zeros(rows, np.int32)
        source[: len(kept)] = kept
        self.caches = self.move(self.caches, source)

    # ---- computing --------------------------------------------------------------------------------------------------

    def read(self, rests: Mapping[int, np.ndarray], starts: Mapping[int, int]) -> tuple[dict[int, int], Array]:
        """The forward pass over the next chunk of the prompts in some seats.

        Args:
            rests: seat -> i32[N], what is left of its prompt; of one seat, or of all that are in use.
            starts: seat -> its column in the prompt.

        Returns:
            (seat -> columns that were read, hidden states [1, C, D] of the one seat, or [seats, C, D] of all; the first
            columns of those that were read mean something).
        """
        together = len(rests) > 1
        size = LARGE if not together and min(map(len, rests.values())) >= LARGE else self.small
        counts = {seat: min(len(rest), size) for seat, rest in rests.items()}
        rows = [*range(self.seats)] if together else [*rests]
        tokens, start, count = np.zeros((len(rows), size), np.int32), *np.zeros((2, len(rows)), np.int32)
        for row, seat in enumerate(rows):
            if seat in rests:
                tokens[row, : counts[seat]], start[row] = rests[seat][: counts[seat]], starts[seat]
                count[row] = counts[seat]
        if together:
            hidden, self.seat_caches = self.chunks(self.params, self.seat_caches, tokens, start, count)
        else:
            seat = np.int32(rows[0])
            hidden, self.seat_caches = self.chunk(self.params, self.seat_caches, tokens, seat, start, count)
        return counts, hidden

    def first(self, hidden: Array, last: np.ndarray, positions: np.ndarray, settings: Settings) -> SlotStep:
        """The tokens for ``positions`` i32[P], behind the columns ``last`` i32[P] of chunks [P, C, D]."""
        return SlotStep(*self.pick(self.params, hidden, last, positions, settings))

    def take(self, seat: int, slot: int) -> None:
        """Move the cache of a seat to a slot."""
        self.caches = self.settle(self.caches, self.seat_caches, np.int32(seat), np.int32(slot))

    def decode(self, given: np.ndarray, before: SlotStep | None, positions: np.ndarray, settings: Settings) -> SlotStep:
        """The tokens behind those ``given`` i32[B], which stand at ``positions``, in every slot. Where -1 is given, it
        is behind the token of the step ``before``, which has as many slots."""
        tokens = given if before is None else before.tokens
        token, hidden, self.caches = self.step(self.params, self.caches, given, tokens, positions, settings)
        return SlotStep(token, hidden)

    def say(self, hidden: Array, tokens: Array | np.ndarray) -> Told:
        """What the states [B, D] say of the tokens behind them, as NumPy arrays."""
        return jax.device_get(self.tell(self.params, hidden, tokens))

    def warm_up(self) -> None:
        """Compile every program: chunks, steps of all sizes and what moves caches, at all widths."""
        seats = [{0: 1}, *([{0: 1, self.seats - 1: 1}] if self.seats > 1 else []), {0: LARGE}]
        for width in self.widths:
            self.make_room(width)
            for lengths in seats[: None if width >= LARGE else -1]:
                rests = {seat: np.zeros(length, np.int32) for seat, length in lengths.items()}
                _, hidden = self.read(rests, dict.fromkeys(rests, 0))
                rows, zeros = len(hidden), np.zeros(len(hidden), np.int32)
                step = self.first(hidden, zeros, zeros, settings_of([None] * rows))
                self.say(step.hidden, step.tokens)
                self.say(self.row(hidden, np.int32(0)), np.zeros(hidden.shape[1], np.int32))
            for size in self.sizes:
                if size > self.rows:
                    self.resize(True, [])
                self.take(0, 0)
                zeros, every = np.zeros(size, np.int32), settings_of([None] * size)
                step = self.decode(zeros, self.decode(zeros, None, zeros, every), zeros, every)
                self.say(step.hidden, step.tokens)
            while self.rows > 1:
                self.resize(False, [])
        self.widen_all()
        self.reset()

    def widen_all(self) -> None:
        """Compile what widens the caches, of all numbers of slots."""
        for size in self.sizes:
            for width, wider in zip(self.widths, self.widths[1:]):
                self.caches = self.blank(size, width)
                self.caches = self.grow(self.caches, wider)


def read_chunk(
    cfg: ModelConfig,
    runtime: Runtime,
    params: Params,
    caches: list[LayerSlots],
    tokens: Array,
    seat: Array,
    start: Array,
    count: Array,
) -> tuple[Array, list[LayerSlots]]:
    """The program of Slots.read for one seat: tokens i32[1, C]; start, count i32[1]."""
    hidden, own = read_columns(params, cfg, tokens, start, count, slot_of(caches, seat), runtime)
    return hidden, with_slot(caches, own, seat)


def read_chunks(
    cfg: ModelConfig,
    runtime: Runtime,
    params: Params,
    caches: list[LayerSlots],
    tokens: Array,
    start: Array,
    count: Array,
) -> tuple[Array, list[LayerSlots]]:
    """The program of Slots.read for all seats: tokens i32[seats, C]; start, count i32[seats]."""
    return read_columns(params, cfg, tokens, start, count, caches, runtime)


def pick_last(
    cfg: ModelConfig, params: Params, hidden: Array, last: Array, position: Array, settings: Settings
) -> tuple[Array, Array]:
    """The program of Slots.first: the tokens and the states before them."""
    state = jax.vmap(lambda chunk, at: jax.lax.dynamic_index_in_dim(chunk, at, keepdims=False))(hidden, last)
    return pick(cfg, params, state, position, settings), state


def take_slot(caches: list[LayerSlots], seats: list[LayerSlots], seat: Array, slot: Array) -> list[LayerSlots]:
    """The program of Slots.take."""
    return with_slot(caches, slot_of(seats, seat), slot)


def decode_slots(
    cfg: ModelConfig,
    runtime: Runtime,
    params: Params,
    caches: list[LayerSlots],
    given: Array,
    before: Array,
    positions: Array,
    settings: Settings,
) -> tuple[Array, Array, list[LayerSlots]]:
    """The program of Slots.decode: one token of each slot."""
    tokens = jnp.where(given >= 0, given, before)
    hidden, caches = read_columns(params, cfg, tokens[:, None], positions, jnp.ones_like(positions), caches, runtime)
    return pick(cfg, params, hidden[:, 0], positions + 1, settings), hidden[:, 0], caches
