"""Distillation on given responses: the policy comes to predict each token as a teacher does (word-level knowledge
distillation, Kim and Rush 2016, arXiv:1606.07947; Hinton et al. 2015, arXiv:1503.02531).

    loss = mean over response tokens of D(teacher, policy)          D: ops/divergence.py

Only the policy learns. The tokens of the data are what both are asked about, not what is learned: where the teacher
wrote them, this is supervised distillation; where somebody else did, the teacher corrects them. ``distill`` learns from
what the policy itself writes.
"""

import dataclasses
from typing import Literal

from jaxrlhf.algorithm import TEACHER, Algorithm, update_once
from jaxrlhf.algorithms import teaching
from jaxrlhf.ops.losses import Aggregation, aggregate
from jaxrlhf.types import Batch, Experience, Mean, Nets, TrainState, Trees, given


@dataclasses.dataclass(frozen=True)
class DistillDataConfig:
    """Distillation from a teacher on the responses of demonstrations."""

    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "forward_kl"  # of policy and teacher: ops/divergence.py
    beta: float = 0.5  # jsd: weight of the teacher in the mixture; TRL's 0 and 1 are forward_kl and reverse_kl
    top_k: int = 0  # only so many tokens, those that the teacher holds likeliest; 0: the whole vocabulary
    tail: Literal["bucket", "drop"] = "bucket"  # top_k: the rest is one outcome more, or both are renormalised without
    temperature: float = 1.0  # both models' logits are divided by it
    aggregation: Aggregation = "token-mean"  # mean over all tokens; or over responses, of their token sums or means


def prepare(nets: Nets, state: TrainState, batch: Batch, cfg: DistillDataConfig) -> tuple[Experience, dict[str, Mean]]:
    """Demonstrations are read as they come."""
    return Experience(responses=given(batch.sequences, "batch.sequences")), {}


def loss(
    nets: Nets, trees: Trees, minibatch: Experience, cfg: DistillDataConfig
) -> tuple[dict[str, Mean], dict[str, Mean]]:
    """Mean divergence from the teacher at a response token, nats."""
    sequences = given(minibatch.responses, "responses")
    mask = sequences.response_mask
    (stats,) = nets.read(trees, sequences, teaching.ask_teacher(cfg))
    total = aggregate(stats.divergence, mask, cfg.aggregation)
    return {"policy": total}, {"loss/policy": total} | teaching.divergence_metrics(stats, mask, cfg)


ALGORITHM = Algorithm(
    config=DistillDataConfig,
    online=False,
    batch=lambda cfg: ("sequences",),
    roles=lambda cfg: ({"policy": "lm"}, {TEACHER: "lm"}),
    updates=update_once,
    prepare=prepare,
    loss=loss,
    problems=teaching.problems,
)
