"""The rollout of a policy that acts in an environment: steps on the host, a compiled program between two of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrlhf.hosts import processes
from jaxrlhf.rewards.environments import Episodes
from jaxrlhf.run.build import Run
from jaxrlhf.run.programs import Program
from jaxrlhf.run.transfer import fetch, put
from jaxrlhf.types import Acting, Prompts, Sequences, TrainState


class Player:
    """Plays the episodes of one iteration after the other, in the same environments.

    Nothing of an episode depends on those before: a resumed run plays what the first would have."""

    def __init__(self, ready: Run):
        self.ready = ready
        self.episodes: Episodes | None = None  # made for the first iteration, whose rows say how many

    def play(
        self, act: Program, state: TrainState, prompts: Prompts, records: Sequence[Mapping[str, Any]]
    ) -> Sequences:
        """Whole episodes, one a row, laid out as rows: the start, the actions, and behind those of an episode that was
        cut one more valid column, as in Trajectories. ``prompts``: of this iteration, on the mesh; ``records``: those
        of this process's prompts, which its episodes are reset by."""
        copies, room, mesh = self.ready.sampler.samples_per_prompt, self.ready.sampler.max_new_tokens, self.ready.mesh
        records = [record for record in records for _ in range(copies)]
        if self.episodes is None:
            self.episodes = Episodes(self.ready.cfg.environment, len(records))
        episodes, rows = self.episodes, len(records)
        (first,) = fetch((prompts.sample_id,))
        ids: Any = put(mesh, np.repeat(first, copies) * copies + np.arange(rows, dtype=np.int32) % copies)
        tokens = np.full((rows, 2 + room), self.ready.sampler.pad_id, np.int32)
        mask, (logprobs, rewards) = np.zeros(tokens.shape, bool), np.zeros((2, *tokens.shape), np.float32)
        episodes.reset(records)
        observations = np.zeros((*tokens.shape, episodes.observations.shape[1]), np.float32)
        observations[:, 0] = episodes.observations
        for at in range(room):
            mask[:, 1 + at] = live = episodes.live.copy()
            if not live.any() and not processes.several():  # several choose together, to the end
                break
            waiting: Any = (episodes.observations, np.full(rows, at, np.int32))
            shown, position = put(mesh, waiting)
            taken, found = fetch(act.run(state, Acting(shown, ids, position)))
            rewards[:, 1 + at] = episodes.step(taken)
            tokens[live, 1 + at], logprobs[live, 1 + at] = taken[live], found[live]
            observations[live, 1 + at] = episodes.observations[live]
        valid = mask | (np.roll(mask, 1, axis=1) & ~episodes.ended[:, None])
        valid[:, 0] = True
        rows_of: dict[str, Any] = {"tokens": tokens, "valid": valid, "response_mask": mask, "logprobs": logprobs}
        rows_of |= {"observations": observations, "rewards": rewards, "ended": episodes.ended.copy()}
        rows_of["scores"] = rewards.sum(1) if self.ready.cfg.environment_scores else None
        return put(mesh, Sequences(**rows_of))
