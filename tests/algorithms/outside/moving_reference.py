"""An algorithm outside the package whose slow role follows the policy: a Polyak average after every update."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrlhf.algorithm import Algorithm, update_once
from jaxrlhf.ops.kl import kl_estimate
from jaxrlhf.ops.masked import keep, sums
from jaxrlhf.types import Ask, Batch, Experience, Mean, Nets, TrainState, Trees, given


@dataclasses.dataclass(frozen=True)
class Config:
    """Maximum likelihood of the response tokens, with a penalty for each nat from a reference that follows."""

    kl_coef: float = 0.1  # of the KL from the reference
    polyak: float = 0.25  # share of the way to the policy that the reference goes after each update


def prepare(nets: Nets, state: TrainState, batch: Batch, cfg: Config) -> tuple[Experience, dict[str, Mean]]:
    return Experience(responses=given(batch.sequences, "batch.sequences")), {}


def loss(nets: Nets, trees: Trees, minibatch: Experience, cfg: Config) -> tuple[dict[str, Mean], dict[str, Mean]]:
    rows = given(minibatch.responses, "responses")
    found = nets.read(trees, rows, Ask("policy", "token_stats"), Ask("reference", "token_stats"))
    logprobs, reference = (keep(stats.logprobs, rows.response_mask) for stats in found)
    kl = kl_estimate(logprobs, reference, "k3")
    total = sums(-logprobs + cfg.kl_coef * kl, rows.response_mask)
    return {"policy": total}, {"loss/policy": total, "kl/reference": sums(kl, rows.response_mask)}


def follow(state: TrainState, cfg: Config) -> TrainState:
    """reference = polyak * policy + (1 - polyak) * reference, in float32."""

    def move(new, old):
        new, kept = new.astype(jnp.float32), old.astype(jnp.float32)
        return (cfg.polyak * new + (1 - cfg.polyak) * kept).astype(old.dtype)

    reference = jax.tree.map(move, state.params["policy"], state.slow["reference"])
    return state.replace(slow=state.slow | {"reference": reference})


ALGORITHM = Algorithm(
    config=Config,
    online=False,
    batch=lambda cfg: ("sequences",),
    roles=lambda cfg: ({"policy": "lm"}, {"reference": "lm"}),
    updates=update_once,
    prepare=prepare,
    loss=loss,
    after_update=follow,
)
