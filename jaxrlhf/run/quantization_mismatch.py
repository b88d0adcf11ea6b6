"""What quantising a base costs, measured once, at the start of a run: the error of its weights, and by how much the
log-probs of the first rows of data differ from those of the weights as they were read."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.hosts import memory, processes
from jaxrlhf.log.metrics import MetricsLog
from jaxrlhf.models.lora import BASE, base_table
from jaxrlhf.models.nets import make_nets, no_sampling
from jaxrlhf.models.quantized import PACKED, unpacked
from jaxrlhf.ops.sampling import Sampling
from jaxrlhf.run import state as states
from jaxrlhf.run.build import Run
from jaxrlhf.run.feed import Feed
from jaxrlhf.run.initial_state import read_base
from jaxrlhf.run.runtime import runtime_of
from jaxrlhf.run.transfer import put, share_of
from jaxrlhf.sharding import for_programs
from jaxrlhf.types import Array, Ask, Batch, Head, Params, Prompts, Role, Sequences, TrainState, Trees

ROWS = 8  # that are computed; more where more devices have one each
ROOM = 1.1  # times the wide weights must be free: for activations


def tell(run: Run, state: TrainState, feed: Feed, log: MetricsLog) -> None:
    """``measure``, written down as step 0."""
    metrics, lines = measure(run, state, feed)
    for line in lines:
        log.say(line)
    if metrics:
        log.write(0, metrics)


def measure(run: Run, state: TrainState, feed: Feed) -> tuple[dict[str, float], list[str]]:
    """(metrics, what to say) of each base that is quantised. The weights are read once more, and are on the devices
    beside ``state``; where these have no room for them, nothing is measured, which is said."""
    bases, metrics, lines = run.resolved.bases, {}, []
    quantized = {based.base: based.quantization for based in bases.values() if based.quantization}
    for name, kind in sorted(quantized.items()):
        role = name.removeprefix(BASE)
        where = f"models.{role}: {kind}"
        if (why := no_room(run, name)) is not None:
            lines.append(f"{where}: its mismatch with the weights as they were read is not measured: {why}")
            continue
        as_read = {one: based._replace(quantization=None) for one, based in bases.items()}
        wide, of = for_programs(read_base(run, name, as_read), run.mesh), role_on(run, name)
        error = weight_error(state.slow[name], wide)
        metrics[f"{role}/quantization_error"] = error
        text = f"{where}: weights of the layers differ by {error:.1%} of their size"
        if "head" in wide or run.configs[of].tie_embeddings:
            mismatch = logprob_mismatch(run, of, state.slow[name], wide, first_rows(run, feed.first()[0]))
            metrics[f"{role}/quantization_mismatch"] = mismatch
            text += f", log-probs of the first rows of data by {mismatch:.3g} nats a token"
        lines.append(text)
    return metrics, lines


def role_on(run: Run, name: Role) -> Role:
    """A role that is computed from this base."""
    return next(role for role, based in run.resolved.bases.items() if based.base == name)


def no_room(run: Run, name: Role) -> str | None:
    """Why the wide weights of a base can't be on the devices, too; None where they can, or where that is not known. All
    processes answer alike."""
    heads: set[Head] = {run.heads[role] for role, based in run.resolved.bases.items() if based.base == name}
    table = base_table(run.configs[role_on(run, name)], heads)
    shape = states.abstract_table(table, jnp.dtype(run.cfg.precision.params), run.mesh)
    need = sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(shape))
    mine = [device for device in run.mesh.devices.flat if device.process_index == jax.process_index()]
    free = memory.free(mine)
    short = free is not None and ROOM * need > free
    gib = lambda size: f"{size / memory.GIB:.1f} GiB"
    why = f"they take {gib(need)} a device, and {gib(free)} are free" if short and free is not None else ""
    return processes.first_told(why) or None


def weight_error(packed: Params, wide: Params) -> float:
    """The RMS of what quantised weights differ by, over the RMS of the weights."""
    total = np.zeros(2)
    of_kernel = jax.jit(squares)
    is_packed = lambda x: isinstance(x, PACKED)
    for one, other in zip(jax.tree.leaves(packed, is_leaf=is_packed), jax.tree.leaves(wide), strict=True):
        if is_packed(one):
            total += np.array(jax.device_get(of_kernel(one, other)), np.float64)
    return float(np.sqrt(total[0] / max(total[1], 1e-30)))


def squares(packed: Any, wide: Array) -> tuple[Array, Array]:
    """(sum of the squared differences, sum of the squares), a layer at a time."""

    def one(layer: tuple[Any, Array]) -> tuple[Array, Array]:
        kernel = layer[1].astype(jnp.float32)
        return ((unpacked(layer[0], jnp.float32) - kernel) ** 2).sum(), (kernel**2).sum()

    return jax.tree.map(jnp.sum, jax.lax.map(one, (packed, wide)))


def logprob_mismatch(run: Run, role: Role, packed: Params, wide: Params, rows: Sequences) -> float:
    """Mean absolute difference of the log-probs of the rows' tokens, nats."""
    nets = make_nets({role: run.configs[role]}, runtime_of(run.cfg, run.mesh), Sampling(), no_sampling)

    @jax.jit
    def logprobs(params: Params, rows: Sequences) -> Array:
        return nets.read(Trees({}, {role: params}), rows, Ask(role, "token_stats"))[0].logprobs

    @jax.jit
    def mean(one: Array, other: Array, mask: Array) -> Array:
        return jnp.where(mask, jnp.abs(one - other), 0).sum() / jnp.maximum(mask.sum(), 1)

    return float(mean(logprobs(packed, rows), logprobs(wide, rows), rows.response_mask))


def first_rows(run: Run, batch: Batch) -> Sequences:
    """The first rows of a batch on the mesh, of prompts, demonstrations or chosen sides, as texts all of whose tokens
    but the first count."""
    is_rows: Callable[[Any], bool] = lambda x: isinstance(x, (Prompts, Sequences))
    rows = next(x for x in jax.tree.leaves(batch, is_leaf=is_rows) if is_rows(x))
    share = share_of(run.mesh)
    count = min(len(rows.tokens), len(share.blocks) * -(-ROWS // share.total))
    tokens, valid = (np.asarray(x)[:count] for x in (rows.tokens, rows.valid))
    segments = np.asarray(rows.segment_ids)[:count] if getattr(rows, "segment_ids", None) is not None else None
    ids = valid.astype(np.int32) if segments is None else segments
    mask = valid & (np.pad(ids, ((0, 0), (1, 0)))[:, :-1] == ids)
    found: Mapping[str, Any] = {"tokens": tokens, "valid": valid, "response_mask": mask, "segment_ids": segments}
    return put(run.mesh, Sequences(**found))
