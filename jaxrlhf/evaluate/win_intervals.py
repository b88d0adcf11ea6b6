"""How sure a win rate is, and what it would be at equal lengths."""

import numpy as np
from scipy.optimize import minimize

RESAMPLES = 2000
SLOPE_PENALTY = 1e-4  # keeps the slope finite where length alone says who wins


def wins_of(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """f64[n]: 1 where ours is more, 0.5 where both are equal."""
    return (ours > theirs) + 0.5 * (ours == theirs)


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95% bootstrap interval of the mean (Efron 1979): percentiles over RESAMPLES draws of as many values."""
    picks = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


def length_controlled(wins: np.ndarray, longer: np.ndarray) -> float:
    """The win rate at equal lengths, as AlpacaEval's (Dubois et al. 2024, arXiv:2404.04475) without its term for the
    difficulty of a prompt:

        P(win) = sigmoid(a + b tanh(longer / std(longer)));  the rate is sigmoid(a)

    Args:
        wins: f64[n] in [0, 1].
        longer: f64[n], tokens of our response less those of the other.
    """
    if wins.min() == wins.max() or longer.std() == 0:  # no fit, or nothing to fit
        return float(wins.mean())
    x = np.tanh(longer / longer.std())

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = weights[0] + weights[1] * x
        each = np.logaddexp(0, logits) - wins * logits
        gap = 1 / (1 + np.exp(-logits)) - wins
        slope = SLOPE_PENALTY * weights[1]
        return each.mean() + slope * weights[1] / 2, np.array([gap.mean(), (gap * x).mean() + slope])

    found = minimize(loss, np.zeros(2), jac=True, method="BFGS")
    return float(1 / (1 + np.exp(-found.x[0])))


def win_report(ours: np.ndarray, theirs: np.ndarray, longer: np.ndarray) -> dict[str, float]:
    """Of prompts of which both responses have a number: how many, the win rate, its interval, and at equal lengths."""
    known = ~(np.isnan(ours) | np.isnan(theirs))
    wins = wins_of(ours[known], theirs[known])
    if not len(wins):
        return {"prompts": 0}
    low, high = interval(wins)
    found = {"rate": wins.mean(), "low": low, "high": high}
    found["length_controlled"] = length_controlled(wins, np.asarray(longer, np.float64)[known])
    return {"prompts": len(wins), **{name: round(float(value), 4) for name, value in found.items()}}
