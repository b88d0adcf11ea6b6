"""The tensors of a Hugging Face folder: opened, called what a plain model of the family calls them, and checked by what
the headers of the files say of them.

No weights are read here; what a family's tensors are called is in models/families.
"""

import collections
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.families import FAMILIES, HuggingFace
from jaxrlhf.models.families.wrappers import TEXT_NAMES
from jaxrlhf.models.files import gguf, mxfp4
from jaxrlhf.models.files.hf_folder import INDEX, SINGLE, VALUE_HEAD, read_json
from jaxrlhf.models.files.hf_layout import SCORE, LeafTensors, find_sources, score_bias
from jaxrlhf.types import Head

FLOATS = ("F32", "BF16", "F16", "F64")
SHOWN = 3  # names that an error lists
# what public reward and value models call their head: one linear map from the last hidden state to one number
HEADS = ("score", "v_head.summary", "v_head", "value_head.summary", "value_head", "reward_head", "rm_head")
HEADS += ("regression_head", "score_head", "scalar_head", "classifier", "out_proj")
HEAD_NAMES = re.compile(rf"(?:{'|'.join(map(re.escape, HEADS))})\.(weight|bias)")
TRL_PREFIX = "pretrained_model."  # of the model under TRL's value head


class Contents(NamedTuple):
    """What a folder holds for one model."""

    tensors: dict[str, Any]  # by the names of a plain model
    sources: dict[str, LeafTensors]  # path of a leaf -> where it is; without the leaves that the folder lacks
    has_score: bool  # whether there is a scalar head
    left: list[str]  # tensors of other parts, that are not read: as the files name them


def examine(folder: epath.PathLike, cfg: ModelConfig, head: Head) -> Contents:
    """What of the folder a model of this config and head is read from.

    A scalar head may be absent: then it is not in ``sources``. Raises ValueError, in one line, for any other tensor
    that is missing, of another shape, or that such a model has no place for."""
    folder = epath.Path(folder)
    opened = open_weights(folder)
    names = FAMILIES[cfg.family].hf
    tensors, left = plain_names(opened, names, is_wrapped(folder), str(folder))
    tensors = mxfp4.joined(tensors, str(folder)) if "mxfp4" in names.quantized else tensors
    heads = [name.removeprefix(TRL_PREFIX) for name in opened]
    called = {HEAD_NAMES.sub(rf"{SCORE.name}.\1", name): name for name in heads if HEAD_NAMES.fullmatch(name)}
    first = [f"{module.name.format(layer=0, expert=0)}{module.weight}" for module in names.split.values()]
    sources = find_sources(cfg, head, split=any(name in tensors for name in first))
    has_score = f"{SCORE.name}.weight" in tensors
    score = [name for name in (f"{SCORE.name}.weight", f"{SCORE.name}.bias") if name in tensors]
    if head != "scalar":
        left = [*left, *(called[name] for name in score)]
    elif not has_score:
        del sources["head.kernel"]
    elif len(score) == 2:
        sources["head.bias"] = score_bias(cfg)
    check_tensors(tensors, sources, cfg, str(folder), called)
    return Contents(tensors, sources, has_score, left)


def is_wrapped(folder: epath.Path) -> bool:
    """Whether the folder's model is the text part of a model of text and images."""
    return isinstance((read_json(folder, "config.json") or {}).get("text_config"), dict)


def has_score(folder: epath.PathLike) -> bool:
    """Whether the folder holds a scalar head, under any of HEADS."""
    return any(HEAD_NAMES.fullmatch(name) for name in open_weights(epath.Path(folder)))


def has_tensor(folder: epath.PathLike, ending: str) -> bool:
    """Whether the folder holds a tensor whose name ends so."""
    return any(name.endswith(ending) for name in open_weights(epath.Path(folder)))


# ---- opening --------------------------------------------------------------------------------------------------------


def open_weights(folder: epath.Path) -> dict[str, Any]:
    """Name -> a lazy safetensors slice (get_shape, get_dtype, [...]) of every tensor in the folder.

    Raises ValueError, in one line, where there are none or their files are broken."""
    if (folder / gguf.RECORD).exists():
        return dict(gguf.open_tensors(folder))
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        model = open_file(folder / SINGLE) if (folder / SINGLE).exists() else open_shards(folder)
        return model | (open_file(folder / VALUE_HEAD) if (folder / VALUE_HEAD).exists() else {})
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


