"""Actions of an environment as tokens, and segments of its episodes as rows."""

import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrlhf.data.encode import Encoded
from jaxrlhf.data.record_kinds import SEGMENTS, BadRecord
from jaxrlhf.data.sources import Source
from jaxrlhf.data.tokenizer import EOS, sign_tokenizer

SIGNS = string.digits + string.ascii_letters  # how actions are written


def actions_tokenizer(actions: int, observation_size: int) -> Any:
    """A transformers fast tokenizer in which token n is action n, a sign; behind the actions comes EOS, which starts
    rows and fills them up. It knows the size of observations."""
    tokenizer = sign_tokenizer({sign: at for at, sign in enumerate(SIGNS[:actions])} | {EOS: actions}, EOS)
    tokenizer.observation_size = observation_size
    return tokenizer


def is_segment(record: Mapping[str, Any]) -> bool:
    """Whether a pair is one of segments of episodes, not of texts."""
    return record.get("chosen_actions") is not None


def starts(count: int) -> Source:
    """A record of every seed below ``count``, which episodes are reset with."""
    what = "seeds of environment.starts"
    read = lambda index: {"prompt": "", "seed": index}
    return Source(read, count, what, f"{what}: {count}", formats={what: count})


def observes(tokenizer: Any) -> bool:
    """Whether its tokens are the actions of an environment."""
    return getattr(tokenizer, "observation_size", None) is not None


def encode_segments(record: Mapping[str, Any], tokenizer: Any) -> tuple[Encoded, ...]:
    """Both sides of a pair: the start, and each action with what was observed after it.

    Raises:
        BadRecord: the run has no environment, or its spaces are others than the record's; or the sides are text.
    """
    if not observes(tokenizer):
        raise BadRecord("chosen_actions are those of an environment; expected environment.id")
    if not is_segment(record):
        raise BadRecord(f"is text, and the run acts in an environment; expected {', '.join(SEGMENTS)}")
    size, actions = tokenizer.observation_size, tokenizer.eos_token_id
    return tuple(encode_segment(record, side, actions, size) for side in ("chosen", "rejected"))


def encode_segment(record: Mapping[str, Any], side: str, actions: int, size: int) -> Encoded:
    """One side. ``actions``: of the environment, whose EOS is the token behind them; ``size``: of an observation."""
    took: Sequence[int] = record[f"{side}_actions"]
    seen: Sequence[Sequence[float]] = record[f"{side}_observations"]
    if len(seen) != len(took) + 1:
        raise BadRecord(
            f"{side}_observations are {len(seen)}: expected {len(took) + 1}, one before every action and the last"
        )
    for at, shown in enumerate(seen):
        if len(shown) != size:
            raise BadRecord(f"{side}_observations[{at}] has {len(shown)} numbers: expected the environment's {size}")
    for at, action in enumerate(took):
        if not 0 <= action < actions or action != int(action):
            raise BadRecord(f"{side}_actions[{at}] is {action}: expected an action of 0 to {actions - 1}")
    tokens = np.array([actions, *took], np.int32)
    return Encoded(tokens, np.arange(len(tokens)) > 0, observations=np.asarray(seen, np.float32))
