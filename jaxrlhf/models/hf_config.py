"""config.json of a Hugging Face folder: read into a ModelConfig, and written so that transformers computes the same.

What a family's fields are called is in models/families.py; nothing here knows a family.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from etils import epath

from jaxrlhf.models.families import FAMILIES
from jaxrlhf.models.hf_folder import SINGLE, read_json
from jaxrlhf.models.transformer import ModelConfig, RopeScaling, resolve
from jaxrlhf.types import Head

# ---- reading --------------------------------------------------------------------------------------------------------


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


# ---- writing --------------------------------------------------------------------------------------------------------


class TokenIds(NamedTuple):
    """Special tokens that an exported folder's configs name."""

    eos: tuple[int, ...] = ()
    bos: int | None = None
    pad: int | None = None


NO_IDS = TokenIds()


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


def describe_ids(ids: TokenIds) -> dict[str, Any]:
    """Null where there is none: what is left out, transformers fills in with numbers of its own."""
    eos = ids.eos[0] if len(ids.eos) == 1 else list(ids.eos) or None
    return {"bos_token_id": ids.bos, "eos_token_id": eos, "pad_token_id": ids.pad}
