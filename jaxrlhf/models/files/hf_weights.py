"""Weights of Hugging Face folders: read into arrays laid out on the mesh, and written so that transformers loads them.

They go through safetensors alone, shard by shard; neither torch nor transformers is needed. What a family's tensors
are called is in models/families; nothing here knows a family.
"""

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.families import FAMILIES
from jaxrlhf.models.files.hf_config import NO_IDS, TokenIds, describe, describe_ids
from jaxrlhf.models.files.hf_folder import INDEX, SINGLE, read_json, tokenizer_files, write_json, written_whole
from jaxrlhf.models.files.hf_headers import examine
from jaxrlhf.models.files.hf_layout import LeafTensors, dotted, find_sources, leaves_of, score_bias
from jaxrlhf.models.parameters import Leaf, init, parameter_table, weight_axes
from jaxrlhf.sharding import explicit, partition
from jaxrlhf.types import Array, Head, Params

# ---- reading --------------------------------------------------------------------------------------------------------


def load(
    folder: epath.PathLike,
    cfg: ModelConfig,
    head: Head,
    dtype=jnp.float32,
    *,
    key: Array | None = None,
    fresh: list[str] | None = None,
    change: Callable[[str, Leaf, Array], Any] = lambda name, leaf, x: x,
) -> Params:
    """The weights of a folder as the parameters of parameters.parameter_table, laid out on the current mesh.

    Every device's part is read by itself, so that no whole copy is ever held besides; nor is one of what ``change``
    (name of the leaf, leaf, what was read) makes of each leaf as it comes. A scalar head that the folder lacks is drawn
    with ``key`` (by default that of 0) as parameters.init does; the paths of such leaves are added to ``fresh``. Raises
    ValueError, in one line, for tensors that are missing, unused, of another shape, or not finite.
    """
    folder = epath.Path(folder)
    tensors, sources, has_score, _ = examine(folder, cfg, head)
    lm_head = f"{FAMILIES[cfg.family].hf.modules['head'].name}.weight"
    if head == "lm" and cfg.tie_embeddings and lm_head in tensors:
        check_tied(tensors[lm_head], tensors[next(sources["embed.tokens.embedding"].names())], f"{folder}: {lm_head}")
    drawn = {}
    if head == "scalar" and not has_score:
        key = jax.random.key(0) if key is None else key
        head_leaves = jax.jit(lambda key: init(cfg, head, key, dtype)["head"])(key)  # the rest is never computed
        drawn = {f"head.{name}": value for name, value in head_leaves.items()}
        if fresh is not None:
            fresh.extend(sorted(drawn))

    def one(path, leaf: Leaf) -> Array:
        path = dotted(path)
        if path in drawn:
            return drawn[path]
        if path == "head.bias" and path not in sources:
            return place(leaf, lambda index: np.full(leaf.shape, read_score_bias(folder), jnp.dtype(dtype)))
        return place(leaf, lambda index: read_shard(sources[path], tensors, leaf.shape, index, dtype, str(folder)))

    table = parameter_table(cfg, head)
    leaves, tree = jax.tree_util.tree_flatten_with_path(table, is_leaf=lambda x: isinstance(x, Leaf))
    # the largest first: a leaf is held twice while it moves to its devices, and then the fewest others are there
    order = sorted(range(len(leaves)), key=lambda i: -math.prod(leaves[i][1].shape))
    arrays = {i: change(leaves[i][0][-1].key, leaves[i][1], one(*leaves[i])) for i in order}
    return jax.tree.unflatten(tree, [arrays[i] for i in range(len(leaves))])


def check_tied(head: Any, embedding: Any, what: str, rows: int = 4096) -> None:
    """A tied model's file may repeat the embeddings as its head, but not contradict them."""
    size = head.get_shape()[0]
    chunks = [slice(start, min(start + rows, size)) for start in range(0, size, rows)]
    if head.get_shape() != embedding.get_shape() or any((head[part] != embedding[part]).any() for part in chunks):
        raise ValueError(f"{what}: differs from the embeddings, though config.json says that they are tied")


