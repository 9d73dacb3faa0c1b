"""What optimizer steps looked like, as numbers summed over minibatches, processes and steps."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from spo.preference.accuracy import is_right
from spo.preference.batches import PairBatch
from spo.preference.rows import FAULTS
from spo.preference.spm_learner import Judged, TrainingPairs

_BUCKETS = 5  # equal parts of the timesteps, for the running accuracy


@dataclass(frozen=True)
class Seen:
    """What a minibatch of n pairs was, should it turn out to be broken."""

    captions: tuple[str, ...]
    timesteps: Tensor  # (n,)
    weights: Tensor  # (n,)
    losses: Tensor  # (n,)

    def broken(self) -> list[str]:
        """The timestep and prompt of each pair whose loss is not finite."""
        bad = ~self.losses.isfinite() & (self.weights > 0)
        timesteps = self.timesteps.tolist()
        return [f"t = {timesteps[i]} for {self.captions[i]!r}" for i in bad.nonzero().flatten()]


def minibatch_sums(
    batch: PairBatch, pairs: TrainingPairs, judged: Judged, num_timesteps: int
) -> dict[str, Tensor]:
    """Sums over the pairs of a minibatch of one process; scalars."""
    sound, tie = pairs.weights > 0, pairs.labels == 0.5
    right = is_right(judged.scores, pairs.labels)
    sums = {
        "loss": (pairs.weights * judged.losses).sum(),
        "pairs": sound.sum(),
        "ties": (sound & tie).sum(),
    }
    bucket = pairs.timesteps * _BUCKETS // num_timesteps
    for number, name in enumerate(bucket_names(num_timesteps)):
        decided = sound & ~tie & (bucket == number)
        sums[f"decided {name}"] = decided.sum()
        sums[f"right {name}"] = (decided & right).sum()
    device = pairs.weights.device
    return sums | {name: torch.tensor(batch.faults[name], device=device) for name in FAULTS}


def step_metrics(totals: Counter, num_timesteps: int) -> dict:
    """Metrics of some optimizer steps from their totals; None where there was nothing to average.

    The totals are those of `minibatch_sums`, and "steps", "updates", "skipped_updates", "grad_norm".
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
    """The first and last timestep of each part, e.g. "0-199"."""
    edges = [-(-i * num_timesteps // _BUCKETS) for i in range(_BUCKETS + 1)]
    return [f"{low}-{high - 1}" for low, high in zip(edges, edges[1:], strict=False)]
