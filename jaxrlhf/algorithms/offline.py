"""What algorithms share that learn from given responses: how likely a network finds each."""

from jaxrlhf.ops.masked import keep
from jaxrlhf.types import Array, Nets, Params, Role, Sequences


def response_logprobs(nets: Nets, role: Role, trees: dict[Role, Params], rows: Sequences) -> Array:
    """log p of the whole responses, nats f32[B]."""
    return keep(nets.token_stats(role, trees, rows).logprobs, rows.response_mask).sum(-1)
