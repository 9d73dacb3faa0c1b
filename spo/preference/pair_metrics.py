"""Numbers of training steps and validation, summed over minibatches and processes."""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from spo.preference.batches import DAMAGED_IMAGE, PairBatch
from spo.preference.pair_learner import PreferenceLearner, TrainingPairs
from spo.preference.preparation import Preparation


def minibatch_sums(pairs: TrainingPairs, losses: Tensor, scores: Tensor) -> dict[str, Tensor]:
    """Returns sums over a minibatch of one process, as scalars: losses (n,), scores (n, 2)."""
    sound = pairs.weights > 0
    return {
        "loss": (pairs.weights * losses).sum(),
        "pairs": sound.sum(),
        "ties": (sound & (pairs.labels == 0.5)).sum(),
        "right": (sound & is_right(scores, pairs.labels)).sum(),
        DAMAGED_IMAGE: (~sound).sum(),
    }


def step_metrics(totals: Counter) -> dict:
    """Returns the metrics of some optimizer steps; None if there was nothing to average.

    `totals` adds up `minibatch_sums`, and "steps", "updates", "skipped_updates", "grad_norm".
    """

    def ratio(over: float, under: float) -> float | None:
        return over / under if under else None

    return {
        "loss": ratio(totals["loss"], totals["steps"]),
        "grad_norm": ratio(totals["grad_norm"], totals["updates"]),
        "skipped_updates": int(totals["skipped_updates"]),
        "pairs": int(totals["pairs"]),
        "ties": int(totals["ties"]),
        "left_out": {DAMAGED_IMAGE: int(totals[DAMAGED_IMAGE])},
        "training_accuracy": ratio(totals["right"], totals["pairs"] - totals["ties"]),
    }


@torch.no_grad()
def validation_sums(
    batches: Iterable[PairBatch], preparation: Preparation, learner: PreferenceLearner
) -> dict[str, Tensor]:
    """Counts this process's pairs ranked right per timestep, except ties and damaged ones; scalars."""
    names = [*(f"t{t}" for t in preparation.validation_timesteps), "pairs", "ties", "damaged"]
    sums = {name: torch.zeros((), device=learner.device) for name in names}
    for batch in batches:
        labels, input_ids = preparation.labels(batch), preparation.input_ids(batch)
        sound = batch.weights.to(learner.device) > 0
        decided = sound & (labels != 0.5)
        sums["pairs"] += decided.sum()
        sums["ties"] += (sound & ~decided).sum()
        sums["damaged"] += (~sound).sum()
        for t, images in preparation.validation_images(batch):
            timesteps = torch.full((len(labels),), t, device=labels.device)
            scores = learner.scores(images, timesteps, *input_ids)
            sums[f"t{t}"] += (is_right(scores, labels) & decided).sum()
    return sums


def is_right(scores: Tensor, labels: Tensor) -> Tensor:
    """Returns (n,) whether scores (n, 2) prefer the image of labels (n,); equal scores prefer none."""
    return (scores[:, 0] - scores[:, 1]) * (labels - 0.5) > 0


def validation_metrics(sums: dict[str, float]) -> dict:
    """Returns metrics of `validation_sums` of all processes; accuracy None if every pair is a tie."""
    pairs, timesteps = sums["pairs"], [name[1:] for name in sums if name[1:].isdigit()]
    return {
        "accuracy": {t: sums[f"t{t}"] / pairs if pairs else None for t in timesteps},
        "validation_pairs": int(pairs),
        "validation_ties": int(sums["ties"]),
        "validation_damaged": int(sums["damaged"]),
    }
