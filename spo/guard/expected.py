"""Ranges of a run's numbers, as its config gives them: the arithmetic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OK, LOOK, CANNOT_TELL = "ok", "look", "cannot tell"
NOTHING_LEARNED = math.log(2)  # -log sigmoid(0): the loss of a pair whose ratios are alike


@dataclass(frozen=True)
class Row:
    """One number of a run beside its expectation."""

    name: str
    number: str
    expected: str
    state: str  # OK, LOOK or CANNOT_TELL
    advice: str  # a sentence on what to look at, if it is not OK


@dataclass(frozen=True)
class Interval:
    """A mean over rollouts, and three times its standard error: infinite for one rollout."""

    mean: float
    error: float

    @property
    def sign(self) -> int:
        """1 or -1 if the mean is that much above or below 0, else 0."""
        return int(np.sign(self.mean)) if abs(self.mean) > self.error else 0

    def __format__(self, form: str) -> str:
        return f"{self.mean:{form}} ± {self.error:{form.lstrip('+')}}"


def estimate(values: Sequence[float]) -> Interval:
    """Returns the mean of values of one or more rollouts, and its error by their spread."""
    n = len(values)
    # Of 8 rollouts' means, three standard errors hold 98 %, two only 91 % (Student's t).
    error = 3 * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.inf
    return Interval(float(np.mean(values)), float(error))


def ends(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """Returns the first and the last tenth of values: 8 at least, or the halves of fewer than 16."""
    size = max(len(values) // 10, min(8, len(values) // 2), 1)
    return values[:size], values[-size:]


def loss_bounds(beta: float, clip_eps: float | None) -> tuple[float, float]:
    """Returns the lowest and the highest loss of a pair that the clips allow.

    -log sigmoid(±beta (log(1 + clip_eps) - log(1 - clip_eps))): the win's ratio at one clip and the
    lose's at the other.
    """
    if clip_eps is None:
        return 0.0, math.inf
    widest = beta * (math.log1p(clip_eps) - math.log1p(-clip_eps))
    return float(np.logaddexp(0, -widest)), float(np.logaddexp(0, widest))


def ema_bounds(ema_decay: float, beta1: float) -> tuple[float, float]:
    """Returns the EMA's distance in units of learning_rate sqrt(LoRA weights), if the run is steady.

    The distance is sum_k ema_decay^k u_k over the latest updates u_1, u_2, ... Adam's u is at most
    about the rate for each weight. If all gradients point one way it is that, and the distance is
    ema_decay / (1 - ema_decay). If they are independent noise, u is their average by beta1, and the
    distance the standard deviation of a recursion with both decays as its poles.
    """
    m, b = ema_decay, beta1
    noise = (1 + m * b) / ((1 - m * b) * (1 - m * m) * (1 - b * b))
    return m * (1 - b) * math.sqrt(noise), m / (1 - m)
