"""How often the SPM prefers the image that people preferred, at several timesteps."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from spo.preference.batches import PairBatch

TIMESTEPS = (0, 251, 501, 701, 951)  # 0: the clean images themselves


@torch.no_grad()
def count_correct(
    batches: Iterable[PairBatch],
    scores_at: Callable[[PairBatch, int], Tensor],
    labels_of: Callable[[PairBatch], Tensor],
    device: torch.device,
) -> dict[str, Tensor]:
    """Per timestep, of this process's validation rows: how many are ranked right; scalars.

    `scores_at` gives the scores (n, 2) of a minibatch at a timestep, `labels_of` its labels (n,).
    Ties and rows without sound images are left out; "pairs" counts the others.
    """
    names = [*(f"t{t}" for t in TIMESTEPS), "pairs", "ties", "damaged"]
    sums = {name: torch.zeros((), device=device) for name in names}
    for batch in batches:
        labels, sound = labels_of(batch), batch.weights.to(device) > 0
        decided = sound & (labels != 0.5)
        sums["pairs"] += decided.sum()
        sums["ties"] += (sound & ~decided).sum()
        sums["damaged"] += (~sound).sum()
        for t in TIMESTEPS:
            right = is_right(scores_at(batch, t), labels)
            sums[f"t{t}"] += (right & decided).sum()
    return sums


def is_right(scores: Tensor, labels: Tensor) -> Tensor:
    """(n,) whether scores (n, 2) put the image first that labels (n,) prefer; equal scores do not."""
    return (scores[:, 0] - scores[:, 1]) * (labels - 0.5) > 0


def accuracy(sums: dict[str, float]) -> dict:
    """Metrics of the sums over all processes; accuracy None where every pair is a tie."""
    pairs = sums["pairs"]
    return {
        "accuracy": {str(t): sums[f"t{t}"] / pairs if pairs else None for t in TIMESTEPS},
        "validation_pairs": int(pairs),
        "validation_ties": int(sums["ties"]),
        "validation_damaged": int(sums["damaged"]),
    }
