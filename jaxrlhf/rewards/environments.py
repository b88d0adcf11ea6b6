"""Gymnasium environments: found, checked, and stepped through whole episodes.

An action is a token. Gymnasium is the extra ``control``; nothing here imports it before an environment is asked for.
"""

import dataclasses
import functools
import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf import user_code
from jaxrlhf.errors import nearest, one_line

MOST_ACTIONS = 62  # letters and digits


@dataclasses.dataclass(frozen=True)
class EnvironmentConfig:
    """What answers the policy: function, an environment of text, a response with an observation and a reward, turn by
    turn; or id, a Gymnasium environment, in which the policy acts in place of writing: an action is a token, an episode
    a response of at most generate.max_new_tokens. The rewards of either count where there is no models.reward."""

    id: str | None = None  # as gymnasium.make takes it: CartPole-v1, or my_module:MyTask-v0; needs the extra control
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)  # keywords for gymnasium.make, or for function
    starts: int = 4096  # id: episodes are reset with the seeds 0, 1, ... below it, where data.prompts gives none
    function: str | None = None  # "package.module:NAME" of a class with reset and step, which answers text
    max_turns: int = 4  # function: responses of an episode at most
    turn_tokens: int | None = None  # function: of one response at most; null: generate.max_new_tokens, those of a row
    context_widths: int = 2  # function: widths, each compiled, in which a later turn reads what came before it


class Spaces(NamedTuple):
    """What goes in and out of an environment."""

    observation: int  # numbers of an observation
    actions: int


def import_gymnasium() -> Any:
    """The module. Raises ValueError, in one line, where it is not installed."""
    try:
        return importlib.import_module("gymnasium")
    except ModuleNotFoundError:
        raise ValueError(
            "gymnasium is not installed; expected the extra control: pip install 'jaxrlhf[control]'"
        ) from None


def make(cfg: EnvironmentConfig) -> Any:
    """One Gymnasium environment. Raises ValueError, "key: value: ...", where there is none of that name."""
    shown = f"id: {cfg.id}"
    try:
        gymnasium = import_gymnasium()
        module, colon, name = (cfg.id or "").rpartition(":")
        if colon:
            user_code.load(module)  # which registers it
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from None
    if name not in gymnasium.registry:
        raise ValueError(
            f"{shown}: no such environment; {nearest(name, [*gymnasium.registry], 'see gymnasium.registry')}"
        )
    try:
        return gymnasium.make(name, disable_env_checker=True, **cfg.arguments)
    except Exception as error:  # whatever its constructor raises
        raise ValueError(f"{shown}: {type(error).__name__}: {one_line(error)}") from error


def spaces_of(cfg: EnvironmentConfig) -> Spaces:
    """The sizes of its spaces. Raises ValueError, as ``make``, and for spaces that tokens and models do not fit."""
    return find_spaces(cfg.id or "", json.dumps(cfg.arguments, sort_keys=True))


@functools.lru_cache(16)
def find_spaces(id: str, arguments: str) -> Spaces:
    """``spaces_of``: an environment is made once for all that ask."""
    environment = make(EnvironmentConfig(id, json.loads(arguments)))
    observed, acted = environment.observation_space, environment.action_space
    environment.close()
    if type(observed).__name__ != "Box" or len(observed.shape) != 1:
        raise ValueError(f"id: {id}: observations of {observed}: expected a Box of one dimension")
    if type(acted).__name__ != "Discrete" or acted.start != 0 or not 2 <= acted.n <= MOST_ACTIONS:
        raise ValueError(f"id: {id}: actions of {acted}: expected Discrete(n) from 0, with n of 2 to {MOST_ACTIONS}")
    return Spaces(int(observed.shape[0]), int(acted.n))


class Episodes:
    """As many environments as rows, stepped together. A row whose episode has ended waits for the others."""

    def __init__(self, cfg: EnvironmentConfig, rows: int):
        self.environments = [make(cfg) for _ in range(rows)]
        self.observations = np.zeros((rows, spaces_of(cfg).observation), np.float32)
        self.live = np.zeros(rows, bool)  # rows that wait for an action
        self.ended = np.zeros(rows, bool)  # rows whose episode the environment ended; not those that it cut

    def reset(self, records: Sequence[Mapping[str, Any]]) -> None:
        """A new episode in every row. ``records``: ``seed`` and ``options`` of each are those of Gymnasium's reset."""
        for row, (environment, record) in enumerate(zip(self.environments, records, strict=True)):
            self.observations[row], _ = environment.reset(seed=record.get("seed"), options=record.get("options"))
        self.live[:], self.ended[:] = True, False

    def step(self, actions: np.ndarray) -> np.ndarray:
        """f32[rows]: what each action earned; 0 in rows that wait. ``actions``: i32[rows]."""
        rewards = np.zeros(len(actions), np.float32)
        for row in np.flatnonzero(self.live):
            shown, reward, ended, cut, _ = self.environments[row].step(int(actions[row]))
            self.observations[row], rewards[row], self.ended[row] = shown, reward, ended
            self.live[row] = not (ended or cut)
        return rewards
