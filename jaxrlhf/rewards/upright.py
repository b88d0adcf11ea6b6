"""CartPole whose episodes don't end, so that their length says nothing: the pole falls and swings on.

CartPole's own reward is 1 a step until the pole has fallen, and a constant reward would teach as much. Here a step
earns the cosine of the pole's angle, and every episode has as many steps. Importing this registers UprightCartPole-v0.
"""

import math
from typing import Any

import gymnasium  # pyright: ignore[reportMissingImports]

NAME = "UprightCartPole-v0"


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
        angle = float(observation[2])
        observation[2] = math.remainder(angle, math.tau)
        return observation, 1.0 if self.constant else math.cos(angle), False, False, info


def make(constant: bool = False) -> gymnasium.Env:
    """The environment, of any length."""
    from gymnasium.envs.classic_control.cartpole import CartPoleEnv  # pyright: ignore[reportMissingImports]

    return Upright(CartPoleEnv(), constant)


if NAME not in gymnasium.registry:
    gymnasium.register(id=NAME, entry_point=make)
