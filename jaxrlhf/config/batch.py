"""The batch arithmetic of a config: prompts, samples, minibatches, micro-batches."""

import math

from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import Resolved
from jaxrlhf.data.batch_kinds import DATA_KINDS
from jaxrlhf.data.record_kinds import DataKind
from jaxrlhf.errors import counted
from jaxrlhf.models.cpu import MICRO_BATCH_COLUMNS


def reads_prompts(resolved: Resolved) -> bool:
    """Whether the run reads prompts, to which it samples responses."""
    return any(kind.is_prompt for kind in resolved.kinds)


def rows_taken(cfg: Config, kind: DataKind) -> int:
    """Rows of its data that an iteration takes."""
    return getattr(cfg.batch, kind.rows_key)


def rows_of(resolved: Resolved) -> dict[str, int]:
    """Rows of one iteration, for each field of Batch that the algorithm reads."""
    cfg = resolved.cfg
    each = lambda kind: cfg.batch.samples_per_prompt if kind.is_prompt else 1
    return {kind.field: rows_taken(cfg, kind) * each(kind) for kind in resolved.kinds}


def minibatch_rows(resolved: Resolved) -> int:
    """Rows of a minibatch, of the first field that the algorithm reads."""
    return next(iter(rows_of(resolved).values())) // resolved.updates.minibatches


def kept_together(resolved: Resolved) -> int:
    """Responses to a prompt that shuffles keep side by side, in one minibatch: all of them, where minibatches have room
    for whole groups, else as many as divide both. It depends on neither micro-batches nor devices.

    Whole groups, and not single rows: a prompt is then computed once for its responses, and the advantages of a
    minibatch, which compare responses to a prompt, balance each other."""
    if not reads_prompts(resolved):
        return 1
    return math.gcd(resolved.cfg.batch.samples_per_prompt, minibatch_rows(resolved))


def longest_row(resolved: Resolved) -> tuple[int, str]:
    """(columns of the longest rows, the keys that they come from)."""
    cfg = resolved.cfg
    if not reads_prompts(resolved):
        return cfg.data.max_length, "data.max_length"
    longest, room = max(cfg.data.prompt_buckets, default=0), cfg.generate.max_new_tokens
    if cfg.acts:
        return 2 + room, f"the start, the state at the end, and generate.max_new_tokens {room}"
    what = f"the largest of data.prompt_buckets + generate.max_new_tokens {room}"
    if cfg.converses and cfg.environment.max_turns > 1:  # a turn may begin in the last columns, and is cut afterwards
        return longest + room + cfg.turn_tokens, f"{what} + {cfg.turn_tokens} of a turn (environment.turn_tokens)"
    return longest + room, what


def asked_parts(resolved: Resolved) -> int:
    """Parts that batch.micro_batch_size cuts a minibatch into; null: one."""
    minibatch = minibatch_rows(resolved)
    return minibatch // (resolved.cfg.batch.micro_batch_size or minibatch)


def choose_micro_batches(resolved: Resolved, shards: int, platform: str) -> int:
    """Parts that a minibatch is computed in, its rows split over ``shards`` devices of ``platform``: as
    batch.micro_batch_size asks. Where it is null, one; on a CPU as many as bring a part down to MICRO_BATCH_COLUMNS
    (twice as many where rows are packed), if the shards divide them and leave the responses to a prompt together."""
    cfg, minibatch, minibatches = resolved.cfg, minibatch_rows(resolved), resolved.updates.minibatches
    if cfg.batch.micro_batch_size or platform != "cpu":
        return asked_parts(resolved)
    rows = {field: count // minibatches for field, count in rows_of(resolved).items()}
    shared = shares_prompts(resolved, shards, 1)
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


def shares_prompts(resolved: Resolved, shards: int, parts: int) -> bool:
    """Whether training too computes a prompt once for all its responses. They then stay together on one of the
    ``shards`` devices that split a batch, in each of the ``parts`` that an update is computed in. Not where devices
    share the columns of a row: a row of all responses to a prompt would gather the keys of all of them."""
    batch = resolved.cfg.batch
    if resolved.cfg.mesh.context != 1:
        return False
    rows = minibatch_rows(resolved) // parts % (batch.samples_per_prompt * shards)
    return reads_prompts(resolved) and batch.share_prompts and rows == 0


def describe_sharing(resolved: Resolved, shards: int, parts: int) -> list[str]:
    """What to say where prompts could be read once, and are not."""
    batch = resolved.cfg.batch
    each, could = batch.samples_per_prompt, batch.share_prompts and reads_prompts(resolved)
    if each == 1 or not could or shares_prompts(resolved, shards, parts):
        return []
    if (context := resolved.cfg.mesh.context) != 1:
        return [
            f"batch: mesh.context: {context}: training and scoring compute a prompt for each of its {each} responses"
        ]
    over = f" over {shards} devices" if shards > 1 else ""
    return [
        f"batch: micro-batches of {minibatch_rows(resolved) // parts} rows{over} cut the {each} responses to a prompt "
        f"apart: it is read for each of them; read once in micro-batches of a multiple of {each * shards}"
    ]


def describe_batch(resolved: Resolved, parts: int) -> str:
    """The batch arithmetic in one line, for the start of a run."""
    cfg, rows = resolved.cfg, rows_of(resolved)
    epochs, minibatches, _ = resolved.updates
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


def describe_learning(resolved: Resolved) -> list[str]:
    """What to say of roles that never learn in the run, or whose learning rate never rises to its peak."""
    lines, cfg, count = [], resolved.cfg, resolved.cfg.length
    epochs, minibatches, _ = resolved.updates
    for role in resolved.roles.trained:
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


def describe_precision(resolved: Resolved) -> list[str]:
    """What to say where precision.params is not float32: whose weights are stored so, and whose are not."""
    roles, params = resolved.roles, resolved.cfg.precision.params
    if params == "float32":
        return []
    return [
        f"precision.params: {params} for {', '.join(roles.slow) or 'no role'}; float32 for {', '.join(roles.trained)}: "
        "small updates to weights would be rounded away"
    ]


def divisors(number: int) -> list[int]:
    """In ascending order; a batch of 10^9 rows is refused later, and its divisors have to be found by then."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})