def read_score_bias(folder: epath.Path) -> float:
    """The score's bias where no tensor holds it: ``score_bias`` in config.json, as older exports have it; else 0."""
    bias = (read_json(folder, "config.json") or {}).get("score_bias", 0.0)
    if type(bias) not in (int, float) or not math.isfinite(bias):
        raise ValueError(f"{folder}/config.json: score_bias: {bias!r}; expected a number")
    return bias


def place(leaf: Leaf, read: Callable[[tuple[slice, ...]], np.ndarray]) -> Array:
    """The array whose parts ``read`` gives, laid out as the leaf is.

    A part that several devices hold is read once, and the host holds one part at a time."""
    if not explicit():
        return jax.block_until_ready(jax.device_put(read((slice(None),) * len(leaf.shape))))
    sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), partition(weight_axes(leaf)))
    holders: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(one.indices(size) for one, size in zip(index or (), leaf.shape))
        holders.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, devices in holders.items():
        part = read(tuple(slice(*bound) for bound in bounds))
        arrays += jax.block_until_ready([jax.device_put(part, device) for device in devices])
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def read_shard(
    source: LeafTensors, tensors: Mapping[str, Any], shape: tuple[int, ...], index: tuple[slice, ...], dtype, where: str
) -> np.ndarray:
    """``index`` of the leaf whose shape is ``shape``: layers stacked, vocabulary padded with zeros."""
    bounds = [one.indices(size)[:2] for one, size in zip(index, shape)]
    shard = np.zeros([stop - start for start, stop in bounds], jnp.dtype(dtype))
    count = len(source.stacked)
    outer, inner = bounds[:count], bounds[count:]
    window = {
        axis: tuple(min(bound, source.sizes[axis]) for bound in pair)
        for axis, pair in zip(source.axes, inner, strict=True)
    }
    if any(start == stop for start, stop in window.values()):
        return shard  # beyond the vocabulary: all padding
    for place in np.ndindex(*(stop - start for start, stop in outer)):
        name = source.name_at(tuple(start + at for (start, _), at in zip(outer, place)))
        value = read_tensor(source, tensors[name], window)
        if not np.isfinite(value).all():
            raise ValueError(f"{where}: {name}: holds weights that are NaN or infinite")
        target = shard[(*place, ...)]
        part = target[(*(slice(size) for size in value.shape), ...)]
        with np.errstate(over="ignore"):
            part[...] = value
        if not np.isfinite(part).all():
            largest = np.abs(value.astype(np.float64)).max()
            raise ValueError(f"{where}: {name}: holds {largest:.3g}; expected weights that fit in {part.dtype}")
    return shard


