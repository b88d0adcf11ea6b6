"""The kinds of data that algorithms learn from, in one table: how a record becomes tokens, and rows of a batch.

A new kind of data is a row here, a row of jaxrlhf.data.record_kinds that says what its records hold, a field of Batch,
and the keys that it names.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrlhf.data.actions import encode_segments, is_segment, observes
from jaxrlhf.data.batches import Layout
from jaxrlhf.data.encode import Encoded, encode_demonstration, encode_pair, encode_prompt
from jaxrlhf.data.record_kinds import BadRecord, DataKind
from jaxrlhf.data.sources import DataConfig
from jaxrlhf.data.trajectories import earned, encode_trajectory
from jaxrlhf.data.truncate import Sides
from jaxrlhf.types import Batch, Comparisons, Preferences, Prompts, Sequences, Trajectories, Unpaired, given

# ---- records to tokens ----------------------------------------------------------------------------------------------


def encode_prompts(record: Mapping[str, Any], tokenizer: Any, cfg: DataConfig, eos: Sequence[int]) -> Sides:
    ids = encode_prompt(record, tokenizer)
    return (Encoded(ids, np.zeros(len(ids), bool)),)


def encode_demonstrations(record: Mapping[str, Any], tokenizer: Any, cfg: DataConfig, eos: Sequence[int]) -> Sides:
    return (encode_demonstration(record, tokenizer, cfg.loss_on, eos, cfg.append_eos),)


def encode_preferences(record: Mapping[str, Any], tokenizer: Any, cfg: DataConfig, eos: Sequence[int]) -> Sides:
    if record.get("tie"):
        raise BadRecord("tie is true, and only rm_ties learns from ties; expected a pair with a preferred side")
    if is_segment(record) or observes(tokenizer):
        return encode_segments(record, tokenizer)
    return encode_pair(record, tokenizer, eos, cfg.append_eos)


def encode_comparisons(record: Mapping[str, Any], tokenizer: Any, cfg: DataConfig, eos: Sequence[int]) -> Sides:
    return encode_pair(record, tokenizer, eos, cfg.append_eos)


def encode_unpaired(record: Mapping[str, Any], tokenizer: Any, cfg: DataConfig, eos: Sequence[int]) -> Sides:
    record = record if record.get("response") is None else {"prompt": "", **record}  # it need not have a prompt
    return (encode_demonstration(record, tokenizer, "response", eos, cfg.append_eos),)


def encode_trajectories(record: Mapping[str, Any], tokenizer: Any, cfg: DataConfig, eos: Sequence[int]) -> Sides:
    return (encode_trajectory(record, tokenizer, cfg.loss_on, eos, cfg.append_eos),)


# ---- tokens to rows: each a batches.Maker ---------------------------------------------------------------------------


def make_demonstrations(layout: Layout, units: np.ndarray, mine: np.ndarray) -> tuple[Batch, None]:
    """``sequences`` [rows here, max_length], one record a row."""
    encoded = [side for (side,) in layout.sides(mine)]
    return Batch(sequences=_right_padded(encoded, layout)), None


def make_packed(layout: Layout, units: np.ndarray, mine: np.ndarray) -> tuple[Batch, None]:
    """``sequences`` with segment_ids: several records a row."""
    rows, segments = [], np.zeros((layout.local, layout.examples.max_length), np.int32)
    for row, unit in enumerate(mine):
        documents = [side for (side,) in layout.sides([unit])]
        lengths = [len(document.tokens) for document in documents]
        segments[row, : sum(lengths)] = np.repeat(np.arange(1, len(documents) + 1), lengths)
        joined = lambda field: np.concatenate([getattr(document, field) for document in documents])  # noqa: B023
        rows.append(Encoded(joined("tokens"), joined("response_mask")))
    return Batch(sequences=_right_padded(rows, layout).replace(segment_ids=segments)), None


def make_beside(layout: Layout, units: np.ndarray, mine: np.ndarray) -> tuple[Batch, None]:
    """``demonstrations``: as ``make_demonstrations``."""
    return _beside(make_demonstrations(layout, units, mine)[0]), None


def make_packed_beside(layout: Layout, units: np.ndarray, mine: np.ndarray) -> tuple[Batch, None]:
    """``demonstrations``: as ``make_packed``."""
    return _beside(make_packed(layout, units, mine)[0]), None


def _beside(batch: Batch) -> Batch:
    """The sequences of data where those that are sampled will not take their place."""
    return Batch(demonstrations=batch.sequences)


def make_preferences(layout: Layout, units: np.ndarray, mine: np.ndarray) -> tuple[Batch, None]:
    """``preferences``: both sides [rows here, max_length]; the margin is there if all pairs have one."""
    pairs = layout.sides(mine)
    chosen, rejected = (_right_padded([pair[side] for pair in pairs], layout) for side in (0, 1))
    margin: Any = np.zeros(layout.local, np.float32) if layout.examples.margins else None
    if layout.examples.margins:
        margin[: len(pairs)] = [record["margin"] for record in layout.records(mine)]
    return Batch(preferences=Preferences(chosen, rejected, margin)), None


def make_comparisons(layout: Layout, units: np.ndarray, mine: np.ndarray) -> tuple[Batch, None]:
    """``comparisons``: pairs as ``make_preferences`` has them, without margins, and which of them are ties."""
    pairs = given(make_preferences(layout, units, mine)[0].preferences, "preferences").replace(margin=None)
    tie, records = np.zeros(layout.local, bool), layout.records(mine)
    tie[: len(records)] = [bool(record.get("tie")) for record in records]
    return Batch(comparisons=Comparisons(pairs, *_arrays(tie))), None


def make_unpaired(layout: Layout, units: np.ndarray, mine: np.ndarray) -> tuple[Batch, None]:
    """``unpaired``: responses [rows here, max_length], their labels, and each prompt with the response of the next row
    of the *global* batch."""
    examples = layout.examples
    at = layout.here[layout.here < len(units)]
    # a last row alone, in an evaluation, takes the response of another batch
    others = units[(at + 1) % len(units)] if len(units) > 1 else (mine + 1) % len(layout.units)
    records = layout.records(mine)
    own, responses = ([side for (side,) in layout.sides(which)] for which in (mine, others))
    swapped = [_with_response(one, other, examples.max_length) for one, other in zip(own, responses, strict=True)]
    desirable = np.zeros(layout.local, bool)
    desirable[: len(records)] = [record["label"] for record in records]
    (labels,) = _arrays(desirable)
    return Batch(unpaired=Unpaired(_right_padded(own, layout), labels, _right_padded(swapped, layout))), None


def _with_response(one: Encoded, other: Encoded, max_length: int) -> Encoded:
    """The prompt of ``one`` with the response of ``other``, which loses its end where both are too long."""
    end, start = int(one.response_mask.argmax()), int(other.response_mask.argmax())
    joined = (np.concatenate([mine[:end], theirs[start:]])[:max_length] for mine, theirs in zip(one[:2], other[:2]))
    return Encoded(*joined)


def make_trajectories(layout: Layout, units: np.ndarray, mine: np.ndarray) -> tuple[Batch, None]:
    """``trajectories``: responses and rewards [rows here, max_length], and which of them a limit cut."""
    records = layout.records(mine)
    own = [side for (side,) in layout.sides(mine)]
    rewards = np.zeros((layout.local, layout.examples.max_length), np.float32)
    truncated = np.zeros(layout.local, bool)
    for row, (record, side) in enumerate(zip(records, own, strict=True)):
        rewards[row, : len(side.tokens)] = side.rewards
        truncated[row] = bool(record.get("truncated"))
    return Batch(trajectories=Trajectories(_right_padded(own, layout), *_arrays(rewards, truncated))), None


def make_prompts(layout: Layout, units: np.ndarray, mine: np.ndarray) -> tuple[Batch, list[dict[str, Any]]]:
    """Left-padded ``prompts`` [rows here, P], where P is the first of data.prompt_buckets that holds the longest prompt
    of the *global* batch, and sample_id is the row in it."""
    examples = layout.examples
    longest = max(int(examples.lengths[layout.units[unit][0]]) for unit in units)
    width = next(bucket for bucket in layout.cfg.prompt_buckets if bucket >= longest)
    tokens = np.full((layout.local, width), layout.pad, np.int32)
    valid = np.zeros((layout.local, width), bool)
    records = layout.records(mine)
    for row, (side,) in enumerate(layout.sides(mine)):
        ids = side.tokens
        tokens[row, width - len(ids) :] = ids
        valid[row, width - len(ids) :] = True
    return Batch(prompts=Prompts(*_arrays(tokens, valid, layout.here.astype(np.int32)))), records


def _right_padded(encoded: Sequence[Encoded], layout: Layout) -> Any:
    """Sequences [local, max_length]; rows behind the last are all padding."""
    shape = (layout.local, layout.examples.max_length)
    tokens = np.full(shape, layout.pad, np.int32)
    valid, response_mask = np.zeros(shape, bool), np.zeros(shape, bool)
    for row, side in enumerate(encoded):
        length = len(side.tokens)
        tokens[row, :length] = side.tokens
        valid[row, :length] = True
        response_mask[row, :length] = side.response_mask
    return Sequences(*_arrays(tokens, valid, response_mask), observations=_observations(encoded, shape))


def _observations(encoded: Sequence[Encoded], shape: tuple[int, int]) -> Any:
    """f32[*shape, D], 0 in padding; None of text."""
    seen = [(row, side.observations) for row, side in enumerate(encoded) if side.observations is not None]
    if not seen:
        return None
    found = np.zeros((*shape, seen[0][1].shape[1]), np.float32)
    for row, observations in seen:
        found[row, : len(observations)] = observations
    return found


def _arrays(*arrays: np.ndarray) -> Any:
    """NumPy arrays where the types of jaxrlhf.types say jax.Array: they go to the devices in one step, later."""
    return arrays


# ---- the shapes of those rows, on all processes together -----------------------------------------------------------

Shaped = Callable[..., Any]  # (dtype, *shape) -> a ShapeDtypeStruct laid out as rows


def sequence_shapes(array: Shaped, rows: int, cfg: DataConfig, margins: bool, packed: bool = False) -> Any:
    """[rows, max_length]; ``packed``: with segment_ids."""
    tokens, mask = (array(dtype, rows, cfg.max_length) for dtype in (np.int32, bool))
    return Sequences(tokens, mask, mask, tokens if packed else None)


def demonstration_shapes(array: Shaped, rows: int, cfg: DataConfig, margins: bool) -> Any:
    return sequence_shapes(array, rows, cfg, margins, cfg.pack)


def preference_shapes(array: Shaped, rows: int, cfg: DataConfig, margins: bool) -> Any:
    """``margins``: whether the pairs say by how much."""
    side = sequence_shapes(array, rows, cfg, margins)
    return Preferences(side, side, array(np.float32, rows) if margins else None)


def comparison_shapes(array: Shaped, rows: int, cfg: DataConfig, margins: bool) -> Any:
    return Comparisons(preference_shapes(array, rows, cfg, margins=False), array(bool, rows))


def unpaired_shapes(array: Shaped, rows: int, cfg: DataConfig, margins: bool) -> Any:
    whole = sequence_shapes(array, rows, cfg, margins)
    return Unpaired(whole, array(bool, rows), whole)


def trajectory_shapes(array: Shaped, rows: int, cfg: DataConfig, margins: bool) -> Any:
    responses = sequence_shapes(array, rows, cfg, margins)
    return Trajectories(responses, array(np.float32, rows, cfg.max_length), array(bool, rows))


# ---- the table ------------------------------------------------------------------------------------------------------

PROMPTS = DataKind("prompts", "prompts", "prompts_per_step", encode_prompts, make_prompts, is_prompt=True)
DEMONSTRATIONS = DataKind(
    name="demonstrations",
    field="sequences",
    rows_key="sequences_per_step",
    encode=encode_demonstrations,
    make=make_demonstrations,
    make_packed=make_packed,
    shapes=demonstration_shapes,
)
BESIDE_SAMPLED = DEMONSTRATIONS._replace(  # the same section, for who also samples
    field="demonstrations", make=make_beside, make_packed=make_packed_beside
)
PREFERENCES = DataKind(
    name="preferences",
    field="preferences",
    rows_key="preferences_per_step",
    encode=encode_preferences,
    make=make_preferences,
    shapes=preference_shapes,
    sides=2,
)
COMPARISONS = DataKind(  # the same section as PREFERENCES, for who learns from ties too
    name="preferences",
    field="comparisons",
    rows_key="preferences_per_step",
    encode=encode_comparisons,
    make=make_comparisons,
    shapes=comparison_shapes,
    sides=2,
)
UNPAIRED = DataKind(
    name="unpaired",
    field="unpaired",
    rows_key="unpaired_per_step",
    encode=encode_unpaired,
    make=make_unpaired,
    shapes=unpaired_shapes,
    least_rows=2,
)
TRAJECTORIES = DataKind(
    name="trajectories",
    field="trajectories",
    rows_key="trajectories_per_step",
    encode=encode_trajectories,
    make=make_trajectories,
    shapes=trajectory_shapes,
    rank=earned,
)
# by their fields of Batch, which is how an algorithm names what it reads
DATA_KINDS: dict[str, DataKind] = {
    kind.field: kind
    for kind in (PROMPTS, DEMONSTRATIONS, BESIDE_SAMPLED, PREFERENCES, COMPARISONS, UNPAIRED, TRAJECTORIES)
}


def kind_of_section(section: str) -> DataKind:
    """The kind of data in the section NAME or eval_NAME of ``data``. Raises StopIteration for any other."""
    return next(kind for kind in DATA_KINDS.values() if section in (kind.name, f"eval_{kind.name}"))
