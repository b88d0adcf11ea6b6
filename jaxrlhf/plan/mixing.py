"""Heads on one device, and what a linear layer (a gated delta net) computes, moves and keeps there."""

from collections.abc import Callable

from jaxrlhf.models.config import LayerType, ModelConfig, head_sizes
from jaxrlhf.models.delta_net.rule import CHUNK
from jaxrlhf.models.layer_kinds import attending

FLOAT32 = 4  # bytes: streams and states, whatever the run computes in


def heads_here(cfg: ModelConfig, tensor: int, kind: LayerType = "global") -> tuple[int, int]:
    """(query heads, cached key-value heads) of such a layer on one device; see attention.match_heads."""
    kv_heads, _ = head_sizes(cfg, kind)
    if cfg.num_heads % tensor:
        return cfg.num_heads, kv_heads
    kv = kv_heads // tensor if kv_heads % tensor == 0 else cfg.num_heads // tensor
    return cfg.num_heads // tensor, kv


def query_features(cfg: ModelConfig, tensor: int) -> int:
    """Features of the queries of one token on one device, of all layers of attention."""
    heads = heads_here(cfg, tensor)[0]
    return sum(count * heads * head_sizes(cfg, kind.type)[1] for kind, count in attending(cfg).items())


def token_bytes(cfg: ModelConfig, tensor: int, number: Callable[[int], float], again: bool = False) -> float:
    """Bytes of the keys and values of one token on one device; ``number``: features of a head to bytes of each of its
    numbers; ``again``: those that several layers read count as often."""
    return sum(
        count * layer_token_bytes(cfg, tensor, kind.type, number) * (again or not kind.reads)
        for kind, count in attending(cfg).items()
    )


def layer_token_bytes(cfg: ModelConfig, tensor: int, kind: LayerType, number: Callable[[int], float]) -> float:
    """``token_bytes`` of one layer of attention."""
    heads, dim = heads_here(cfg, tensor, kind)[1], head_sizes(cfg, kind)[1]
    return 2 * heads * dim * number(dim)


def linear_heads_here(cfg: ModelConfig, tensor: int) -> tuple[int, int]:
    """(value heads, key heads) on one device."""
    split = lambda heads: heads if heads % tensor else heads // tensor
    return split(cfg.linear_value_heads), split(cfg.linear_key_heads)


def state_bytes(cfg: ModelConfig, tensor: int) -> int:
    """The state of one row."""
    return linear_heads_here(cfg, tensor)[0] * cfg.linear_key_dim * cfg.linear_value_dim * FLOAT32


def kept_bytes(cfg: ModelConfig, tensor: int, compute: int) -> int:
    """What decoding keeps of one row, however long it is: the state, and the columns that the convolution sees."""
    heads, keys = linear_heads_here(cfg, tensor)
    tail = (cfg.convolution_size - 1) * (2 * keys * cfg.linear_key_dim + heads * cfg.linear_value_dim)
    return state_bytes(cfg, tensor) + tail * compute


def stream_bytes(cfg: ModelConfig, tensor: int) -> float:
    """Of one token: queries, keys, values and outputs, and its share of the states between chunks."""
    heads, _ = linear_heads_here(cfg, tensor)
    return heads * 2 * (cfg.linear_key_dim + cfg.linear_value_dim) * FLOAT32 + state_bytes(cfg, tensor) / CHUNK


def rule_of_token(cfg: ModelConfig, tensor: int) -> tuple[float, float]:
    """(FLOPs, bytes moved) of one token: products with the chunk's other tokens (keys with keys and queries, the
    inverse of the triangular system, what it and the shares multiply), and three with the state; its streams read and
    written, and a part of a state."""
    key, value = cfg.linear_key_dim, cfg.linear_value_dim
    inside = 4 * CHUNK * (key + value) + 4 * CHUNK * CHUNK * (CHUNK.bit_length() - 2)
    flops = linear_heads_here(cfg, tensor)[0] * (inside + 6 * key * value)
    return flops, stream_bytes(cfg, tensor) + state_bytes(cfg, tensor) / CHUNK
