"""What graders that networks answer say of rows: one model, or the members of an ensemble combined."""

from collections.abc import Iterable, Mapping
from typing import Literal

import jax.numpy as jnp

from jaxrlhf.ops.ensembles import combine_scores, disagreement
from jaxrlhf.ops.masked import sums
from jaxrlhf.types import Array, Ask, Mean, Nets, Role, Sequences, Trees


def members_of(nets: Nets, grader: Role = "reward") -> tuple[Role, ...]:
    """The roles that answer for ``grader``: its members, or itself alone."""
    return nets.graders[grader].members if grader in nets.graders else (grader,)


def read_members(
    nets: Nets, trees: Trees, rows: Sequences, grader: Role = "reward", what: Literal["scores", "rewards"] = "scores"
) -> dict[Role, Array]:
    """What each member says of the rows: scores f32[B], or rewards f32[B, S]."""
    members = members_of(nets, grader)
    return dict(zip(members, nets.read(trees, rows, *(Ask(role, what) for role in members))))


def read_scores(nets: Nets, trees: Trees, rows: Sequences, grader: Role = "reward") -> tuple[Array, dict[Role, Array]]:
    """(f32[B]: the score of each row; the scores of each member, where they are several)."""
    each = read_members(nets, trees, rows, grader)
    return combined(nets, each, grader), each if len(each) > 1 else {}


def over_members(losses: Iterable[Mean]) -> Mean:
    """The mean over the rows of all members."""
    first, *others = losses
    return sum(others, first)


def combined(nets: Nets, scores: dict[Role, Array], grader: Role = "reward") -> Array:
    """The members' scores f32[B], or rewards f32[B, S], as the grader combines them. What holds a score low holds a
    cost high: ``min`` is then the highest cost, ``mean_minus_variance`` the mean plus the variance."""
    if grader not in nets.graders:
        return scores[grader]
    spec, sign = nets.graders[grader], -1 if grader == "cost" else 1
    return sign * combine_scores(sign * jnp.stack([*scores.values()]), spec.combine, spec.variance_coef)


def member_metrics(scores: Mapping[Role, Array], mask: Array) -> dict[str, Mean]:
    """score/disagreement, the deviation between members, and the mean score/<member>; nothing of a single model.
    ``mask``: bool[B], the rows that count."""
    if not scores:
        return {}
    apart = sums(disagreement(jnp.stack([*scores.values()])), mask)
    return {"score/disagreement": apart} | {f"score/{role}": sums(each, mask) for role, each in scores.items()}
