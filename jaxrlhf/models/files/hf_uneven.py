"""Layers that differ in their heads, in a Hugging Face config.json: read and written. What a family's fields are called
is in models/families; nothing here knows a family."""

from collections.abc import Mapping
from typing import Any

from jaxrlhf.models.config import ModelConfig, layer_types_of
from jaxrlhf.models.families import Uneven
from jaxrlhf.models.files.hf_fields import checked

HEAD_DIM, KV_HEADS = "head_dim", "num_key_value_heads"


def parse_uneven(raw: Mapping[str, Any], names: Uneven, found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of ModelConfig about the heads of global layers; ``found``: those that are known already.

    Raises ValueError, in one line, for what is wrong or not supported."""
    if found["per_layer_size"]:
        rows = raw.get(names.vocabulary, found["vocab_size"])
        if rows != found["vocab_size"]:
            raise ValueError(f"{where}: {names.vocabulary}: {rows!r} is not supported; expected {found['vocab_size']}")
    if raw.get(names.each) is not None:
        return parse_each(raw[names.each], found, f"{where}: {names.each}")
    field, default = names.head_dim
    given = raw.get(field)
    sizes = {"global_head_dim": checked(default if given is None else given, int, f"{where}: {field}")}
    if found["keys_are_values"] and (given := raw.get(names.kv_heads)) is not None:
        sizes["global_kv_heads"] = checked(given, int, f"{where}: {names.kv_heads}")
    return sizes


def parse_each(given: Any, found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``parse_uneven`` of an object a layer, {number: {head_dim, num_key_value_heads}}: the same for all global layers,
    and none for others."""
    layers = {
        str(at) for at, kind in enumerate(found["layer_types"] or ("global",) * found["num_layers"]) if kind == "global"
    }
    if not isinstance(given, dict) or any(not isinstance(each, dict) for each in given.values()):
        raise ValueError(f"{where}: {given!r}; expected an object a layer")
    each = next(iter(given.values()), {})
    if given and ({str(at) for at in given} != layers or any(other != each for other in given.values())):
        raise ValueError(
            f"{where}: is not supported; expected the same for each layer of full_attention, and no others"
        )
    if other := sorted(str(name) for name in each if name not in (HEAD_DIM, KV_HEADS)):
        raise ValueError(f"{where}: {other[0]}: is not supported; expected {HEAD_DIM} and {KV_HEADS}")
    names = {HEAD_DIM: "global_head_dim", KV_HEADS: "global_kv_heads"}
    sizes = {names[field]: checked(value, int, f"{where}: {field}") for field, value in each.items()}
    return {"global_head_dim": found["head_dim"]} | sizes


def describe_uneven(cfg: ModelConfig, names: Uneven) -> dict[str, Any]:
    """The config.json fields that parse_uneven reads, in both spellings: readers older than ``each`` remain."""
    own = {HEAD_DIM: cfg.global_head_dim} | ({KV_HEADS: cfg.global_kv_heads} if cfg.keys_are_values else {})
    return {
        names.head_dim[0]: cfg.global_head_dim,
        names.kv_heads: cfg.global_kv_heads if cfg.keys_are_values else None,
        names.each: {str(at): own for at, kind in enumerate(layer_types_of(cfg)) if kind == "global"},
        names.vocabulary: cfg.vocab_size,
    }
