"""config.json of a Hugging Face folder: read into a ModelConfig, and written so that transformers computes the same.

What a family's fields are called is in models/families; nothing here knows a family.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from etils import epath

from jaxrlhf.errors import content_of
from jaxrlhf.models.config import LayerType, LayerTypes, ModelConfig, layer_types_of, resolve
from jaxrlhf.models.families import FAMILIES, HuggingFace, Windows
from jaxrlhf.models.families.wrappers import SIZES, WRAPPERS, Wrapper
from jaxrlhf.models.files.hf_fields import MOST_LAYERS, checked, parse_count, parse_field, refuse_unsupported
from jaxrlhf.models.files.hf_folder import SINGLE, read_json
from jaxrlhf.models.files.hf_headers import has_score, has_tensor
from jaxrlhf.models.files.hf_rope import GLOBAL, LOCAL, describe_rope, parse_rope
from jaxrlhf.models.files.hf_uneven import describe_uneven, parse_uneven
from jaxrlhf.types import Head

# fixed in every family
ALWAYS: dict[str, tuple] = {"quantization_config": (None,), "is_encoder_decoder": (False,), "is_causal": (True,)}
LAYER_TYPES: dict[LayerType, str] = {"local": LOCAL, "global": GLOBAL, "linear": "linear_attention"}


# ---- reading --------------------------------------------------------------------------------------------------------


def read_config(folder: epath.PathLike) -> tuple[ModelConfig, Head]:
    """The architecture (resolved) and the head of a folder, by config.json and the names of its tensors.

    Raises ValueError, in one line, for a family, a class or a field that changes the maths and is not supported."""
    raw, where = read_json(folder, "config.json"), f"{folder}/config.json"
    if raw is None:
        raise ValueError(f"{where}: there is no such file; expected a Hugging Face folder: config.json and {SINGLE}")
    text = raw.get("text_config")
    if wrapper_of(raw) and isinstance(text, dict) and "tie_word_embeddings" not in raw | text:
        raw = raw | {"tie_word_embeddings": not has_tensor(folder, "lm_head.weight")}
    return parse_config(raw, where, lambda: has_score(folder))


def parse_config(
    raw: Mapping[str, Any], where: str, scored: Callable[[], bool] = lambda: False
) -> tuple[ModelConfig, Head]:
    """read_config of an object already read; errors begin with ``where``.

    ``scored``: whether the weights hold a scalar head, which makes a class that transformers lacks a reward model."""
    with content_of(where):
        return parse_fields(raw, where, scored)


def parse_fields(raw: Mapping[str, Any], where: str, scored: Callable[[], bool]) -> tuple[ModelConfig, Head]:
    """``parse_config``, but for types of values that nobody thought of."""
    families = {family.hf.model_type: name for name, family in FAMILIES.items()}
    raw, where = unwrap(raw, where), f"{where}: text_config" if wrapper_of(raw) else where
    kind = raw.get("model_type")
    if kind not in families:
        known = ", ".join([*families, *WRAPPERS])
        raise ValueError(f"{where}: model_type: {kind!r} is not supported; expected one of {known}")
    family = FAMILIES[families[kind]]
    names = family.hf
    raw = by_first_names(raw, names.aliases, where)
    check_auto_map(raw.get("auto_map"), names.classes, where)
    refuse_unsupported(without_quantization(raw, names), ALWAYS | names.fixed, where)
    head = parse_head(raw, names.classes, where, scored)
    found: dict[str, Any] = {ours: parse_field(raw, ours, *name, where) for ours, name in names.fields.items()}
    found |= {ours: parse_count(raw, *name, where) for ours, name in names.counts.items()}
    if names.beside:
        found |= parse_beside(raw, names, found, where)
    if found["num_layers"] > MOST_LAYERS:
        field = names.fields["num_layers"][0]
        raise ValueError(f"{where}: {field}: {found['num_layers']}; expected at most {MOST_LAYERS}")
    if family.positions == "rope":
        found |= parse_rope(raw, names.rope, found["max_positions"], where)
    if names.linear_every:
        found |= parse_linear(raw, names.linear_every, family.global_every, found["num_layers"], where)
    elif names.nope:
        found |= parse_nope(raw, names.nope, family.nope_every, found["num_layers"], where)
    elif names.windows:
        found |= parse_windows(raw, names.windows, family.global_every, found["num_layers"], where)
    else:
        refuse_windows(raw, where)
    if names.uneven:
        found |= parse_uneven(raw, names.uneven, found, where)
    if not found.get("head_dim") and found["hidden_size"] % found["num_heads"]:
        raise ValueError(f"{where}: hidden size {found['hidden_size']} is not a multiple of {found['num_heads']} heads")
    try:
        return resolve(ModelConfig(**{"family": families[kind], **found})), head
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def parse_beside(raw: Mapping[str, Any], names: HuggingFace, found: Mapping[str, Any], where: str) -> dict[str, int]:
    """The fields of experts as 0, where ``names.beside`` does not switch them on; ``found``: those that the file has.

    Raises ValueError, in one line, where it does and one is 0."""
    switch, fields = names.beside or "", ("num_experts", "experts_per_token", "expert_size")
    if raw.get(switch) is None or not checked(raw[switch], bool, f"{where}: {switch}"):
        return dict.fromkeys(fields, 0)
    for field in fields:
        if not found[field]:
            raise ValueError(f"{where}: {names.counts[field][0]}: 0: {switch} is true; expected 1 or more")
    return {}


def without_quantization(raw: Mapping[str, Any], names: HuggingFace) -> Mapping[str, Any]:
    """``raw`` without quantization_config where that is of a kind whose tensors are read: these say what they hold."""
    how = raw.get("quantization_config")
    read = isinstance(how, dict) and how.get("quant_method") in names.quantized
    return {name: value for name, value in raw.items() if not (read and name == "quantization_config")}


def by_first_names(raw: Mapping[str, Any], aliases: Mapping[str, str], where: str) -> Mapping[str, Any]:
    """``raw`` whose fields have the names that the family's table has. Raises ValueError where two names differ."""
    found = {name: value for name, value in raw.items() if name not in aliases}
    for other, name in aliases.items():
        if other in raw and found.setdefault(name, raw[other]) != raw[other]:
            raise ValueError(f"{where}: {other}: {raw[other]!r}: {name} is {found[name]!r}; expected the same")
    return found


