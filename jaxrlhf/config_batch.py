"""The batch arithmetic of a config: prompts, samples, minibatches, micro-batches."""

from jaxrlhf.config import Config, find_algorithm

ROWS_KEY = {"prompts": "prompts_per_step", "sequences": "sequences_per_step", "preferences": "preferences_per_step"}


def fields_read(cfg: Config) -> tuple[str, ...]:
    """The fields of Batch that the algorithm reads from data."""
    return find_algorithm(cfg.algorithm_name).batch(cfg.algorithm)


def rows_of(cfg: Config) -> dict[str, int]:
    """Rows of one iteration, for each field of Batch that the algorithm reads."""
    rows = {field: getattr(cfg.batch, ROWS_KEY[field]) for field in fields_read(cfg)}
    if "prompts" in rows:
        rows["prompts"] *= cfg.batch.samples_per_prompt
    return rows


def updates_of(cfg: Config) -> tuple[int, int]:
    """(epochs, minibatches) of one iteration; their product is its optimizer steps."""
    return getattr(cfg.algorithm, "num_epochs", 1), getattr(cfg.algorithm, "num_minibatches", 1)


def minibatch_rows(cfg: Config) -> int:
    """Rows of a minibatch, of the first field that the algorithm reads."""
    return next(iter(rows_of(cfg).values())) // updates_of(cfg)[1]


def num_micro(cfg: Config) -> int:
    """Parts that a minibatch is computed in."""
    minibatch = minibatch_rows(cfg)
    return minibatch // (cfg.batch.micro_batch_size or minibatch)


def micro_rows(cfg: Config) -> int:
    """Rows of such a part."""
    return minibatch_rows(cfg) // num_micro(cfg)


def shares_prompts(cfg: Config, shards: int) -> bool:
    """Whether a prompt is read once for all its responses, in what is learned from too: so that they stay together, and
    on one of the ``shards`` devices that split a batch, in each part that an update is computed in."""
    rows = micro_rows(cfg) % (cfg.batch.samples_per_prompt * shards)
    return "prompts" in fields_read(cfg) and cfg.batch.share_prompts and rows == 0


def describe_sharing(cfg: Config, shards: int) -> list[str]:
    """What to say where prompts could be read once, and are not."""
    samples = cfg.batch.samples_per_prompt
    if samples == 1 or not cfg.batch.share_prompts or shares_prompts(cfg, shards) or "prompts" not in fields_read(cfg):
        return []
    over = f" over {shards} devices" if shards > 1 else ""
    return [
        f"batch: micro-batches of {micro_rows(cfg)} rows{over} cut the {samples} responses to a prompt "
        f"apart: it is read for each of them; read once in micro-batches of a multiple of {samples * shards}"
    ]


def describe_batch(cfg: Config) -> str:
    """The batch arithmetic in one line, for the start of a run."""
    (epochs, minibatches), parts, rows = updates_of(cfg), num_micro(cfg), rows_of(cfg)
    (field, count), *others = rows.items()
    each = cfg.batch.samples_per_prompt
    start = f"{count // each} prompts x {each} samples = {count} rows" if field == "prompts" else f"{count} {field}"
    more = "".join(f" with {number} {name}" for name, number in others)
    size = count // minibatches
    updates = f"{epochs} epochs x {minibatches} minibatches of {size} = {epochs * minibatches} updates an iteration"
    widths = cfg.batch.pack_widths
    packed = f", packed into the narrowest of {widths} widths" if widths > 1 else ""
    return f"batch: {start}{more} -> {updates}; micro-batches of {size // parts} ({parts} a minibatch){packed}"
