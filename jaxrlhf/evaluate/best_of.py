"""Best of n: of n responses that a run's policy samples, the one that its reward holds best, by a second reward too."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrlhf.errors import ConfigError
from jaxrlhf.evaluate.against_reference import PolicyEvaluation
from jaxrlhf.evaluate.majority import majority
from jaxrlhf.ops.best_of import best_of, best_of_kl
from jaxrlhf.rewards.math_text import final_answer
from jaxrlhf.run.build import Run
from jaxrlhf.types import TrainState


def best_of_report(ready: Run, state: TrainState, sizes: Sequence[int]) -> list[dict[str, float]]:
    """A row for each n in ``sizes``, from max(sizes) responses to each held-out prompt: the expected reward and gold of
    the best of n by the run's reward, without bias (ops.best_of).

    Raises ConfigError, in one line, where the run has no policy, no held-out prompts or no reward."""
    if "policy" not in ready.heads or ready.cfg.data.eval_prompts is None:
        raise ConfigError("--best-of: there is nothing to sample; expected a run with a policy and data.eval_prompts")
    evaluation = PolicyEvaluation(ready, judge=False, samples=max(sizes))
    responses = evaluation.write(state)
    if responses.scores is None:
        raise ConfigError(
            "--best-of: no reward says which is best; expected models.reward, rewards.function or functions"
        )
    grouped = lambda x: np.asarray(x, np.float64).reshape(-1, max(sizes))
    measured = {"reward": responses.scores, "gold": responses.gold, "length": responses.lengths, "kl": responses.kl}
    texts, most = [final_answer(row["response"]) for row in responses.rows], max(sizes)
    answers = [texts[at : at + most] for at in range(0, len(texts), most)]
    return best_of_rows(sizes, {name: grouped(x) for name, x in measured.items() if x is not None}, answers)


def best_of_rows(
    sizes: Sequence[int], measured: dict[str, np.ndarray], answers: Sequence[Sequence[str | None]] = ()
) -> list[dict[str, float]]:
    """What is said of each n.

    Args:
        measured: f64[prompts, N] of each sample: its "reward", which decides; "gold" and "length" where known; "kl":
            log p under the policy less that under the reference. A prompt with a sample without a number is left out.
        answers: final_answer of each sample, [prompts][N].

    Returns:
        For each n: "reward", "gold" and "length" of the best; where every reward is 0 or 1, "pass", how likely one of n
        is right (pass@n, which is that reward), and "majority" of the answers, where there are some; "kl_bound",
        log n - (n - 1) / n nats from the policy that samples; "kl/reference", an estimate of the nats from the
        reference: the mean of "kl" of the best, plus that.
    """
    known = np.asarray(~np.isnan(np.stack([*measured.values()])).any(axis=(0, 2)))
    if not known.any():
        raise ConfigError("--best-of: every prompt has a response without a score; expected some that all have one")
    found = {name: best_of(measured["reward"][known], x[known], sizes).mean(1) for name, x in measured.items()}
    right = measured["reward"][known] if np.isin(measured["reward"][known], (0, 1)).all() else None
    votes = [given for given, kept in zip(answers, known) if kept]
    votes = votes if any(answer is not None for given in votes for answer in given) else []
    rows = []
    for at, n in enumerate(sizes):
        row: dict[str, Any] = {"n": n, "prompts": int(known.sum()), "kl_bound": best_of_kl(n)}
        row |= {name: x[at] for name, x in found.items() if name != "kl"}
        if right is not None:
            row["pass"] = row["reward"]
        if right is not None and votes:
            row["majority"] = float(np.mean([majority(given, each, n) for given, each in zip(votes, right)]))
        if "kl" in found:
            row["kl/reference"] = found["kl"][at] + row["kl_bound"]
        rows.append({name: round(float(x), 4) if isinstance(x, float) else x for name, x in row.items()})
    return rows
