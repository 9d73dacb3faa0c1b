"""Is a run healthy, and which epoch should be shipped? A rule on the numbers of its evaluations.

The judges decide, as nobody trains on them: all of them together, each in standard deviations of its
scores of the untrained model, as their scales differ. Of the pixels the verdict only tells: images that
people like better may well be more saturated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from spo.evaluation.statistics import Estimate, bootstrap_mean

HEALTHY, CANNOT_TELL = "healthy", "cannot tell"
OVEROPTIMISED, WORSE = "over-optimised", "worse than untrained"
# The name of the training scorer's scores, and what begins the names of others.
REWARD, JUDGES, PIXELS = "reward", "judges/", "pixels/"
SHARES = ("clipped",)  # statistics of pixels that are shares of them already, and may start at 0
_LEAST_FALL = 0.05  # of the best epoch's gain; a smaller fall is no reason to stop, however sure
_SURE = 0.998  # level of the interval of a fall: of many epochs the best one was lucky, too


@dataclass(frozen=True)
class Evaluation:
    """The numbers of a run's validation images after `epochs`, of each prompt, by name."""

    epochs: int
    scores: Mapping[str, Sequence[float]]

    def named(self, prefix: str) -> list[str]:
        """Returns the names that begin with `prefix`, which is JUDGES or PIXELS, in order."""
        return sorted(name for name in self.scores if name.startswith(prefix))


@dataclass(frozen=True)
class Change:
    """The mean of a number over the prompts, before training and now."""

    untrained: float
    now: float

    def describe(self, name: str) -> str:
        """Returns the change: in percent of the first, but of a share of pixels in points."""
        if name.removeprefix(PIXELS) in SHARES or not self.untrained:
            return f"{_rounded(100 * (self.now - self.untrained), 1):+.1f} points"
        return f"{_rounded(100 * (self.now / self.untrained - 1), 0):+.0f} %"


@dataclass(frozen=True)
class Verdict:
    """The newest evaluation of a run beside its first, that of the untrained model."""

    epochs: int
    status: str
    ship: int  # the epochs after which the judges liked the images best; 0: before training
    differences: Mapping[str, Estimate]  # of reward and judges to the untrained model, by prompt
    since_ship: Mapping[str, Estimate]  # likewise, to the shipped epoch
    pixels: Mapping[str, Change]  # by statistic

    @property
    def is_overoptimised(self) -> bool:
        """True if the run should have ended at an earlier epoch."""
        return self.status in (OVEROPTIMISED, WORSE)

    def numbers(self) -> dict[str, Any]:
        """Returns the verdict as entries of a line of metrics.jsonl."""
        found = {name: asdict(each) for name, each in self.differences.items()}
        judges = {n.removeprefix(JUDGES): each for n, each in found.items() if n != REWARD}
        pixels = {name.removeprefix(PIXELS): asdict(each) for name, each in self.pixels.items()}
        reward = {REWARD: found[REWARD]} if REWARD in found else {}
        ends = {"verdict": self.status, "ship": self.ship, "text": self.describe()}
        return {**reward, "judges": judges, "pixels": pixels, **ends}

    def describe(self) -> str:
        """Returns the verdict in one line."""
        parts = [_named(self.differences)]
        for name, change in self.pixels.items():
            parts.append(f"{name.removeprefix(PIXELS).replace('_', ' ')} {change.describe(name)}")
        advice = ""
        if self.status == OVEROPTIMISED:
            why = f"since epoch {self.ship}: {_named(self.since_ship)}"
            if self.ship == self.epochs:
                why = "the reward has fallen from its best"
            advice = f" ({why}); ship epoch {self.ship}"
        return f"epoch {self.epochs}: {', '.join(parts)}: {self.status}{advice}"


def decide(evaluations: Sequence[Evaluation]) -> Verdict:
    """Returns the verdict on the last of a run's evaluations; the first is of the untrained model.

    An epoch is shipped if the judges like its images better than those of every epoch before. The run
    is over-optimised once they like its images less than those, or the reward has fallen from its best:
    by more than a twentieth of the gain and by more than chance, as the 99.8 % interval of the fall,
    paired by prompt, is above 0. Without a gain to lose it is worse than untrained once the judges
    like its images less than those at the start, as surely. It is healthy if reward and judges have
    risen by more than chance (95 %). Else nobody can tell.
    """
    base, last = evaluations[0], evaluations[-1]
    judges = sorted(set.intersection(*(set(each.named(JUDGES)) for each in evaluations)))
    gains = [_gain(base, each, judges) for each in evaluations]
    best = int(np.argmax([gain.mean() for gain in gains]))  # the first of equals
    has_reward = all(REWARD in each.scores for each in evaluations)
    names = [REWARD, *judges] if has_reward else judges
    differences, since_ship = (
        {n: bootstrap_mean(np.subtract(last.scores[n], then.scores[n])) for n in names}
        for then in (base, evaluations[best])
    )
    rewards = [_gain(base, each, [REWARD]) for each in evaluations] if has_reward else []
    if _has_risen(gains[best]) and (_has_fallen(gains) or _has_fallen(rewards)):
        status = OVEROPTIMISED
    elif bootstrap_mean(gains[-1], _SURE).high < 0:
        status = WORSE
    else:
        is_healthy = has_reward and _has_risen(rewards[-1]) and _has_risen(gains[-1])
        status = HEALTHY if is_healthy else CANNOT_TELL
    pixels = {
        name: Change(*(float(np.mean(each.scores[name])) for each in (base, last)))
        for name in last.named(PIXELS)
        if name in base.scores
    }
    return Verdict(last.epochs, status, evaluations[best].epochs, differences, since_ship, pixels)


def _has_risen(gain: np.ndarray) -> bool:
    return bootstrap_mean(gain).low > 0


def _has_fallen(gains: Sequence[np.ndarray]) -> bool:
    """Tells if the last of gains by epoch is less than the best, surely and by enough."""
    if not gains:
        return False
    best = max(gains, key=np.mean)
    change = bootstrap_mean(gains[-1] - best, _SURE)
    return change.high < 0 and change.mean < -_LEAST_FALL * best.mean()


def _named(estimates: Mapping[str, Estimate]) -> str:
    return ", ".join(f"{name.removeprefix(JUDGES)} {each:+.2f}" for name, each in estimates.items())


def _rounded(value: float, digits: int) -> float:
    return round(value, digits) + 0.0  # never -0


def _gain(base: Evaluation, other: Evaluation, judges: Sequence[str]) -> np.ndarray:
    """Returns the mean over judges, by prompt, of the difference to `base` in standard deviations."""
    parts = [
        np.subtract(other.scores[name], base.scores[name]) / (np.std(base.scores[name]) or 1.0)
        for name in judges
    ]
    return np.mean(parts, axis=0) if parts else np.zeros(1)
