"""An algorithm outside the package, in the shape of KTO: responses that are each good or bad, against a reference."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrlhf.algorithm import Algorithm, Updates
from jaxrlhf.ops.masked import keep, sums
from jaxrlhf.types import Array, Ask, Batch, Experience, Mean, Nets, Sequences, TrainState, Trees, Unpaired, given


@dataclasses.dataclass(frozen=True)
class Config:
    """Good responses should be likelier than under the reference, bad ones less likely."""

    beta: float = 0.1  # implicit reward for each nat between policy and reference
    passes: int = 2  # over the rows of an iteration; a name that the step does not know


class Labelled(Experience, kw_only=True):
    rows: Unpaired
    ref_logprobs: Array  # f32[B] of whole responses


def response_logprobs(nets: Nets, role: str, trees: Trees, rows: Sequences) -> Array:
    """log p of the whole responses, nats f32[B]."""
    (stats,) = nets.read(trees, rows, Ask(role, "token_stats"))
    return keep(stats.logprobs, rows.response_mask).sum(-1)


def prepare(nets: Nets, state: TrainState, batch: Batch, cfg: Config) -> tuple[Labelled, dict[str, Mean]]:
    rows = given(batch.unpaired, "batch.unpaired")
    reference = response_logprobs(nets, "reference", state.trees, rows.responses)
    return Labelled(rows=rows.replace(mismatched=None), ref_logprobs=reference), {}


def loss(nets: Nets, trees: Trees, minibatch: Labelled, cfg: Config) -> tuple[dict[str, Mean], dict[str, Mean]]:
    rows = minibatch.rows
    ratio = response_logprobs(nets, "policy", trees, rows.responses) - minibatch.ref_logprobs
    gain = jnp.where(rows.desirable, 1.0, -1.0) * cfg.beta * ratio
    total = sums(jax.nn.sigmoid(-gain), rows.responses.valid.any(-1))
    return {"policy": total}, {
        "loss/policy": total,
        "ratio/good": sums(ratio, rows.desirable),
        "ratio/bad": sums(ratio, ~rows.desirable),
    }


ALGORITHM = Algorithm(
    config=Config,
    online=False,
    batch=lambda cfg: ("unpaired",),
    roles=lambda cfg: ({"policy": "lm"}, {"reference": "lm"}),
    updates=lambda cfg: Updates(epochs=cfg.passes),
    prepare=prepare,
    loss=loss,
)
