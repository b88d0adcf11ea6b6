"""What a model of any family has to do first: lose ln 2 to itself by DPO, and score higher by GRPO."""

from collections.abc import Callable

import numpy as np

from jaxrlhf.algorithms.dpo import DPOConfig
from jaxrlhf.algorithms.grpo import GRPOConfig
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.optim import OptimizerConfig
from jaxrlhf.step import make_iteration, make_measure
from jaxrlhf.types import Batch, Metrics, Params
from tests.support import tiny


def without_margin(model: ModelConfig) -> tiny.Tiny:
    """A run of DPO of the model, on pairs without margins."""
    batch = Batch(preferences=tiny.preferences().replace(margin=None))
    return tiny.build("dpo", DPOConfig(), model=model, batch=batch)


def dpo_loss(model: ModelConfig, reference: Params) -> Callable[[Params], float]:
    """The loss of DPO of a policy, nats: a forward pass of it and of the reference, and no update."""
    made = without_margin(model)
    measure = tiny.program(make_measure(made.recipe))

    def loss(policy: Params) -> float:
        state = made.state.replace(params={"policy": policy}, slow={"reference": reference})
        return float(measure(state, made.batch)["loss/policy"].value())

    return loss


def first_dpo_metrics(model: ModelConfig) -> Metrics:
    """Of the first iteration, whose policy is its reference; the pairs have no margin."""
    made = without_margin(model)
    return tiny.program(make_iteration(made.recipe))(made.state, made.batch)[1]


def gain_by_grpo(model: ModelConfig, lora: LoraConfig | None = None) -> float:
    """How much higher a reward model of random weights scores in the last three of 24 iterations than in the first.
    ``lora``: of its adapter, if it learns one. In each, log-probs of what was sampled are those of the trainer."""
    cfg, optimizer = GRPOConfig(kl_coef=0.0, old_logprobs="recompute"), OptimizerConfig(learning_rate=3e-2)
    made = tiny.build("grpo", cfg, model=model, optimizer=optimizer, samples_per_prompt=4, lora=lora)
    step, state, scores = tiny.program(make_iteration(made.recipe)), made.state, []
    for _ in range(24):
        state, metrics, _ = step(state, made.batch)
        scores.append(float(metrics["score/mean"]))
        assert 0 < float(metrics["kl/sampler_mismatch"]) < 1e-4
    return float(np.mean(scores[-3:]) - np.mean(scores[:3]))
