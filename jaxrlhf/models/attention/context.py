"""Attention where the mesh axis ``context`` splits the columns of rows.

A device has the queries of its columns, and gathers the keys and values of all. With 2 n chunks of a row on n devices,
device i has chunks i and 2 n - 1 - i: a token attends to what is before it, so that each device has as many products of
queries and keys as the others. Keys and values are put back into the order of the row behind the gather.

Gathering was measured beside passing them round a ring: benchmarks/README.md.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding, PartitionSpec

from jaxrlhf.models.attention.kernels import (
    BLOCKS,
    SAVED,
    Attend,
    Kernel,
    blocks,
    head_layouts,
    library_rows,
)
from jaxrlhf.models.attention.products import attention, bias_of, head_axis, within_window
from jaxrlhf.sharding import constrain, partition, reshaped, split_columns, split_over
from jaxrlhf.types import Array

# ---- the order of columns -------------------------------------------------------------------------------------------


def column_order(columns: int, devices: int) -> np.ndarray:
    """i32[columns]: which column of the row stands where; ``devices`` equal parts, each of two chunks."""
    chunks = np.arange(columns, dtype=np.int32).reshape(2 * devices, -1)
    pairs = [np.concatenate([chunks[i], chunks[2 * devices - 1 - i]]) for i in range(devices)]
    return np.concatenate(pairs)


def spread(x: Array, devices: int) -> Array:
    """[B, S, ...], no device splits S -> the same columns in ``column_order``."""
    chunks = split_columns(x, 2, devices, x.shape[1] // (2 * devices))
    return joined(jnp.stack([chunks[:, 0], jnp.flip(chunks[:, 1], 1)], axis=2))


def in_order(x: Array, devices: int) -> Array:
    """The inverse of ``spread``."""
    pairs = split_columns(x, devices, 2, x.shape[1] // (2 * devices))
    return joined(jnp.stack([pairs[:, :, 0], jnp.flip(pairs[:, :, 1], 1)], axis=1))


def joined(x: Array) -> Array:
    """[B, i, j, C, ...], no device splits the three -> [B, i * j * C, ...]."""
    shape = len(x), math.prod(x.shape[1:4]), *x.shape[4:]
    return reshaped(x, shape, (0, None, *range(4, x.ndim)))


# ---- attention ------------------------------------------------------------------------------------------------------


def within_split_rows(
    kernel: Kernel,
    segment_ids: Array,
    window: int | None,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
    gather_again: bool = False,
) -> Attend:
    """kernels.within_rows of queries, keys and values whose columns are in ``column_order`` and split over ``context``;
    segment_ids i32[B, S] are in the order of the row, whole on every device.

    ``gather_again``: the backward pass gathers keys and values again, so that no layer keeps those of all columns.
    XLA's products are then computed again too; what splash keeps for its backward pass is not."""

    def attend(query: Array, key: Array, value: Array, sinks: Array | None = None) -> Array:
        order, made, heads = column_order(query.shape[1], split_over("seq")), None, query.shape[2]
        queries, keys = head_layouts(query, key)
        if kernel == "splash":
            own = heads // (split_over("heads") if head_axis("heads", heads) else 1)
            made = splash_kernel(order.reshape(split_over("seq"), -1), own, window, softcap, interpret)
        local = local_of(kernel, window, scale, softcap)
        if gather_again:
            local = jax.checkpoint(local, policy=jax.checkpoint_policies.save_only_these_names(SAVED))
        layouts = kernel_layout(made)
        made = jax.tree.map(jax.sharding.reshard, made, layouts)
        rows, columns = partition(("batch", None)), partition(("seq",))
        specs = (
            queries,
            keys,
            keys,
            rows,
            columns,
            layouts,
            sinks if sinks is None else partition((head_axis("heads", heads),)),
        )
        mapped = jax.shard_map(local, in_specs=specs, out_specs=queries, check_vma=False)
        return mapped(query, key, value, segment_ids, constrain(jnp.asarray(order), "seq"), made, sinks)

    return attend


def local_of(kernel: Kernel, window: int | None, scale: float, softcap: float | None) -> Callable[..., Array]:
    """What one device computes: query [b, C, h, K], key, value [b, C, n, K], segment_ids i32[b, S], which columns it
    has i32[C], the splash kernel or None, sinks [h] or None -> [b, C, h, K]."""

    def local(query, key, value, segment_ids, columns, made, sinks) -> Array:
        key, value = whole(key), whole(value)
        if kernel == "splash":
            return splash_columns(made, query, key, value, segment_ids, columns, sinks, scale)
        mask = column_mask(segment_ids, columns, window)
        if kernel == "cudnn":
            return library_rows(query, key, value, mask, scale=scale, implementation="cudnn", causal=False)
        return attention(query, key, value, bias_of(mask), scale, softcap, sinks)

    return local


