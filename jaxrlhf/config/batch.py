"""The batch arithmetic of a config: prompts, samples, minibatches, micro-batches."""

import math

from jaxrlhf.config.record import Config
from jaxrlhf.config.roles import find_algorithm, roles_of
from jaxrlhf.data.data_kinds import DATA_KINDS
from jaxrlhf.data.kinds import DataKind
from jaxrlhf.errors import counted
from jaxrlhf.models.cpu import MICRO_BATCH_COLUMNS


def fields_read(cfg: Config) -> tuple[str, ...]:
    """The fields of Batch that the algorithm reads from data."""
    return find_algorithm(cfg.algorithm_name).batch(cfg.algorithm)


def kinds_read(cfg: Config) -> list[DataKind]:
    """Those fields as kinds of data; the first is the one whose rows and epochs are counted."""
    return [DATA_KINDS[field] for field in fields_read(cfg)]


def rows_taken(cfg: Config, kind: DataKind) -> int:
    """Rows of its data that an iteration takes."""
    return getattr(cfg.batch, kind.rows_key)


def rows_of(cfg: Config) -> dict[str, int]:
    """Rows of one iteration, for each field of Batch that the algorithm reads."""
    each = lambda kind: cfg.batch.samples_per_prompt if kind.is_prompt else 1
    return {kind.field: rows_taken(cfg, kind) * each(kind) for kind in kinds_read(cfg)}


def updates_of(cfg: Config) -> tuple[int, int]:
    """(epochs, minibatches) of one iteration; their product is its optimizer steps."""
    updates = find_algorithm(cfg.algorithm_name).updates(cfg.algorithm)
    return updates.epochs, updates.minibatches


def minibatch_rows(cfg: Config) -> int:
    """Rows of a minibatch, of the first field that the algorithm reads."""
    return next(iter(rows_of(cfg).values())) // updates_of(cfg)[1]


def kept_together(cfg: Config) -> int:
    """Responses to a prompt that shuffles keep side by side, in one minibatch: all of them, where minibatches have room
    for whole groups, else as many as divide both. It depends on neither micro-batches nor devices.

    Whole groups, and not single rows: a prompt is then computed once for its responses, and the advantages of a
    minibatch, which compare responses to a prompt, balance each other."""
    return math.gcd(cfg.batch.samples_per_prompt, minibatch_rows(cfg)) if "prompts" in fields_read(cfg) else 1


def longest_row(cfg: Config) -> tuple[int, str]:
    """(columns of the longest rows, the keys that they come from)."""
    if "prompts" not in fields_read(cfg):
        return cfg.data.max_length, "data.max_length"
    longest, room = max(cfg.data.prompt_buckets, default=0), cfg.generate.max_new_tokens
    return longest + room, f"the largest of data.prompt_buckets + generate.max_new_tokens {room}"


def asked_parts(cfg: Config) -> int:
    """Parts that batch.micro_batch_size cuts a minibatch into; null: one."""
    minibatch = minibatch_rows(cfg)
    return minibatch // (cfg.batch.micro_batch_size or minibatch)


