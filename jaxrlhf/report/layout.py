"""Which chart shows which metric, and in which part of the page."""

import re
from collections.abc import Iterable

from jaxrlhf.log.metric_names import HELD_OUT

OWN = "(?!grad_norm|learning_rate|spikes)"  # those of a role's optimizer have a part of their own
# part of the page -> patterns of the metrics in it, in their order; a metric is in the first part that has it
PARTS = {
    "Score": (
        "score/mean",
        "score/kept",
        "score/(?!length)[^/]+",
        "reward/mean",
        "return/mean",
        "judge/.*",
        "gold/.*",
        "win_rate/.*",
    ),
    "Cost": (f"cost/{OWN}.*", f"cost_value/{OWN}.*"),
    "Reward model": ("reward/accuracy", "loss/reward", f"reward/{OWN}.*"),
    "Preferences": ("implicit_reward/accuracy", "implicit_reward/.*", "logprobs/.*", "kl/baseline"),
    "Policy": (
        "kl/reference",
        "teacher/divergence.*",
        "kl/teacher",
        "loss/policy",
        "policy/entropy",
        f"teacher/{OWN}.*",
        "response/length_mean",
        "policy/clip_fraction",
        "response/ended",
        "group/.*",
        "rollout/.*",
        "kl/.*",
        f"policy/{OWN}.*",
        "response/.*",
        "score/.*",
    ),
    "Environment": ("environment/.*", "turns/.*"),
    "Value and Q": (
        "value/explained_variance",
        "loss/value",
        f"value/{OWN}.*",
        f"q/{OWN}.*",
        "loss/q.*",
    ),
    "Optimizer": ("loss/.*", ".*/grad_norm", ".*/learning_rate", "update/.*", ".*/spikes"),
    "Time and memory": ("time/.*", "throughput/.*", "memory/.*"),
    "Data": ("data/.*",),
    "Other": (".*",),
}
CLOSED = ("Optimizer", "Data", "Other")  # parts that a reader opens
FULL_RANGE = ("share", "probability")  # units whose axis begins at 0


def arrange(names: Iterable[str]) -> dict[str, list[str]]:
    """Part of the page -> its metrics, without the prefix eval/. ``names``: what the runs have written."""
    left = sorted({name.removeprefix(HELD_OUT) for name in names})
    found: dict[str, list[str]] = {}
    for part, patterns in PARTS.items():
        for pattern in patterns:
            there = [name for name in left if re.fullmatch(pattern, name)]
            left = [name for name in left if name not in there]
            if there:
                found.setdefault(part, []).extend(there)
    return found
