"""Weights of Hugging Face folders: read into arrays laid out on the mesh, and written so that transformers loads them.

They go through safetensors alone, shard by shard; neither torch nor transformers is needed. What a family's tensors
are called is in models/families; nothing here knows a family.
"""

import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxrlhf.models import gguf
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.families import FAMILIES, HuggingFace
from jaxrlhf.models.hf_config import NO_IDS, TokenIds, describe, describe_ids
from jaxrlhf.models.hf_folder import INDEX, SINGLE, clear, read_json, tokenizer_files, write_json
from jaxrlhf.models.hf_layout import SCORE, Source, dotted, find_sources, leaves_of
from jaxrlhf.models.transformer import Leaf, init, parameter_table, weight_axes
from jaxrlhf.sharding import explicit, partition
from jaxrlhf.types import Array, Head, Params

FLOATS = ("F32", "BF16", "F16", "F64")
SHOWN = 3  # names that an error lists


# ---- reading --------------------------------------------------------------------------------------------------------


def load(
    folder: epath.PathLike,
    cfg: ModelConfig,
    head: Head,
    dtype=jnp.float32,
    *,
    key: Array | None = None,
    fresh: list[str] | None = None,
) -> Params:
    """The weights of a folder as the parameters of transformer.parameter_table, laid out on the current mesh.

    Every device's part is read by itself, so that no whole copy is ever held besides. A scalar head that the folder
    lacks is drawn with ``key`` (by default that of 0) as transformer.init does; the paths of such leaves are added to
    ``fresh``. Raises ValueError, in one line, for tensors that are missing, unused, of another shape, or not finite.
    """
    folder = epath.Path(folder)
    tensors = with_prefix(open_weights(folder), FAMILIES[cfg.family].hf)
    sources, drawn = find_sources(cfg, head), {}
    if head == "scalar" and f"{SCORE.name}.weight" not in tensors:
        key = jax.random.key(0) if key is None else key
        head_leaves = jax.jit(lambda key: init(cfg, head, key, dtype)["head"])(key)  # the rest is never computed
        drawn = {f"head.{name}": value for name, value in head_leaves.items()}
        del sources["head.kernel"]
        if fresh is not None:
            fresh.extend(sorted(drawn))
    check_tensors(tensors, sources, cfg, head, str(folder))

    def one(path, leaf: Leaf) -> Array:
        path = dotted(path)
        if path in drawn:
            return drawn[path]
        if path == "head.bias":
            return place(leaf, lambda index: np.full(leaf.shape, read_score_bias(folder), jnp.dtype(dtype)))
        return place(leaf, lambda index: read_shard(sources[path], tensors, leaf.shape, index, dtype, str(folder)))

    table = parameter_table(cfg, head)
    leaves, tree = jax.tree_util.tree_flatten_with_path(table, is_leaf=lambda x: isinstance(x, Leaf))
    # the largest first: a leaf is held twice while it moves to its devices, and then the fewest others are there
    order = sorted(range(len(leaves)), key=lambda i: -math.prod(leaves[i][1].shape))
    arrays = {i: one(*leaves[i]) for i in order}
    return jax.tree.unflatten(tree, [arrays[i] for i in range(len(leaves))])


def read_score_bias(folder: epath.Path) -> float:
    """The score's bias, which has no place in a Hugging Face class: ``score_bias`` in config.json, by default 0."""
    bias = (read_json(folder, "config.json") or {}).get("score_bias", 0.0)
    if type(bias) not in (int, float) or not math.isfinite(bias):
        raise ValueError(f"{folder}/config.json: score_bias: {bias!r}; expected a number")
    return bias


def open_weights(folder: epath.Path) -> dict[str, Any]:
    """Name -> a lazy safetensors slice (get_shape, get_dtype, [...]) of every tensor in the folder.

    Raises ValueError, in one line, where there are none or their files are broken."""
    if (folder / gguf.RECORD).exists():
        return dict(gguf.open_tensors(folder))
    if (folder / SINGLE).exists():
        return open_file(folder / SINGLE)
    if (folder / INDEX).exists():
        return open_shards(folder)
    pickled = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt"))
    if pickled:
        raise ValueError(f"{folder}: {pickled[0]}: pickled weights can run code and are never read; expected {SINGLE}")
    raise ValueError(f"{folder}: there are no weights; expected {SINGLE} or {INDEX}")


