"""The table of a model's parameters: shapes, logical axes and initialisation."""

import math
import operator
import zlib
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.models.attention.products import head_axis
from jaxrlhf.models.config import MLP, ModelConfig, head_sizes
from jaxrlhf.models.families import FAMILIES
from jaxrlhf.models.layer_kinds import PARTS, Kinds, LayerKind, count_kinds, layers_with, part_of, stacks_of
from jaxrlhf.sharding import spec
from jaxrlhf.types import Array, Head, Params

VOCAB_MULTIPLE = 64  # embeddings are padded up to it, whatever the mesh, so that a checkpoint fits every mesh


class Leaf(NamedTuple):
    """One parameter: its shape, logical axes, and the deviation it starts with ("ones" and "zeros" are constants)."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: float | Literal["ones", "zeros"]
    noise: Literal["normal", "uniform"] = "normal"


Axes = tuple[str | None, ...]  # a logical axis a dimension; None: whole on every device


def inputs(axes: Axes) -> int:
    """How many of a kernel's axes, its first, are summed over."""
    return 1 if axes[0] == "embed" else len(axes) - 1


def padded_vocab(cfg: ModelConfig) -> int:
    """Rows of the embedding: the vocabulary rounded up to VOCAB_MULTIPLE."""
    return -(-cfg.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def parameter_table(cfg: ModelConfig, head: Head) -> dict:
    """The pytree of Leafs of a model with this head. ``cfg`` is resolved."""
    dim, vocab = cfg.hidden_size, padded_vocab(cfg)
    if head == "bare":
        return {"head": scalar_table(cfg)}
    if head == "action":
        return {"head": {"kernel": Leaf((dim, vocab), ("embed", "vocab"), 0.02)}}
    if cfg.family == MLP:
        own = scalar_table(cfg) if head == "scalar" else {"kernel": Leaf((dim, vocab), ("embed", "vocab"), 0.02)}
        return mlp_trunk_table(cfg) | {"head": own}
    table = {
        "embed": {"tokens": {"embedding": Leaf((vocab, dim), ("vocab", "embed"), 1 / math.sqrt(dim))}},
        "layers": layers_table(cfg),
        "final_norm": norm_table(cfg, {"embed": dim}),
    }
    if FAMILIES[cfg.family].positions == "learned":
        table["embed"]["positions"] = {"embedding": Leaf((cfg.max_positions, dim), ("positions", "embed"), 0.01)}
    if cfg.per_layer_size:
        table["embed"]["per_layer_norm"] = norm_table(cfg, {"per_layer": cfg.per_layer_size})
    if head == "scalar":
        table["head"] = scalar_table(cfg)
    elif not cfg.tie_embeddings:
        table["head"] = {"kernel": Leaf((dim, vocab), ("embed", "vocab"), 0.02)}
    return table


def layers_table(cfg: ModelConfig) -> dict:
    """Leafs of all layers, a stack each: those of the layers that it holds a part of, in their order."""
    kinds = {kind.stack(part): kind for kind in count_kinds(cfg) for part in kind.parts}
    return {stack: stack_table(cfg, stack, kinds[stack]) for stack in stacks_of(cfg)}


def stack_table(cfg: ModelConfig, stack: str, kind: LayerKind) -> dict:
    """Leafs of one stack, of layers of this ``kind``."""
    count, part = len(layers_with(cfg, stack)), part_of(stack)
    if part == "output":
        return {"layer_scalar": plain_leaf({"layers": count}, "ones")}
    if part == "per_layer":
        return per_layer_table(cfg, count)
    if part == "mlp":
        return mlp_table(cfg, count, kind) | branch_norms(cfg, count)
    if part == "delta":
        return delta_table(cfg, count) | branch_norms(cfg, count)
    return attention_table(cfg, count, kind) | branch_norms(cfg, count)


def layer_at(stacked: Params, kinds: Kinds, index: int) -> Params:
    """The parameters of layer ``index`` among layers of these ``kinds``, out of those that are stacked."""
    found = {}
    for part in PARTS:
        stack = kinds[index].stack(part)
        if stack in stacked and part in kinds[index].parts:
            place = [kind.stack(part) for kind in kinds[:index] if part in kind.parts].count(stack)
            found[stack] = jax.tree.map(operator.itemgetter(place), stacked[stack])
    return found


def scalar_table(cfg: ModelConfig) -> dict:
    """Leafs of a head that gives one number per token."""
    dim = cfg.hidden_size
    kernel = Leaf((dim, 1), ("embed", "score"), 1 / math.sqrt(dim + 1))
    return {"kernel": kernel, "bias": Leaf((1,), ("score",), "zeros")}


def mlp_trunk_table(cfg: ModelConfig) -> dict:
    """Leafs of a model of observations without its head: a layer from the observation, num_layers - 1 behind it."""
    size, dim, behind = cfg.observation_size, cfg.hidden_size, cfg.num_layers - 1
    first = {
        "kernel": Leaf((size, dim), ("observation", "embed"), 1 / math.sqrt(size)),
        "bias": Leaf((dim,), ("embed",), "zeros"),
    }
    sizes = {"layers": behind, "embed": dim, "mlp": dim}
    return {"observations": first} | ({"layers": linear_table(sizes, dim, True, 1)} if behind else {})


def attention_table(cfg: ModelConfig, count: int, kind: LayerKind) -> dict:
    """Leafs of the attention of ``count`` layers, but for the norms of the branch. With an output gate a head's query
    is twice as wide: the query, then its gate. Layers that read keys and values have no maps for them."""
    family, bias, layers = FAMILIES[cfg.family], bool(cfg.attention_bias), {"layers": count}
    kv_heads, head_dim = head_sizes(cfg, kind.type)
    dim, width = {"embed": cfg.hidden_size}, {"head_dim": head_dim}
    heads, kv = {"heads": cfg.num_heads}, {"kv_heads": kv_heads}
    wide = {"head_dim": head_dim * (2 if family.output_gate else 1)}
    project = lambda n, width=width: linear_table(layers | dim | n | width, cfg.hidden_size, bias, 2)
    out = linear_table(layers | heads | width | dim, cfg.num_heads * head_dim, bias and family.out_bias, 1, small(cfg))
    norm = lambda n: norm_table(cfg, layers | (n if family.query_key_norm == "all" else {}) | width)
    table, norms = {"query": project(heads, wide)}, {"query_norm": norm(heads)}
    if not kind.reads:
        table, norms = table | {"key": project(kv)}, norms | {"key_norm": norm(kv)}
    if not kind.reads and not (kind.apart and cfg.keys_are_values):
        table["value"] = project(kv)
    table |= {"out": out} | ({"softmax": {"sinks": plain_leaf(layers | heads, 0.02)}} if family.sinks else {})
    return table if family.query_key_norm == "none" else table | norms


def per_layer_table(cfg: ModelConfig, count: int) -> dict:
    """Leafs of the embeddings that ``count`` layers have of their own: see per_layer.py."""
    layers, dim, size = {"layers": count}, {"embed": cfg.hidden_size}, {"per_layer": cfg.per_layer_size}
    tokens = {"vocab_of_layer": padded_vocab(cfg), "per_layer": cfg.per_layer_size}
    return {
        "per_layer_tokens": {"embedding": plain_leaf(layers | tokens, 1 / math.sqrt(cfg.per_layer_size))},
        "per_layer_context": linear_table(layers | dim | size, cfg.hidden_size, False, 1),
        "per_layer_gate": linear_table(layers | dim | size, cfg.hidden_size, False, 1),
        "per_layer_out": linear_table(layers | size | dim, cfg.per_layer_size, False, 1, small(cfg)),
        "post_norm": norm_table(cfg, layers | dim),
    }


def delta_table(cfg: ModelConfig, count: int) -> dict:
    """Leafs of the gated delta nets of ``count`` layers, but for the norms of the branch.

    A token's decay begins near exp(-exp(A_log) softplus(1)): some heads forget at once, some hardly at all."""
    layers, dim = {"layers": count}, {"embed": cfg.hidden_size}
    keys = {"kv_heads": cfg.linear_key_heads, "head_dim": cfg.linear_key_dim}
    values = {"heads": cfg.linear_value_heads, "head_dim": cfg.linear_value_dim}
    heads = {"heads": cfg.linear_value_heads}
    project = lambda sizes: linear_table(layers | dim | sizes, cfg.hidden_size, False, len(sizes))
    size = cfg.convolution_size
    taps = lambda sizes: {"taps": plain_leaf(layers | sizes | {"taps": size}, 1 / math.sqrt(size))}
    fan_in = cfg.linear_value_heads * cfg.linear_value_dim
    return {
        "delta_query": project(keys),
        "delta_key": project(keys),
        "delta_value": project(values),
        "delta_convolution": {"query": taps(keys), "key": taps(keys), "value": taps(values)},
        "delta_decay": project(heads),
        "delta_beta": project(heads),
        "delta_rate": {"A_log": plain_leaf(layers | heads, 2.0), "dt_bias": plain_leaf(layers | heads, "ones")},
        "delta_gate": project(values),
        "delta_norm": {"scale": plain_leaf(layers | {"head_dim": cfg.linear_value_dim}, "ones")},
        "delta_out": linear_table(layers | values | dim, fan_in, False, 1, small(cfg)),
    }


def plain_leaf(sizes: dict[str, int], init: float | Literal["ones", "zeros"]) -> Leaf:
    """A Leaf by the ``sizes`` of its logical axes, in their order."""
    return Leaf(tuple(sizes.values()), tuple(sizes), init)


def mlp_table(cfg: ModelConfig, count: int, kind: LayerKind) -> dict:
    """Leafs of the mlps of ``count`` layers, but for the norms of the branch."""
    if cfg.num_experts and not cfg.expert_size:
        return expert_table(cfg, count)
    size = cfg.mlp_size * (2 if kind.reads and cfg.wide_shared_mlp else 1)
    layers, dim, mlp = {"layers": count}, {"embed": cfg.hidden_size}, {"mlp": size}
    up = lambda: linear_table(layers | dim | mlp, cfg.hidden_size, bool(cfg.mlp_bias), 1)
    down = linear_table(layers | mlp | dim, size, bool(cfg.mlp_bias), 1, small(cfg))
    found = {"up": up(), "down": down} | ({"gate": up()} if FAMILIES[cfg.family].gated else {})
    return found | (beside_table(cfg, count) if cfg.num_experts else {})


def beside_table(cfg: ModelConfig, count: int) -> dict:
    """Leafs of what ``count`` layers have beside their mlps: experts, norms around both, and what scales the router."""
    layers, dim = {"layers": count}, {"embed": cfg.hidden_size}
    norms = {name: norm_table(cfg, layers | dim) for name in ("mlp_norm", "expert_norm", "expert_post_norm")}
    scales = {"router_scale": dim, "expert_scale": {"routes": cfg.num_experts}}
    ones = {name: {"scale": plain_leaf(layers | sizes, "ones")} for name, sizes in scales.items()}
    return expert_table(cfg, count) | norms | ones


def expert_table(cfg: ModelConfig, count: int) -> dict:
    """Leafs of the routers, experts and shared experts of ``count`` layers. The first two have biases where the mlp
    has."""
    size = cfg.expert_size or cfg.mlp_size
    layers, experts = {"layers": count}, {"layers": count, "expert": cfg.num_experts}
    dim, mlp, bias = {"embed_of_expert": cfg.hidden_size}, {"mlp": size}, bool(cfg.mlp_bias)
    router = layers | {"embed": cfg.hidden_size, "routes": cfg.num_experts}
    up = lambda: linear_table(experts | dim | mlp, cfg.hidden_size, bias, 1)
    down = linear_table(experts | mlp | dim, size, bias, 1, small(cfg))
    own = {"gate": up(), "up": up(), "down": down}
    found = {"router": linear_table(router, cfg.hidden_size, bias, 1), "experts": own}
    return found | ({"shared": shared_table(cfg, count)} if cfg.shared_expert_size else {})


def shared_table(cfg: ModelConfig, count: int) -> dict:
    """Leafs of the expert of each of ``count`` layers that computes every token, and of what weighs it."""
    layers, dim, mlp = {"layers": count}, {"embed": cfg.hidden_size}, {"mlp": cfg.shared_expert_size}
    up = lambda: linear_table(layers | dim | mlp, cfg.hidden_size, False, 1)
    down = linear_table(layers | mlp | dim, cfg.shared_expert_size, False, 1, small(cfg))
    share = linear_table(layers | dim | {"score": 1}, cfg.hidden_size, False, 1)
    return {"gate": up(), "up": up(), "down": down, "share": share}


def small(cfg: ModelConfig) -> float:
    """Residual branches start small (GPT-2)."""
    return 1.0 / math.sqrt(2 * cfg.num_layers)


def branch_norms(cfg: ModelConfig, count: int) -> dict:
    """Leafs of the norms before and after a residual branch of ``count`` layers, as the family has them."""
    places = {"pre": ["norm"], "post": ["post_norm"], "sandwich": ["norm", "post_norm"]}[FAMILIES[cfg.family].norms]
    return {place: norm_table(cfg, {"layers": count, "embed": cfg.hidden_size}) for place in places}


def norm_table(cfg: ModelConfig, sizes: dict[str, int]) -> dict:
    """Leafs of a norm: ``sizes`` of its logical axes, in their order."""
    family = FAMILIES[cfg.family]
    scale = {"scale": plain_leaf(sizes, "zeros" if family.norm_offset else "ones")}
    return scale | ({"bias": plain_leaf(sizes, "zeros")} if family.norm == "layer" else {})


def linear_table(sizes: dict[str, int], fan_in: int, bias: bool, bias_rank: int, gain: float = 1.0) -> dict:
    """Leafs of a linear map: ``sizes`` of its kernel's logical axes; its bias has layers, experts where the kernel has,
    and the last ``bias_rank``."""
    table = {"kernel": plain_leaf(sizes, gain / math.sqrt(fan_in))}
    if bias:
        last = [*sizes][-bias_rank:]
        kept = {name: size for name, size in sizes.items() if name in ("layers", "expert", *last)}
        table["bias"] = plain_leaf(kept, "zeros")
    return table


def init(cfg: ModelConfig, head: Head, key: Array, dtype=jnp.float32) -> Params:
    """Random parameters, each sharded by its logical axes. A leaf's noise depends on its path only, not on the mesh."""
    return draw_table(parameter_table(cfg, head), key, dtype)


def draw_table(table: dict, key: Array, dtype=jnp.float32) -> Params:
    """``init`` of the Leafs in ``table``."""

    def one(path, leaf: Leaf):
        if leaf.init in ("ones", "zeros"):
            value = 1.0 if leaf.init == "ones" else 0.0
            return jnp.full(leaf.shape, value, dtype, out_sharding=weight_spec(leaf))
        noise_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        if leaf.noise == "uniform":
            bounds = -math.sqrt(3), math.sqrt(3)  # of deviation 1
            noise = jax.random.uniform(noise_key, leaf.shape, jnp.float32, *bounds, out_sharding=weight_spec(leaf))
        else:
            noise = jax.random.normal(noise_key, leaf.shape, jnp.float32, out_sharding=weight_spec(leaf))
        return (noise * leaf.init).astype(dtype)

    return jax.tree_util.tree_map_with_path(one, table, is_leaf=lambda x: isinstance(x, Leaf))


def weight_axes(leaf: Leaf) -> tuple[str | None, ...]:
    """The leaf's axes as this mesh can split them: heads that ``tensor`` does not divide stay whole."""
    one = lambda name, size: head_axis(name, size) if name in ("heads", "kv_heads") else name
    return tuple(one(name, size) for name, size in zip(leaf.axes, leaf.shape, strict=True))


def weight_spec(leaf: Leaf):
    return spec(*weight_axes(leaf))
