"""Attention within whole rows by the kernel that the hardware has: splash on TPUs, cuDNN's on NVIDIA GPUs, or XLA.

``choose`` decides while tracing, from the hardware, the model and the number format alone: all programs of a run and
rows of all lengths use the same kernel, whose rounding differs from another's. Both kernels keep the products of
queries and keys on the chip: no [B, H, S, S] is stored. A compiler cannot split them, so that under an explicit mesh
each device runs them on its own rows and heads (jax.shard_map).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrlhf.models.attention.products import (
    attention,
    bias_of,
    branches,
    by_head,
    causal_mask,
    head_axis,
    merge_copies,
    split_copies,
    split_keys,
    within_window,
)
from jaxrlhf.models.config import ModelConfig, head_sizes
from jaxrlhf.models.families import FAMILIES
from jaxrlhf.models.layer_kinds import attending
from jaxrlhf.models.response_packing import Places
from jaxrlhf.sharding import explicit, partition
from jaxrlhf.types import Array

Kernel = Literal["xla", "splash", "cudnn"]
Asked = Literal["auto", "xla", "splash", "cudnn"]  # auto: the best that computes this model here
# query [B, S, H, K]; key, value [B, S, N, K]; sinks [H], or nothing (products.branches) -> [B, S, H, K]
Attend = Callable[..., Array]

SAVED = "attention"  # the name under which remat policies may keep what the splash kernel's backward pass reads
LANES = 128  # columns of a TPU register: splash's blocks are multiples of it
LARGEST_BLOCK = 512  # columns; seen to compile for v5e with 256 features a head in float32


# of queries and keys: forward, for the gradients of keys and values, for that of queries
BLOCKS = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")


class Hardware(NamedTuple):
    """What a kernel depends on."""

    platform: str = "cpu"  # "cpu", "gpu" or "tpu"
    capability: float = 0.0  # CUDA's number for the generation of an NVIDIA GPU (8.0: A100, 9.0: H100); else 0


def hardware_of(device: Any) -> Hardware:
    """The Hardware of a jax.Device, or of a device of a topology that is compiled for."""
    try:
        capability = float(getattr(device, "compute_capability", 0))
    except ValueError:  # ROCm answers with a name, "gfx90a"
        capability = 0.0
    return Hardware(device.platform, capability)


def choose_kernel(asked: Asked, hardware: Hardware, cfg: ModelConfig, dtype: Any) -> Kernel:
    """The kernel that computes attention of this model in ``dtype``.

    auto: splash on TPUs and cuDNN's on GPUs, where they can compute it (see ``refusal``), and XLA elsewhere. Raises
    ValueError, in one line, where another is asked for that can't: nothing else is computed silently."""
    best: Kernel = {"tpu": "splash", "gpu": "cudnn"}.get(hardware.platform, "xla")  # type: ignore[assignment]
    automatic: Kernel = "xla" if refusal(best, hardware, cfg, dtype) else best
    if asked == "auto":
        return automatic
    problem = refusal(asked, hardware, cfg, dtype)
    if problem:
        raise ValueError(f"attention: {asked}: {problem}; nearest: {automatic}")
    return asked


def passed_over(hardware: Hardware, cfg: ModelConfig, dtype: Any) -> str | None:
    """Why auto takes XLA where the hardware has a kernel; None where it takes the kernel, or there is none."""
    best: Kernel = {"tpu": "splash", "gpu": "cudnn"}.get(hardware.platform, "xla")  # type: ignore[assignment]
    problem = refusal(best, hardware, cfg, dtype)
    return problem and f"not {best}, which {problem}"


