"""What algorithms share that learn from a teacher: what they ask of it, and what is told of that."""

from collections.abc import Iterator
from typing import Literal, Protocol

from jaxrlhf.algorithm import TEACHER
from jaxrlhf.ops.masked import sums
from jaxrlhf.types import Array, Ask, Divergence, DivergenceStats, Mean


class TeacherConfig(Protocol):
    """The fields of a config that say how far the policy is from the teacher."""

    @property
    def divergence(self) -> Literal["reverse_kl", "forward_kl", "jsd"]: ...
    @property
    def beta(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def tail(self) -> Literal["bucket", "drop"]: ...
    @property
    def temperature(self) -> float: ...


def ask_teacher(cfg: TeacherConfig) -> Ask:
    """How far the policy is from the teacher at each response token: one chunked pass over the states of both."""
    how = Divergence(cfg.divergence, cfg.beta, cfg.top_k, cfg.tail, cfg.temperature)
    return Ask("policy", "divergence", TEACHER, how)


def divergence_metrics(stats: DivergenceStats, mask: Array, cfg: TeacherConfig) -> dict[str, Mean]:
    """What is told of the response tokens under ``mask`` (bool[B, S]), nats a token."""
    metrics = {
        "teacher/divergence": sums(stats.divergence, mask),
        "teacher/entropy": sums(stats.against_entropy, mask),
        "policy/entropy": sums(stats.entropy, mask),
    }
    return metrics | ({"teacher/top_k_mass": sums(stats.against_mass, mask)} if cfg.top_k else {})


def problems(cfg: TeacherConfig) -> Iterator[str]:
    """A field that would do nothing is refused."""
    if cfg.divergence != "jsd" and cfg.beta != Divergence().beta:
        yield f"beta: {cfg.beta:g}: {cfg.divergence} has no mixture; expected {Divergence().beta}, or divergence jsd"
    if cfg.top_k == 0 and cfg.tail != Divergence().tail:
        yield f"tail: {cfg.tail}: top_k is 0, so there is no tail; expected {Divergence().tail}, or a top_k"