def read_tensor(source: LeafTensors, tensor: Any, window: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    """The part of the leaf that ``window`` (axis -> start, stop) says, its axes in the leaf's order; no more is read
    than the slice of each dimension's slowest axis. Of a ``strided`` tensor, whose numbers are dequantised, the other
    parts between the leaf's are not."""
    picked, fused, mine, split, wanted, order = [], [], [], [], [], []
    for dim in source.dims:
        if dim == ("1",):
            picked.append(0)
            continue
        lead, *rest = (axis for axis in dim if axis != "part")
        start, stop = window[lead]
        inner = math.prod(source.sizes[axis] for axis in rest)
        offset, width, share, step = 0, inner, slice(None), 1
        if dim[0] == "part":  # all queries, all keys, all values
            offset = source.before
        elif "part" in dim and inner == 1 and getattr(tensor, "strided", False):
            offset, step = source.before, source.total
        elif "part" in dim:  # query, key, value in every head
            width, share = source.total, slice(source.before, source.before + inner)
        picked.append(slice(offset + start * width * step, offset + stop * width * step, step))
        fused += [stop - start, width]
        mine += [slice(None), share]
        split += [stop - start, *(source.sizes[axis] for axis in rest)]
        wanted += [slice(None), *(slice(*window[axis]) for axis in rest)]
        order += [lead, *rest]
    value = tensor[tuple(picked)].reshape(fused)[tuple(mine)].reshape(split)[tuple(wanted)]
    return value.transpose([order.index(axis) for axis in source.axes])


# ---- writing --------------------------------------------------------------------------------------------------------


def save(
    params: Params,
    cfg: ModelConfig,
    head: Head,
    folder: epath.PathLike,
    dtype="float32",
    *,
    ids: TokenIds = NO_IDS,
    tokenizer_folder: epath.PathLike | None = None,
    max_shard_bytes: float = 5e9,
) -> list[str]:
    """Write ``folder`` so that transformers (and ``load``) reads the same model from it; config.json comes last.

    transformers' classes take the score at the last token that is not ``ids.pad``, and have no bias there: it moves
    into the last norm where that has one; elsewhere it is a tensor of the file, score.bias. In a run of several
    processes all call this, and the first writes. Returns what transformers computes otherwise. Raises ValueError, in
    one line, where the family cannot say the model.
    """
    folder = epath.Path(folder)
    raw = describe(cfg, head, ids) | {"dtype": jnp.dtype(dtype).name}
    check_params(params, cfg, head)
    check_ids(ids, cfg)
    tokenizer = tokenizer_files(tokenizer_folder)
    sources, notes = find_sources(cfg, head), []
    if head == "scalar":
        params = fold_score_bias(params)
        raw["score_bias"] = bias = float(to_numpy(params["head"]["bias"])[0])  # what transformers' scores lack
        if bias:
            sources["head.bias"] = score_bias(cfg)
            notes = [
                f"score.bias: {bias:.6g}: {raw['architectures'][0]} has no bias: its scores are ours less {bias:.6g}"
            ]
    writes = jax.process_index() == 0
    shards = plan_shards(sources, jnp.dtype(dtype).itemsize, max_shard_bytes)
    place = written_whole(folder, {path.name for path in tokenizer}) if writes else contextlib.nullcontext(folder)
    with place as new:
        host: dict[tuple, np.ndarray] = {}
        for name, tensors in shards.items():
            values = {
                tensor: join_parts(params, parts, host).astype(jnp.dtype(dtype)) for tensor, parts in tensors.items()
            }
            if writes:
                write_weights(new / name, values)
        if not writes:
            return notes
        if len(shards) > 1:
            weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
            size = weight_bytes(sources, dtype)
            write_json(new / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        for path in tokenizer:
            if path != new / path.name:
                path.copy(new / path.name, overwrite=True)
        if ids.eos:
            write_json(new / "generation_config.json", describe_ids(ids))
        write_json(new / "config.json", raw)
    return notes


def fold_score_bias(params: Params) -> Params:
    """The same scores without a bias, where the last norm has one: moved along the score's direction w, its own bias
    adds (b + bias w / |w|^2) . w = b . w + bias."""
    if "bias" not in params["final_norm"]:
        return params
    kernel, bias = (np.asarray(to_numpy(params["head"][name]), np.float64) for name in ("kernel", "bias"))
    norm = np.asarray(to_numpy(params["final_norm"]["bias"]), np.float64)
    length = (kernel**2).sum()
    if not length:
        return params
    moved = (norm + bias * kernel[:, 0] / length).astype(np.float32)
    head = params["head"] | {"bias": np.zeros(1, np.float32)}
    return params | {"final_norm": params["final_norm"] | {"bias": moved}, "head": head}


class LayerPart(NamedTuple):
    """One layer of a leaf, or one expert of it, which is all or a part of a tensor."""

    path: str
    source: LeafTensors
    place: tuple[int, ...]


def plan_shards(
    sources: dict[str, LeafTensors], itemsize: int, max_bytes: float
) -> dict[str, dict[str, list[LayerPart]]]:
    """File name -> tensor -> its parts; a file is as full as ``max_bytes`` allows, and holds one tensor at least."""
    tensors: dict[str, list[LayerPart]] = {}
    for path, source in sources.items():
        for place in np.ndindex(source.stacked):
            tensors.setdefault(source.name_at(place), []).append(LayerPart(path, source, place))
    groups, room = [{}], max_bytes
    for name, parts in tensors.items():
        size = math.prod(parts[0].source.shape()) * itemsize
        if size > room and groups[-1]:
            groups.append({})
            room = max_bytes
        groups[-1][name] = parts
        room -= size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def join_parts(params: Params, parts: list[LayerPart], host: dict[tuple, np.ndarray]) -> np.ndarray:
    """The tensor as files have it: the inverse of read_tensor, for all the leaves that share it. ``host`` keeps the
    experts of one layer, which are asked for one after the other."""
    blocks, at = [], 0
    for path, source, place in parts:
        layer, expert = place[:1], place[1:]
        if (path, layer) not in host:
            host.clear()
            leaf = leaf_at(params, path)
            host[path, layer] = to_numpy(leaf[layer] if layer else leaf)
        whole = host[path, layer][expert]
        value = whole[tuple(slice(source.sizes[axis]) for axis in source.axes)]
        order = [axis for dim in source.dims for axis in dim if axis not in ("part", "1")]
        shape = []
        for dim, size in zip(source.dims, source.shape()):
            if "part" in dim:
                shape += [size // source.total, source.own()]
                at = len(shape) - 1
            else:
                shape.append(size)
        blocks.append(value.transpose([source.axes.index(axis) for axis in order]).reshape(shape))
    return np.concatenate(blocks, axis=at).reshape(parts[0].source.shape())


def leaf_at(params: Params, path: str) -> Any:
    for name in path.split("."):
        params = params[name]
    return params


def to_numpy(x: Any) -> np.ndarray:
    """The whole of a sharded array on this host, whichever hosts hold it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def check_params(params: Params, cfg: ModelConfig, head: Head) -> None:
    """``params`` are those of this config and head, or a ValueError says where they are not."""
    flat = {dotted(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    expected = {path: leaf.shape for path, leaf in leaves_of(cfg, head).items()}
    wrong = sorted(path for path in flat.keys() | expected if flat.get(path) != expected.get(path))
    if wrong:
        shapes = f"{flat.get(wrong[0], 'absent')}, expected {expected.get(wrong[0], 'absent')}"
        raise ValueError(f"export: {len(wrong)} parameters do not fit the config: {wrong[0]}: {shapes}")


def check_ids(ids: TokenIds, cfg: ModelConfig) -> None:
    for name, value in (("eos", max(ids.eos, default=None)), ("bos", ids.bos), ("pad", ids.pad)):
        if value is not None and cfg.vocab_size and value >= cfg.vocab_size:
            raise ValueError(f"export: {name} token {value} is outside the vocabulary of {cfg.vocab_size}")


def weight_bytes(sources: dict[str, LeafTensors], dtype) -> int:
    """Of all tensors in the files."""
    shapes = {name: source.shape() for source in sources.values() for name in source.names()}
    return sum(map(math.prod, shapes.values())) * jnp.dtype(dtype).itemsize


def write_weights(path: epath.Path, values: dict[str, np.ndarray]) -> None:
    """One safetensors file; by way of a local one where ``path`` is remote."""
    from safetensors.numpy import save_file

    values = {name: np.ascontiguousarray(value) for name, value in values.items()}
    if "://" not in os.fspath(path):
        path.write_bytes(b"")
        mode = os.stat(path).st_mode & 0o777  # by the umask; safetensors makes files for the user alone
        save_file(values, os.fspath(path), metadata={"format": "pt"})
        os.chmod(path, mode)
        return
    with tempfile.TemporaryDirectory() as scratch:
        local = epath.Path(scratch) / path.name
        save_file(values, os.fspath(local), metadata={"format": "pt"})
        local.copy(path, overwrite=True)