def refusal(kernel: Kernel, hardware: Hardware, cfg: ModelConfig, dtype: Any) -> str | None:
    """What keeps ``kernel`` from computing this model here; None where nothing does.

    Sources: for splash, compilation for v5e and v5p (tests/models/test_kernels_tpu.py); for cuDNN, the checks of
    jax.nn.dot_product_attention."""
    if kernel == "splash" and hardware.platform != "tpu":
        return f"runs on TPUs, and the devices are of platform {hardware.platform}"
    if kernel != "cudnn":
        return None
    if hardware.platform != "gpu" or hardware.capability < 8:
        what = f"platform {hardware.platform}, compute capability {hardware.capability:g}"
        return f"runs on NVIDIA GPUs of compute capability 8.0 or more, and the devices are of {what}"
    if jnp.dtype(dtype).itemsize != 2:
        return f"computes in bfloat16, and precision.compute is {jnp.dtype(dtype).name}"
    if cfg.attention_softcap is not None:
        return f"has no soft-caps, and attention_softcap is {cfg.attention_softcap:g}"
    if FAMILIES[cfg.family].sinks:
        return f"has no attention sinks, and a {cfg.family} has"
    largest = 256 if hardware.capability >= 9 else 128
    for kind in attending(cfg):
        name, size = "global_head_dim" if kind.apart else "head_dim", head_sizes(cfg, kind.type)[1]
        if size % 8 or size > largest:
            return f"takes multiples of 8 up to {largest} features a head here, and {name} is {size}"
    return None


def within_rows(
    kernel: Kernel,
    segment_ids: Array,
    window: int | None,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
) -> Attend:
    """Attention of each token to those of its own segment up to itself; with ``window``, to that many of them.

    segment_ids i32[B, S], 0 where padding, which no token attends to; what padding itself reads is arbitrary but
    finite. ``scale``, ``softcap``: as in attention.attention. ``interpret``: run Pallas kernels step by step on any
    platform (slow: for tests)."""
    if kernel == "splash":
        square = functools.partial(causal_square, window=window)
        local = functools.partial(splash_rows, mask_of=square, scale=scale, softcap=softcap, interpret=interpret)
        return lambda query, key, value, sinks=None: per_device(local, query, key, value, segment_ids, sinks)
    mask = row_mask(segment_ids, window)
    if kernel == "cudnn":
        local = functools.partial(library_rows, scale=scale, implementation="cudnn")
        return lambda query, key, value, sinks=None: per_device(local, query, key, value, mask, sinks)
    bias = bias_of(mask)
    return lambda query, key, value, sinks=None: attention(query, key, value, bias, scale, softcap, sinks)


def within_groups(
    kernel: Kernel,
    readable: Array,
    copies: int,
    room: int,
    window: int | None,
    where: Places | None,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
) -> Attend:
    """``within_rows`` where a row is a group: a prompt, then ``copies`` responses that branch from it.

    A response attends to the prompt and to itself, as if it came right after it. readable bool[G, P]: the columns of
    the prompt that hold tokens, all behind the padding. The responses have ``room`` columns each, and no token of
    theirs attends to what follows their end, by causality; or they are packed, as ``where`` says (xla only)."""
    if kernel == "splash":
        ids = lambda columns: jnp.pad(readable, ((0, 0), (0, columns - readable.shape[1])), constant_values=True)
        mask_of = functools.partial(tree, prompt=readable.shape[1], copies=copies, window=window)
        local = functools.partial(splash_rows, mask_of=mask_of, scale=scale, softcap=softcap, interpret=interpret)
        rows = lambda query: ids(query.shape[1]).astype(jnp.int32)
        return lambda query, key, value, sinks=None: per_device(local, query, key, value, rows(query), sinks)
    if kernel == "cudnn":
        local = functools.partial(library_groups, copies=copies, window=window, scale=scale, implementation="cudnn")
        return lambda query, key, value, sinks=None: per_device(local, query, key, value, readable, sinks)
    start, branch = readable.shape[1], copies if where is None else 1
    masks = branch_masks(readable, room, window) if where is None else packed_masks(readable, where, window)
    biases = [bias_of(mask) for mask in masks]

    def attend(query, key, value, sinks=None):
        kv_heads = key.shape[2]
        keys, values = by_head(key[:, :start]), by_head(value[:, :start])
        within = [(keys[:, :, None], values[:, :, None], biases[0])]
        prompt = branches(split_copies(query[:, :start], kv_heads, 1), within, scale, softcap, sinks)
        own = split_keys(key[:, start:], branch), split_keys(value[:, start:], branch), biases[2]
        parts = [(keys, values, biases[1]), own]
        responses = branches(split_copies(query[:, start:], kv_heads, branch), parts, scale, softcap, sinks)
        return jnp.concatenate([merge_copies(prompt), merge_copies(responses)], axis=1)

    return attend


