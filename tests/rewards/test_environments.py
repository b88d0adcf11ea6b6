"""Environments of Gymnasium: found or refused in one line, stepped row by row; the pole that never stops."""

import importlib
import math
import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest

from jaxrlhf.rewards import environments
from jaxrlhf.rewards.environments import EnvironmentConfig, Episodes, Spaces, spaces_of

UPRIGHT = "jaxrlhf.rewards.upright:UprightCartPole-v0"


class Count(gymnasium.Env):
    """Shows how many steps there were and the last action; it ends after as many as the option says, and earns them."""

    observation_space = gymnasium.spaces.Box(-9, 9, (2,))
    action_space = gymnasium.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None) -> tuple[Any, dict[str, Any]]:
        self.steps, self.most = 0, (options or {}).get("steps", 9)
        self.cut = seed == 1
        return np.array([0, -1], np.float32), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        over = self.steps == self.most
        return (
            np.array([self.steps, action], np.float32),
            float(self.steps),
            over and not self.cut,
            over and self.cut,
            {},
        )


gymnasium.register("CountOfTests-v0", entry_point=lambda **_: Count())


def test_spaces():
    assert spaces_of(EnvironmentConfig(UPRIGHT)) == spaces_of(EnvironmentConfig("CartPole-v1")) == Spaces(4, 2)
    assert spaces_of(EnvironmentConfig("CountOfTests-v0")) == Spaces(2, 3)


@pytest.mark.parametrize(
    "config, said",
    [
        (EnvironmentConfig("CartPole-v11"), "id: CartPole-v11: no such environment; nearest: CartPole-v1"),
        (EnvironmentConfig("Pendulum-v1"), "id: Pendulum-v1: actions of Box.*expected Discrete"),
        (EnvironmentConfig("FrozenLake-v1"), "id: FrozenLake-v1: observations of Discrete.*expected a Box"),
        (EnvironmentConfig("no_such_module:X-v0"), "id: no_such_module:X-v0: no module no_such_module"),
        (EnvironmentConfig("CartPole-v1", {"gravitas": 1}), "id: CartPole-v1: TypeError: .*gravitas"),
    ],
)
def test_what_is_no_environment_for_tokens_is_refused_in_one_line(config, said):
    with pytest.raises(ValueError, match=said) as found:
        spaces_of(config)
    assert "\n" not in str(found.value)


def test_without_gymnasium_the_extra_is_named(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    environments.find_spaces.cache_clear()
    with pytest.raises(ValueError, match=r"id: CartPole-v1: gymnasium is not installed.*jaxrlhf\[control\]"):
        spaces_of(EnvironmentConfig("CartPole-v1"))


def test_rows_whose_episode_is_over_wait():
    episodes = Episodes(EnvironmentConfig("CountOfTests-v0"), 3)
    episodes.reset([{"seed": seed, "options": {"steps": steps}} for seed, steps in ((0, 1), (1, 2), (2, 3))])
    earned, live = [], []
    for at in range(4):
        live.append(episodes.live.tolist())
        earned.append(episodes.step(np.array([at, at, 2], np.int32) % 3).tolist())
    assert live == [[True] * 3, [False, True, True], [False, False, True], [False] * 3]
    assert earned == [[1, 1, 1], [0, 2, 2], [0, 0, 3], [0, 0, 0]]
    assert episodes.ended.tolist() == [True, False, True]  # the second was cut
    assert episodes.observations.tolist() == [[1, 0], [2, 1], [3, 2]]
    episodes.reset([{}] * 3)
    assert episodes.live.all() and not episodes.ended.any() and episodes.observations[:, 0].tolist() == [0, 0, 0]


def test_the_upright_pole_falls_and_swings_on():
    environment = environments.make(EnvironmentConfig(UPRIGHT))
    first, _ = environment.reset(seed=3)
    assert np.array_equal(first, environment.reset(seed=3)[0]) and not np.array_equal(
        first, environment.reset(seed=4)[0]
    )
    angles = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(200):
            observation, reward, ended, cut, _ = environment.step(1)
            assert not ended and not cut
            off = min((observation[0] / 2.4) ** 2, 1)
            assert reward == pytest.approx(math.cos(observation[2]) - off, abs=1e-5)
            angles.append(abs(observation[2]))
    assert max(angles) > 3 and max(angles) <= math.pi + 1e-6  # it hung below the cart, within half a turn
