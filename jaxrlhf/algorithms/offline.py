"""What algorithms share that learn from given responses: how likely a network finds each."""

from jaxrlhf.algorithm import read_logprobs
from jaxrlhf.ops.masked import keep
from jaxrlhf.types import Array, Nets, Role, Sequences, Trees


def response_logprobs(nets: Nets, role: Role, trees: Trees, rows: Sequences) -> Array:
    """log p of the whole responses, nats f32[B]."""
    return keep(read_logprobs(nets, role, trees, rows), rows.response_mask).sum(-1)
