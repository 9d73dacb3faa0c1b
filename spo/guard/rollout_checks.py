"""The checks of a run's rollouts: pairs, win margin and mean score."""

import math
from collections.abc import Sequence

import numpy as np

from spo.guard.expected import CANNOT_TELL, LOOK, OK, Interval, Row, ends, estimate
from spo.guard.log import Log

_FEW = 0.1  # share of comparisons that make a pair


def check_pairs(log: Log) -> Row | None:
    pairs, compared = (ends(log.numbers(name))[1] for name in ("pairs", "comparisons"))
    if not pairs or not compared:
        return None
    s = log.settings
    update = s.global_batch_size or s.batch_size
    share = sum(pairs) / (sum(compared) or 1)
    at = [line["pairs_at"] for line in ends(log.lines)[1] if line.get("pairs_at")]
    empty = sum(not any(line.get(t) for line in at) for t in (at[0] if at else ()))
    advice = (
        f"Too few comparisons make a pair: lower sample.threshold (now {_threshold(log)}); how many "
        "another one keeps, scripts/pair_agreement.py --compare=sample.threshold=X tells."
    )
    starved = share < _FEW or np.mean(pairs) < update or (at and empty > len(at[0]) / 2)
    number = f"{np.mean(pairs):.3g} a rollout, {100 * share:.0f} % of the comparisons"
    number += f", none at {empty} of {len(at[0])} timesteps" if at else ""
    expected = f"{100 * _FEW:.0f} % or more, {update} or more, most timesteps"
    return Row("pairs", number, expected, LOOK if starved else OK, advice)


def _threshold(log: Log) -> float:
    s = log.settings
    return s.threshold_min if s.threshold is None else s.threshold


def check_margin(log: Log) -> Row | None:
    if not (values := log.numbers("win_margin")):
        return None
    margin, threshold = np.mean(ends(values)[1]), _threshold(log)
    advice = (
        "The preference model hardly tells the candidates apart, or the threshold is too high for it: "
        "compare win_margin in the first rollouts, and look at scripts/show_rollout.py."
    )
    state = OK if margin > threshold / 2 else LOOK
    expected = f"above half of the threshold, {threshold:g}"
    return Row("win margin", f"{margin:.3g}", expected, state, advice)


def check_score(log: Log) -> Row | None:
    if len(values := log.numbers("score_mean")) < 2:
        return None
    first, last = map(estimate, _epochs(log) or ends(values))
    found = Interval(last.mean - first.mean, math.hypot(first.error, last.error))
    advice = (
        "The mean score of the candidates falls, although the loss asks for higher scores: the rate is "
        "too high, or the pairs are not chosen by this score."
        if found.sign < 0
        else "The mean score differs more from prompt to prompt than it has moved: wait, or compare "
        "validation images."
    )
    state = {1: OK, 0: CANNOT_TELL, -1: LOOK}[found.sign]
    return Row("mean score", f"{found:+.3g}", "rises", state, advice)


def _epochs(log: Log) -> tuple[Sequence[float], Sequence[float]] | None:
    """Returns the mean scores of the first and of the last whole epoch: those of the same prompts."""
    by_epoch: dict[int, list[float]] = {}
    for line in log.lines:
        if line.get("score_mean") is not None and "epoch" in line:
            by_epoch.setdefault(line["epoch"], []).append(line["score_mean"])
    found = list(by_epoch.values())
    whole = [scores for scores in found if len(scores) == len(found[0])]
    return (whole[0], whole[-1]) if len(whole) > 1 and len(whole[0]) > 1 else None
