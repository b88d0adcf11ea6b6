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


class TextAutomaton(NamedTuple):
    """The Knuth-Morris-Pratt automaton of a stop text over what tokens write; state 0 is the first."""

    step: np.ndarray  # i32[states, symbols + 1]: the state after each symbol, the last of which is any other
    codes: dict[int | None, int]  # the column of each symbol: a byte, or -1 - the id of a token
    own: set[int]  # ids that are found as these tokens

    def symbols(self, token: int, piece: bytes) -> list[int | None]:
        """What a token means to it. Tokens that write nothing count where ids are looked for."""
        if token in self.own:
            return [-1 - token]
        return [*piece] or ([None] if self.own else [])

    def follow(self, state: int, token: int, piece: bytes) -> int:
        """The state after a token that writes ``piece``; the last one stays."""
        for symbol in self.symbols(token, piece):
            state = int(self.step[state, self.codes.get(symbol, len(self.codes))])
        return state

    @property
    def found(self) -> int:
        """The state in which the text has been found."""
        return len(self.step) - 1


def text_automaton(stop: str | Sequence[str | int]) -> TextAutomaton:
    """The automaton of a stop text, or of its parts. Raises ValueError for an empty text."""
    parts = [stop] if isinstance(stop, str) else stop
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
    return TextAutomaton(step, codes, {part for part in parts if isinstance(part, int)})


def stop_automaton(stop: str | Sequence[str | int], token_bytes: Sequence[bytes], vocab: int) -> Automaton:
    """The automaton of a stop text over ``vocab`` tokens, of which each writes what ``token_bytes`` says.

    A stop text is found however the tokenizer cuts it, also across tokens. Of one that is given in parts, ids are found
    as these tokens, and other tokens that write nothing are no part of it. Raises ValueError for an empty text."""
    text = text_automaton(stop)
    table = np.tile(np.arange(len(text.step), dtype=np.int32)[:, None], (1, vocab))
    for token, piece in enumerate(token_bytes[:vocab]):
        symbols = text.symbols(token, piece)
        if symbols and not any(symbol in text.codes for symbol in symbols):
            symbols = symbols[:1]  # one that the pattern lacks is enough
        for symbol in symbols:
            table[:, token] = text.step[table[:, token], text.codes.get(symbol, len(text.codes))]
    return Automaton(table)
