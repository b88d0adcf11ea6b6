"""`jaxrlhf train CONFIG --check`: what can be told of a run without training, and without writing to its folder."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxrlhf.config.batch import describe_batch, describe_learning, describe_sharing, rows_taken
from jaxrlhf.config.check import check
from jaxrlhf.config.load import dump, without_place
from jaxrlhf.config.places import check_places
from jaxrlhf.config.record import Config
from jaxrlhf.config.resolved import Resolved, resolve_config
from jaxrlhf.data.batches import Stream
from jaxrlhf.data.encode import Encoded
from jaxrlhf.evaluate.held_out import HeldOut, check_best, describe_best
from jaxrlhf.log.run_dir import made_by
from jaxrlhf.log.trackers import check_installed
from jaxrlhf.plan import largest_batch
from jaxrlhf.plan.calls import models_of, passes_of
from jaxrlhf.plan.device_memory import need_room_for_batch, room_of
from jaxrlhf.plan.memory_estimate import estimate
from jaxrlhf.plan.search import setup_of
from jaxrlhf.run import announce, saved_run, verified_steps
from jaxrlhf.run.build import Run, build
from jaxrlhf.run.epochs import describe_epochs, describe_short_run
from jaxrlhf.run.feed import Feed, describe_data
from jaxrlhf.run.origins import origin
from jaxrlhf.run.resume import changes_since_saved
from jaxrlhf.sharding import batch_shards, current
from jaxrlhf.tpu.peaks import GIB

SHOWN_ROWS = 3
SHOWN_LETTERS = 400  # of a part of a row
OPEN, CLOSE = "{+", "+}"  # around what is learned


def dry_run(configs: Sequence[tuple[str, Config]]) -> Iterator[str]:
    """What to tell of each of the configs, given as (path, config), in their order. Raises ConfigError, in one line,
    for what training would refuse.

    Of a run that starts from an earlier one of the command, which is not there yet, only the config is checked."""
    makers: dict[str, str] = {}
    for path, cfg in configs:
        check(cfg, jax.device_count(), path)
        check_places(cfg, path)
        check_installed(cfg.log.trackers, path)
        starts = [str(origin(cfg, role).init_from) for role in cfg.models] + [str(cfg.tokenizer.init_from)]
        runs = [run for name in starts if (run := made_by(name, makers)) is not None]
        waits = [run for run in runs if verified_steps.newest(run) is None]
        yield f"# {path}, as it is read; the other keys are at their defaults"
        yield dump(cfg, whole=False).rstrip("\n")
        if waits:
            yield f"{path}: starts from {waits[0]}, which {makers[waits[0]]} makes first: its data are not looked at"
        else:
            yield from describe_run(resolve_config(without_place(cfg)))
        makers[cfg.run_dir] = path


def describe_run(resolved: Resolved) -> Iterator[str]:
    """Data, three rows, steps, batch and memory of one run."""
    saved_runs = saved_run.SavedRuns()
    start, changes = saved_runs.newest(resolved.cfg.run_dir) or 0, changes_since_saved(saved_runs, resolved)
    ready = build(resolved, keep=False, saved_runs=saved_runs)
    resolved, cfg, parts = ready.resolved, ready.cfg, ready.recipe.num_micro
    check(cfg, jax.device_count())
    need_room_for_batch(ready)
    with current(ready.mesh):
        feed, held_out = Feed(ready), HeldOut(ready)
        check_best(ready, held_out)
        yield announce.opening(ready, start)
        if start and changes:
            yield f"changed since step {start}: {', '.join(changes)}"
        yield from describe_data(ready)
        yield from announce.describe_rows(ready, feed, held_out.summaries())
        for stream in feed.streams.values():
            yield from first_rows(ready, stream)
        yield describe_epochs(resolved, feed.rows())
        yield describe_steps(resolved, feed.rows())
        yield describe_batch(resolved, parts)
        yield from describe_short_run(resolved, feed.rows())
        sharing = describe_sharing(resolved, batch_shards(ready.mesh), parts)
        yield from [*sharing, *describe_best(cfg), *describe_learning(resolved)]
    yield describe_memory(ready)  # no mesh may be set


def describe_steps(resolved: Resolved, rows: int) -> str:
    """How many iterations an epoch is."""
    kind = resolved.kinds[0]
    each = rows_taken(resolved.cfg, kind)
    return f"an epoch: {rows:,} rows of data.{kind.name} / {each:,} an iteration = {rows / each:,.4g} iterations"


# ---- rows -----------------------------------------------------------------------------------------------------------


def first_rows(ready: Run, stream: Stream) -> Iterator[str]:
    """The first rows of a source as the models get them, with marks around the tokens that are learned from."""
    examples = stream.examples
    for record in examples.kept[:SHOWN_ROWS]:
        sides = examples.sides(examples.source[int(record)])
        names = ["chosen", "rejected"] if len(sides) == 2 else [""]
        for name, side in zip(names, sides):
            learned = int(side.response_mask.sum())
            what = f"{learned} of them learned" if learned else "the responses to it are learned"
            where = f"{examples.summary.where}, row {record + 1}" + (f", {name}" if name else "")
            yield f"{where}: {len(side.tokens)} tokens, {what}:"
            yield f"  {marked(ready.tokenizer, side)}"


def marked(tokenizer: Any, side: Encoded) -> str:
    """The text of a row, special tokens and all, on one line, with OPEN and CLOSE around what is learned."""
    edges = np.flatnonzero(np.diff(side.response_mask.astype(int))) + 1
    parts = []
    for tokens, mask in zip(np.split(side.tokens, edges), np.split(side.response_mask, edges)):
        text = shortened(tokenizer.decode(tokens.tolist(), skip_special_tokens=False))
        parts.append(f"{OPEN}{text}{CLOSE}" if mask[0] else text)
    return "".join(parts)


def shortened(text: str) -> str:
    """``text`` on one line, without its middle where it is long."""
    text = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    half, left_out = SHOWN_LETTERS // 2, len(text) - SHOWN_LETTERS
    return text if left_out <= 0 else f"{text[:half]} [... {left_out:,} letters ...] {text[-half:]}"


# ---- memory ---------------------------------------------------------------------------------------------------------


def describe_memory(ready: Run) -> str:
    """What a device needs, by the count of `jaxrlhf plan`, and what the devices here have."""
    devices = list(ready.mesh.devices.flat)
    setup = setup_of(ready.cfg, devices, ready)
    need = estimate(passes_of(ready, largest_batch(ready)), models_of(ready), setup)
    room = room_of(devices[0])
    total = need.peak * (len(devices) if room and room.shared else 1)
    shown = (
        f"memory, counted and not compiled: {need.peak / GIB:.2f} GiB a device ({need.arguments / GIB:.2f} weights and "
        f"moments, {(need.peak - need.arguments) / GIB:.2f} temporaries)"
    )
    if room is None:
        return f"{shown}; these devices do not tell what they have"
    over = " MORE THAN THERE IS:" if total > room.bytes else ""
    each = f"{len(devices)} devices share {total / GIB:.2f} of" if room.shared and len(devices) > 1 else "of"
    return f"{shown};{over} {each} {room.bytes / GIB:.1f} GiB {room.name}"
