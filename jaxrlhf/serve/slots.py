"""The programs that serve requests: chunks of prompts, and one token of every slot. Nothing else computes.

Their shapes are few: two widths of chunks, and a width of the caches from a short list. Everything that a request may
choose is an array, so that after ``warm_up`` nothing compiles.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.models.attention.kernels import hardware_of
from jaxrlhf.models.config import ModelConfig, row_limit
from jaxrlhf.models.cpu import prompts_abreast
from jaxrlhf.models.decoding import decode_layout
from jaxrlhf.models.heads import lm_logits
from jaxrlhf.models.slot_decoding import SlotCache, blank_caches, read_columns, slot_of, with_slot
from jaxrlhf.models.transformer import Runtime
from jaxrlhf.ops.sampling import RowSampling, choose, shape_rows, uniform_noise
from jaxrlhf.types import Array, Params

SMALL, LARGE = 32, 128  # columns of a chunk of a prompt
FIRST_WIDTH, GROWTH = 256, 4  # columns of the smallest caches; what they are multiplied by to grow
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


def settings_of(rows: int) -> Settings:
    """The greedy settings of rows that are to be filled in, as NumPy arrays."""
    sampling = RowSampling(np.zeros(rows, np.float32), np.zeros(rows, np.int32), np.ones(rows, np.float32))  # type: ignore[arg-type]
    return Settings(sampling, np.zeros(rows, np.int32), np.zeros(rows, np.int32))  # type: ignore[arg-type]


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
    """``count`` rows of a model on one device, each with its own request: first its prompt, then its response.

    Args:
        limit: columns that a prompt and its response may have together, at most; ``self.limit`` is what is had.
    """

    def __init__(self, params: Params, cfg: ModelConfig, count: int, limit: int):
        self.device = jax.devices()[0]
        self.runtime = Runtime(hardware=hardware_of(self.device))
        self.cfg, self.count = cfg, count
        self.abreast = prompts_abreast(count, 1, self.runtime.hardware)
        limit = min(limit, row_limit(cfg) or limit)
        self.small = min(SMALL, limit)
        self.limit = limit // self.small * self.small
        self.widths = [min(FIRST_WIDTH, self.limit)]
        while self.widths[-1] < self.limit:
            self.widths.append(min(self.widths[-1] * GROWTH, self.limit))
        params = jax.device_put(params, jax.sharding.SingleDeviceSharding(self.device))  # no mesh from here on
        lay_out = lambda params: decode_layout(params, cfg, "lm", self.runtime, count)
        self.params = jax.jit(lay_out)(params)
        self.chunk = jax.jit(functools.partial(read_chunk, cfg, self.runtime), donate_argnums=1)
        self.step = jax.jit(functools.partial(decode_slots, cfg, self.runtime), donate_argnums=1)
        self.pick = jax.jit(functools.partial(pick, cfg))
        self.tell = jax.jit(functools.partial(tell, cfg))
        self.column = jax.jit(lambda hidden, at: jax.lax.dynamic_slice_in_dim(hidden, at, 1))
        self.grow = jax.jit(widened, static_argnums=1)
        self.caches: list[SlotCache] = []
        self.reset()

    def reset(self) -> None:
        """Empty caches of the smallest width; for when no slot is in use."""
        if not self.caches or self.width != self.widths[0]:
            self.caches = []  # the old ones are freed first
            groups = self.count // self.abreast
            self.caches = blank_caches(self.cfg, groups, self.abreast, self.widths[0], self.runtime.compute)

    @property
    def width(self) -> int:
        return self.caches[0].key.shape[3]

    def make_room(self, columns: int) -> None:
        """Widen the caches until they hold so many columns."""
        while self.width < columns:
            self.caches = self.grow(self.caches, self.widths[self.widths.index(self.width) + 1])

    def read(self, tokens: np.ndarray, slot: int, start: int) -> tuple[int, Array]:
        """The forward pass over the next chunk of a slot's prompt: ``tokens`` i32[N] are its rest from column ``start``
        on. Returns (columns that were read, hidden states [C, D], of which the first so many mean something)."""
        size = LARGE if len(tokens) >= LARGE else self.small
        count = min(len(tokens), size)
        row = np.zeros((1, size), np.int32)
        row[0, :count] = tokens[:count]
        hidden, self.caches = self.chunk(self.params, self.caches, row, np.int32(slot), np.int32(start))
        return count, hidden

    def first(self, hidden: Array, last: int, position: int, settings: Settings) -> tuple[int, Array]:
        """The token behind column ``last`` of a chunk, for ``position``, and the state before it, [1, D]; ``settings``
        are of one row."""
        state = self.column(hidden, np.int32(last))
        return int(self.pick(self.params, state, np.full(1, position, np.int32), settings)[0]), state

    def decode(self, tokens: np.ndarray, positions: np.ndarray, settings: Settings) -> tuple[np.ndarray, Array]:
        """The tokens behind ``tokens`` i32[B], which stand at ``positions``, in every slot; the states before them."""
        hidden, self.caches = self.step(self.params, self.caches, tokens, positions)
        return np.asarray(self.pick(self.params, hidden, positions + 1, settings)), hidden

    def say(self, hidden: Array, tokens: np.ndarray) -> Told:
        """What the states say of the tokens behind them, as NumPy arrays."""
        return jax.device_get(self.tell(self.params, hidden, tokens))

    def warm_up(self) -> None:
        """Compile every program: all sizes of chunks and a step, at all widths."""
        every, zeros = settings_of(self.count), np.zeros(self.count, np.int32)
        for width in self.widths:
            self.make_room(width)
            for size in [self.small, *([LARGE] if width >= LARGE else [])]:
                _, hidden = self.read(np.zeros(size, np.int32), 0, 0)
                self.say(hidden, np.zeros(size, np.int32))
                _, state = self.first(hidden, 0, 0, settings_of(1))
            self.say(self.decode(zeros, zeros, every)[1], zeros)
        self.say(state, np.zeros(1, np.int32))
        self.reset()


def widened(caches: list[SlotCache], columns: int) -> list[SlotCache]:
    """``caches`` of so many columns; the new ones are empty."""
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, columns - x.shape[3]), (0, 0)))
    return jax.tree.map(pad, caches)


def read_chunk(
    cfg: ModelConfig,
    runtime: Runtime,
    params: Params,
    caches: list[SlotCache],
    tokens: Array,
    slot: Array,
    start: Array,
) -> tuple[Array, list[SlotCache]]:
    """The program of Slots.read: tokens i32[1, C] of a slot."""
    hidden, own = read_columns(params, cfg, tokens, start[None], slot_of(caches, slot), runtime)
    return hidden[0], with_slot(caches, own, slot)


def decode_slots(
    cfg: ModelConfig, runtime: Runtime, params: Params, caches: list[SlotCache], tokens: Array, positions: Array
) -> tuple[Array, list[SlotCache]]:
    """The program of Slots.decode: one token of each slot."""
    hidden, caches = read_columns(params, cfg, tokens[:, None], positions, caches, runtime)
    return hidden[:, 0], caches
