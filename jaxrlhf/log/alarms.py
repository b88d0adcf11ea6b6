"""Signs that a run goes wrong, each a metric with a threshold: told in the log, marked in the report, or a stop."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeGuard

from jaxrlhf.log.metric_names import HELD_OUT

AlarmName = Literal["judge", "gold", "kl", "entropy", "length", "zero_variance", "explained_variance", "mismatch"]


@dataclasses.dataclass(frozen=True)
class AlarmsConfig:
    """Thresholds past which a run is warned of; null: never."""

    judge: float | None = 0.2  # held out: fall of judge/mean from its best, in standard deviations, as the score rises
    gold: float | None = 0.2  # held out: the same of gold/mean, the second reward
    kl: float | None = 2.0  # nats a response token from the reference
    entropy: float | None = 0.1  # of the policy, as a share of what it was at first
    length: float | None = 2.0  # of responses: so many times as long as at first, or as short
    zero_variance: float | None = 0.9  # share of prompts whose responses all have the same score (grpo)
    explained_variance: float | None = 0.0  # value/explained_variance below it
    mismatch: float | None = 0.1  # kl/sampler_mismatch, nats a token
    patience: int = 5  # iterations, one after the other, that show a sign before it is told; of evaluations one
    stop: tuple[AlarmName, ...] = ()  # those that save and stop the run, with exit code 1


class Alarm(NamedTuple):
    """One sign, at the step at which it was told."""

    name: str
    step: int
    metrics: tuple[str, ...]  # by which it was seen
    message: str


class Sign(NamedTuple):
    """What an alarm looks at. ``judge``: (limit, now, then) -> (whether it is there, what to say of it)."""

    metrics: tuple[str, ...]
    judge: Callable[[float, list[float], list[float]], tuple[bool, str]]
    held_out: bool = False  # of evaluations alone, and compared with the best of them; else with the first row


def fallen(limit: float, now: list[float], then: list[float]) -> tuple[bool, str]:
    """The score rose while the verdict of who is not optimised against fell."""
    fall = (then[0] - now[0]) / max(then[1], 1e-8)
    said = f"fell by {fall:.2f} standard deviations from its best, to {now[0]:.3g}, as the score rose to {now[2]:.3g}"
    return fall > limit and now[2] > then[2], said


def far(limit: float, now: list[float], then: list[float]) -> tuple[bool, str]:
    each = now[0] / max(now[1], 1.0)
    return each > limit, f"is {each:.3g} nats a token"


def collapsed(limit: float, now: list[float], then: list[float]) -> tuple[bool, str]:
    return now[0] < limit * then[0], f"is {now[0]:.3g}, and was {then[0]:.3g} at first"


def drifted(limit: float, now: list[float], then: list[float]) -> tuple[bool, str]:
    apart = max(now[0], then[0]) / max(min(now[0], then[0]), 1e-8)
    return apart > limit, f"is {now[0]:.4g}, and was {then[0]:.4g} at first"


def above(limit: float, now: list[float], then: list[float]) -> tuple[bool, str]:
    return now[0] > limit, f"is {now[0]:.3g}"


def below(limit: float, now: list[float], then: list[float]) -> tuple[bool, str]:
    return now[0] < limit, f"is {now[0]:.3g}"


SIGNS: dict[str, Sign] = {
    "judge": Sign(("judge/mean", "judge/std", "score/mean"), fallen, held_out=True),
    "gold": Sign(("gold/mean", "gold/std", "score/mean"), fallen, held_out=True),
    "kl": Sign(("kl/reference", "response/length_mean"), far),
    "entropy": Sign(("policy/entropy",), collapsed),
    "length": Sign(("response/length_mean",), drifted),
    "zero_variance": Sign(("group/zero_variance",), above),
    "explained_variance": Sign(("value/explained_variance",), below),
    "mismatch": Sign(("kl/sampler_mismatch",), above),
}


def finite(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


class Alarms:
    """Looks at a run's rows in their order. A sign is told when it has been there for ``patience`` rows, or for one
    evaluation, and again only after it was gone. Evaluations tell what iterations do not measure: the KL of dpo."""

    def __init__(self, cfg: AlarmsConfig):
        self.cfg = cfg
        self.then: dict[str, list[float]] = {}  # what a sign's numbers are compared with
        self.rows: dict[str, int] = {}  # how long a sign has been there
        self.stop: Alarm | None = None  # one of cfg.stop that was told

    def see(self, step: int, row: Mapping[str, Any]) -> list[Alarm]:
        """What is to be told at this row, of an iteration or of an evaluation."""
        prefix = HELD_OUT if any(key.startswith(HELD_OUT) for key in row) else ""
        found = []
        for name, sign in SIGNS.items():
            metrics, place = tuple(prefix + metric for metric in sign.metrics), prefix + name
            limit, now = getattr(self.cfg, name), [x for metric in metrics if finite(x := row.get(metric))]
            if limit is None or len(now) < len(metrics) or (name in self.then if prefix else sign.held_out):
                continue
            then = self.then.setdefault(place, now)
            there, said = sign.judge(limit, now, then)
            if sign.held_out and now[0] > then[0]:
                self.then[place] = now
            self.rows[place] = self.rows.get(place, 0) + 1 if there else 0
            if self.rows[place] == (1 if prefix else self.cfg.patience):
                text = f"{metrics[0]} {said} (alarms.{name}: {limit:g})"
                found.append(Alarm(name, step, metrics, text))
        self.stop = next((alarm for alarm in found if alarm.name in self.cfg.stop), self.stop)
        return found

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """What an earlier process wrote, and told: a run that an alarm stopped goes on."""
        for row in rows:
            self.see(row["step"], row)
        self.stop = None
