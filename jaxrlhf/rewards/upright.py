"""CartPole whose episodes don't end, so that their length says nothing: the pole falls and swings on.

CartPole's own reward is 1 a step until the pole has fallen, and a constant reward would teach as much. Here a step
earns the cosine of the pole's angle, less what the cart is off the middle of its track, and every episode has as many
steps. Importing this registers UprightCartPole-v0.
"""

import math
from typing import Any

import gymnasium  # pyright: ignore[reportMissingImports]
import numpy as np

NAME = "UprightCartPole-v0"
TRACK = 2.4  # from the middle to the end: CartPole's own limit


def reward_of(observations: np.ndarray) -> np.ndarray:
    """f32[...]: what is earned in the states f32[..., 4]: cos(angle) - min((x / 2.4)^2, 1), at most 1."""
    return np.cos(observations[..., 2]) - np.minimum(np.square(observations[..., 0] / TRACK), 1)


class Upright(gymnasium.Wrapper):
    """CartPole without its end: the physics goes on beyond every limit. Observed are CartPole's four numbers, with the
    angle of the pole within half a turn of upright. ``constant``: every step earns 1, as CartPole's own steps do."""

    def __init__(self, env: gymnasium.Env, constant: bool = False):
        super().__init__(env)
        self.constant = constant

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        cart: Any = self.env.unwrapped
        cart.steps_beyond_terminated = None  # else it warns of steps behind the end
        observation, _, _, _, info = self.env.step(action)
        observation[2] = math.remainder(float(observation[2]), math.tau)
        return observation, 1.0 if self.constant else float(reward_of(observation)), False, False, info


def make(**options: Any) -> gymnasium.Env:
    """The environment, of any length, with the options of ``Upright``."""
    from gymnasium.envs.classic_control.cartpole import CartPoleEnv  # pyright: ignore[reportMissingImports]

    return Upright(CartPoleEnv(), **options)


if NAME not in gymnasium.registry:
    gymnasium.register(id=NAME, entry_point=make)
