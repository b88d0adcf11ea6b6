"""Hugging Face folders: read into arrays laid out on the mesh, and written back so that transformers loads them.

Weights go through safetensors alone, shard by shard; neither torch nor transformers is needed. What a family's tensors
and fields are called is in models/families.py; nothing here knows a family.
"""

import dataclasses
import fnmatch
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxrlhf.models.families import FAMILIES, Module
from jaxrlhf.models.transformer import Leaf, ModelConfig, RopeScaling, init, parameter_table, resolve, weight_axes
from jaxrlhf.sharding import explicit, partition
from jaxrlhf.types import Array, Head, Params

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
READ_FILES = ("*.json", "model*.safetensors", "merges.txt", "tokenizer.model", "chat_template.jinja")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OWN_FILES = ("config.json", "generation_config.json", SINGLE, INDEX, "model-?????-of-?????.safetensors")
SCORE = Module("score", "score embed")  # the scalar head, in every family; its bias is in config.json, HF has none
FLOATS = ("F32", "BF16", "F16", "F64")
MAX_JSON_BYTES = 64 * 2**20
SHOWN = 3  # names that an error lists


class TokenIds(NamedTuple):
    """Special tokens that an exported folder's configs name."""

    eos: tuple[int, ...] = ()
    bos: int | None = None
    pad: int | None = None


NO_IDS = TokenIds()


# ---- folders --------------------------------------------------------------------------------------------------------


def locate(name: str) -> epath.Path:
    """The local folder that ``name`` says: a folder here, gs://... (copied), or a hub name (downloaded).

    Only configs, tokenizers and safetensors are fetched. Raises ValueError, in one line, where there is no such thing.
    """
    folder = epath.Path(name).expanduser()
    if "://" in name and folder.is_dir():
        return mirror(folder)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise ValueError(f"init_from: {name!r}: there is no such folder, and hub names are owner/model")
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(name, allow_patterns=list(READ_FILES), ignore_patterns=["*/*"])
    except Exception as error:  # of many kinds: offline, gated, unknown, disk full
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"init_from: {name!r}: there is no such folder, and the hub answers: {why}") from error
    return epath.Path(found)


def mirror(remote: epath.Path) -> epath.Path:
    """A copy of a remote folder under ~/.cache/jaxrlhf/models (safetensors maps local files); old copies are reused."""
    local = epath.Path("~/.cache/jaxrlhf/models").expanduser() / hashlib.sha256(str(remote).encode()).hexdigest()[:16]
    local.mkdir(parents=True, exist_ok=True)
    sources = {path.name: path for path in remote.iterdir() if any(fnmatch.fnmatch(path.name, p) for p in READ_FILES)}
    for stale in [path for path in local.iterdir() if not path.name.startswith((".", *sources))]:
        stale.unlink()
    for name, source in sources.items():
        target, want = local / name, source.stat()
        if target.exists() and target.stat().length == want.length and target.stat().mtime >= (want.mtime or 0):
            continue
        unfinished = local / f".{name}.{os.getpid()}"
        source.copy(unfinished, overwrite=True)
        unfinished.replace(target)
    return local


def read_json(folder: epath.PathLike, name: str) -> dict[str, Any] | None:
    """The object in a JSON file of the folder; None where there is no such file.

    Raises ValueError, in one line, where it is broken or absurdly large."""
    path = epath.Path(folder) / name
    if not path.exists():
        return None
    if path.stat().length > MAX_JSON_BYTES:
        raise ValueError(f"{path}: {path.stat().length} bytes; expected at most {MAX_JSON_BYTES}")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}; expected an object")
    return value


# ---- config.json ----------------------------------------------------------------------------------------------------


def read_config(folder: epath.PathLike) -> tuple[ModelConfig, Head]:
    """The architecture (resolved) and the head that config.json names.

    Raises ValueError, in one line, for a family, a class or a field that changes the maths and is not supported."""
    raw, where = read_json(folder, "config.json"), f"{folder}/config.json"
    if raw is None:
        raise ValueError(f"{where}: there is no such file; expected a Hugging Face folder: config.json and {SINGLE}")
    return parse_config(raw, where)


