"""Rotary positions in a Hugging Face config.json: the old spelling (rope_theta, rope_scaling) and that of transformers
5 (rope_parameters). What a family's fields are called is in models/families; nothing here knows a family."""

import math
from collections.abc import Mapping
from typing import Any

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.families import Rope
from jaxrlhf.models.files.hf_fields import checked, refuse_unsupported
from jaxrlhf.models.rope import RopeScaling

ORIGINAL = "original_max_position_embeddings"
FRACTION = "partial_rotary_factor"
GLOBAL, LOCAL = "full_attention", "sliding_attention"  # of layer_types, and of rope_parameters a kind of layer


# ---- reading --------------------------------------------------------------------------------------------------------


def parse_rope(raw: Mapping[str, Any], names: Rope, max_positions: int, where: str) -> dict[str, Any]:
    """The fields of ModelConfig about rotary positions. Where both spellings are given the old one wins, as in
    transformers. Raises ValueError, in one line, for what is wrong or not supported."""
    raw = raw if names.old else {"rope_parameters": raw.get("rope_parameters") or names.absent}
    if names.local_theta:
        rope, local, spelling = split_layers(raw, where)
    else:
        spelling = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
        given = raw.get(spelling)
        rope, local = flat(names.absent if given is None else given, f"{where}: {spelling}"), {}
    what = f"{where}: {spelling}"
    found: dict[str, Any] = {"rope_theta": number(rope, raw, names.theta, "rope_theta", what)}
    if names.local_theta:
        refuse_ambiguous(raw, local, names, where)
        found["local_rope_theta"] = number(local, raw, names.local_theta, "rope_theta", f"{what}.{LOCAL}")
    if names.fraction:
        field, default = names.fraction
        default = 1.0 if raw.get(field, default) is None and field == FRACTION else default  # null, as transformers
        found["rotary_fraction"] = number(rope, raw, (field, default), FRACTION, what)
    else:
        for place, given in ((where, raw), (what, rope)):
            refuse_unsupported(given, {FRACTION: (1.0, None)}, place)
    found["rope_scaling"] = parse_scaling(rope, raw, names, max_positions, what)
    return found


def flat(rope: Any, where: str) -> dict[str, Any]:
    """``rope`` ({} where it is null), if it is an object without objects in it."""
    if not isinstance(rope or {}, dict) or any(isinstance(value, dict) for value in (rope or {}).values()):
        raise ValueError(f"{where}: {rope!r} is not supported; expected one flat object")
    return dict(rope or {})


