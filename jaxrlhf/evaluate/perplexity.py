"""Perplexity of held-out demonstrations under the policy, and under its reference."""

import math

import jax

from jaxrlhf.algorithm import read_logprobs
from jaxrlhf.config.batch import rows_taken
from jaxrlhf.data.batch_kinds import DEMONSTRATIONS
from jaxrlhf.hosts import processes
from jaxrlhf.ops.masked import sums
from jaxrlhf.run.build import Run
from jaxrlhf.run.feed import held_out
from jaxrlhf.run.transfer import put
from jaxrlhf.types import Mean, Params, Role, Sequences, TrainState, Trees, given


def perplexities(ready: Run, state: TrainState, others: dict[Role, Params]) -> dict[str, float]:
    """exp of the mean negative log-likelihood of a response token: ``after`` under the policy, ``before`` under its
    reference, where there is one. Nothing where there is no policy, or no data.eval_demonstrations.

    Args:
        others: models that only the evaluation reads."""
    trees = Trees(state.params, others | state.slow)
    roles: dict[str, Role] = {"before": "reference", "after": "policy"}
    roles = {when: role for when, role in roles.items() if role in {*trees.params, *trees.slow}}
    if "after" not in roles or ready.cfg.acts or ready.cfg.data.eval_demonstrations is None:
        return {}
    batches = held_out(ready, DEMONSTRATIONS, ready.cfg.eval.size, rows_taken(ready.cfg, DEMONSTRATIONS))

    @processes.jit
    def logprobs(trees: Trees, sequences: Sequences) -> dict[str, Mean]:
        read = lambda role: read_logprobs(ready.recipe.nets, role, trees, sequences)
        return {when: sums(read(role), sequences.response_mask) for when, role in roles.items()}

    total: dict[str, Mean] = {}
    for host in batches:
        means = jax.device_get(logprobs(trees, given(put(ready.mesh, host.batch).sequences, "sequences")))
        total = {when: total[when] + mean if when in total else mean for when, mean in means.items()}
    return {when: round(math.exp(-float(mean.total) / float(mean.count)), 4) for when, mean in total.items()}