def parse_config(raw: Mapping[str, Any], where: str) -> tuple[ModelConfig, Head]:
    """read_config of an object already read; errors begin with ``where``."""
    families = {family.hf.model_type: name for name, family in FAMILIES.items()}
    kind = raw.get("model_type")
    if kind not in families:
        raise ValueError(f"{where}: model_type: {kind!r} is not supported; expected {' or '.join(families)}")
    family = FAMILIES[families[kind]]
    refuse_unsupported(raw, family.hf.fixed, where)
    head = parse_head(raw, family.hf.classes, where)
    found: dict[str, Any] = {ours: parse_field(raw, ours, *name, where) for ours, name in family.hf.fields.items()}
    if family.positions == "rope":
        found |= parse_rope(raw, found["max_positions"], where)
    if not found.get("head_dim") and found["hidden_size"] % found["num_heads"]:
        raise ValueError(f"{where}: hidden size {found['hidden_size']} is not a multiple of {found['num_heads']} heads")
    try:
        return resolve(ModelConfig(**{"family": families[kind], **found})), head
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def refuse_unsupported(raw: Mapping[str, Any], fixed: Mapping[str, tuple], where: str) -> None:
    """Fields that change the maths must have a value that is supported; code that comes with a model is never run."""
    if raw.get("auto_map"):
        raise ValueError(f"{where}: auto_map: remote code is never run; expected a plain {raw['model_type']} model")
    always = {"quantization_config": (None,), "is_encoder_decoder": (False,), "partial_rotary_factor": (1.0, None)}
    for name, allowed in {**always, **fixed}.items():
        value = raw.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{where}: {name}: {value!r} is not supported; expected {allowed[0]!r}")


def parse_head(raw: Mapping[str, Any], classes: Mapping[Head, str], where: str) -> Head:
    """The head that ``architectures`` names; a classifier has to have one label."""
    heads: list[Head] = [head for head, name in classes.items() if raw.get("architectures") == [name]]
    if not heads:
        shown = raw.get("architectures")
        raise ValueError(
            f"{where}: architectures: {shown!r} is not supported; expected {' or '.join(classes.values())}"
        )
    labels = raw.get("id2label")
    count = len(labels) if isinstance(labels, dict) else raw.get("num_labels", 2)
    if heads[0] == "scalar" and count != 1:
        raise ValueError(f"{where}: num_labels: {count} is not supported; expected 1, a score")
    return heads[0]


def parse_field(raw: Mapping[str, Any], ours: str, theirs: str, default: Any, where: str) -> Any:
    """One field of ModelConfig, checked against its annotation: numbers are positive, null is absent."""
    value = default if raw.get(theirs) is None else raw[theirs]
    if value is ...:
        raise ValueError(f"{where}: {theirs}: is missing")
    kind = next(field.type for field in dataclasses.fields(ModelConfig) if field.name == ours)
    return value if value is None else checked(value, kind, f"{where}: {theirs}")


def checked(value: Any, kind: Any, what: str) -> Any:
    """``value`` if it is a ``kind`` (bool, int or float, or null) in a sane range; else a ValueError about ``what``."""
    kinds = get_args(kind) or (kind,)
    if bool in kinds:
        good, expected = isinstance(value, bool), "true or false"
    elif int in kinds:
        good, expected = type(value) is int and 0 < value < 2**31, "a positive whole number"
    else:
        good, expected = type(value) in (int, float) and 0 < value < math.inf, "a positive number"
    if not good:
        raise ValueError(f"{what}: {value!r}; expected {expected}")
    return float(value) if float in kinds else value