def branch_masks(readable: Array, room: int, window: int | None) -> tuple[Array, Array, Array]:
    """What may be read, bool, broadcastable to [G, n, queries, keys]: of a prompt by itself, of it by a response, of a
    response by itself."""
    start = readable.shape[1]
    size = start + room
    causal = jnp.tril(jnp.ones((size, size), bool))[None, None]  # of one prompt and response
    mask = causal if window is None else within_window(causal, jnp.arange(size), window)
    seen = readable[:, None, None, :]
    return mask[..., :start, :start] & seen, mask[..., start:, :start] & seen, mask[..., start:, start:]


def packed_masks(readable: Array, where: Places, window: int | None) -> tuple[Array, Array, Array]:
    """``branch_masks`` of responses that are packed: all stand in one row of columns."""
    start, width = readable.shape[1], where.owner.shape[1]
    same = (where.owner[:, :, None] == where.owner[:, None, :])[:, None]
    own = same & jnp.tril(jnp.ones((width, width), bool))
    prompt, across = jnp.tril(jnp.ones((start, start), bool))[None, None], jnp.ones((1, 1, width, start), bool)
    if window is not None:
        own, prompt = (within_window(mask, jnp.arange(mask.shape[-2]), window) for mask in (own, prompt))
        behind = start + where.index[:, None, :, None]  # the column that a token would stand in right behind its prompt
        across = behind - jnp.arange(start) < window
    seen = readable[:, None, None, :]
    return prompt & seen, across & seen, own


def row_mask(segment_ids: Array, window: int | None) -> Array:
    """bool[B, 1, S, S]: what each token of a row may read."""
    mask = causal_mask(segment_ids)
    return mask if window is None else within_window(mask, jnp.arange(mask.shape[-1]), window)


def per_device(
    local: Callable, query: Array, key: Array, value: Array, rows: Array, sinks: Array | None = None
) -> Array:
    """``local(query, key, value, rows)``, and sinks where there are any, on the rows and heads of each device; ``rows``
    [B, ...] is split along B."""
    given = (query, key, value, rows) if sinks is None else (query, key, value, rows, sinks)
    if not explicit():
        return local(*given)
    queries, keys = head_layouts(query, key)
    split = (queries, keys, keys, partition(("batch", *(None,) * (rows.ndim - 1))))
    split += () if sinks is None else (partition((head_axis("heads", sinks.shape[0]),)),)
    # check_vma: a Pallas kernel does not say over which axes its results vary
    return jax.shard_map(local, in_specs=split, out_specs=queries, check_vma=False)(*given)


def head_layouts(query: Array, key: Array) -> tuple[PartitionSpec, PartitionSpec]:
    """The layouts of queries [B, S, H, K], and of keys and values [B, S, N, K]."""
    heads = lambda name, x: partition(("batch", "seq", head_axis(name, x.shape[2]), "head_dim"))
    return heads("heads", query), heads("kv_heads", key)


# ---- splash ---------------------------------------------------------------------------------------------------------


