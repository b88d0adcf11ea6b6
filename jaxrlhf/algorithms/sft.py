"""Supervised fine-tuning: maximum likelihood of demonstrated responses (as in Ouyang et al. 2022, arXiv:2203.02155).

    loss = - mean over response tokens of log pi(token | before)

The mean is over all response tokens of the minibatch.
"""

import dataclasses

from jaxrlhf.algorithm import Algorithm, update_once
from jaxrlhf.ops.masked import sums
from jaxrlhf.types import Ask, Batch, Experience, Mean, Nets, TrainState, Trees, given


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning: maximum likelihood of the response tokens."""


def prepare(nets: Nets, state: TrainState, batch: Batch, cfg: SFTConfig) -> tuple[Experience, dict[str, Mean]]:
    """Demonstrations are learned from as they come."""
    return Experience(responses=given(batch.sequences, "batch.sequences")), {}


def loss(nets: Nets, trees: Trees, minibatch: Experience, cfg: SFTConfig) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Mean negative log-likelihood of a response token, in nats."""
    sequences = given(minibatch.responses, "responses")
    mask = sequences.response_mask
    (stats,) = nets.read(trees, sequences, Ask("policy", "token_stats"))
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
