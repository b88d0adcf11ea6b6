"""The last touch to a reward model: scores of mean 0 and standard deviation 1 on the responses of the SFT policy.

The head is affine, so the normalisation is folded into it: kernel / std and (bias - mean) / std. A nat of KL then costs
the same against every reward model (Ziegler et al. 2019; Stiennon et al. 2020).
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.hosts import processes
from jaxrlhf.run import build, feed
from jaxrlhf.run.build import Run
from jaxrlhf.types import Head, Params, Role, TrainState


def finish(ready: Run, state: TrainState, say=print) -> TrainState:
    """Normalise the reward head where the algorithm's config asks for it; else the state as it is.

    ``normalize_samples`` responses to data.prompts are sampled from models.policy, which is read for this alone."""
    size = getattr(ready.cfg.algorithm, "normalize_samples", 0)
    if not size:
        return state
    scores, prompts = score_policy_samples(ready, state, size)
    mean, std = float(scores.mean()), float(scores.std(ddof=1))
    which = f" (for the {prompts} usable prompts of data.prompts)" if prompts < size else ""
    say(
        f"reward model: scores of {len(scores)} samples of the policy{which} had mean {mean:.3f}, std {std:.3f}; "
        "now 0 and 1"
    )
    head = jax.jit(fold)(state.params["reward"]["head"], mean, std)
    return state.replace(params=state.params | {"reward": state.params["reward"] | {"head": head}})


def fold(head: Params, mean: float, std: float) -> Params:
    """The head whose scores are (old scores - mean) / std."""
    scale = 1.0 / jnp.maximum(std, 1e-6)
    return {"kernel": head["kernel"] * scale, "bias": (head["bias"] - mean) * scale}


def score_policy_samples(ready: Run, state: TrainState, size: int) -> tuple[np.ndarray, int]:
    """(f32[size]: what the reward model thinks of responses that models.policy samples for data.prompts, the number of
    prompts). Where there are fewer prompts than ``size``, each gets several responses, as equally as can be."""
    rows = ready.cfg.batch.prompts_per_step
    batches = feed.training_prompts(ready, size)
    prompts = sum(host.real for host in batches)
    copies = -(-size // prompts)
    if copies > 1:
        batches = feed.training_prompts(ready, size, max(rows // copies, 1))
    policy: dict[Role, Head] = {"policy": "lm"}
    found = build.find_weights(ready.cfg, "policy", len(ready.tokenizer))
    sampler = build.make_sampler(ready.cfg, ready.tokenizer, {"policy": found})._replace(samples_per_prompt=copies)
    whole = build.with_roles(ready, policy, sampler)
    nets, params = whole.recipe.nets, {"policy": build.read_weights(whole, "policy")}

    @processes.jit
    def score(policy, reward, prompts, seed, step):
        return nets.scores("reward", reward, nets.sample("policy", policy, prompts, seed, step))

    scores = []
    for host in batches:
        given = feed.put(ready.mesh, host.batch).prompts
        answers = score(params, {"reward": state.params["reward"]}, given, state.seed, jnp.int32(0))
        scores.append(feed.fetch_all(answers).reshape(-1, copies)[: host.real])
    return np.concatenate(scores).T.reshape(-1)[:size], prompts  # of every prompt one, before the next of any