def blocks(size: int) -> tuple[int, int]:
    """(columns of a block, columns of the padded rows) for rows of ``size``: blocks as few and as small as can be."""
    count = -(-size // LARGEST_BLOCK)
    block = -(-size // (count * LANES)) * LANES
    return block, -(-size // block) * block


def splash_rows(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    sinks: Array | None = None,
    *,
    mask_of: Callable[[int, int], Any],
    scale: float,
    softcap: float | None,
    interpret: bool,
) -> Array:
    """``within_rows`` of the splash kernel: blocks that no query of theirs may read are never visited.

    ``mask_of``: (columns, columns with padding) to the kernel's mask, beside which segment_ids count. The kernel does
    not scale products, so that queries are scaled instead, in their own dtype."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    size = query.shape[1]
    block, padded = blocks(size)
    widen = lambda x: jnp.pad(x, ((0, 0), (0, padded - size)) + ((0, 0),) * (x.ndim - 2))
    by_head = lambda x: jnp.swapaxes(widen(x), 1, 2)
    mask = mask_of(size, padded)
    kernel: Any = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * query.shape[2]),
        block_sizes=splash.BlockSizes(**dict.fromkeys(BLOCKS, block)),  # type: ignore[arg-type]
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    ids = widen(segment_ids)
    scaled = (query.astype(jnp.float32) * scale).astype(query.dtype)
    one = lambda query, key, value, ids: kernel(query, key, value, ids, sinks=sinks)
    out = jax.vmap(one)(by_head(scaled), by_head(key), by_head(value), splash.SegmentIds(ids, ids))
    return jnp.swapaxes(out, 1, 2)[:, :size]


def causal_square(size: int, padded: int, window: int | None) -> Any:
    """What a token of a row may read, for splash."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    square = (padded, padded)
    return masks.CausalMask(square) if window is None else masks.LocalMask(square, (window - 1, 0), 0)


def tree(size: int, padded: int, prompt: int, copies: int, window: int | None) -> Any:
    """What a token of a group may read, for splash."""
    from jaxrlhf.models.attention.tree_mask import TreeMask

    return TreeMask(padded, prompt, copies, (size - prompt) // copies, window)


# ---- cuDNN ----------------------------------------------------------------------------------------------------------


Library = Literal["cudnn", "xla"]  # implementations of jax.nn.dot_product_attention


def library_rows(
    query: Array, key: Array, value: Array, mask: Array, *, scale: float, implementation: Library, causal: bool = True
) -> Array:
    """``within_rows`` of jax.nn.dot_product_attention; ``mask`` bool[B, 1, S, T] says all that a token may read.

    cuDNN adds the mask to the products, and is told where it is causal too, so as to skip what lies ahead. Its
    backward pass wants even rows. The lengths of rows that it knows begin at column 0, where prompts are padded."""
    odd, odd_keys = query.shape[1] % 2, key.shape[1] % 2
    widen = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, odd), (0, odd_keys)))
    how: dict[str, Any] = {"scale": scale, "is_causal": causal, "implementation": implementation}
    return jax.nn.dot_product_attention(widen(query), widen(key), widen(value), mask=mask, **how)[:, : query.shape[1]]


def library_groups(
    query: Array,
    key: Array,
    value: Array,
    readable: Array,
    *,
    copies: int,
    window: int | None,
    scale: float,
    implementation: Library,
) -> Array:
    """``within_groups`` of jax.nn.dot_product_attention: a call for the prompts, and one in which each response is a
    row that reads a copy of its prompt's keys and values before its own. All else is still computed once a prompt."""
    start, room = readable.shape[1], (query.shape[1] - readable.shape[1]) // copies
    of_prompt, across, own = branch_masks(readable, room, window)
    call = functools.partial(library_rows, scale=scale, implementation=implementation)
    prompt = call(query[:, :start], key[:, :start], value[:, :start], of_prompt)
    rows = lambda x: x[:, start:].reshape(-1, room, *x.shape[2:])
    behind = lambda x: jnp.concatenate([jnp.repeat(x[:, :start], copies, axis=0), rows(x)], axis=1)
    own = jnp.broadcast_to(own, (*across.shape[:3], room))
    mask = jnp.repeat(jnp.concatenate([across, own], axis=3), copies, axis=0)
    responses = call(rows(query), behind(key), behind(value), mask, causal=False)
    return jnp.concatenate([prompt, responses.reshape(len(prompt), -1, *prompt.shape[2:])], axis=1)
