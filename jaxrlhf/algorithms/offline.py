"""What algorithms share that learn from given responses: how likely a network finds each."""

from jaxrlhf.ops.masked import keep
from jaxrlhf.types import Array, Ask, Nets, Role, Sequences, Trees


def response_logprobs(nets: Nets, role: Role, trees: Trees, rows: Sequences) -> Array:
    """log p of the whole responses, nats f32[B]."""
    (stats,) = nets.read(trees, rows, Ask(role, "token_stats"))
    return keep(stats.logprobs, rows.response_mask).sum(-1)
