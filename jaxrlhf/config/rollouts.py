"""Can an iteration gather its groups from several rollouts (batch.max_rollouts)?"""

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
