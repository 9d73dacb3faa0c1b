"""Numbers of training steps and validation, summed over minibatches and processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from spo.preference.batches import PairBatch
from spo.preference.preparation import Preparation
from spo.preference.rows import FAULTS
from spo.preference.spm_learner import PreferenceLearner, ScoredPairs

TIMESTEPS = (0, 251, 501, 701, 951)  # of validation; 0: the clean images themselves
_BUCKETS = 5  # equal parts of the timesteps, for the running accuracy


def not_finite(batch: PairBatch, scored: ScoredPairs) -> list[str]:
    """Returns the timestep and prompt of each pair whose loss is not finite."""
    bad = ~scored.losses.isfinite() & (scored.weights > 0)
    timesteps = scored.timesteps.tolist()
    return [f"t = {timesteps[i]} for {batch.captions[i]!r}" for i in bad.nonzero().flatten()]


def minibatch_sums(batch: PairBatch, scored: ScoredPairs, num_timesteps: int) -> dict[str, Tensor]:
    """Returns sums over the pairs of a minibatch of one process; scalars."""
    sound, tie = scored.weights > 0, scored.labels == 0.5
    right = is_right(scored.scores, scored.labels)
    sums = {
        "loss": (scored.weights * scored.losses).sum(),
        "pairs": sound.sum(),
        "ties": (sound & tie).sum(),
    }
    bucket = scored.timesteps * _BUCKETS // num_timesteps
    for number, name in enumerate(bucket_names(num_timesteps)):
        decided = sound & ~tie & (bucket == number)
        sums[f"decided {name}"] = decided.sum()
        sums[f"right {name}"] = (decided & right).sum()
    device = scored.weights.device
    return sums | {name: torch.tensor(batch.faults[name], device=device) for name in FAULTS}


def step_metrics(totals: Counter, num_timesteps: int) -> dict:
    """Returns the metrics of some optimizer steps; None if there was nothing to average.

    `totals` adds up `minibatch_sums`, and "steps", "updates", "skipped_updates", "grad_norm".
    """

    def ratio(over: float, under: float) -> float | None:
        return over / under if under else None

    names = bucket_names(num_timesteps)
    right, decided = ([totals[f"{kind} {n}"] for n in names] for kind in ("right", "decided"))
    return {
        "loss": ratio(totals["loss"], totals["steps"]),
        "grad_norm": ratio(totals["grad_norm"], totals["updates"]),
        "skipped_updates": int(totals["skipped_updates"]),
        "pairs": int(totals["pairs"]),
        "ties": int(totals["ties"]),
        "left_out": {name: int(totals[name]) for name in FAULTS if totals[name]},
        "training_accuracy": ratio(sum(right), sum(decided)),
        "training_accuracy_at": dict(zip(names, map(ratio, right, decided), strict=True)),
    }


def bucket_names(num_timesteps: int) -> list[str]:
    """Returns the first and last timestep of each part, e.g. "0-199"."""
    edges = [-(-i * num_timesteps // _BUCKETS) for i in range(_BUCKETS + 1)]
    return [f"{low}-{high - 1}" for low, high in zip(edges, edges[1:], strict=False)]


@torch.no_grad()
def validation_sums(
    batches: Iterable[PairBatch], preparation: Preparation, learner: PreferenceLearner
) -> dict[str, Tensor]:
    """Counts, per timestep, the validation pairs of this process that are ranked right; scalars.

    Ties and rows without sound images are left out; "pairs" counts the remaining ones.
    """
    names = [*(f"t{t}" for t in TIMESTEPS), "pairs", "ties", "damaged"]
    sums = {name: torch.zeros((), device=learner.device) for name in names}
    for batch in batches:
        labels, input_ids = preparation.labels(batch), preparation.input_ids(batch)
        sound = batch.weights.to(learner.device) > 0
        decided = sound & (labels != 0.5)
        sums["pairs"] += decided.sum()
        sums["ties"] += (sound & ~decided).sum()
        sums["damaged"] += (~sound).sum()
        for t in TIMESTEPS:
            pixels = preparation.validation_pixels(batch, t)
            timesteps = torch.full((len(labels),), t, device=labels.device)
            scores = learner.features(pixels, timesteps, input_ids).scores
            sums[f"t{t}"] += (is_right(scores, labels) & decided).sum()
    return sums


def is_right(scores: Tensor, labels: Tensor) -> Tensor:
    """Says of each pair (n,) if scores (n, 2) prefer the image that labels (n,) prefer.

    Equal scores prefer neither.
    """
    return (scores[:, 0] - scores[:, 1]) * (labels - 0.5) > 0


def validation_metrics(sums: dict[str, float]) -> dict:
    """Returns metrics of `validation_sums` of all processes; accuracy None if every pair is a tie."""
    pairs = sums["pairs"]
    return {
        "accuracy": {str(t): sums[f"t{t}"] / pairs if pairs else None for t in TIMESTEPS},
        "validation_pairs": int(pairs),
        "validation_ties": int(sums["ties"]),
        "validation_damaged": int(sums["damaged"]),
    }
