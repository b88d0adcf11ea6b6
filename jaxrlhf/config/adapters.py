"""Which roles are adapters on a base, which roles share it, and what of that makes no sense."""

import dataclasses
from collections.abc import Iterator

from jaxrlhf.algorithm import TARGET, TEACHER
from jaxrlhf.config.record import Config
from jaxrlhf.config.roles import Roles
from jaxrlhf.config.strict import suggest
from jaxrlhf.errors import ConfigError, show
from jaxrlhf.models.lora import ALL, BASE, TARGETS, Based, LoraConfig
from jaxrlhf.models.quantized import Quantization
from jaxrlhf.types import Role

SHAPE = ("rank", "alpha", "targets", "rslora", "dora")  # what the adapters of one folder have in common


def chain(cfg: Config, role: Role) -> list[Role]:
    """``role``, the role that it starts from, and so on; the last names weights. Raises ConfigError for a circle."""
    seen = [role]
    while (start := cfg.models[seen[-1]].init_from) is not None and start in cfg.models:
        seen.append(start)
        if start in seen[:-1]:
            raise ConfigError(f"models.{start}.init_from: {' -> '.join(seen)} goes round in a circle")
    return seen


def starting_adapter(cfg: Config, role: Role) -> LoraConfig | None:
    """The adapter that ``role`` starts with: the first on the way to its weights that is read from a folder."""
    every = (cfg.models[name].adapter for name in chain(cfg, role))
    return next((adapter for adapter in every if adapter is not None and adapter.init_from is not None), None)


def adapter_of(cfg: Config, roles: Roles, role: Role) -> LoraConfig | None:
    """The adapter that ``role`` has, with the folder it starts from. One that does not learn has that of the role that
    it starts from, where that is read from a folder; else it starts as the base."""
    own, start = cfg.models[role].adapter, starting_adapter(cfg, role)
    if own is None:
        return None if role in roles.trained else start
    return dataclasses.replace(own, init_from=start.init_from if start else None)


def bases_of(cfg: Config, roles: Roles) -> dict[Role, Based]:
    """The roles that are computed from a base: those with an adapter, and what does not learn and starts from the same
    weights as one of them does, through init_from: ROLE; and a teacher, since a base is saved once, not with every
    checkpoint."""
    groups: dict[Role, list[Role]] = {}
    for role, head in roles.heads.items():
        if head in ("lm", "scalar") and role in cfg.models:
            groups.setdefault(chain(cfg, role)[-1], []).append(role)
    found = {}
    for base, members in groups.items():
        adapters = {role: adapter_of(cfg, roles, role) for role in members}
        if any(adapters.values()) or TEACHER in members:
            based = [role for role in members if adapters[role] or role not in roles.trained]
            asked: list[Quantization | None] = [cfg.models[role].base_quantization for role in based]
            kind: Quantization | None = next((one for one in asked if one is not None), None)
            found |= {role: Based(f"{BASE}{base}", adapters[role], kind) for role in based}
    return found


def quantization_problems(cfg: Config, roles: Roles) -> Iterator[str]:
    """What is quantised is frozen under an adapter, all that share it say the same, and decoding beside it has one."""
    bases = bases_of(cfg, roles)
    for role, model in cfg.models.items():
        kind, where = model.base_quantization, f"models.{role}.base_quantization"
        if kind is None:
            continue
        if model.adapter is None:
            yield f"{where}: {kind}: {role} has no adapter, under which weights are frozen; expected null, or adapter"
        elif role in bases and bases[role].quantization != kind:
            other = bases[role].quantization
            first = next(one for one in bases if cfg.models[one].base_quantization == other)
            yield f"{where}: {kind}: {first} has {other} for the same weights; nearest: {other}"
    if cfg.generate.merge_adapter:
        return
    if "policy" not in bases or bases["policy"].quantization is None:
        wrong = "models.policy.base_quantization is null, so it would save nothing"
        yield f"generate.merge_adapter: false: {wrong}; expected true, or int8 or nf4 there"
    elif "weights" in cfg.generate.int8:
        wrong = "generate.int8 has weights, which are merged ones"
        yield f"generate.merge_adapter: false: {wrong}; expected true, or generate.int8 without weights"


def adapter_problems(cfg: Config, roles: Roles) -> Iterator[str]:
    """Adapters are on weights that were trained, on roles that learn or from a folder, and of one shape where one
    starts as another."""
    for role, model in cfg.models.items():
        if model.adapter is None:
            continue
        where, adapter = f"models.{role}.adapter", model.adapter
        for name in adapter.targets:
            if name not in (ALL, *TARGETS):
                yield f"{where}.targets: {name}: no linear map of a layer; {suggest(name, [ALL, *TARGETS])}"
        if not adapter.targets:
            yield f"{where}.targets: []: nothing would learn; expected {ALL}, or some of {', '.join(TARGETS)}"
        end = chain(cfg, role)[-1]
        if cfg.models[end].architecture is not None:
            wrong = f"models.{end}.architecture is random weights, which would stay so"
            yield f"{where}: {wrong}; expected models.{end}.init_from: a trained model"
        if model.share_trunk:
            yield f"{where}: share_trunk puts the {role} on a trunk that has an adapter or not; expected null"
        elif role not in roles.trained and adapter.init_from is None:
            yield f"{where}: {cfg.algorithm_name} does not train {role}; expected null, or adapter.init_from"
        elif f"{TARGET}{role}" in roles.heads:
            yield f"{where}: {TARGET}{role} follows whole weights of {role}; expected null"
        start = starting_adapter(cfg, role)
        for name in SHAPE if start is not None and adapter.init_from is None else ():
            if (ours := getattr(adapter, name)) != (theirs := getattr(start, name)):
                yield (
                    f"{where}.{name}: {show(ours)}: {role} starts with an adapter whose {name} is {show(theirs)}; "
                    f"nearest: {show(theirs)}"
                )
