"""The table of a model's parameters: shapes, logical axes and initialisation."""

import math
import operator
import zlib
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf.models.attention.products import head_axis
from jaxrlhf.models.config import MLP, LayerTypes, ModelConfig, branch_of, layers_with
from jaxrlhf.models.families import FAMILIES
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
    if head == "scalar":
        table["head"] = scalar_table(cfg)
    elif not cfg.tie_embeddings:
        table["head"] = {"kernel": Leaf((dim, vocab), ("embed", "vocab"), 0.02)}
    return table


def layers_table(cfg: ModelConfig) -> dict:
    """Leafs of all layers, a branch each: those of the layers that have it are stacked, in their order."""
    tables = {"attention": attention_table, "delta": delta_table}
    count = {branch: len(layers_with(cfg, branch)) for branch in tables}
    found = {name: tables[name](cfg, size) | branch_norms(cfg, size) for name, size in count.items() if size}
    return found | {"mlp": mlp_table(cfg) | branch_norms(cfg, cfg.num_layers)}


def layer_at(stacked: Params, kinds: LayerTypes, index: int) -> Params:
    """The parameters of layer ``index`` among layers of these ``kinds``, out of those that are stacked."""
    own = branch_of(kinds[index])
    place = [branch_of(kind) for kind in kinds[:index]].count(own)
    pick = lambda tree, at: jax.tree.map(operator.itemgetter(at), tree)
    return {own: pick(stacked[own], place), "mlp": pick(stacked["mlp"], index)}


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


def attention_table(cfg: ModelConfig, count: int) -> dict:
    """Leafs of the attention of ``count`` layers, but for the norms of the branch. With an output gate a head's query
    is twice as wide: the query, then its gate."""
    family, bias, layers = FAMILIES[cfg.family], bool(cfg.attention_bias), {"layers": count}
    dim, width = {"embed": cfg.hidden_size}, {"head_dim": cfg.head_dim}
    heads, kv = {"heads": cfg.num_heads}, {"kv_heads": cfg.num_kv_heads}
    wide = {"head_dim": cfg.head_dim * (2 if family.output_gate else 1)}
    project = lambda n, width=width: linear_table(layers | dim | n | width, cfg.hidden_size, bias, 2)
    out = linear_table(
        layers | heads | width | dim, cfg.num_heads * cfg.head_dim, bias and family.out_bias, 1, small(cfg)
    )
    table = {"query": project(heads, wide), "key": project(kv), "value": project(kv), "out": out}
    if family.sinks:
        table["softmax"] = {"sinks": plain_leaf(layers | heads, 0.02)}
    if family.query_key_norm == "none":
        return table
    norm = lambda n: norm_table(cfg, layers | (n if family.query_key_norm == "all" else {}) | width)
    return table | {"query_norm": norm(heads), "key_norm": norm(kv)}


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


def mlp_table(cfg: ModelConfig) -> dict:
    """Leafs of all layers' mlps, but for the norms of the branch."""
    if cfg.num_experts:
        return expert_table(cfg)
    layers, dim, mlp = {"layers": cfg.num_layers}, {"embed": cfg.hidden_size}, {"mlp": cfg.mlp_size}
    up = lambda: linear_table(layers | dim | mlp, cfg.hidden_size, bool(cfg.mlp_bias), 1)
    down = linear_table(layers | mlp | dim, cfg.mlp_size, bool(cfg.mlp_bias), 1, small(cfg))
    return {"up": up(), "down": down} | ({"gate": up()} if FAMILIES[cfg.family].gated else {})


def expert_table(cfg: ModelConfig) -> dict:
    """Leafs of all layers' routers and experts, which have biases where the mlp has."""
    layers, experts = {"layers": cfg.num_layers}, {"layers": cfg.num_layers, "expert": cfg.num_experts}
    dim, mlp, bias = {"embed_of_expert": cfg.hidden_size}, {"mlp": cfg.mlp_size}, bool(cfg.mlp_bias)
    router = layers | {"embed": cfg.hidden_size, "routes": cfg.num_experts}
    up = lambda: linear_table(experts | dim | mlp, cfg.hidden_size, bias, 1)
    down = linear_table(experts | mlp | dim, cfg.mlp_size, bias, 1, small(cfg))
    own = {"gate": up(), "up": up(), "down": down}
    return {"router": linear_table(router, cfg.hidden_size, bias, 1), "experts": own}


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
