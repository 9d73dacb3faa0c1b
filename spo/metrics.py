"""What a rollout and its training looked like, as numbers summed over processes."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from spo.collect import Comparison
from spo.learner import Step
from spo.pairs import preference_gap


def rollout_sums(
    comparisons: Sequence[Comparison], pair_timesteps: Tensor, timesteps: Sequence[int]
) -> dict[str, Tensor]:
    """Sums over comparisons and prompts, and the number of pairs at each of `timesteps`; scalars.

    `score_spread` is the standard deviation over the candidates of a prompt, `win_margin` the softmax
    probability of the best less that of the worst.
    """
    device = pair_timesteps.device
    sums = {name: torch.zeros((), device=device) for name in ("score_mean", "score_spread")}
    sums |= {name: torch.zeros((), device=device) for name in ("win_margin", "comparisons")}
    for comparison in comparisons:
        scores = comparison.scores
        sums["score_mean"] += scores.mean(dim=0).sum()
        sums["score_spread"] += scores.std(dim=0).sum()
        sums["win_margin"] += preference_gap(scores).sum()
        sums["comparisons"] += scores.shape[1]
    return sums | {f"t{t}": (pair_timesteps == t).sum() for t in timesteps}


def rollout_metrics(sums: dict[str, float], timesteps: Sequence[int]) -> dict:
    """Metrics of a rollout from its sums over all processes."""
    pairs_at = {str(t): int(sums[f"t{t}"]) for t in timesteps}
    count = sums["comparisons"]
    return {
        "score_mean": sums["score_mean"] / count,
        "score_spread": sums["score_spread"] / count,
        "win_margin": sums["win_margin"] / count,
        "comparisons": int(count),
        "pairs": sum(pairs_at.values()),
        "pairs_at": pairs_at,
    }


def training_sums(steps: Sequence[Step], device: torch.device) -> dict[str, Tensor]:
    """Sums over minibatches and updates; scalars."""
    total = {
        "loss": [step.output.loss for step in steps],
        "win_ratio": [step.output.win_ratio.mean() for step in steps],
        "lose_ratio": [step.output.lose_ratio.mean() for step in steps],
        "clipped": [step.output.clipped.mean() for step in steps],
        "grad_norm": [
            step.grad_norm for step in steps if step.grad_norm is not None and not step.skipped
        ],
    }
    sums = {
        name: torch.stack(values).sum() if values else torch.zeros((), device=device)
        for name, values in total.items()
    }
    sums["minibatches"] = torch.tensor(float(len(steps)), device=device)
    sums["updates"] = torch.tensor(float(len(total["grad_norm"])), device=device)
    sums["skipped_updates"] = torch.tensor(float(sum(s.skipped for s in steps)), device=device)
    return sums


def training_metrics(sums: dict[str, float], processes: int) -> dict:
    """Metrics of the training on a rollout's pairs; None where there was nothing to average."""

    def mean(name: str, count: str) -> float | None:
        return sums[name] / sums[count] if sums[count] else None

    return {
        "loss": mean("loss", "minibatches"),
        "win_ratio": mean("win_ratio", "minibatches"),
        "lose_ratio": mean("lose_ratio", "minibatches"),
        "clipped": mean("clipped", "minibatches"),
        "grad_norm": mean("grad_norm", "updates"),
        "minibatches": int(sums["minibatches"]) // processes,
        "updates": int(sums["updates"]) // processes,
        "skipped_updates": int(sums["skipped_updates"]) // processes,
    }


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the allocator on a GPU, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
