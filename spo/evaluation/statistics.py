"""Paired comparisons of two models on the same prompts and seeds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean and its bootstrap confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"

    def percent(self) -> str:
        """Returns the mean as a share of all: "86 % [80, 91]"."""
        return f"{100 * self.mean:.0f} % [{100 * self.low:.0f}, {100 * self.high:.0f}]"


def bootstrap_mean(values: ArrayLike, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Returns the mean of `values` (n,), percentile bootstrap interval (Efron & Tibshirani, ch. 13).

    Raises ValueError if there are no values, or if one is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError("values must be one or more finite numbers in one dimension")
    rng = np.random.default_rng(seed)
    # The counts of the drawn values are multinomial: equivalent to drawing indices, and smaller.
    shares = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=_RESAMPLES)
    means = shares @ values / len(values)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(float(values.mean()), float(low), float(high))


def paired_difference(base: ArrayLike, other: ArrayLike) -> Estimate:
    """Returns the mean of other - base over n pairs of scores, with its 95 % interval."""
    base, other = _paired(base, other)
    return bootstrap_mean(other - base)


def win_rate(base: ArrayLike, other: ArrayLike) -> Estimate:
    """Returns the share of n pairs that `other` wins, with its 95 % interval; a tie counts half."""
    base, other = _paired(base, other)
    return bootstrap_mean(np.where(other == base, 0.5, other > base))


def _paired(base: ArrayLike, other: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    base, other = np.asarray(base, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if base.shape != other.shape:
        raise ValueError(f"pairs need equally many scores, not {base.shape} and {other.shape}")
    return base, other
