"""Behaviour cloning (Pomerleau 1989): maximum likelihood of the tokens of trajectories, whatever they earned.

Filtered behaviour cloning, the baseline of Snell et al. 2022 (arXiv:2206.11871), is the same on the trajectories with
the highest returns: data.keep_top: 0.1.
"""

import dataclasses

from jaxrlhf.algorithm import Algorithm
from jaxrlhf.algorithms import sft
from jaxrlhf.algorithms.trajectories import plan_updates, take_trajectories


@dataclasses.dataclass(frozen=True)
class BCConfig:
    """Behaviour cloning: maximum likelihood of trajectories; with data.keep_top of those with the highest returns."""

    num_epochs: int = 1  # passes over the trajectories of an iteration
    num_minibatches: int = 1  # optimizer steps of a pass; the trajectories are shuffled and split among them


ALGORITHM = Algorithm(
    config=BCConfig,
    online=False,
    batch=lambda cfg: ("trajectories",),
    roles=lambda cfg: ({"policy": "lm"}, {}),
    updates=plan_updates,
    prepare=take_trajectories,
    loss=sft.loss,
)
