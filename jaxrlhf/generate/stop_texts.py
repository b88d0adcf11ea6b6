"""What ends a response: EOS tokens, and stop texts, each an automaton over tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrlhf.sharding import spec
from jaxrlhf.types import Array


class Automaton(NamedTuple):
    """A finite automaton over the tokens of a response, which ends where the last state is reached."""

    table: np.ndarray  # i32[states, V]: the state after each token; [states, 1]: the same after every token
    start: int | np.ndarray = 0  # the state before the first token: of all rows, or i32[rows of the batch]


def is_any(token: Array, ids: tuple[int, ...]) -> Array:
    """bool[B]: token is one of ids."""
    found = jnp.zeros_like(token, bool)
    for ident in ids:
        found = found | (token == ident)
    return found


def follow_stops(stops: tuple[Automaton, ...], states: tuple[Array, ...], token: Array):
    """Advance each automaton by one token: (new states, bool[B] where one has reached its last state)."""
    found, after = jnp.zeros_like(token, bool), []
    for (table, _), state in zip(stops, states, strict=True):
        column = token if table.shape[1] > 1 else jnp.zeros_like(token)
        state = jnp.asarray(table).at[state, column].get(out_sharding=spec("batch"))
        found = found | (state == table.shape[0] - 1)
        after.append(state)
    return tuple(after), found


def stop_automaton(stop: str | Sequence[str | int], token_bytes: Sequence[bytes], vocab: int) -> Automaton:
    """The Knuth-Morris-Pratt automaton of a stop text, over what each of ``vocab`` tokens writes.

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
    return Automaton(table)
