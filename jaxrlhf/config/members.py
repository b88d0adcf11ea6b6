"""Ensembles: a list under models.reward becomes the numbered roles reward_0, reward_1, ..., here and nowhere else."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxrlhf.errors import ConfigError, show
from jaxrlhf.types import Role

GRADERS = ("reward", "cost")  # roles that may be several models
NUMBERED = re.compile(rf"({'|'.join(GRADERS)})_(0|[1-9][0-9]*)")


def grader_of(role: Role) -> Role:
    """The grader that a numbered role is a member of: "reward" of "reward_3"; any other role itself."""
    found = NUMBERED.fullmatch(role)
    return found[1] if found else role


def members_in(roles: Iterable[Role], grader: Role) -> tuple[Role, ...]:
    """The numbered roles of ``grader`` among ``roles``, in their order; the grader itself where there are none."""
    numbers = sorted(int(found[2]) for role in roles if (found := NUMBERED.fullmatch(role)) and found[1] == grader)
    return tuple(f"{grader}_{number}" for number in numbers) or (grader,)


def with_members(tree: Mapping[str, Any], source: str) -> dict[str, Any]:
    """``tree`` (what YAML says) with the items of a list under models.<grader> as numbered roles.

    Raises ConfigError for an empty list, and where a numbered role stands beside the list."""
    models = tree.get("models")
    if not isinstance(models, dict):
        return dict(tree)
    found: dict[str, Any] = {}
    for role, row in models.items():
        if role not in GRADERS or not isinstance(row, list):
            found[role] = row
            continue
        beside = [other for other in models if other != role and grader_of(str(other)) == role]
        if not row or beside:
            what = f"models.{beside[0]} is given too; expected one of them" if row else "expected a model, or several"
            raise ConfigError(f"{source}: models.{role}: {show(row)}: {what}")
        found |= {f"{role}_{number}": member for number, member in enumerate(row)}
    return {**tree, "models": found}


def numbering_problems(roles: Iterable[Role]) -> Iterator[str]:
    """Members are numbered from 0 without a gap, and do not stand beside a single model."""
    roles = list(roles)
    for grader in GRADERS:
        members = members_in(roles, grader)
        if members == (grader,):
            continue
        if grader in roles:
            yield f"models.{grader}: models.{members[0]} is given too; expected one of them"
        missing = next((f"{grader}_{at}" for at, role in enumerate(members) if role != f"{grader}_{at}"), None)
        if missing:
            yield f"models.{members[-1]}: no models.{missing}; expected a list under models.{grader}"