def choose_micro_batches(cfg: Config, shards: int, platform: str) -> int:
    """Parts that a minibatch is computed in, its rows split over ``shards`` devices of ``platform``: as
    batch.micro_batch_size asks. Where it is null, one; on a CPU as many as bring a part down to MICRO_BATCH_COLUMNS
    (twice as many where rows are packed), if the shards divide them and leave the responses to a prompt together."""
    minibatch, minibatches = minibatch_rows(cfg), updates_of(cfg)[1]
    if cfg.batch.micro_batch_size or platform != "cpu":
        return asked_parts(cfg)
    rows = {field: count // minibatches for field, count in rows_of(cfg).items()}
    shared = shares_prompts(cfg, shards, 1)
    together = {"prompts": cfg.batch.samples_per_prompt if shared else 1}
    divides = lambda parts: all(rows[field] % (parts * shards * together.get(field, 1)) == 0 for field in rows)
    columns = sum(columns_of(cfg, field, count, shared) for field, count in rows.items())
    fits = [parts for parts in divisors(minibatch) if divides(parts)]
    most = MICRO_BATCH_COLUMNS * (2 if cfg.batch.pack_widths > 1 else 1)  # about half of what is packed holds no token
    return next((parts for parts in fits if columns <= parts * most), fits[-1])


def columns_of(cfg: Config, field: str, rows: int, shared: bool) -> int:
    """Columns that ``rows`` rows of a field of Batch have at most; ``shared``: a prompt's once for its responses."""
    if not (kind := DATA_KINDS[field]).is_prompt:
        return rows * cfg.data.max_length * kind.sides
    prompts = rows // cfg.batch.samples_per_prompt if shared else rows
    return prompts * max(cfg.data.prompt_buckets, default=0) + rows * cfg.generate.max_new_tokens


def shares_prompts(cfg: Config, shards: int, parts: int) -> bool:
    """Whether training too computes a prompt once for all its responses. They then stay together on one of the
    ``shards`` devices that split a batch, in each of the ``parts`` that an update is computed in."""
    rows = minibatch_rows(cfg) // parts % (cfg.batch.samples_per_prompt * shards)
    return "prompts" in fields_read(cfg) and cfg.batch.share_prompts and rows == 0


def describe_sharing(cfg: Config, shards: int, parts: int) -> list[str]:
    """What to say where prompts could be read once, and are not."""
    samples, could = cfg.batch.samples_per_prompt, cfg.batch.share_prompts and "prompts" in fields_read(cfg)
    if samples == 1 or not could or shares_prompts(cfg, shards, parts):
        return []
    over = f" over {shards} devices" if shards > 1 else ""
    return [
        f"batch: micro-batches of {minibatch_rows(cfg) // parts} rows{over} cut the {samples} responses to a prompt "
        f"apart: it is read for each of them; read once in micro-batches of a multiple of {samples * shards}"
    ]


def describe_batch(cfg: Config, parts: int) -> str:
    """The batch arithmetic in one line, for the start of a run."""
    (epochs, minibatches), rows = updates_of(cfg), rows_of(cfg)
    (field, count), *others = rows.items()
    each = cfg.batch.samples_per_prompt
    prompts, samples = counted(count // each, "prompt"), counted(each, "sample")
    start = f"{prompts} x {samples} = {counted(count, 'row')}" if field == "prompts" else f"{count} {field}"
    more = "".join(f" with {number} {name}" for name, number in others)
    size = count // minibatches
    split = f"{counted(epochs, 'epoch')} x {counted(minibatches, 'minibatch', 'minibatches')} of {size}"
    updates = f"{split} = {counted(epochs * minibatches, 'update')} an iteration"
    widths = cfg.batch.pack_widths
    packed = f", packed into the narrowest of {widths} widths" if widths > 1 else ""
    return f"batch: {start}{more} -> {updates}; micro-batches of {size // parts} ({parts} a minibatch){packed}"


def describe_learning(cfg: Config) -> list[str]:
    """What to say of roles that never learn in the run, or whose learning rate never rises to its peak."""
    lines, (epochs, minibatches), count = [], updates_of(cfg), cfg.length
    for role in roles_of(cfg)[0]:
        row, name = cfg.optimizer_of(role), role if role in cfg.optimizer else "default"
        updates = (count - row.delay) * epochs * minibatches
        if updates <= 0:
            wrong = f"delay: {row.delay}: the run has {count} iterations, so that the {role} model never learns"
            lines.append(f"optimizer.{name}.{wrong}; nearest: {count - 1}")
        elif updates <= row.warmup_steps:
            wrong = (
                f"warmup_steps: {row.warmup_steps}: the {role} model makes {updates} updates in the run, so that its "
            )
            lines.append(f"optimizer.{name}.{wrong}learning rate never rises to its peak")
    return lines


def divisors(number: int) -> list[int]:
    """In ascending order; a batch of 10^9 rows is refused later, and its divisors have to be found by then."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})
