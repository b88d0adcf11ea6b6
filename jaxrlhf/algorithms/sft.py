"""Supervised fine-tuning: maximum likelihood of demonstrated responses."""

import dataclasses

from jaxrlhf.ops.masked import sums
from jaxrlhf.types import Algorithm, Batch, Experience, Mean, Nets, TrainState, update_once


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning: maximum likelihood of the response tokens."""


def prepare(nets: Nets, state: TrainState, batch: Batch, cfg: SFTConfig) -> tuple[Experience, dict[str, Mean]]:
    """Demonstrations are learned from as they come."""
    return Experience(sequences=batch.sequences), {}


def loss(nets: Nets, params, slow, minibatch: Experience, cfg: SFTConfig) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Mean negative log-likelihood of a response token, in nats."""
    mask = minibatch.sequences.response_mask
    stats = nets.token_stats("policy", params, minibatch.sequences)
    nll = sums(-stats.logprobs, mask)
    return {"policy": nll}, {"loss/policy": nll, "policy/entropy": sums(stats.entropy, mask)}


ALGORITHM = Algorithm(
    config=SFTConfig,
    online=False,
    batch=lambda cfg: ("sequences",),
    roles=lambda cfg: ({"policy": "lm"}, {}),
    updates=update_once,
    prepare=prepare,
    loss=loss,
)