def open_file(path: epath.Path) -> dict[str, Any]:
    """open_weights of one file; safetensors checks that the header fits the file, before it allocates."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(os.fspath(path), framework="numpy")
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: is not a safetensors file: {error}") from error


def open_shards(folder: epath.Path) -> dict[str, Any]:
    """open_weights of the files that the index names."""
    weight_map = (read_json(folder, INDEX) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{folder / INDEX}: weight_map: expected an object of tensor: file")
    files = {}
    for name in sorted(set(weight_map.values())):
        if name != os.path.basename(name) or not (folder / name).exists():
            raise ValueError(f"{folder / INDEX}: {name}: there is no such file in the folder")
        files[name] = open_file(folder / name)
    absent = [tensor for tensor, name in weight_map.items() if tensor not in files[name]]
    if absent:
        raise ValueError(f"{folder / INDEX}: {weight_map[absent[0]]} does not hold {shown(absent)}")
    return {tensor: files[name][tensor] for tensor, name in weight_map.items()}


def with_prefix(tensors: dict[str, Any], names: HuggingFace) -> dict[str, Any]:
    """Base-model files (GPT-2's on the hub) leave the prefix out: put it back."""
    if any(name.startswith(names.prefix) for name in tensors):
        return tensors
    heads = (f"{names.modules['head'].name}.", f"{SCORE.name}.")
    return {name if name.startswith(heads) else names.prefix + name: tensor for name, tensor in tensors.items()}


def shown(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (" and others" if len(names) > SHOWN else "")


def check_tensors(
    tensors: Mapping[str, Any], sources: dict[str, Source], cfg: ModelConfig, head: Head, where: str
) -> None:
    """Every tensor that is needed is there, in its shape; every other one is another head's or no weight at all."""
    names, used, missing = FAMILIES[cfg.family].hf, set(), []
    for source in sources.values():
        for name in source.names():
            if name not in tensors:
                missing.append(name)
                if len(missing) > SHOWN:  # a config may claim any number of layers
                    raise ValueError(f"{where}: lacks tensors: {shown(missing)}")
                continue
            used.add(name)
            shape, kind = tuple(tensors[name].get_shape()), tensors[name].get_dtype()
            if shape != source.shape():
                raise ValueError(f"{where}: {name}: has shape {shape}; config.json says {source.shape()}")
            if kind not in FLOATS:
                raise ValueError(f"{where}: {name}: holds {kind}; expected one of {', '.join(FLOATS)}")
    if missing:
        raise ValueError(f"{where}: lacks tensors: {shown(missing)}")
    lm_head, score = f"{names.modules['head'].name}.weight", f"{SCORE.name}.weight"
    other = {lm_head, score} - used
    unused = [name for name in tensors if name not in used | other and not re.search(names.ignored, name)]
    if unused:
        raise ValueError(f"{where}: holds tensors that a {cfg.family} of this config has no place for: {shown(unused)}")
    if head == "lm" and lm_head in other and lm_head in tensors:
        check_tied(tensors[lm_head], tensors[next(sources["embed.tokens.embedding"].names())], f"{where}: {lm_head}")


def check_tied(head: Any, embedding: Any, what: str, rows: int = 4096) -> None:
    """A tied model's file may repeat the embeddings as its head, but not contradict them."""
    size = head.get_shape()[0]
    chunks = [slice(start, min(start + rows, size)) for start in range(0, size, rows)]
    if head.get_shape() != embedding.get_shape() or any((head[part] != embedding[part]).any() for part in chunks):
        raise ValueError(f"{what}: differs from the embeddings, though config.json says that they are tied")


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
    source: Source, tensors: Mapping[str, Any], shape: tuple[int, ...], index: tuple[slice, ...], dtype, where: str
) -> np.ndarray:
    """``index`` of the leaf whose shape is ``shape``: layers stacked, vocabulary padded with zeros."""
    bounds = [one.indices(size)[:2] for one, size in zip(index, shape)]
    shard = np.zeros([stop - start for start, stop in bounds], jnp.dtype(dtype))
    layers, inner = (range(*bounds[0]), bounds[1:]) if source.layers else ([None], bounds)
    window = {
        axis: tuple(min(bound, source.sizes[axis]) for bound in pair)
        for axis, pair in zip(source.axes, inner, strict=True)
    }
    if any(start == stop for start, stop in window.values()):
        return shard  # beyond the vocabulary: all padding
    for row, layer in enumerate(layers):
        name = source.name.format(layer=layer)
        value = read_tensor(source, tensors[name], window)
        if not np.isfinite(value).all():
            raise ValueError(f"{where}: {name}: holds weights that are NaN or infinite")
        target = shard if layer is None else shard[row]
        target[tuple(slice(size) for size in value.shape)] = value
    return shard


def read_tensor(source: Source, tensor: Any, window: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    """The part of the leaf that ``window`` (axis -> start, stop) says, its axes in the leaf's order; no more is read
    than the slice of each dimension's slowest axis."""
    picked, fused, mine, split, wanted, order = [], [], [], [], [], []
    for dim in source.dims:
        lead, *rest = (axis for axis in dim if axis != "part")
        start, stop = window[lead]
        inner = math.prod(source.sizes[axis] for axis in rest)
        offset, width, share = 0, inner, slice(None)
        if dim[0] == "part":  # all queries, all keys, all values
            offset = source.before
        elif "part" in dim:  # query, key, value in every head
            width, share = source.total, slice(source.before, source.before + inner)
        picked.append(slice(offset + start * width, offset + stop * width))
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
) -> None:
    """Write ``folder`` so that transformers (and ``load``) reads the same model from it; config.json comes last.

    transformers' classes have no bias in the score and read it at the last token that is not ``ids.pad``: scores are
    equal to ours up to ``score_bias``, where padding is not a token of the text. In a run of several processes all
    call this, and the first writes. Raises ValueError, in one line, where the family cannot say the model.
    """
    folder = epath.Path(folder)
    raw = describe(cfg, head, ids) | {"dtype": jnp.dtype(dtype).name}
    check_params(params, cfg, head)
    check_ids(ids, cfg)
    tokenizer = tokenizer_files(tokenizer_folder)
    if head == "scalar":
        raw["score_bias"] = float(fetch(params["head"]["bias"])[0])
    writes = jax.process_index() == 0
    if writes:
        clear(folder, {path.name for path in tokenizer})
    shards = plan_shards(find_sources(cfg, head), jnp.dtype(dtype).itemsize, max_shard_bytes)
    for name, tensors in shards.items():
        values = {tensor: join(params, parts).astype(jnp.dtype(dtype)) for tensor, parts in tensors.items()}
        if writes:
            write_weights(folder / name, values)
    if not writes:
        return
    if len(shards) > 1:
        weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        write_json(
            folder / INDEX, {"metadata": {"total_size": weight_bytes(cfg, head, dtype)}, "weight_map": weight_map}
        )
    for path in tokenizer:
        if path != folder / path.name:
            path.copy(folder / path.name, overwrite=True)
    if ids.eos:
        write_json(folder / "generation_config.json", describe_ids(ids))
    write_json(folder / "config.json", raw)


class Part(NamedTuple):
    """One layer of a leaf, which is all or a part of a tensor."""

    path: str
    source: Source
    layer: int | None


def plan_shards(sources: dict[str, Source], itemsize: int, max_bytes: float) -> dict[str, dict[str, list[Part]]]:
    """File name -> tensor -> its parts; a file is as full as ``max_bytes`` allows, and holds one tensor at least."""
    tensors: dict[str, list[Part]] = {}
    for path, source in sources.items():
        for layer, name in enumerate(source.names()):
            tensors.setdefault(name, []).append(Part(path, source, layer if source.layers else None))
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


def join(params: Params, parts: list[Part]) -> np.ndarray:
    """The tensor as files have it: the inverse of read_tensor, for all the leaves that share it."""
    blocks, at = [], 0
    for path, source, layer in parts:
        leaf = leaf_at(params, path)
        value = fetch(leaf if layer is None else leaf[layer])[tuple(slice(source.sizes[axis]) for axis in source.axes)]
        order = [axis for dim in source.dims for axis in dim if axis != "part"]
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


def fetch(x: Any) -> np.ndarray:
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


def weight_bytes(cfg: ModelConfig, head: Head, dtype) -> int:
    """Of all tensors in the files."""
    shapes = {name: source.shape() for source in find_sources(cfg, head).values() for name in source.names()}
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