def wrapper_of(raw: Mapping[str, Any]) -> Wrapper | None:
    """What is known of a model of text and images; None: ``raw`` is of another."""
    kind = raw.get("model_type")
    return WRAPPERS.get(kind) if isinstance(kind, str) else None


def unwrap(raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The config of the text part of a model of text and images, as a plain model says it; any other as it is."""
    wrapper = wrapper_of(raw)
    if wrapper is None:
        return raw
    text, shown = raw.get("text_config"), raw.get("architectures")
    if not isinstance(text, dict):
        raise ValueError(f"{where}: text_config: {text!r}; expected an object")
    heads: list[Head] = [head for head, name in wrapper.classes.items() if shown == [name]]
    if not heads:
        expected = " or ".join(wrapper.classes.values())
        raise ValueError(f"{where}: architectures: {shown!r} is not supported; expected {expected}")
    kind = text.get("model_type", wrapper.text)
    classes = next((family.hf.classes for family in FAMILIES.values() if family.hf.model_type == kind), {})
    above = {name: raw[name] for name in (*ALWAYS, "auto_map", "id2label", "num_labels") if name in raw}
    tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", wrapper.tied))
    own = {"model_type": kind, "architectures": [classes.get(heads[0])], "tie_word_embeddings": tied}
    return {**SIZES.get(kind, {}), **text, **above, **own}


def check_auto_map(auto_map: Any, classes: Mapping[Head, str], where: str) -> None:
    """Code of a folder is never run: it may name the classes alone that transformers has itself. Raises ValueError."""
    stem = classes["lm"].partition("For")[0].removesuffix("LMHeadModel")
    known = {f"{stem}{ending}" for ending in ("Config", "Model", "PreTrainedModel", "ForTokenClassification")}
    for auto, target in (auto_map or {}).items():
        if auto.startswith(("AutoConfig", "AutoModel")) and str(target).rpartition(".")[2] not in {
            *known,
            *classes.values(),
        }:
            raise ValueError(
                f"{where}: auto_map: {auto}: {target!r}: remote code is never run; expected classes of transformers: "
                f"{', '.join(classes.values())}"
            )


def parse_head(
    raw: Mapping[str, Any], classes: Mapping[Head, str], where: str, scored: Callable[[], bool] = lambda: False
) -> Head:
    """The head that ``architectures`` names; a classifier has to have one label."""
    heads: list[Head] = [head for head, name in classes.items() if raw.get("architectures") == [name]]
    if not heads and scored():
        return "scalar"  # the shape of the head says how many labels there are
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


def parse_windows(raw: Mapping[str, Any], names: Windows, every: int, num_layers: int, where: str) -> dict[str, Any]:
    """sliding_window and layer_types of ModelConfig; ``every``: as Family.global_every."""
    consent = raw.get(names.switch, False) if names.switch else True
    if not isinstance(consent, bool):
        raise ValueError(f"{where}: {names.switch}: {consent!r}; expected true or false")
    window = raw.get("sliding_window", names.size) if consent else None
    if window is None and not names.optional:
        raise ValueError(f"{where}: sliding_window: null is not supported; expected a positive whole number")
    window = 0 if window is None else checked(window, int, f"{where}: sliding_window")
    if names.types and raw.get("layer_types") is not None:
        return {"sliding_window": window, "layer_types": parse_types(raw["layer_types"], where)}
    if not window:
        return {"sliding_window": 0}
    if names.global_every:
        every = checked(raw.get(names.global_every, every), int, f"{where}: {names.global_every}")
    first = 0
    if names.first_global:
        field, default = names.first_global
        first = raw.get(field, default)
        if type(first) is not int or first < 0:
            raise ValueError(f"{where}: {field}: {first!r}; expected a whole number")
    is_global = lambda i: i < first or (every and (i + 1) % every == 0)
    types: LayerTypes = tuple("global" if is_global(i) else "local" for i in range(num_layers))
    types = (*types[:-1], "global") if names.last_global else types
    return {"sliding_window": window, "layer_types": types}


def refuse_windows(raw: Mapping[str, Any], where: str) -> None:
    """Raises ValueError where a family without windows has one: transformers' cache would drop what is before it."""
    refuse_unsupported(raw, {"sliding_window": (None,)}, where)
    refuse_types(raw, where)


def refuse_types(raw: Mapping[str, Any], where: str) -> None:
    """Raises ValueError where layer_types names another kind than full attention."""
    given = raw.get("layer_types")
    if given is not None and (not isinstance(given, list) or set(given) - {GLOBAL}):
        raise ValueError(f"{where}: layer_types: {given!r} is not supported; expected {GLOBAL} alone")


def parse_linear(raw: Mapping[str, Any], field: str, every: int, num_layers: int, where: str) -> dict[str, Any]:
    """layer_types of ModelConfig, of a family with linear layers: a kind each, or one global layer of every n-th."""
    refuse_unsupported(raw, {"sliding_window": (None,)}, where)
    if raw.get("layer_types") is not None:
        return {"layer_types": parse_types(raw["layer_types"], where, ("linear", "global"))}
    every = checked(raw.get(field, every), int, f"{where}: {field}")
    types: LayerTypes = tuple("linear" if (i + 1) % every else "global" for i in range(num_layers))
    return {"layer_types": types}


def parse_nope(
    raw: Mapping[str, Any], names: tuple[str, str], every: int, num_layers: int, where: str
) -> dict[str, Any]:
    """layer_types of ModelConfig, of a family with layers without positions; ``names``: as HuggingFace.nope."""
    refuse_types(raw, where)
    given, interval = (raw.get(name) for name in names)
    if given is None:
        every = checked(every if interval is None else interval, int, f"{where}: {names[1]}")
        given = [int((i + 1) % every != 0) for i in range(num_layers)]
    if not isinstance(given, list) or any(type(one) is not int or one not in (0, 1) for one in given):
        raise ValueError(f"{where}: {names[0]}: {given!r}; expected a list of 1 (rotated) and 0 (no positions)")
    if len(given) < num_layers:
        raise ValueError(f"{where}: {names[0]}: {len(given)} of them; expected one for each of {num_layers} layers")
    types: LayerTypes = tuple("global" if one else "nope" for one in given[:num_layers])
    return {"layer_types": types}


def parse_types(given: Any, where: str, kinds: tuple[LayerType, ...] = ("local", "global")) -> LayerTypes:
    """layer_types in our words, where these ``kinds`` may be."""
    names: dict[Any, LayerType] = {LAYER_TYPES[kind]: kind for kind in kinds}
    if not isinstance(given, list):
        raise ValueError(f"{where}: layer_types: {given!r}; expected a list")
    for kind in given:
        if kind not in names:
            raise ValueError(f"{where}: layer_types: {kind!r} is not supported; expected {' or '.join(names)}")
    return tuple(names[kind] for kind in given)


# ---- writing --------------------------------------------------------------------------------------------------------


class TokenIds(NamedTuple):
    """Special tokens that an exported folder's configs name."""

    eos: tuple[int, ...] = ()
    bos: int | None = None
    pad: int | None = None


NO_IDS = TokenIds()


def embedded(ids: TokenIds, vocab: int) -> TokenIds:
    """Those that a model of ``vocab`` tokens has embeddings for; the EOS tokens stay where none of them has."""
    eos = tuple(id for id in ids.eos if id < vocab)
    inside = lambda id: id if id is None or id < vocab else None
    return TokenIds(eos or ids.eos, inside(ids.bos), inside(ids.pad))


def describe(cfg: ModelConfig, head: Head, ids: TokenIds = NO_IDS) -> dict[str, Any]:
    """The config.json with which transformers computes what we do: all that parse_config reads.

    Raises ValueError, in one line, for a model that the family's class in transformers cannot be."""
    family = FAMILIES[cfg.family]
    names = family.hf
    if head not in names.classes:
        wrong = f"transformers has no class of {names.model_type} with a {head} head"
        raise ValueError(f"export: {wrong}; expected {' or '.join(names.classes)}")
    raw = {"architectures": [names.classes[head]], "model_type": names.model_type}
    said = dataclasses.replace(cfg, query_pre_attn_scalar=cfg.query_pre_attn_scalar or cfg.head_dim)
    raw |= {theirs: getattr(said, ours) for ours, (theirs, _) in (names.fields | {**names.counts}).items()}
    raw |= {name: allowed[0] for name, allowed in names.fixed.items() if allowed[0] is not None}
    raw |= describe_rope(cfg, names.rope) if family.positions == "rope" else {}
    raw |= describe_windows(cfg, names.windows) if names.windows else {}
    raw |= {"layer_types": described_types(cfg)} if names.linear_every else {}
    raw |= describe_uneven(cfg, names.uneven) if names.uneven else {}
    raw |= {names.beside: cfg.num_experts > 0} if names.beside else {}
    raw |= {names.nope[0]: [int(kind != "nope") for kind in layer_types_of(cfg)]} if names.nope else {}
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


def describe_windows(cfg: ModelConfig, names: Windows) -> dict[str, Any]:
    """The config.json fields that parse_windows reads."""
    none = None if names.optional else cfg.max_positions  # where no layer looks at it a number has to stand
    raw: dict[str, Any] = {"sliding_window": cfg.sliding_window or none}
    if names.switch:
        raw[names.switch] = cfg.sliding_window > 0
    if names.types:
        raw["layer_types"] = described_types(cfg)
    return raw


def described_types(cfg: ModelConfig) -> list[str]:
    """layer_types of config.json."""
    return [LAYER_TYPES[kind] for kind in layer_types_of(cfg)]


def describe_ids(ids: TokenIds) -> dict[str, Any]:
    """Null where there is none: what is left out, transformers fills in with numbers of its own."""
    eos = ids.eos[0] if len(ids.eos) == 1 else list(ids.eos) or None
    return {"bos_token_id": ids.bos, "eos_token_id": eos, "pad_token_id": ids.pad}
