"""The end of a run whose algorithm asks for it (Algorithm.finish): scores of one role get mean 0 and standard deviation
1 on the responses of models.policy. Its head is affine, so the normalisation is folded into it."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.config.members import members_in
from jaxrlhf.hosts import processes
from jaxrlhf.models.lora import bases_in
from jaxrlhf.run import build, feed
from jaxrlhf.run.build import Run
from jaxrlhf.run.initial_state import read_weights
from jaxrlhf.run.sampler import run_sampler
from jaxrlhf.run.saved_run import SavedRuns
from jaxrlhf.run.transfer import fetch_all, put
from jaxrlhf.run.weights import find_weights
from jaxrlhf.types import Ask, Head, Role, TrainState, Trees


def finish(ready: Run, state: TrainState, say=print) -> TrainState:
    """The state with the head that Algorithm.finish asks for; as it is where it asks for none.

    The responses to data.prompts are sampled from models.policy, which is loaded for this alone."""
    asked = ready.algorithm.finish(ready.cfg.algorithm)
    if asked is None:
        return state
    members = members_in(state.params, asked.role)
    scores, prompts = score_policy_samples(ready, state, members, asked.samples)
    which = f" (for the {prompts} usable prompts of data.prompts)" if prompts < asked.samples else ""
    params = dict(state.params)
    for role, found in scores.items():
        mean, std = float(found.mean()), float(found.std(ddof=1))
        say(
            f"{role} model: scores of {len(found)} samples of the policy{which} had mean {mean:.3f}, std {std:.3f}; "
            "now 0 and 1"
        )
        params[role] = params[role] | {"head": jax.jit(asked.fold)(params[role]["head"], mean, std)}
    return state.replace(params=params)


def score_policy_samples(
    ready: Run, state: TrainState, roles: Sequence[Role], size: int
) -> tuple[dict[Role, np.ndarray], int]:
    """(f32[size]: the scores that each role gives to responses of models.policy to data.prompts; how many prompts).
    Where there are fewer prompts than ``size``, each gets several responses, as equally as can be."""
    rows, ready = ready.cfg.batch.prompts_per_step, dataclasses.replace(ready, saved_runs=SavedRuns())
    batches = feed.training_prompts(ready, size)
    prompts = sum(host.real for host in batches)
    copies = -(-size // prompts)
    if copies > 1:
        batches = feed.training_prompts(ready, size, max(rows // copies, 1))
    policy: dict[Role, Head] = {"policy": "lm"}
    found = find_weights(ready.saved_runs, ready.cfg, "policy", len(ready.tokenizer))
    sampler = run_sampler(ready.saved_runs, ready.cfg, ready.tokenizer, {"policy": found})
    sampler = sampler._replace(samples_per_prompt=copies)
    whole = build.with_roles(ready, policy, sampler)
    nets, params = whole.recipe.nets, {"policy": read_weights(whole, "policy")}
    scorer = Trees(state.params, bases_in(state.slow))

    @processes.jit
    def score(policy, scorer: Trees, prompts, seed, step):
        responses = nets.sample("policy", Trees(policy, {}), prompts, seed, step)
        return dict(zip(roles, nets.read(scorer, responses, *(Ask(role, "scores") for role in roles))))

    scores: dict[Role, list[np.ndarray]] = {role: [] for role in roles}
    for host in batches:
        given = put(ready.mesh, host.batch).prompts
        answers = fetch_all(score(params, scorer, given, state.seed, jnp.int32(0)))
        for role in roles:
            scores[role].append(answers[role].reshape(-1, copies)[: host.real])
    # of every prompt one, before the next of any
    return {role: np.concatenate(found).T.reshape(-1)[:size] for role, found in scores.items()}, prompts
