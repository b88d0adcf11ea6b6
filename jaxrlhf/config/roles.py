"""The roles that a config's algorithm needs, and where each starts from."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxrlhf.algorithm import Algorithm
from jaxrlhf.algorithms import ALGORITHMS, find
from jaxrlhf.config.members import GRADERS, members_in
from jaxrlhf.config.record import Config, RoleConfig
from jaxrlhf.config.strict import suggest
from jaxrlhf.errors import ConfigError, show
from jaxrlhf.types import AskedHead, Grader, Head, HeadSpec, Role


def find_algorithm(name: Any) -> Algorithm:
    """The record of this name: a row of the table, or "package.module:NAME". Raises ConfigError."""
    names = sorted(ALGORITHMS)
    if not isinstance(name, str):
        raise ConfigError(f"{show(name)}: expected a name; choices: {', '.join(names)}, package.module:NAME")
    try:
        return find(name)
    except KeyError:
        raise ConfigError(f"{name}: unknown algorithm; {suggest(name, names)}") from None
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


class Roles(NamedTuple):
    """The roles of a run under the heads of their parameters."""

    trained: dict[Role, Head]
    slow: dict[Role, Head]  # the others
    declared: dict[Role, HeadSpec]  # those that the algorithm itself puts on another role's trunk

    @property
    def heads(self) -> dict[Role, Head]:
        """All of them, trained roles first."""
        return {**self.trained, **self.slow}

    @property
    def guides(self) -> tuple[Role, ...]:
        """The trained heads of action values on the policy's trunk, which may guide what is sampled from it."""
        on_policy = lambda role: role in self.declared and self.declared[role].trunk == "policy"
        return tuple(role for role, head in self.trained.items() if head == "action" and on_policy(role))


def roles_of(cfg: Config, algorithm: Algorithm) -> Roles:
    """The roles that the run needs. Functions, or an environment, take the place of the reward model, and a function
    called cost that of the cost model; an ensemble's members take that of their grader; what shares a trunk is a bare
    head."""
    on_host = {"reward", *({"cost"} & cfg.rewards.functions.keys())} if cfg.rewards.on_host else set()
    on_host |= {"reward"} if cfg.environment_scores else set()
    scored = on_host if algorithm.online else set()  # offline there is nothing to score
    shared = {role for role, model in cfg.models.items() if model.share_trunk}

    def needed(heads: Mapping[Role, AskedHead]) -> dict[Role, Head]:
        return {
            member: head_of(head, member in shared)
            for role, head in heads.items()
            if role not in scored
            for member in members_in(cfg.models, role)
        }

    trained, slow = algorithm.roles(cfg.algorithm)
    asked = {**trained, **slow}
    declared = {role: head for role, head in asked.items() if isinstance(head, HeadSpec) and head.trunk is not None}
    return Roles(needed(trained), needed(slow), declared)


def with_default_roles(cfg: Config, algorithm: Algorithm) -> Config:
    """Fills in the roles that the algorithm needs and the config leaves out: the reference starts as the policy, the
    value model as the reward model, that of the cost as the cost model, or where there is none, or it shares a trunk,
    as the policy. A policy that learns from its own responses always has a reference: an evaluation compares with
    it."""
    roles = roles_of(cfg, algorithm)
    needed = {*roles.heads} | ({"reference"} if algorithm.online else set())
    origins = {"reference": "policy"}
    for critic, grader in (("value", "reward"), ("cost_value", "cost")):
        first = members_in(cfg.models, grader)[0]
        origins[critic] = first if first in needed else "policy"
    default = {role: RoleConfig(init_from=start) for role, start in origins.items() if role in needed}
    for role, spec in roles.declared.items():
        default[role] = RoleConfig(init_from=spec.trunk, share_trunk=True, trunk_gradient=spec.gradient)
    models = cfg.models | {role: row for role, row in default.items() if role not in cfg.models}
    for role, model in models.items():
        if model.share_trunk and model.init_from is None and model.architecture is None:
            models[role] = dataclasses.replace(model, init_from="policy")
    return dataclasses.replace(cfg, models=models)


def head_of(asked: AskedHead, shared: bool = False) -> Head:
    """The head of a role's parameters; ``shared``: the config puts it on another role's trunk."""
    spec = asked if isinstance(asked, HeadSpec) else HeadSpec(asked)
    if spec.trunk is None and not shared:
        return "lm" if spec.outputs == "action" else spec.outputs
    return "bare" if spec.outputs == "scalar" else spec.outputs


def graders_of(cfg: Config) -> dict[Role, Grader]:
    """The graders that are ensembles."""
    rewards = cfg.rewards
    members = {grader: members_in(cfg.models, grader) for grader in GRADERS}
    return {
        grader: Grader(roles, rewards.combine, rewards.variance_coef)
        for grader, roles in members.items()
        if roles != (grader,)
    }


def trunks_of(cfg: Config) -> dict[Role, Role]:
    """The roles that are a bare head -> the role on whose trunk it stands."""
    return {role: model.init_from for role, model in cfg.models.items() if model.share_trunk and model.init_from}
