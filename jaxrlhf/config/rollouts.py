"""Can an iteration gather its groups from several rollouts (batch.max_rollouts), or sample the next one's responses
(rewards.sample_ahead)?"""

from collections.abc import Iterator

from jaxrlhf.config.resolved import Resolved
from jaxrlhf.errors import show


def rollout_problems(resolved: Resolved) -> Iterator[str]:
    """Groups can be told apart, and those of several rollouts put together."""
    cfg, algorithm, name = resolved.cfg, resolved.algorithm, resolved.cfg.algorithm_name
    if (most := cfg.batch.max_rollouts) == 1:
        return
    where = f"batch.max_rollouts: {most}"
    if algorithm.informative is None or algorithm.min_samples(cfg.algorithm) < 2:
        yield f"{where}: {name} does not compare the responses to a prompt with each other; expected 1; nearest: 1"
        return
    if cfg.acts or cfg.converses:
        yield f"{where}: the responses are those of an environment; expected 1; nearest: 1"
    if cfg.mesh.style == "pmap":
        yield f"{where}: groups move between devices, and mesh.style is pmap; expected 1, or mesh.style mesh"
    if len(buckets := cfg.data.prompt_buckets) > 1:
        wrong = "prompts of several rollouts are put together (batch.max_rollouts)"
        yield f"data.prompt_buckets: {show(list(buckets))}: {wrong}; expected one length; nearest: [{max(buckets)}]"
    if cfg.epochs is not None:
        yield f"epochs: {cfg.epochs:g}: an iteration takes up to batch.max_rollouts batches; expected iterations"


def ahead_problems(resolved: Resolved) -> Iterator[str]:
    """There is something to wait for, and what learns knows how old the responses are."""
    cfg, where = resolved.cfg, "rewards.sample_ahead: true"
    if not cfg.rewards.sample_ahead:
        return
    if not cfg.rewards.on_host or not resolved.algorithm.online:
        yield f"{where}: no reward function runs on the host, so nothing is waited for; expected false; nearest: false"
        return
    if cfg.batch.max_rollouts > 1:
        yield f"{where}: the scores decide whether there is another rollout (batch.max_rollouts); nearest: false"
    if cfg.checkpoint.every == 1:
        yield f"{where}: nothing is sampled ahead over a checkpoint, and checkpoint.every is 1; nearest: false"
    known = getattr(cfg.algorithm, "old_logprobs", "sampler")
    if known == "recompute" and cfg.algorithm.sampler_ratio_cap is None:
        nearest = "algorithm.old_logprobs: sampler"
        yield f"{where}: the ratio would not see the update in between; expected {nearest}, or a sampler_ratio_cap"
