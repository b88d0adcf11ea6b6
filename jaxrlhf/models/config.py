"""What a model is, apart from its weights: its family and its sizes."""

import dataclasses
import math
from typing import Any, Literal

from jaxrlhf.models.families import FAMILIES
from jaxrlhf.models.rope import RopeScaling

MLP = "mlp"  # the family of models that are computed from observations, each by itself
# attention in a window, attention to everything, the same without positions (NoPE), a gated delta net
LayerType = Literal["local", "global", "nope", "linear"]
LayerTypes = tuple[LayerType, ...]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture: what a HF config.json says, in the words of the house."""

    family: Literal[
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "qwen3_5_text",
        "phi3",
        "ministral3",
        "olmo2",
        "olmo3",
        "smollm3",
        "gemma2",
        "gemma3_text",
        "gemma4_text",
        "gpt2",
        "gpt_neox",
        "mixtral",
        "qwen3_moe",
        "olmoe",
        "gpt_oss",
        "qwen3_5_moe_text",
        "mlp",
    ] = "llama"  # the layers: normalisation, mlp, biases, soft-caps, as models of this name have them; mlp: for control
    vocab_size: int = 0  # 0: the tokenizer's
    hidden_size: int = 128  # features of the residual stream
    num_layers: int = 2  # transformer layers; of mlp: hidden ones
    num_heads: int = 4  # query heads of a layer's attention
    num_kv_heads: int = 0  # 0: num_heads
    head_dim: int = 0  # 0: hidden_size / num_heads
    mlp_size: int = 0  # 0: 8/3 x hidden_size rounded up to 64 (4 x hidden_size where the mlp has no gate)
    max_positions: int = 1024  # columns of the longest row
    norm_eps: float = 1e-5  # added to the variance that a norm divides by
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling | None = None  # of the rotary frequencies, for rows longer than pretraining's
    rotary_fraction: float = 1.0  # of a head's features that is rotated
    attention_bias: bool | None = None  # null: the family's
    mlp_bias: bool | None = None  # null: the family's
    tie_embeddings: bool = True  # the head's weights are the token embedding
    parallel_residual: bool | None = None  # attention and mlp side by side; null: the family's
    sliding_window: int = 0  # tokens that local layers see, the token itself included; 0: there are no such layers
    layer_types: LayerTypes = ()  # local, global, nope or linear, a layer; []: the family's, where it has several kinds
    local_rope_theta: float | None = None  # of local layers, which rope_scaling leaves alone; null: rope_theta
    query_pre_attn_scalar: int = 0  # attention's products are divided by its root; 0: head_dim
    attention_softcap: float | None = None  # products x become softcap x tanh(x / softcap)
    logit_softcap: float | None = None  # the same of the next-token logits
    global_head_dim: int = 0  # features of a head of global layers, where they may have their own; 0: head_dim
    global_kv_heads: int = 0  # and their heads of keys and values; 0: num_kv_heads
    keys_are_values: bool = False  # of global layers: one map makes keys and values, which are normalised apart
    shared_kv_layers: int = 0  # last layers, which read the keys and values of the last of their type before them
    wide_shared_mlp: bool = False  # the mlps of these are twice as wide
    per_layer_size: int = 0  # features of a token's embeddings that are added within layers, one a layer; 0: none
    num_experts: int = 0  # feed-forward networks of a layer, each of mlp_size; 0: one, and no router
    expert_size: int = 0  # features of each, of families that have them beside a layer's mlp; else 0
    experts_per_token: int = 0  # of them that compute a token; 0: 2, where there are experts
    shared_expert_size: int = 0  # features of the expert that computes every token; 0: mlp_size, where there is one
    normalize_routing: bool | None = None  # the weights of a token's experts sum to 1; null: as the family has it
    linear_key_heads: int = 0  # of linear layers: heads of queries and keys; 0: num_heads
    linear_value_heads: int = 0  # heads of values, states and gates, a multiple of that; 0: linear_key_heads
    linear_key_dim: int = 0  # features of a query or key; 0: head_dim
    linear_value_dim: int = 0  # features of a value; 0: linear_key_dim
    convolution_size: int = 0  # tokens that the convolution sees, the token itself included; 0: 4
    observation_size: int = 0  # of mlp, which is computed from observations: their numbers; 0: the environment's


def resolve(cfg: ModelConfig, vocab_size: int = 0) -> ModelConfig:
    """``cfg`` with everything that was left open filled in, and one way of saying each thing.

    Raises ValueError, in one line, where its fields do not fit each other."""
    if cfg.family == MLP:
        return resolve_mlp(cfg, vocab_size)
    if (size := cfg.observation_size) != 0:
        raise ValueError(f"observation_size: {size}: {cfg.family} reads tokens; expected 0, or family mlp")
    family = FAMILIES[cfg.family]
    mlp = math.ceil(cfg.hidden_size * 8 / 3 / 64) * 64 if family.gated else 4 * cfg.hidden_size
    head_dim = cfg.head_dim or cfg.hidden_size // cfg.num_heads
    layer_types, window = resolve_layers(cfg)
    scaling, local_theta = cfg.rope_scaling, cfg.local_rope_theta
    if family.uneven:
        scaling, local_theta = scaling or RopeScaling("proportional"), local_theta or cfg.rope_theta
    same = local_theta == cfg.rope_theta and scaling is None
    cfg = dataclasses.replace(
        cfg,
        **resolve_linear(cfg, head_dim),
        **resolve_uneven(cfg, head_dim, layer_types),
        vocab_size=cfg.vocab_size or vocab_size,
        num_kv_heads=cfg.num_kv_heads or cfg.num_heads,
        head_dim=head_dim,
        mlp_size=cfg.mlp_size or mlp,
        attention_bias=family.attention_bias if cfg.attention_bias is None else cfg.attention_bias,
        mlp_bias=family.mlp_bias if cfg.mlp_bias is None else cfg.mlp_bias,
        parallel_residual=family.parallel_residual if cfg.parallel_residual is None else cfg.parallel_residual,
        layer_types=layer_types,
        sliding_window=window,
        rope_scaling=scaling,
        local_rope_theta=None if same or not window else local_theta,
        query_pre_attn_scalar=resolve_scale(cfg, head_dim),
        **resolve_experts(cfg, cfg.mlp_size or mlp),
    )
    if cfg.num_heads % cfg.num_kv_heads:
        raise ValueError(f"num_heads: {cfg.num_heads} is not a multiple of num_kv_heads: {cfg.num_kv_heads}")
    if family.positions == "rope":
        check_rope(cfg)
    return cfg


def resolve_experts(cfg: ModelConfig, mlp_size: int) -> dict[str, Any]:
    """The fields of ModelConfig that say what experts there are. Raises ValueError where they do not fit each other."""
    routed, shared = FAMILIES[cfg.family].experts, FAMILIES[cfg.family].shared_expert
    beside, size = FAMILIES[cfg.family].experts_beside, cfg.expert_size
    none = beside and not (cfg.num_experts or cfg.experts_per_token or size)
    if not routed or none:
        for name in ("num_experts", "experts_per_token", "expert_size", "shared_expert_size", "normalize_routing"):
            if value := getattr(cfg, name):
                families = " or ".join(name for name, family in FAMILIES.items() if family.experts)
                expected = "num_experts of 1 or more" if none else f"family {families}"
                raise ValueError(f"{name}: {value}: {cfg.family} has no experts; expected {expected}")
        return {"normalize_routing": None}
    if bool(size) != beside:
        nearest = f"1 or more; nearest: {mlp_size}" if beside else "0, and mlp_size"
        raise ValueError(f"expert_size: {size}: of the experts of a {cfg.family}; expected {nearest}")
    count = cfg.experts_per_token or 2
    if not cfg.num_experts:
        raise ValueError(f"num_experts: 0: {cfg.family} has experts; expected {count} or more; nearest: {count}")
    if count > cfg.num_experts:
        raise ValueError(f"experts_per_token: {count}: expected at most num_experts; nearest: {cfg.num_experts}")
    normalize = routed == "normalized" if cfg.normalize_routing is None else cfg.normalize_routing
    if cfg.shared_expert_size and not shared:
        raise ValueError(f"shared_expert_size: {cfg.shared_expert_size}: a {cfg.family} has no such expert; nearest: 0")
    shared_size = (cfg.shared_expert_size or mlp_size) if shared else 0
    return {"experts_per_token": count, "normalize_routing": normalize, "shared_expert_size": shared_size}


def resolve_mlp(cfg: ModelConfig, vocab_size: int) -> ModelConfig:
    """``resolve`` of a model of observations: its layers are hidden_size wide, and of the rest it has the head alone.

    Raises ValueError where a field is given that it does not have."""
    own = {"family", "vocab_size", "observation_size", "hidden_size", "num_layers", "mlp_size", "tie_embeddings"}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.name not in own and value != field.default:
            raise ValueError(f"{field.name}: {value}: family mlp has no such thing; nearest: {field.default}")
    if cfg.mlp_size not in (0, cfg.hidden_size):
        raise ValueError(f"mlp_size: {cfg.mlp_size}: family mlp has layers of hidden_size; nearest: {cfg.hidden_size}")
    size = cfg.vocab_size or vocab_size
    return dataclasses.replace(cfg, vocab_size=size, mlp_size=cfg.hidden_size, tie_embeddings=False)


def resolve_layers(cfg: ModelConfig) -> tuple[LayerTypes, int]:
    """(layer_types, sliding_window): both empty where no layer is local."""
    family = FAMILIES[cfg.family]
    every = family.global_every
    types: LayerTypes = cfg.layer_types
    if not types and family.has_linear:  # of fewer than a round the last is global
        size = min(every, cfg.num_layers)
        types = tuple("linear" if (i + 1) % size else "global" for i in range(cfg.num_layers))
    elif not types and family.nope_every:
        types = tuple("global" if (i + 1) % family.nope_every else "nope" for i in range(cfg.num_layers))
    elif not types and cfg.sliding_window:
        types = tuple("global" if every and (i + 1) % every == 0 else "local" for i in range(cfg.num_layers))
    if family.uneven and not cfg.layer_types:  # the last is global, and where there is no window all are
        types = (*types[:-1], "global") if types else ("global",) * cfg.num_layers
    if types and len(types) != cfg.num_layers:
        raise ValueError(f"layer_types: {len(types)} of them; expected one for each of num_layers: {cfg.num_layers}")
    if family.has_linear:
        if "global" not in types or set(types) - {"linear", "global"}:
            raise ValueError(f"layer_types: {', '.join(dict.fromkeys(types))}: expected linear and one global at least")
        return types, 0
    allowed: LayerTypes = ("global", "nope") if family.nope_every else ("local", "global")
    if other := [kind for kind in types if kind not in allowed]:
        expected = " or ".join(allowed)
        raise ValueError(f"layer_types: {other[0]}: a {cfg.family} has no such layers; expected {expected}")
    if family.nope_every:
        if cfg.sliding_window:
            raise ValueError(f"sliding_window: {cfg.sliding_window}: a {cfg.family} has no local layers; nearest: 0")
        return types, 0
    if "local" not in types:
        return types if family.uneven else (), 0
    if not cfg.sliding_window:
        raise ValueError("layer_types: local layers need a window; expected sliding_window of 1 or more")
    return types, cfg.sliding_window


def resolve_linear(cfg: ModelConfig, head_dim: int) -> dict[str, int]:
    """The fields of linear layers. Raises ValueError where a family without them is given one, or heads do not fit."""
    names = ("linear_key_heads", "linear_value_heads", "linear_key_dim", "linear_value_dim", "convolution_size")
    if not FAMILIES[cfg.family].has_linear:
        for name in names:
            if value := getattr(cfg, name):
                raise ValueError(f"{name}: {value}: a {cfg.family} has no linear layers; nearest: 0")
        return {}
    keys, width = cfg.linear_key_heads or cfg.num_heads, cfg.linear_key_dim or head_dim
    heads = cfg.linear_value_heads or keys
    if heads % keys:
        raise ValueError(f"linear_value_heads: {heads} is not a multiple of linear_key_heads: {keys}")
    return dict(zip(names, (keys, heads, width, cfg.linear_value_dim or width, cfg.convolution_size or 4)))


def resolve_scale(cfg: ModelConfig, head_dim: int) -> int:
    """query_pre_attn_scalar. Raises ValueError for another than 1 where the family does not divide products."""
    given = cfg.query_pre_attn_scalar
    if FAMILIES[cfg.family].scaled_products:
        return 0 if given == head_dim else given
    if given not in (0, 1):
        raise ValueError(f"query_pre_attn_scalar: {given}: a {cfg.family} does not divide products; nearest: 1")
    return 1


def resolve_uneven(cfg: ModelConfig, head_dim: int, types: LayerTypes) -> dict[str, Any]:
    """The fields of layers that differ in their heads, share keys and values, or have embeddings of their own.

    Raises ValueError, in one line, where the family has no such layers, or they do not fit each other."""
    names = ("global_head_dim", "global_kv_heads", "keys_are_values", "shared_kv_layers", "wide_shared_mlp")
    if not FAMILIES[cfg.family].uneven:
        for name in (*names, "per_layer_size"):
            if value := getattr(cfg, name):
                raise ValueError(f"{name}: {value}: a {cfg.family} has no such layers; nearest: {type(value)()}")
        return {}
    if types[-1:] != ("global",):
        raise ValueError(f"layer_types: {types[-1]}: the last layer of a {cfg.family} is global; nearest: global")
    kv, own = cfg.num_kv_heads or cfg.num_heads, cfg.global_kv_heads
    if own not in (0, kv) and not cfg.keys_are_values:
        raise ValueError(f"global_kv_heads: {own}: needs keys_are_values: true; nearest: {kv}")
    if own and cfg.num_heads % own:
        raise ValueError(f"num_heads: {cfg.num_heads} is not a multiple of global_kv_heads: {own}")
    shared, most = cfg.shared_kv_layers, len(types) - 1 - max(map(types.index, set(types)))
    if shared > most:
        what = "each type of layers needs one before them that has keys and values"
        raise ValueError(f"shared_kv_layers: {shared}: {what}; nearest: {most}")
    if cfg.wide_shared_mlp and not shared:
        raise ValueError("wide_shared_mlp: true: of layers that share keys and values; expected shared_kv_layers")
    return {"global_head_dim": cfg.global_head_dim or head_dim, "global_kv_heads": own or kv}


def head_sizes(cfg: ModelConfig, kind: LayerType) -> tuple[int, int]:
    """(heads of keys and values, features of a head) of the attention of such layers."""
    if kind == "global" and FAMILIES[cfg.family].uneven:
        return cfg.global_kv_heads, cfg.global_head_dim
    return cfg.num_kv_heads, cfg.head_dim


def rotary_size(cfg: ModelConfig, kind: LayerType = "global") -> int:
    """The period of the frequencies' law in features: as many are rotated, or one more where it is odd. Local layers
    with a base of their own rotate all."""
    width = head_sizes(cfg, kind)[1]
    return width if kind == "local" and cfg.local_rope_theta else int(width * cfg.rotary_fraction)


def check_rope(cfg: ModelConfig) -> None:
    """Raises ValueError where a head does not hold the rotated features, or a scaling does not fit them."""
    size, scaling, width = rotary_size(cfg), cfg.rope_scaling, head_sizes(cfg, "global")[1]
    if not size or size + size % 2 > width:
        share = f"{cfg.rotary_fraction:g} of head_dim: {width} is {size} features, rotated in pairs"
        raise ValueError(f"rotary_fraction: {share}; expected 1 to {width - width % 2}")
    kinds = FAMILIES[cfg.family].hf.rope.kinds
    if scaling is None:
        if "default" not in kinds:
            raise ValueError(f"rope_scaling: null: of {cfg.family} it is {' or '.join(kinds)}; nearest: {kinds[0]}")
        return
    if (scaling.kind == "proportional") != ("proportional" in kinds):
        raise ValueError(f"rope_scaling.kind: {scaling.kind}: not of {cfg.family}; expected {' or '.join(kinds)}")
    if scaling.kind == "proportional" and width % 2:
        law = "a proportional law has a frequency for each pair of features"
        raise ValueError(f"global_head_dim: {width}: {law}; nearest: {width + 1}")
    if size % 2 and scaling.kind == "yarn":
        raise ValueError(f"rope_scaling.kind: yarn: {size} rotated features are an odd number; expected an even one")
    for name in ("short_factor", "long_factor") if scaling.kind == "longrope" else ():
        count, expected = len(getattr(scaling, name)), (size + 1) // 2
        if count != expected:
            raise ValueError(f"rope_scaling.{name}: {count} numbers; expected one for each of {expected} frequencies")


def row_limit(cfg: ModelConfig) -> int | None:
    """How many columns a row may have; None where any number will do.

    Beyond them learned positions end, and longrope would need its long factors, whose choice depends on the row."""
    if cfg.family == MLP:
        return None
    if FAMILIES[cfg.family].positions == "learned":
        return cfg.max_positions
    scaling = cfg.rope_scaling
    return scaling.original_max_positions if scaling is not None and scaling.kind == "longrope" else None


def layer_types_of(cfg: ModelConfig) -> LayerTypes:
    """The kind of every layer."""
    return cfg.layer_types or ("global",) * cfg.num_layers