def whole(x: Array) -> Array:
    """[b, C, n, K], the columns of one device -> [b, S, n, K], those of all, in order."""
    rows, columns, *rest = x.shape
    parts = gather_parts(x.reshape(rows * columns, math.prod(rest)))
    parts = parts.reshape(len(parts), rows, 2, columns // 2, -1)
    chunks = jnp.stack([parts[:, :, 0], jnp.flip(parts[:, :, 1], 0)])
    return jnp.moveaxis(chunks, 2, 0).reshape(rows, len(parts) * columns, *rest)


@jax.custom_vjp
def gather_parts(x: Array) -> Array:
    """[T, F] of one device -> [devices, T, F]."""
    return jax.lax.all_gather(x, "context")


def scatter_parts(_, dy: Array) -> tuple[Array]:
    """The gradient, with an axis of devices that is the outermost in memory too: else XLA:TPU (libtpu 0.0.52) sums all
    of it on every device in place of scattering it, which sends twice the bytes."""
    dy = with_layout_constraint(dy, Layout((0, 1, 2)))
    return (jax.lax.psum_scatter(dy, "context"),)


gather_parts.defvjp(lambda x: (gather_parts(x), None), scatter_parts)


def column_mask(segment_ids: Array, columns: Array, window: int | None) -> Array:
    """bool[b, 1, C, S]: what the tokens in ``columns`` i32[C] of rows i32[b, S] may read."""
    own = segment_ids[:, columns]
    seen = columns[:, None] >= jnp.arange(segment_ids.shape[1])
    mask = ((own[:, :, None] == segment_ids[:, None]) & seen & (segment_ids > 0)[:, None])[:, None]
    return mask if window is None else within_window(mask, columns, window)


# ---- splash ---------------------------------------------------------------------------------------------------------


def splash_kernel(columns: np.ndarray, heads: int, window: int | None, softcap: float | None, interpret: bool) -> Any:
    """The kernel of every device: ``columns`` i32[devices, C] are those of its queries, of ``heads`` each.

    Its arrays say which blocks of keys each block of queries visits; ``kernel_layout`` splits them."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    from jaxrlhf.models.attention.column_mask import ColumnMask

    (block, padded), (key_block, keys) = blocks(columns.shape[1]), blocks(columns.size)
    wide = np.pad(columns, ((0, 0), (0, padded - columns.shape[1])), mode="edge")
    sizes = {name: key_block if name.split("_")[1] == "kv" else block for name in BLOCKS}
    return splash.make_splash_mha(
        masks.MultiHeadMask([ColumnMask(tuple(wide.reshape(-1).tolist()), keys, window)] * heads),
        block_sizes=splash.BlockSizes(**sizes),  # type: ignore[arg-type]
        head_shards=1,
        q_seq_shards=len(columns),
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )


def kernel_layout(made: Any) -> Any:
    """The PartitionSpecs of the arrays of ``splash_kernel``."""
    if made is None:
        return None
    by_queries = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec(None, "context"))  # type: ignore[arg-type]
    return made.manual_sharding_spec(by_queries)


def splash_columns(
    made: Any,
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    columns: Array,
    sinks: Array | None,
    scale: float,
) -> Array:
    """Attention of one device's queries by the kernel that was ``made``; see kernels.splash_rows."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    size, (_, padded), (_, keys) = query.shape[1], blocks(query.shape[1]), blocks(key.shape[1])

    def widen(x: Array, to: int, mode: str = "constant") -> Array:
        return jnp.pad(x, ((0, 0), (0, to - x.shape[1])) + ((0, 0),) * (x.ndim - 2), mode=mode)

    by_head = lambda x, to: jnp.swapaxes(widen(x, to), 1, 2)
    ids = splash.SegmentIds(widen(segment_ids[:, columns], padded, "edge"), widen(segment_ids, keys))
    scaled = (query.astype(jnp.float32) * scale).astype(query.dtype)
    one = lambda query, key, value, ids: made(query, key, value, ids, sinks=sinks)
    out = jax.vmap(one)(by_head(scaled, padded), by_head(key, keys), by_head(value, keys), ids)
    return jnp.swapaxes(out, 1, 2)[:, :size]
