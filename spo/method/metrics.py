"""What a rollout and its training looked like, as numbers summed over processes."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from spo.method.collect import Comparison
from spo.method.learner import Learner, Step
from spo.method.pairs import preference_gap
from spo.method.position import RolloutInProgress


def rollout_sums(
    comparisons: Sequence[Comparison], pair_timesteps: Tensor, timesteps: Sequence[int]
) -> dict[str, Tensor]:
    """Sums over comparisons and prompts, and the number of pairs at each of `timesteps`; scalars.

    `score_spread` is the standard deviation over the candidates of a prompt, `win_margin` the softmax
    probability of the best less that of the worst.
    """
    device = pair_timesteps.device
    sums = {name: torch.zeros((), device=device) for name in ("score_mean", "score_spread")}
    sums |= {
        name: torch.zeros((), device=device) for name in ("win_margin", "comparisons", "images")
    }
    for comparison in comparisons:
        scores = comparison.scores
        sums["score_mean"] += scores.mean(dim=0).sum()
        sums["score_spread"] += scores.std(dim=0).sum()
        sums["win_margin"] += preference_gap(scores).sum()
        sums["comparisons"] += scores.shape[1]
        sums["images"] += scores.numel()
    return sums | {f"t={t}": (pair_timesteps == t).sum() for t in timesteps}


def rollout_metrics(sums: dict[str, float]) -> dict:
    """Metrics of a rollout from its sums over all processes."""
    pairs_at = {name[2:]: int(count) for name, count in sums.items() if name.startswith("t=")}
    count = sums["comparisons"]
    return {
        "score_mean": sums["score_mean"] / count,
        "score_spread": sums["score_spread"] / count,
        "win_margin": sums["win_margin"] / count,
        "comparisons": int(count),
        "pairs": sum(pairs_at.values()),
        "pairs_at": pairs_at,
    }


_STEP = ("loss", "win_ratio", "lose_ratio", "clipped", "grad_norm", "updates", "skipped_updates")


def step_row(step: Step) -> Tensor:
    """What metrics need of a minibatch, (7,): it outlives the minibatch, in checkpoints, too."""
    output, zero = step.output, step.output.loss.new_zeros(())
    updates = step.grad_norm is not None and not step.skipped
    means = (output.win_ratio.mean(), output.lose_ratio.mean(), output.clipped.mean())
    norm = step.grad_norm if updates else zero
    return torch.stack([output.loss, *means, norm, zero + updates, zero + step.skipped])


def training_sums(rows: Sequence[Tensor], device: torch.device) -> dict[str, Tensor]:
    """Sums over the minibatches whose `step_row`s these are; scalars."""
    table = torch.stack(tuple(rows)) if rows else torch.zeros(0, len(_STEP), device=device)
    sums = dict(zip(_STEP, table.sum(dim=0), strict=True))
    return sums | {"minibatches": torch.tensor(float(len(rows)), device=device)}


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


def state_metrics(learner: Learner) -> dict:
    """Metrics of the networks and the optimizer as they stand."""
    return {
        "ema_distance": learner.ema_distance(),
        "learning_rate": learner.optimizer.param_groups[0]["lr"],
    }


def speed_metrics(rollout: RolloutInProgress) -> dict:
    """How long a rollout and its training took; `images_per_second` are those that were scored."""
    return {
        "seconds_rollout": rollout.seconds_rollout,
        "seconds_train": rollout.seconds_train,
        "images_per_second": rollout.sums["images"] / rollout.seconds_rollout,
    }


def time_left(rollout: RolloutInProgress, prompts: int) -> str:
    """Returns a line: the seconds of each prompt of `rollout`, and the time of `prompts` more."""
    each = (rollout.seconds_rollout + rollout.seconds_train) / rollout.prompts
    hours = each * prompts / 3600
    time = f"{hours:.3g} hours" if hours >= 1 else f"{hours * 60:.3g} minutes"
    return (
        f"rate: {each:.3g} s for a prompt and its pairs; at this rate the {prompts} prompts that are "
        f"left take {time}"
    )


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the allocator on a GPU, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
    # Linux' rusage would have the memory of the process that started this one in it.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20