def parse_rope(raw: Mapping[str, Any], max_positions: int, where: str) -> dict[str, Any]:
    """rope_theta and rope_scaling of ModelConfig, from the old spelling (rope_theta, rope_scaling) or that of
    transformers 5 (rope_parameters); as there, the old one wins where both are given."""
    spelling = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope, where = raw.get(spelling) or {}, f"{where}: {spelling}"
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{where}: {rope!r} is not supported; expected one flat object")
    number = lambda name: checked(rope.get(name), float, f"{where}.{name}")
    refuse_unsupported({"partial_rotary_factor": rope.get("partial_rotary_factor")}, {}, where)
    theta = checked(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0, float, f"{where}.rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = RopeScaling("linear", number("factor"))
    elif kind == "llama3":
        name = "original_max_position_embeddings"
        original = checked(raw.get(name) or rope.get(name) or max_positions, int, f"{where}.{name}")
        scaling = RopeScaling(
            "llama3", number("factor"), number("low_freq_factor"), number("high_freq_factor"), original
        )
    else:
        raise ValueError(f"{where}.rope_type: {kind!r} is not supported; expected default, linear or llama3")
    return {"rope_theta": theta, "rope_scaling": scaling}


def describe_rope(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json fields that parse_rope reads, in both spellings: readers older than transformers 5 remain."""
    scaling = cfg.rope_scaling
    if scaling is None:
        return {"rope_theta": cfg.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta}}
    rope: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        rope |= {"original_max_position_embeddings": scaling.original_max_positions}
    new = {**rope, "rope_theta": cfg.rope_theta}
    return {"rope_theta": cfg.rope_theta, "rope_scaling": rope, "rope_parameters": new}


def describe(cfg: ModelConfig, head: Head, ids: TokenIds = NO_IDS) -> dict[str, Any]:
    """The config.json with which transformers computes what we do: all that parse_config reads.

    Raises ValueError, in one line, for a model that the family's class in transformers cannot be."""
    family = FAMILIES[cfg.family]
    names = family.hf
    raw = {"architectures": [names.classes[head]], "model_type": names.model_type}
    raw |= {theirs: getattr(cfg, ours) for ours, (theirs, _) in names.fields.items()}
    raw |= {name: allowed[0] for name, allowed in names.fixed.items()}
    raw |= describe_rope(cfg) if family.positions == "rope" else {}
    raw |= describe_ids(ids)
    if head == "scalar":
        raw |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if cfg.hidden_size % cfg.num_heads:
        what = f"hidden_size: {cfg.hidden_size} is not a multiple of num_heads: {cfg.num_heads}"
        raise ValueError(f"export: {what}, and transformers loads no such {names.model_type} model")
    back = parse_config(raw, "export")[0]
    for field in dataclasses.fields(cfg):
        ours, theirs = getattr(cfg, field.name), getattr(back, field.name)
        if ours != theirs:
            what = f"{field.name}: {ours!r} cannot be said in the config.json of {names.model_type}"
            raise ValueError(f"export: {what}, where it is {theirs!r}")
    return raw


def describe_ids(ids: TokenIds) -> dict[str, Any]:
    """Null where there is none: what is left out, transformers fills in with numbers of its own."""
    eos = ids.eos[0] if len(ids.eos) == 1 else list(ids.eos) or None
    return {"bos_token_id": ids.bos, "eos_token_id": eos, "pad_token_id": ids.pad}


# ---- where a leaf is in the files -----------------------------------------------------------------------------------


class Source(NamedTuple):
    """The tensor, one a layer, that holds a leaf."""

    name: str
    dims: tuple[tuple[str, ...], ...]  # the tensor's dimensions, each the leaf's axes that it is made of
    axes: tuple[str, ...]  # the leaf's, without layers
    sizes: dict[str, int]  # of those axes in the file: the vocabulary is not padded there
    layers: int | None
    before: int = 0  # where the leaf begins along the ``part`` of a fused tensor
    total: int = 0  # and how long that is

    def own(self) -> int:
        """The leaf's share of ``total``; 0 where the tensor is not fused."""
        fused = [dim[dim.index("part") + 1 :] for dim in self.dims if "part" in dim]
        return math.prod(self.sizes[axis] for axis in fused[0]) if fused else 0

    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor, its other parts included."""

        def one(dim: tuple[str, ...]) -> int:
            mine = math.prod(self.sizes[axis] for axis in dim if axis != "part")
            return mine // self.own() * self.total if "part" in dim else mine

        return tuple(map(one, self.dims))

    def names(self) -> Iterator[str]:
        """The tensor's name for each layer."""
        return (self.name.format(layer=i) for i in range(self.layers)) if self.layers else iter([self.name])


def dotted(path) -> str:
    return ".".join(key.key for key in path)


def leaves_of(cfg: ModelConfig, head: Head) -> dict[str, Leaf]:
    """Path -> Leaf."""
    is_leaf = lambda x: isinstance(x, Leaf)
    flat = jax.tree_util.tree_leaves_with_path(parameter_table(cfg, head), is_leaf=is_leaf)
    return {dotted(path): leaf for path, leaf in flat}


def find_sources(cfg: ModelConfig, head: Head) -> dict[str, Source]:
    """Path of a leaf -> Source, for every leaf but the bias of a scalar head; parts of a tensor in their order."""
    leaves = leaves_of(cfg, head)
    leaves.pop("head.bias", None)
    modules = FAMILIES[cfg.family].hf.modules | ({"head": SCORE} if head == "scalar" else {})
    order = {path: place for place, path in enumerate(modules)}
    found, length = {}, {}
    for path, leaf in sorted(leaves.items(), key=lambda item: order[item[0].rpartition(".")[0]]):
        module, _, kind = path.rpartition(".")
        source = make_source(modules[module], "bias" if kind == "bias" else "weight", leaf, cfg)
        found[path] = source._replace(before=length.get(source.name, 0))
        length[source.name] = found[path].before + source.own()
    return {path: source._replace(total=length[source.name]) for path, source in found.items()}


def make_source(module: Module, suffix: str, leaf: Leaf, cfg: ModelConfig) -> Source:
    """Where ``leaf`` of ``module`` is, but for its place among parts."""
    stacked = leaf.axes[0] == "layers"
    axes = leaf.axes[1:] if stacked else leaf.axes
    sizes = dict(zip(axes, leaf.shape[1:] if stacked else leaf.shape, strict=True))
    if "vocab" in sizes:
        sizes["vocab"] = cfg.vocab_size or sizes["vocab"]
    dims = tuple(tuple(dim.split(".")) for dim in module.layout.split())
    dims = tuple(dim for dim in dims if set(dim) - {"part"} <= set(axes))  # a bias has some of the weight's
    return Source(f"{module.name}.{suffix}", dims, axes, sizes, cfg.num_layers if stacked else None)


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
    tensors = with_prefix(open_weights(folder), FAMILIES[cfg.family].hf.prefix)
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
    return jax.tree_util.tree_map_with_path(one, table, is_leaf=lambda x: isinstance(x, Leaf))


def read_score_bias(folder: epath.Path) -> float:
    """The score's bias, which has no place in a Hugging Face class: ``score_bias`` in config.json, by default 0."""
    bias = (read_json(folder, "config.json") or {}).get("score_bias", 0.0)
    if type(bias) not in (int, float) or not math.isfinite(bias):
        raise ValueError(f"{folder}/config.json: score_bias: {bias!r}; expected a number")
    return bias


def open_weights(folder: epath.Path) -> dict[str, Any]:
    """Name -> a lazy safetensors slice (get_shape, get_dtype, [...]) of every tensor in the folder.

    Raises ValueError, in one line, where there are none or their files are broken."""
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


def with_prefix(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Base-model files (GPT-2's on the hub) leave the prefix out: put it back."""
    if any(name.startswith(prefix) for name in tensors):
        return tensors
    heads = ("lm_head.", f"{SCORE.name}.")
    return {name if name.startswith(heads) else prefix + name: tensor for name, tensor in tensors.items()}


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
        clear(folder)
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


def tokenizer_files(folder: epath.PathLike | None) -> list[epath.Path]:
    """The tokenizer's files in a folder. Raises ValueError where it has none."""
    if folder is None:
        return []
    files = [epath.Path(folder) / name for name in TOKENIZER_FILES]
    present = [path for path in files if path.exists()]
    if not present:
        raise ValueError(f"export: {folder}: holds no tokenizer; expected tokenizer.json")
    return present


def clear(folder: epath.Path) -> None:
    """Make the folder; remove an earlier export, whose weights could be read in place of the new ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in list(folder.iterdir()):
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in OWN_FILES):
            path.unlink()


def weight_bytes(cfg: ModelConfig, head: Head, dtype) -> int:
    """Of all tensors in the files."""
    shapes = {name: source.shape() for source in find_sources(cfg, head).values() for name in source.names()}
    return sum(map(math.prod, shapes.values())) * jnp.dtype(dtype).itemsize


def write_json(path: epath.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_weights(path: epath.Path, values: dict[str, np.ndarray]) -> None:
    """One safetensors file; by way of a local one where ``path`` is remote."""
    from safetensors.numpy import save_file

    values = {name: np.ascontiguousarray(value) for name, value in values.items()}
    if "://" not in os.fspath(path):
        save_file(values, os.fspath(path), metadata={"format": "pt"})
        return
    with tempfile.TemporaryDirectory() as scratch:
        local = epath.Path(scratch) / path.name
        save_file(values, os.fspath(local), metadata={"format": "pt"})
        local.copy(path, overwrite=True)
