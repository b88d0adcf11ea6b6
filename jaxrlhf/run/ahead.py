"""The responses of the next iteration, sampled while the host scores those of this one (rewards.sample_ahead).

They are of the policy before this iteration's update: one update old when they teach. Nothing is sampled ahead over a
checkpoint, so that a run which goes on from one is the run without a break.
"""

from collections.abc import Callable

from jax.sharding import Mesh

from jaxrlhf.config.record import Config
from jaxrlhf.run.feed import Feed
from jaxrlhf.run.transfer import put
from jaxrlhf.types import Batch, Sequences, TrainState, given

STALENESS = "rollout/staleness"
Rollout = Callable[[TrainState, Batch], Sequences]


class Ahead:
    """Samples for the iterations of one run, in their order."""

    def __init__(self, cfg: Config, mesh: Mesh, feed: Feed):
        self.cfg, self.mesh, self.feed = cfg, mesh, feed
        self.done = 0  # iterations that have begun
        self.rollouts: dict[int, Rollout] = {}  # by the columns of the prompts
        self.held: Sequences | None = None  # of the next iteration

    def serve(self, batch: Batch, rollout: Rollout) -> None:
        """Sample with ``rollout`` where the prompts are as wide as those of ``batch``."""
        self.rollouts[columns(batch)] = rollout

    def take(self, state: TrainState, batch: Batch) -> tuple[Sequences, dict[str, float]]:
        """(the responses of the iteration that begins, rollout/staleness: updates since they were sampled)."""
        held, self.held = self.held, None
        self.done += 1
        if held is not None:
            return held, {STALENESS: 1.0}
        return self.rollouts[columns(batch)](state, batch), {STALENESS: 0.0}

    def sample(self, state: TrainState) -> None:
        """Dispatch the rollout of the next iteration, with noise of its own, where nothing is saved before it."""
        if self.done < self.cfg.length and self.done % self.cfg.checkpoint.every:
            batch = put(self.mesh, self.feed.peek())
            self.held = self.rollouts[columns(batch)](state.replace(step=state.step + 1), batch)


def columns(batch: Batch) -> int:
    return given(batch.prompts, "batch.prompts").tokens.shape[1]
