"""A run's numbers beside their expected ranges, and what to look at first."""

import math
from collections.abc import Callable

import numpy as np

from spo.guard.expected import (
    CANNOT_TELL,
    LOOK,
    NOTHING_LEARNED,
    OK,
    Row,
    ema_bounds,
    ends,
    estimate,
    loss_bounds,
)
from spo.guard.log import Log
from spo.guard.rollout_checks import check_margin, check_pairs, check_score
from spo.run.tables import markdown_table

_CLIPPED = 0.1  # share of ratios without a gradient
_WAY = -0.1, 0.5  # of both ratios together to the clip
_ROUNDING = 1e-5  # of a loss in fp32
_LITTLE = 0.002  # of the loss: the logarithms of win and lose differ by that / (beta / 2)
_GROWTH = 3.0  # of the gradient norm
_LARGEST_LORA = 0.1  # of the tiny world: 0.03 to 0.05 in good runs, 0.12 and more past the clips
_FIRST_SKIPPED = 16  # fp16: the scale of the loss starts at 2^16, and halves at each overflow
_SENTENCES = 3
_VERDICT = "verdict"  # the name of the last check


def _is_finite(log: Log) -> Row | None:
    names = {name for line in log.lines for name, value in line.items() if _is_broken(value)}
    advice = (
        f"{', '.join(sorted(names))} overflowed: go back to the last checkpoint before, with a lower "
        "train.learning_rate or mixed_precision=bf16."
    )
    state = LOOK if names else OK
    return Row("finite numbers", ", ".join(sorted(names)) or "finite", "finite", state, advice)