def split_layers(raw: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(of global layers, of local ones, spelling) where the two kinds of layers have positions of their own."""
    both = raw.get("rope_parameters") or {}
    if not isinstance(both, dict) or both.keys() - {GLOBAL, LOCAL}:
        raise ValueError(f"{where}: rope_parameters: {both!r} is not supported; expected {GLOBAL} and {LOCAL}")
    rope, local = (flat(both.get(kind), f"{where}: rope_parameters.{kind}") for kind in (GLOBAL, LOCAL))
    refuse_unsupported(local, {"rope_type": ("default",)}, f"{where}: rope_parameters.{LOCAL}")
    old = flat(raw.get("rope_scaling"), f"{where}: rope_scaling")
    if "type" in old and "rope_type" not in old:
        raise ValueError(f"{where}: rope_scaling.type: {old['type']!r} is not read by transformers; expected rope_type")
    return rope | old, local, "rope_scaling" if old else "rope_parameters"


def refuse_ambiguous(raw: Mapping[str, Any], local: Mapping[str, Any], names: Rope, where: str) -> None:
    """Raises ValueError for a base outside rope_parameters that some versions of transformers give to all layers, and
    others to the global ones alone: where both kinds have their base in one field, and it is not the default."""
    field, default = names.theta
    if names.local_theta == names.theta and not local.get("rope_theta") and raw.get(field) not in (None, default):
        shown = f"{raw[field]!r} is not read alike by all versions of transformers"
        raise ValueError(f"{where}: {field}: {shown}; expected {default:g}, or rope_parameters.{LOCAL}.rope_theta")


def number(rope: Mapping[str, Any], raw: Mapping[str, Any], names: tuple[str, float], new: str, what: str) -> float:
    """A number from rope_parameters (as ``new``), else from config.json, else the default."""
    given = (rope.get(new), raw.get(names[0]), names[1])
    return checked(next(value for value in given if value is not None), float, f"{what}.{new}")


def parse_scaling(
    rope: Mapping[str, Any], raw: Mapping[str, Any], names: Rope, max_positions: int, where: str
) -> RopeScaling | None:
    """How the frequencies are stretched; None where they are not."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = names.renamed.get(kind, kind)
    if kind not in names.kinds:
        shown = " or ".join(names.kinds)
        raise ValueError(f"{where}.rope_type: {kind!r} is not supported; expected {shown}")
    if kind == "default":
        return None
    get = lambda name, default=None: checked(
        default if rope.get(name) is None else rope[name], float, f"{where}.{name}"
    )
    if kind == "linear":
        return RopeScaling("linear", get("factor"))
    if kind == "proportional":
        return RopeScaling("proportional", get("factor", 1.0))
    original = raw.get(ORIGINAL) or names.original or rope.get(ORIGINAL) or max_positions
    original = checked(original, int, f"{where}.{ORIGINAL}")
    if kind == "llama3":
        return RopeScaling("llama3", get("factor"), get("low_freq_factor"), get("high_freq_factor"), original)
    given = None if rope.get("attention_factor") is None else get("attention_factor")
    if kind == "longrope":
        short, long = (numbers(rope.get(name), f"{where}.{name}") for name in ("short_factor", "long_factor"))
        factor = get("factor", max_positions / original)
        return RopeScaling(
            "longrope",
            factor,
            original_max_positions=original,
            attention_factor=given,
            short_factor=short,
            long_factor=long,
        )
    if given is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        size = lambda name: 1 + 0.1 * get(name) * math.log(max(get("factor"), 1))
        given = size("mscale") / size("mscale_all_dim")
    return RopeScaling(
        "yarn",
        get("factor"),
        original_max_positions=original,
        beta_fast=get("beta_fast", 32.0),
        beta_slow=get("beta_slow", 1.0),
        truncate=checked(rope.get("truncate", True), bool, f"{where}.truncate"),
        attention_factor=given,
        query_beta=get(names.query_beta) if names.query_beta else 0.0,
    )


def numbers(value: Any, what: str) -> tuple[float, ...]:
    """A list of positive numbers."""
    if not isinstance(value, list):
        raise ValueError(f"{what}: {value!r}; expected a list of numbers")
    return tuple(checked(one, float, what) for one in value)


# ---- writing --------------------------------------------------------------------------------------------------------


def describe_rope(cfg: ModelConfig, names: Rope) -> dict[str, Any]:
    """The config.json fields that parse_rope reads, in both spellings: readers older than transformers 5 remain."""
    scaling = describe_scaling(cfg.rope_scaling, names)
    raw: dict[str, Any] = {names.theta[0]: cfg.rope_theta}
    new: dict[str, Any] = (scaling or {"rope_type": "default"}) | {"rope_theta": cfg.rope_theta}
    if names.fraction:
        raw[names.fraction[0]] = new[FRACTION] = cfg.rotary_fraction
    if scaling:
        raw["rope_scaling"] = scaling
    if scaling and names.original and ORIGINAL in scaling:
        raw[ORIGINAL] = scaling[ORIGINAL]
    if names.local_theta:
        theta = cfg.local_rope_theta or cfg.rope_theta
        raw = {names.local_theta[0]: theta} | raw
        new = {GLOBAL: new, LOCAL: {"rope_type": "default", "rope_theta": theta}}
    return (raw if names.old else {}) | {"rope_parameters": new}


def describe_scaling(scaling: RopeScaling | None, names: Rope) -> dict[str, Any] | None:
    """The inverse of parse_scaling."""
    if scaling is None:
        return None
    rope: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return rope
    if scaling.kind == "proportional":
        return rope if scaling.factor != 1 else {"rope_type": scaling.kind}
    rope[ORIGINAL] = scaling.original_max_positions
    if scaling.kind == "llama3":
        return rope | {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.attention_factor is not None:
        rope["attention_factor"] = scaling.attention_factor
    if scaling.kind == "longrope":
        return rope | {"short_factor": [*scaling.short_factor], "long_factor": [*scaling.long_factor]}
    if names.query_beta:
        rope[names.query_beta] = scaling.query_beta
    return rope | {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
