"""The roles that a config's algorithm needs, and where each starts from."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxrlhf.algorithm import Algorithm
from jaxrlhf.algorithms import ALGORITHMS, find
from jaxrlhf.config.record import Config, RoleConfig
from jaxrlhf.config.strict import suggest
from jaxrlhf.errors import ConfigError, show
from jaxrlhf.types import AskedHead, Head, HeadSpec, Role


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


def with_default_roles(cfg: Config) -> Config:
    """Fills in the roles that the algorithm needs and the config leaves out: the reference starts as the policy, the
    value model as the reward model, or where there is none, or it shares a trunk, as the policy. A policy that learns
    from its own responses always has a reference: an evaluation compares with it."""
    trained, slow = roles_of(cfg)
    trunks = declared_trunks(cfg)
    needed = {*trained, *slow} | ({"reference"} if find_algorithm(cfg.algorithm_name).online else set())
    origins = {"reference": "policy", "value": "reward" if "reward" in needed else "policy"}
    default = {role: RoleConfig(init_from=start) for role, start in origins.items() if role in needed}
    for role, spec in trunks.items():
        default[role] = RoleConfig(init_from=spec.trunk, share_trunk=True, trunk_gradient=spec.gradient)
    models = cfg.models | {role: row for role, row in default.items() if role not in cfg.models}
    for role, model in models.items():
        if model.share_trunk and model.init_from is None and model.architecture is None:
            models[role] = dataclasses.replace(model, init_from="policy")
    return dataclasses.replace(cfg, models=models)


def roles_of(cfg: Config) -> tuple[dict[Role, Head], dict[Role, Head]]:
    """(trained, slow): the roles that the run needs. A reward function takes the place of the reward model; what shares
    a trunk is a bare head."""
    algorithm = find_algorithm(cfg.algorithm_name)
    scored = cfg.rewards.on_host and algorithm.online  # offline there is nothing to score
    shared = {role for role, model in cfg.models.items() if model.share_trunk}

    def needed(heads: Mapping[Role, AskedHead]) -> dict[Role, Head]:
        return {
            role: head_of(head, role in shared) for role, head in heads.items() if not (scored and role == "reward")
        }

    trained, slow = algorithm.roles(cfg.algorithm)
    return needed(trained), needed(slow)


def head_of(asked: AskedHead, shared: bool = False) -> Head:
    """The head of a role's parameters; ``shared``: the config puts it on another role's trunk."""
    spec = asked if isinstance(asked, HeadSpec) else HeadSpec(asked)
    if spec.trunk is None and not shared:
        return "lm" if spec.outputs == "action" else spec.outputs
    return "bare" if spec.outputs == "scalar" else spec.outputs


def declared_trunks(cfg: Config) -> dict[Role, HeadSpec]:
    """The roles that the algorithm itself puts on another role's trunk."""
    trained, slow = find_algorithm(cfg.algorithm_name).roles(cfg.algorithm)
    heads = {**trained, **slow}
    return {role: head for role, head in heads.items() if isinstance(head, HeadSpec) and head.trunk is not None}


def trunks_of(cfg: Config) -> dict[Role, Role]:
    """The roles that are a bare head -> the role on whose trunk it stands."""
    return {role: model.init_from for role, model in cfg.models.items() if model.share_trunk and model.init_from}


def describe_precision(cfg: Config) -> list[str]:
    """What to say where precision.params is not float32: whose weights are stored so, and whose are not."""
    (trained, slow), params = roles_of(cfg), cfg.precision.params
    if params == "float32":
        return []
    return [
        f"precision.params: {params} for {', '.join(slow) or 'no role'}; float32 for {', '.join(trained)}: "
        "small updates to weights would be rounded away"
    ]