# ---- names ----------------------------------------------------------------------------------------------------------


def plain_names(
    tensors: dict[str, Any], names: HuggingFace, wrapped: bool, where: str
) -> tuple[dict[str, Any], list[str]]:
    """(the tensors by the names of a plain model with a score, those of other parts than the text part).

    Raises ValueError where two heads could be the score."""
    tensors = {name.removeprefix(TRL_PREFIX): tensor for name, tensor in tensors.items()}
    left: list[str] = []
    if wrapped:
        tensors, left = text_part(tensors)
    other = [name for name in tensors if re.match(names.left, name)]
    tensors, left = {name: tensor for name, tensor in tensors.items() if name not in other}, [*left, *other]
    heads = sorted({name.rpartition(".")[0] for name in tensors if HEAD_NAMES.fullmatch(name)})
    if len(heads) > 1:
        raise ValueError(f"{where}: holds {len(heads)} scalar heads: {', '.join(heads)}; expected one")
    rename = lambda name: HEAD_NAMES.sub(rf"{SCORE.name}.\1", name) if HEAD_NAMES.fullmatch(name) else name
    return with_prefix({rename(name): tensor for name, tensor in tensors.items()}, names), left


def text_part(tensors: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the tensors of the text part of a model of text and images, the names of the others)."""
    found: dict[str, Any] = {}
    left = []
    for name, tensor in tensors.items():
        pattern = next((pair for pair in TEXT_NAMES if re.match(pair[0], name)), None)
        if pattern is None:
            left.append(name)
        else:
            found[re.sub(rf"^{pattern[0]}", pattern[1], name)] = tensor
    return found, left


def with_prefix(tensors: dict[str, Any], names: HuggingFace) -> dict[str, Any]:
    """Base-model files (GPT-2's on the hub) leave the prefix out: put it back."""
    if any(name.startswith(names.prefix) for name in tensors):
        return tensors
    heads = (f"{names.modules['head'].name}.", f"{SCORE.name}.")
    return {name if name.startswith(heads) else names.prefix + name: tensor for name, tensor in tensors.items()}


def kinds(names: list[str]) -> str:
    """What parts so many tensors are of: "vision_tower (438 tensors), multi_modal_projector (2)"."""
    counts = collections.Counter(name.removeprefix("model.").partition(".")[0] for name in names)
    return ", ".join(f"{part} ({count} tensor{'s' if count > 1 else ''})" for part, count in counts.items())


def shown(names: list[str]) -> str:
    """The first few names."""
    return ", ".join(names[:SHOWN]) + (" and others" if len(names) > SHOWN else "")


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_tensors(
    tensors: Mapping[str, Any], sources: dict[str, LeafTensors], cfg: ModelConfig, where: str, called: Mapping[str, str]
) -> None:
    """Every tensor that is needed is present, in its shape; every other one is another head's or no weight at all.
    ``called``: names that the file has otherwise."""
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
                what = called.get(name, name)
                raise ValueError(f"{where}: {what}: has shape {shape}; config.json says {source.shape()}")
            if kind not in FLOATS:
                raise ValueError(f"{where}: {name}: holds {kind}; expected one of {', '.join(FLOATS)}")
    if missing:
        raise ValueError(f"{where}: lacks tensors: {shown(missing)}")
    other = {f"{names.modules['head'].name}.weight", f"{SCORE.name}.weight", f"{SCORE.name}.bias"} - used
    of_no_use = lambda name: re.search(names.ignored, name) or is_unread(name, cfg)
    unused = [name for name in tensors if name not in used | other and not of_no_use(name)]
    if unused:
        raise ValueError(f"{where}: holds tensors that a {cfg.family} of this config has no place for: {shown(unused)}")


def is_unread(name: str, cfg: ModelConfig) -> bool:
    """Whether the tensor would make keys or values of a layer that reads those of an earlier one: published files have
    such, and nothing computes with them."""
    uneven = FAMILIES[cfg.family].hf.uneven
    found = uneven and re.match(uneven.unread, name)
    return bool(found) and cfg.num_layers - cfg.shared_kv_layers <= int(found[1]) < cfg.num_layers