def _is_broken(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _skipped(log: Log) -> Row | None:
    if not (skipped := log.numbers("skipped_updates")):
        return None
    made = sum(log.numbers("updates"))
    # After 2,000 updates without one the scale doubles, which may be too much.
    most = _FIRST_SKIPPED + made / 1000
    advice = (
        "fp16 gradients overflow again and again: train in bf16 (mixed_precision=bf16), or lower "
        "train.learning_rate."
    )
    state = OK if sum(skipped) <= most else LOOK
    number = f"{sum(skipped):.0f} of {made + sum(skipped):.0f}"
    return Row(
        "skipped updates", number, f"at most {_FIRST_SKIPPED} + updates / 1000", state, advice
    )


def _clipped(log: Log) -> Row | None:
    if not (values := log.numbers("clipped")) or log.settings.clip_eps is None:
        return None
    share = np.mean(ends(values)[1])
    first = next((i for i, value in enumerate(values, 1) if value > _CLIPPED), len(values))
    advice = (
        f"The policy has moved to the clips, behind which the loss has no gradient: ship or go on from "
        f"a checkpoint before rollout {first}, where that began, and lower train.learning_rate (now "
        f"{log.settings.learning_rate:g}) or train for fewer epochs."
    )
    state = OK if share <= _CLIPPED else LOOK
    return Row("clipped share", f"{share:.2f}", f"at most {_CLIPPED}", state, advice)


def _gradient(log: Log) -> Row | None:
    if not (values := log.numbers("grad_norm")):
        return None
    before, now = map(np.mean, ends(values))
    limit = log.settings.max_grad_norm or math.inf
    above = np.mean(np.array(ends(values)[1]) > limit)
    if now == 0 or ends(values)[1][-1] == 0:
        advice = "No gradient is left: each pair has both of its ratios clipped."
    else:
        advice = (
            f"The gradient norm was {before:.3g} at first: the updates have become too large, lower "
            "train.learning_rate."
        )
    grows = len(values) > 1 and now > _GROWTH * before
    number = f"{now:.3g}, above max_grad_norm in {100 * above:.0f} % of the rollouts"
    expected = f"above 0, at most {_GROWTH:g} x the first rollouts'"
    return Row("gradient norm", number, expected, LOOK if grows or not now else OK, advice)


def _loss(log: Log) -> Row | None:
    if not (values := log.numbers("loss")) or not _is_ours(log):
        return None
    low, high = loss_bounds(log.settings.beta, log.settings.clip_eps)
    advice = (
        "No pair can have this loss with this train.beta and train.clip_eps: the numbers are of "
        "another loss, or of another config, which --config names."
    )
    inside = low - _ROUNDING <= min(values) and max(values) <= high + _ROUNDING
    number = f"{min(values):.4f} to {max(values):.4f}"
    return Row("loss", number, f"{low:.4f} to {high:.4f}", OK if inside else LOOK, advice)


def _is_ours(log: Log) -> bool:
    return log.settings.algorithm in ("gradspo", "spo", "lpo")


def _learning(log: Log) -> Row | None:
    if not (values := log.numbers("loss")) or not _is_ours(log):
        return None
    found = estimate(np.subtract(ends(values)[1], NOTHING_LEARNED))
    advice = (
        "The loss is not below ln 2, although the first epoch is over: labels may be noise or turned "
        "round (look at scripts/show_rollout.py), or the rate is too low or too high."
    )
    is_late = log.lines[-1].get("epoch", 1) > 1
    none = found.sign > 0 or (is_late and found.mean - found.error > -_LITTLE)
    unclear = LOOK if none else CANNOT_TELL
    state = OK if found.sign < 0 else unclear
    return Row("loss - ln 2", f"{found:+.4f}", "below 0", state, advice)


def _ratios(log: Log) -> Row | None:
    wins, loses = (np.array(ends(log.numbers(name))[1]) for name in ("win_ratio", "lose_ratio"))
    if len(wins) != len(loses) or not len(wins) or not (wins > 0).all() or not (loses > 0).all():
        return None
    eps = log.settings.clip_eps
    # Of win and lose alike, in units of the clip.
    way = np.mean(np.log(wins) + np.log(loses)) / 2 / math.log1p(eps or math.inf)
    advice = (
        "Both ratios have gone the same way, so that the policy is far from the reference: half of the "
        "way to the clips is used up."
        if way > 0
        else "Both ratios are below 1: the policy runs ahead of its EMA; lower train.learning_rate."
    )
    low, high = _WAY
    state = OK if low <= way <= high else LOOK
    number = f"win {wins.mean():.4f}, lose {loses.mean():.4f}"
    number += f", {100 * way:.0f} % of the way to the clip" if eps else ""
    return Row("ratios", number, f"{100 * low:.0f} % to {100 * high:.0f} %", state, advice)


def _ema(log: Log) -> Row | None:
    s, distances = log.settings, log.numbers("ema_distance")
    if not distances or not log.lora_weights or not 0 < s.ema_decay < 1:
        return None
    low, high = ema_bounds(s.ema_decay, s.adam_beta1)
    unit = s.learning_rate * math.sqrt(log.lora_weights)
    found = np.mean(ends(distances)[1]) / unit
    advice = (
        "The policy hardly moves any more, as the gradients vanish: see the clipped share."
        if found < low / 2
        else "The EMA is further behind than train.ema_decay explains: see train.ema_every."
    )
    state = OK if low / 2 <= found <= high else LOOK
    number = f"{found:.2f} x learning_rate sqrt({log.lora_weights:,} weights)"
    expected = f"{low:.2f} (gradients are noise) to {high:.3g} (all alike), half of it at least"
    return Row("EMA distance", number, expected, state, advice)


def _distance(log: Log) -> Row | None:
    if not (norms := log.numbers("lora_norm")):
        return None
    number = f"LoRA {norms[-1]:.3g} of the weights"
    if at := [line["kl_at"] for line in log.lines if line.get("kl_at")]:
        number += f", KL {np.median(list(at[-1].values())):.2g} nats a step"
    advice = (
        "The LoRA has grown large beside the weights that it changes: look at the validation images, "
        "and go back to an earlier checkpoint."
    )
    state = OK if norms[-1] <= _LARGEST_LORA else LOOK
    return Row("LoRA norm", number, f"at most {_LARGEST_LORA}", state, advice)


def _verdict(log: Log) -> Row | None:
    if not log.has_evaluations:
        return None
    if not log.evaluations:
        advice = (
            "No number of the training tells a wrong preference model from a right one: look at the "
            "validation images, and let other judges see them (docs/healthy_runs.md)."
        )
        return Row(_VERDICT, "no evaluation yet", "healthy", CANNOT_TELL, advice)
    status = str(log.evaluations[-1].get("verdict"))
    state = {"healthy": OK, CANNOT_TELL: CANNOT_TELL}.get(status, LOOK)
    advice = f"The run's own judges say {status}: see the verdict below."
    return Row(_VERDICT, status, "healthy", state, advice)


# What explains others comes first.
CHECKS: dict[str, Callable[[Log], Row | None]] = {
    "finite numbers": _is_finite,
    "skipped updates": _skipped,
    "clipped share": _clipped,
    "pairs": check_pairs,
    "win margin": check_margin,
    "gradient norm": _gradient,
    "ratios": _ratios,
    "loss": _loss,
    "loss - ln 2": _learning,
    "mean score": check_score,
    "EMA distance": _ema,
    "LoRA norm": _distance,
    _VERDICT: _verdict,
}


def check(log: Log) -> list[Row]:
    """Returns a row for each check that the log has the numbers for."""
    return [row for look in CHECKS.values() if (row := look(log))]


def describe(log: Log) -> str:
    """Returns the checks of a log as a table, and below it what to look at first."""
    rows = check(log)
    names = [row.name for row in rows]
    lines = [
        markdown_table(
            ["number", "in this run", "expected", ""],
            [(row.name, row.number, row.expected, row.state) for row in rows],
        ),
        "",
    ]
    advice = [row.advice for row in rows if row.state == LOOK][:_SENTENCES]
    # Of what nobody can tell yet, judges are worth a word.
    advice = advice or [r.advice for r in rows if r.name == _VERDICT and r.state == CANNOT_TELL]
    lines.append("look at first: " + (" ".join(advice) or "nothing is out of its range."))
    if log.evaluations:
        lines.append(f"verdict: {log.evaluations[-1].get('text')}")
    if missing := [name for name in CHECKS if name not in names]:
        lines.append(f"not checked, as the numbers are not there: {', '.join(missing)}")
    return "\n".join(lines)
