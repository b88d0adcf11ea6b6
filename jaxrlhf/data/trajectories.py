"""From the record of a trajectory to tokens and what each of them earned.

The reward of a step, or of a whole response, is earned by its last token; EOS belongs to what it ends. A trajectory
that a limit cut gets no EOS, but one token behind it that is not learned: the state before that token is the last one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrlhf.data.encode import Encoded, encode_demonstration, encode_parts
from jaxrlhf.data.record_kinds import BadRecord


def earned(record: Mapping[str, Any]) -> float:
    """The return of a trajectory: the sum of its rewards, not discounted."""
    if record.get("steps") is not None:
        return float(sum(step.get("reward") or 0.0 for step in record["steps"]))
    return float(record["reward"]) if record.get("reward") is not None else float(sum(record["rewards"]))


def encode_trajectory(
    record: Mapping[str, Any], tokenizer: Any, loss_on: str, eos: Sequence[int], append_eos: bool = True
) -> Encoded:
    """Tokens, mask and rewards of one trajectory.

    Args:
        loss_on, eos, append_eos: as in ``encode_demonstration``.

    Raises:
        BadRecord: ``rewards`` are not as many as the tokens that are learned.
    """
    cut = bool(record.get("truncated"))
    ends = append_eos and not cut
    if record.get("steps") is not None:
        said, rewards = encode_steps(record, tokenizer, eos, ends)
    else:
        record = record if record.get("response") is None else {"prompt": "", **record}  # it need not have a prompt
        said = encode_demonstration(record, tokenizer, loss_on, eos, ends)
        rewards = rewards_of(record, said, eos)
    if not cut:
        return Encoded(said.tokens, said.response_mask, rewards)
    one_more = lambda x, value: np.append(x, np.asarray(value, x.dtype))
    return Encoded(one_more(said.tokens, eos[0]), one_more(said.response_mask, False), one_more(rewards, 0))


def encode_steps(
    record: Mapping[str, Any], tokenizer: Any, eos: Sequence[int], append_eos: bool
) -> tuple[Encoded, np.ndarray]:
    """(tokens and mask, rewards f32[S]) of ``steps`` behind a prompt: their texts are learned, their observations
    not."""
    steps = record["steps"]
    piece = lambda step: (step["text"], True) if step.get("text") is not None else (step["observation"], False)
    pieces = [piece(step) for step in steps]
    said, ends = encode_parts(record, pieces, tokenizer, eos, append_eos)
    rewards = np.zeros(len(said.tokens), np.float32)
    for step, end in zip(steps, ends, strict=True):
        rewards[end - 1] += step.get("reward") or 0.0
    return said, rewards


def rewards_of(record: Mapping[str, Any], said: Encoded, eos: Sequence[int]) -> np.ndarray:
    """f32[S]: ``reward`` at the last learned token, or ``rewards`` at each; EOS may go without one, and earns
    nothing."""
    found, at = np.zeros(len(said.tokens), np.float32), np.flatnonzero(said.response_mask)
    if record.get("reward") is not None:
        found[at[-1:]] = record["reward"]
        return found
    rewards, count = record["rewards"], len(at)
    ended = count > 0 and int(said.tokens[at[-1]]) in eos
    if len(rewards) not in ((count - 1, count) if ended else (count,)):
        expected = f"{count - 1}, or {count} with EOS" if ended else f"{count}"
        raise BadRecord(f"rewards has {len(rewards)} numbers; expected one a token of the response: {expected}")
    found[at[: len(rewards)]] = rewards
    return found
