"""Paired comparisons of two models on the same prompts and seeds."""

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

    def __format__(self, form: str) -> str:
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def percent(self) -> str:
        """Returns the mean as a share of all: "86 % [80, 91]"."""
        return f"{percent(self.mean)} % [{percent(self.low)}, {percent(self.high)}]"


def percent(share: float, digits: int = 0) -> str:
    """Returns a share in percent, with more digits where 0 or 100 would be wrong: 99.5."""
    text = f"{100 * share:.{digits}f}"
    is_rounded = float(text) in (0, 100) and share not in (0, 1)
    return percent(share, digits + 1) if is_rounded and digits < 9 else text


def bootstrap_mean(values: ArrayLike, level: float = 0.95) -> Estimate:
    """Returns the mean of n values and its percentile interval (Efron & Tibshirani, ch. 13).

    Raises ValueError if there are no values, or if one is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError("values must be one or more finite numbers in one dimension")
    rng = np.random.default_rng(0)
    # The counts of the drawn values are multinomial: equivalent to drawing indices, and smaller.
    shares = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=_RESAMPLES)
    low, high = np.quantile(shares @ values / len(values), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values.mean()), float(low), float(high))


def paired_difference(base: ArrayLike, other: ArrayLike) -> Estimate:
    """Returns the mean of other - base over n pairs of scores, with its 95 % interval."""
    return bootstrap_mean([float(b) - float(a) for a, b in zip(base, other, strict=True)])


def win_rate(base: ArrayLike, other: ArrayLike) -> Estimate:
    """Returns the share of n pairs that `other` wins, with its 95 % interval; a tie counts half."""
    return bootstrap_mean([0.5 if a == b else b > a for a, b in zip(base, other, strict=True)])
